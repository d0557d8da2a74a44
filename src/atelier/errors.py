"""What a user's mistake looks like: one line with the key, the value, the problem and the fix, and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class UserError(Exception):
    """A mistake in what was asked for.

    Args:
        key: the dotted key or option to change, as typed on the command line (`data.batch_size`).
        value: what it was.
        problem: why that does not work.
        fix: an override or a command that does.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        super().__init__(self.line())

    def line(self) -> str:
        text = f"error: {self.key}={_short(self.value)}: {self.problem}. Fix: {self.fix}"
        return " ".join(text.split())

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.value, self.problem, self.fix)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest in spelling, or None where nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def user_error(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from; None means that it is a bug."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause
    return _composition_error(error)


def report(error: UserError) -> None:
    """Print the line, once for all ranks."""
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0:
        print(error.line(), file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Call a Hydra main: a user's mistake becomes its line and exit code 2, anything else stays a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if os.environ.get(ENVIRONMENT):
            raise UserError(ENVIRONMENT, 1, "it lets checkpoints run code", f"unset {ENVIRONMENT}")
        main()
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        report(known)
        sys.exit(2)
    from atelier import sweeps

    if sweeps.failed:
        print("\n".join(sweeps.failed), file=sys.stderr, flush=True)
        sys.exit(1)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _composition_error(error: BaseException) -> UserError | None:
    """Hydra's and OmegaConf's own complaints, each as one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(causes(error))
    hydra_errors = [e for e in chain if isinstance(e, (HydraException, OmegaConfBaseException))]
    if not hydra_errors or type(chain[0]).__name__ == "InstantiationException":
        return None
    text = "\n".join(str(e) for e in hydra_errors)
    for translate in (_unknown_option, _unknown_key, _unset_variable, _missing_value, _bad_grammar):
        found = translate(text)
        if found is not None:
            return found
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(chain[-1]).__name__)
    return UserError("config", "", first.rstrip("."), "python train.py --help shows the command line")


def _unknown_option(text: str) -> UserError | None:
    found = re.search(r"(?:Could not find|Could not load) '([\w/.-]+)/([^'\s]*)'", text)
    if found is None:
        return None
    group, value = found.groups()
    listed = re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", text)
    options = [line.strip() for line in listed.group(1).splitlines()] if listed else []
    close = nearest(value, options)
    fix = f"{group}={close}" if close else f"{group}={'|'.join(options[:12])}"
    return UserError(group, value, f"there is no such page in conf/{group}", fix)


def _unknown_key(text: str) -> UserError | None:
    group = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text)
    if group is not None:
        return _misspelt(group.group(1), "it is no group of conf/")
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    if found is None or ("not in struct" not in text and "Could not override" not in text):
        return None
    return _misspelt(found.group(1), "there is no such key")


def _misspelt(key: str, problem: str) -> UserError:
    from atelier.preflight import known_keys

    close = nearest(key, known_keys())
    return UserError(key, "", problem, f"{close}=..." if close else "python train.py --cfg job lists every key")


def _unset_variable(text: str) -> UserError | None:
    found = re.search(r"Environment variable '([^']+)' not found", text)
    if found is None:
        return None
    return UserError(found.group(1), "", "this environment variable is not set", f"export {found.group(1)}=VALUE")


def _missing_value(text: str) -> UserError | None:
    found = re.search(r"Missing mandatory value: (\S+)", text)
    key = re.search(r"full_key: (\S+)", text)
    if found is None and "MISSING" not in text.upper():
        return None
    name = (found or key).group(1) if (found or key) else "config"
    return UserError(name, "???", "it has no value", f"{name}=VALUE")


def _bad_grammar(text: str) -> UserError | None:
    found = re.search(r"Error parsing override '([^']*)'", text)
    if found is None:
        return None
    key = found.group(1).split("=")[0]
    return UserError(key, found.group(1).partition("=")[2], "it cannot be parsed", f"'{key}=VALUE' in quotes")
