"""What a user's mistake looks like: one line with the key, the value, the problem and the fix, and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atelier.launchers import rank

CONF = Path(__file__).parents[2] / "conf"
ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
LONGEST = 200
ALMOST = 1.1  # likeness of two keys from which one is offered for the other; 2 is the same
ELSEWHERE = {  # words of other projects -> ours
    "gradient_clip_val": "model.grad_clip",
    "accumulate_grad_batches": "data.batch_size",
    "max_epochs": "budget.images",
    "max_steps": "budget.images",
    "num_classes": "data.n_classes",
    "learning_rate": "model.optimizer.lr",
    "check_val_every_n_epoch": "eval.every_images",
    "val_check_interval": "eval.every_images",
}


class UserError(Exception):
    """A mistake in what was asked for.

    Args:
        key: the dotted key or option to change, as typed on the command line (`data.batch_size`); where it begins
            with a dot, an argument of the object that the config was building.
        value: what it was.
        problem: why that does not work.
        fix: an override or a command that does; with a dot in front, of an argument of the same object.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        super().__init__(" ".join(f"error: {key}={value}: {problem}. Fix: {fix}".split()))

    def line(self) -> str:
        """One line of at most 200 characters; what is too long loses its middle, the value first, the fix last."""
        key, value, problem, fix = (" ".join(str(p).split()) for p in (self.key, self.value, self.problem, self.fix))
        spare = LONGEST - len(f"error: {key}=: . Fix: ")
        value = _short(value, min(60, max(12, spare - len(problem) - len(fix))))
        problem = _short(problem, max(30, spare - len(value) - len(fix)))
        fix = _short(fix, max(20, spare - len(value) - len(problem)))
        return f"error: {key}={value}: {problem}. Fix: {fix}"[:LONGEST]

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.value, self.problem, self.fix)


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n // 2 - 2] + "..." + text[len(text) - (n - n // 2 - 1) :]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known key closest in spelling, its last part counted as much as the whole; None where nothing is close."""
    whole, tail = (difflib.SequenceMatcher(None, "", part) for part in (word, word.split(".")[-1]))
    best, most = None, 0.0
    for key in known:
        whole.set_seq1(key)
        tail.set_seq1(key.split(".")[-1])
        for ratio in ("real_quick_ratio", "quick_ratio", "ratio"):  # the quick ones are never below the last
            likeness = getattr(whole, ratio)() + getattr(tail, ratio)()
            if likeness < ALMOST or likeness <= most:
                break
        else:
            best, most = key, likeness
    return best


@functools.cache
def known_keys(script: str = "") -> dict[str, Any]:
    """Every dotted key that some page of conf/ has with its value there (a dictionary holds further keys).

    The name of a group has the name of one of its pages. `script`: only those that it has; "": of all three.
    """
    from omegaconf import OmegaConf

    keys: dict[str, Any] = {}
    groups = (
        [next(iter(e)) for e in OmegaConf.load(CONF / f"{script}.yaml").defaults if e != "_self_"] if script else []
    )
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix().strip(".")
        if script and (group not in groups if group else path.stem != script):
            continue
        if not path.read_text().startswith("# @package _global_"):
            keys |= _dotted(OmegaConf.to_container(OmegaConf.load(path)), group)
        keys |= {group: path.stem} if group else {}
    return keys


def _dotted(node: Any, prefix: str) -> dict[str, Any]:
    keys = {prefix: node} if prefix else {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if key not in ("_target_", "_partial_", "defaults", "hydra"):
            keys |= _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    return keys


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def user_error(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from; None means that it is a bug."""
    outer = ""
    for cause in causes(error):
        if isinstance(cause, UserError):
            if cause.key.startswith("."):
                place = _full_key(outer)
                fix = place + cause.fix if cause.fix.startswith(".") else cause.fix
                return UserError(place + cause.key, cause.value, cause.problem, fix)
            return cause
        outer += f"{cause}\n"
    chain = list(causes(error))
    return _composition_error(chain) or _loader(chain) or _memory(chain)


def report(error: UserError) -> None:
    """Print the line, once for all ranks."""
    if rank() == 0:
        print(error.line(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Inside, a user's mistake becomes its line and exit code 2; anything else stays a traceback."""
    try:
        yield
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        report(known)
        sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Call a Hydra main under `one_line`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line():
        if unsafe := os.environ.get(ENVIRONMENT):
            raise UserError(ENVIRONMENT, unsafe, "it lets checkpoints run code", f"unset {ENVIRONMENT}")
        check_words(sys.argv[1:])
        main()


def check_words(words: list[str]) -> None:
    """Refuse what Hydra would take, or would explain at length.

    `+key` and `~key` would be read by nothing or take something needed away, `hydra...._target_` would be called.
    """
    from hydra._internal.utils import get_args_parser

    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for word in words:
        key, _, value = word.partition("=")
        if word.startswith("="):
            raise UserError("KEY", value, "the key is missing", f"KEY={value}")
        if key == "run_dir" and value.strip("'\"") in ("", "null"):
            raise UserError(key, value, "it must name a folder", "run_dir=outputs/NAME, or leave it out")
        if key.startswith("--") and not any(flag.startswith(key) for flag in flags):
            bare = key.lstrip("-").replace("-", "_")
            raise UserError(key, value, "keys are written without dashes", _fix(bare, value))
        if key.startswith(("+", "~")):
            raise UserError(key, value, "keys are neither added nor removed", _fix(key.lstrip("+~"), value))
        if key.startswith("hydra") and key.endswith("_target_"):
            raise UserError(key, value, "what Hydra calls is not for the command line", f"leave {key} out")


def _fix(key: str, value: str, known_wrong: bool = False) -> str:
    """The nearest known key with a value; the key itself only where it is not known to be wrong."""
    if elsewhere := ELSEWHERE.get(key.split(".")[-1]):
        return f"{elsewhere}=VALUE"
    if chosen := placed(key, value):
        return chosen
    known = known_keys(Path(sys.argv[0]).stem if Path(sys.argv[0]).stem in ("sample", "evaluate") else "train")
    close = nearest(
        key,
        [
            name
            for name, shipped in known.items()
            if not isinstance(shipped, dict) and not (known_wrong and name == key)
        ],
    )
    return f"{close}={value or 'VALUE'}" if close else "python train.py --cfg job lists every key"


def placed(key: str, value: str) -> str | None:
    """How a group that stands inside a page is chosen there, where `key` is its name or its place."""
    group, _, place = key.partition("@")
    found = [(g, at, page) for g, at, page in places() if (group in (g, at) and place in ("", at))]
    if not found:
        return None
    pages = [page for _, _, page in found]
    asked = next((word.removeprefix("model=") for word in sys.argv[1:] if word.startswith("model=")), "")
    if place or (asked and not {asked, "train"} & set(pages)):
        return " or ".join(f"model={page}" for page in sorted(set(pages)))
    group, place, page = next((f for f in found if f[2] == asked), found[0])
    chosen = f"{group}@{place}={value or 'PAGE'}"
    return chosen if page in (asked, "train") else f"model={page} {chosen}"


@functools.cache
def places() -> tuple[tuple[str, str, str], ...]:
    """Group, place and page of each group that stands inside another page."""
    found = []
    for path in (CONF / "train.yaml", *sorted((CONF / "model").glob("*.yaml"))):
        prefix = "model." if path.parent != CONF else ""
        for group, place in re.findall(r"^  - /?(\w+)@([\w.]+):", path.read_text(), re.MULTILINE):
            found.append((group, prefix + place, path.stem))
    return tuple(found)


def _composition_error(chain: list[BaseException]) -> UserError | None:
    """Hydra's and OmegaConf's own complaints, each as one line."""
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    parse = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    if parse is not None:
        key, _, value = parse.override.partition("=")
        return UserError(key, value, "it cannot be parsed", f"{key}=VALUE, or quotes round it: '{key}=\"VALUE\"'")
    known = [e for e in chain if isinstance(e, (HydraException, OmegaConfBaseException)) or _is_group_override(e)]
    if not known or isinstance(chain[0], InstantiationException):
        return None
    text = "\n".join(str(e) for e in known)
    for translate in (_unknown_page, _unknown_key, _unset, _other):
        found = translate(text)
        if found is not None:
            return found
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(chain[-1]).__name__)
    return UserError(_full_key(text), "", first.rstrip("."), "python train.py --cfg job lists every key")


def _loader(chain: list[BaseException]) -> UserError | None:
    """A loader process that is gone, which torch tells in the training process, wherever that is."""
    pattern = r"DataLoader worker \(pid.*?\) (?:is )?(killed by signal: [\w ]+|exited unexpectedly)"
    found = re.search(pattern, "\n".join(map(str, chain)))
    if found is None:
        return None
    end = found.group(1).replace("killed", "was killed")
    problem = f"a loader process {end}; memory may have run out"
    return UserError("data.num_workers", "", problem, "data.num_workers=0")


def _memory(chain: list[BaseException]) -> UserError | None:
    """A machine that is too small, or a number that is too large."""
    words = "can't allocate memory|out of memory|size calculation overflowed"
    short = [e for e in chain if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and re.search(words, str(e))]
    if not short:
        return None
    key = next((_full_key(str(e)) for e in chain if "full_key" in str(e)), "data.batch_size")
    fix = "smaller numbers there; else a smaller data.batch_size, eval.batch_size or model.net.width"
    return UserError(key, "", "memory ran out", fix)


def _is_group_override(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "Config group override must be" in str(error)


def _full_key(text: str) -> str:
    found = re.search(r"full_key: (\S+)", text)
    return found.group(1) if found else "config"


def _unknown_page(text: str) -> UserError | None:
    found = re.search(r"Could not (?:find|load) '([^']*)'", text)
    if found is None:
        return None
    listed = re.search(r"Available options in '([^']*)':\n((?:\t.*\n?)+)", text)
    group = listed.group(1) if listed else found.group(1).rpartition("/")[0]
    pages = [line.strip() for line in listed.group(2).splitlines()] if listed else []
    page = found.group(1).removeprefix(f"{group}/")
    if group.startswith("hydra/"):
        return UserError(group, page, "this plugin of Hydra is not installed", 'pip install -e ".[sweep]"')
    close = nearest(page, pages)
    typed = next((word.partition("=")[0] for word in sys.argv[1:] if word.startswith(f"{group}@")), group)
    return UserError(typed, page, f"there is no such page in conf/{group}", f"{typed}={close or '|'.join(pages[:12])}")


def _unknown_key(text: str) -> UserError | None:
    found = re.search(r"Could not override '([^']+)'", text)
    if found is None and "not in struct" not in text:
        return None
    key = found.group(1) if found else _full_key(text)
    typed = re.search(r"To append to your config use \+[^=\s]+=(.*)", text)
    words = [word.partition("=")[2] for word in sys.argv[1:] if word.partition("=")[0] == key]
    value = typed.group(1) if typed else "".join(words[:1])
    if key.startswith("sampler."):
        return UserError(key, value, "name the sampler too", f"sampler=ddim {key}={value}, or another of conf/sampler")
    return UserError(key, value, "there is no such key", _fix(key, value, known_wrong=True))


def _unset(text: str) -> UserError | None:
    """What has no value: an environment variable, `???`, or a reference to nothing."""
    if found := re.search(r"Environment variable '([^']+)' not found", text):
        name = found.group(1)
        return UserError(_full_key(text), f"${{oc.env:{name}}}", f"{name} is not set", f"export {name}=VALUE")
    if "Missing mandatory value" in text:
        return UserError(_full_key(text), "???", "it has no value", f"{_full_key(text)}=VALUE")
    if found := re.search(r"Interpolation key '([^']+)' not found", text):
        return UserError(_full_key(text), f"${{{found.group(1)}}}", "there is no such key", _fix(found.group(1), ""))
    if found := re.search(r"Recursive interpolation|Unsupported interpolation type \w+", text):
        return UserError(_full_key(text), "${...}", found.group(0).lower(), f"{_full_key(text)}=VALUE")
    return None


def _other(text: str) -> UserError | None:
    if found := re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text):
        key, value = found.groups()
        return UserError(key, value, "one value, or a sweep", f"python train.py -m {key}={value}, or {key}=[{value}]")
    if "Config group override must be" in text:
        pattern = r"([a-z_]+)=(null|true|false|[\d.]*)"
        words = [found.groups() for word in sys.argv[1:] if (found := re.fullmatch(pattern, word))]
        group, value = next(((k, v) for k, v in words if (CONF / k).is_dir()), ("model", "null"))
        pages = "|".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        return UserError(group, value, f"it is the name of a page in conf/{group}", f"{group}={pages}")
    return None
