"""What a user reads when a command fails: one line, also for the complaints of Hydra, OmegaConf and torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from atelier.cli import offers
from atelier.cli.flags import flags_last, is_unknown_flag
from atelier.cli.given import meant
from atelier.cli.guard import guarded
from atelier.core.errors import RankGone, UserError, causes, nearest, parsed
from atelier.core.launchers import rank, started
from atelier.core.lines import say
from atelier.core.stopping import piped
from atelier.core.words import shell, word
from atelier.runs import meeting
from atelier.runs.pages import is_group, key_of, known_keys, member, script_name
from atelier.runs.preflight import of_link

ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
NAME = r"(?!(?:null|true|false|nan|inf)\b)[a-z_]\w*"
PAGE = re.compile(rf"{NAME}|\[ *{NAME}(?: *, *{NAME})* *\]", re.IGNORECASE)


def user_error(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from; None means that it is a bug."""
    outer = ""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause.at(_full_key(outer, ""))
        outer += f"{cause}\n"
    chain = list(causes(error))
    first = _composition_error(chain) or _long_name(chain) or _folder(chain)
    return first or _loader(chain) or _memory(chain) or _rank(chain)


def report(error: UserError) -> None:
    """Print the line, once for all ranks: rank 0 what all of them have, else the one that has it."""
    if meeting.tell(error):
        say(f"rank {rank()}: {error.line()}" if rank() else error.line(), error=True)
    meeting.linger()


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
    """Call a Hydra main under `one_line`, with the words as they were meant."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with piped(), one_line():
        if unsafe := os.environ.get(ENVIRONMENT):
            raise UserError(ENVIRONMENT, unsafe, "it lets checkpoints run code", f"unset {ENVIRONMENT}")
        check_words(sys.argv[1:])
        sys.argv[1:] = flags_last(sys.argv[1:])
        sys.argv[1:] = meant(sys.argv[1:], script_name() == "train")
        with guarded():
            main()


def check_words(words: list[str]) -> None:
    """Refuse what Hydra would take, or would explain at length.

    `+key` and `~key` would be read by nothing or take something needed away, `hydra...._target_` would be called.
    """
    for one in words:
        key, _, value = one.partition("=")
        if one.startswith("=") or not one.strip():
            raise UserError("KEY", value, "the key is missing", f"KEY={value.strip() or 'VALUE'}")
        if key == "run_dir" and value.strip("'\"") in ("", "null"):
            raise UserError(key, value, "it must name a folder", "run_dir=outputs/NAME, or leave it out")
        if key != key.strip():
            fix = shell(f"{key.strip()}={value.strip()}")
            raise UserError(key.strip(), value, "no space stands beside the =", fix)
        if is_unknown_flag(key):
            bare = key.lstrip("-").replace("-", "_")
            fix = offers.for_key(bare, value).replace(f"leave {bare} out", f"leave {key} out")
            raise UserError(key, value, "keys are written without dashes", fix)
        group = key.partition("@")[0]
        if is_group(group) and value[:1] in tuple("[{$(") and not PAGE.fullmatch(value):
            raise UserError(key, value, f"it is the name of a page in conf/{group}", offers.for_key(key, ""))
        if key.startswith(("+", "~")):
            raise UserError(key, value, "keys are neither added nor removed", offers.for_key(key.lstrip("+~"), value))
        if key.startswith("hydra") and key.endswith("_target_"):
            raise UserError(key, value, "what Hydra calls is not for the command line", f"leave {key} out")
        if key.startswith("choices."):
            raise UserError(key, value, "it only says which page was chosen", offers.for_key(key, value))
        if key == "hydra.job.chdir":
            raise UserError(key, value, "paths are told from where the command is given", f"leave {key} out")


def _composition_error(chain: list[BaseException]) -> UserError | None:
    """Hydra's and OmegaConf's own complaints, each as one line."""
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    parse = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    if parse is not None:
        return _unreadable(parse.override)
    typed = _typed(chain)
    known = [e for e in chain if isinstance(e, (HydraException, OmegaConfBaseException)) or typed]
    if not known or isinstance(chain[0], InstantiationException):
        return None
    text = "\n".join(str(e) for e in known)
    if "invalid literal for int" in text and typed:
        text = f"Could not override '{typed.partition('=')[0]}'"
    if found := _unknown_page(text) or _unknown_key(text, typed) or _unset(text) or _unfit(text, typed):
        return found
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(chain[-1]).__name__)
    key, _, value = typed.partition("=")
    key = key or _full_key(text)
    return UserError(key, value, first.rstrip("."), offers.for_key(key, ""))


def _unreadable(typed: str) -> UserError:
    """A word that is no `key=value`, or whose value is none that Hydra reads."""
    key, sign, value = typed.partition("=")
    if not offers.has(key):
        return _no_such_key(key, value) if sign else UserError(key, "", "it is no KEY=VALUE", offers.for_key(key, ""))
    text = sign and offers.takes_text(key)
    return UserError(key, value, "it cannot be parsed", word(key, value) if text else offers.with_value(key, ""))


def _no_such_key(key: str, value: str) -> UserError:
    typed = {key_of(one): one.partition("=")[2] for one in sys.argv[1:]}
    if key not in typed and "hparams_search" in typed:
        problem = f"it searches {key}, which this model has not"
        return UserError("hparams_search", typed["hparams_search"], problem, "leave hparams_search out")
    if found := offers.renamed(key, value):
        today, fix = found
        return UserError(key, value, f"it is called {today} now", fix)
    group, fix = key.partition(".")[0], offers.for_key(key, value, known_wrong=True)
    if fix == shell(f"{key}={value}"):  # one of several models that are swept over has it, and another has not
        fix = f"leave {key} out"
    if group in ("sampler", "guider") and script_name() != "train":
        problem = f"name the {group} too" if fix.startswith(f"{group}=") else f"the run has no {group}"
        return UserError(key, value, problem, fix)
    return UserError(key, value, "there is no such key", fix)


def _folder(chain: list[BaseException]) -> UserError | None:
    """The folder of a run or a sweep, which Hydra makes before any line of ours."""
    error = chain[0]
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [room for name in frames for room in ("hydra", "atelier") if f"{os.sep}{room}{os.sep}" in name]
    if not isinstance(error, OSError) or rooms[-1:] != ["hydra"]:
        return None
    problem = f"the folder cannot be made ({error.strerror}{of_link(error.filename)})"
    return UserError("run_dir", error.filename or "", problem, "run_dir=A_FOLDER_OF_YOURS")


def _long_name(chain: list[BaseException]) -> UserError | None:
    """A path that no disk takes, in whatever was looked for or written first."""
    name = next((e.filename for e in chain if isinstance(e, OSError) and e.errno == errno.ENAMETOOLONG), None)
    if name is None:
        return None
    words = [(key, value.strip("'\"")) for key, _, value in (one.partition("=") for one in sys.argv[1:])]
    named = [(key, value) for key, value in words if value and value in str(name)]
    key, value = max(named, key=lambda pair: len(pair[1]), default=("run_dir", name))
    return UserError(key, value, "the name is longer than this disk takes", f"{key}=A_SHORTER_NAME")


def _loader(chain: list[BaseException]) -> UserError | None:
    """What a loader process could not do, or that it is gone, which torch tells in the training process, anywhere."""
    text = "\n".join(map(str, chain))
    if "in DataLoader worker process" in text and (own := parsed(text)):
        return own
    if found := re.search("unable to (?:open|allocate|write|mmap).*shared memory.*|insufficient shared memory", text):
        return UserError("data.num_workers", "", f"loader processes: {found.group(0)}", "data.num_workers=0")
    pattern = r"DataLoader worker \(pid.*?\) (?:is )?(killed by signal: [\w ]+|exited unexpectedly)"
    found = re.search(pattern, text)
    if found is None and not _unanswered(chain):
        return None
    end = found.group(1).replace("killed", "was killed") if found else "is gone"
    problem = f"a loader process {end}; memory may have run out"
    return UserError("data.num_workers", "", problem, "data.num_workers=0")


def _unanswered(chain: list[BaseException]) -> bool:
    """Whether a tensor was on its way from a loader process that is gone: torch asks that one for its memory."""
    for error in chain:
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        taken = any(name.endswith(os.path.join("torch", "multiprocessing", "reductions.py")) for name in files)
        if taken and isinstance(error, ConnectionError | EOFError | FileNotFoundError):
            return True
    return False


def _memory(chain: list[BaseException]) -> UserError | None:
    """A machine that is too small, or a number that is too large."""
    words = "can't allocate memory|out of memory|size calculation overflowed"
    short = [e for e in chain if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and re.search(words, str(e))]
    if not short:
        return None
    key = next((_full_key(str(e)) for e in chain if "full_key" in str(e)), "data.batch_size")
    fix = "smaller numbers there; else a smaller data.batch_size, eval.batch_size or model.net.width"
    return UserError(key, "", "memory ran out", fix)


def _rank(chain: list[BaseException]) -> UserError | None:
    """A rank that is gone or does not answer, as gloo, NCCL and torch's stores tell the others."""
    if started() is None:
        return None
    text = "\n".join(str(e) for e in chain if isinstance(e, RuntimeError))
    if found := re.search("Connection (?:closed|reset|refused)(?: by peer)?|Broken pipe|remote process exited", text):
        problem = f"another rank is gone ({found.group(0)}), of memory if it left no line"
        return RankGone("trainer.devices", "", problem, "the same command goes on from the last checkpoint")
    if re.search(r"Timed out (?:waiting|after)|[Tt]imeout after \d+ ?ms|clients joined", text):
        problem = "a rank waited that long for another, which did not answer or was never started"
        return RankGone("trainer.timeout_minutes", "", problem, "see the lines of the other ranks")
    return None


def _typed(chain: list[BaseException]) -> str:
    """The word of the command that Hydra was at when it failed; "" where it was at none, as in a job."""
    frames = [frame for error in chain for frame, _ in traceback.walk_tb(error.__traceback__)]
    words = [getattr(frame.f_locals.get("override"), "input_line", None) for frame in frames]
    return next(filter(None, words), "")


def _full_key(text: str, otherwise: str = "config") -> str:
    found = re.search(r"full_key: (\S+)", text)
    return found.group(1) if found else otherwise


def _unknown_page(text: str) -> UserError | None:
    found = re.search(r"Could not (?:find|load) '([^']*)'", text)
    if found is None:
        return None
    listed = re.search(r"Available options in '([^']*)':\n((?:\t.*\n?)+)", text)
    group = listed.group(1) if listed else found.group(1).rpartition("/")[0]
    page = found.group(1).removeprefix(f"{group}/")
    if group.startswith("hydra/"):
        return UserError(group, page, "this plugin of Hydra is not installed", 'pip install -e ".[sweep]"')
    words = [one.partition("=")[::2] for one in sys.argv[1:] if one.partition("=")[0].partition("@")[0] == group]
    typed = next((name for name, value in words if page in value.strip("[]").split(",")), group)
    if several := next((one.partition("=")[2] for one in sys.argv[1:] if one.startswith(f"{typed}=[")), None):
        lists = [
            key
            for key, value in known_keys(script_name()).items()
            if key.startswith(f"{group}.") and isinstance(value, list)
        ]
        fix = f"{lists[0]}={several}" if lists else f"{typed}={member(group, page)}"
        return UserError(typed, several, f"it is the name of one page in conf/{group}", fix)
    recipe = typed == "model" and any(one.startswith("experiment=") for one in sys.argv[1:])  # which has its own
    fix = "leave model out" if recipe else f"{typed}={member(group, page)}"
    return UserError(typed, page, f"there is no such page in conf/{group}", fix)


def _unknown_key(text: str, typed: str) -> UserError | None:
    found = re.search(r"Could not override '([^']+)'", text)
    if found is None and "not in struct" not in text:
        return None
    if recipe := re.match(r"In 'experiment/(\w+)'", text):
        problem = f"experiment={recipe[1]} chooses {found[1] if found else 'pages'}, which it has not"
        model = next((one.partition("=")[2] for one in sys.argv[1:] if one.startswith("model=")), "")
        return UserError("model", model, problem, "leave model out" if model else "leave experiment out")
    beneath = _full_key(text)
    key, _, value = typed.partition("=") if typed else (found[1] if found else beneath, "", "")
    if not beneath.startswith(f"{key}."):
        words = [one.partition("=")[2] for one in sys.argv[1:] if one.partition("=")[0] == key]
        return _no_such_key(key, value or "".join(words[:1]))
    section = isinstance(offers.keys().get(key), dict)
    fix = offers.for_key(beneath, "", known_wrong=True) if section else offers.with_value(key, "")
    return UserError(key, value, f"there is no such key as {beneath}", fix)


def _unset(text: str) -> UserError | None:
    """What has no value: an environment variable, `???`, or a reference to nothing."""
    if found := re.search(r"You must specify '([^']+)'", text):
        group = found[1].partition("@")[0]
        return UserError(found[1], "???", f"it is the name of a page in conf/{group}", f"leave {found[1]} out")
    key = offers.origin(_full_key(text), [key_of(one) for one in sys.argv[1:]])
    key = {"hydra.run.dir": "run_dir", "hydra.sweep.dir": "run_dir"}.get(key, key)
    if found := re.search(r"Environment variable '([^']+)' not found", text):
        name = found.group(1)
        return UserError(key, f"${{oc.env:{name}}}", f"{name} is not set", f"export {name}=VALUE")
    if "Missing mandatory value" in text:
        return UserError(key, "???", "it has no value", f"{key}=VALUE")
    if found := re.search(r"Interpolation key '([^']+)' not found|Error trying to access ([\w.]+)", text):
        return _reference(_full_key(text), found[1] or found[2])
    reasons = r"Recursive interpolation|Unsupported interpolation type \w+|Interpolation to parent node"
    if found := re.search(reasons, text):
        return UserError(key, "${...}", found.group(0).lower(), f"{key}=VALUE")
    return None


def _reference(key: str, name: str) -> UserError:
    """A key whose value is that of another, which is not there: misspelt, or gone with what was typed above it."""
    if key in map(key_of, sys.argv[1:]):
        value = next(one.partition("=")[2] for one in sys.argv[1:] if key_of(one) == key)
        if f"${{{name}}}" not in value:  # it was told from where the key stands
            return UserError(key, value, f"there is no such key as {name} there", f"{key}=VALUE")
        shipped = offers.shipped(key)
        if isinstance(shipped, str) and not offers.takes_text(key):  # one of a few words, which others have not
            return UserError(key, f"${{{name}}}", "there is no such key", word(key, shipped))
        alike = [one for one in offers.keys() if one != key and type(offers.shipped(one)) is type(shipped)]
        close = nearest(name, alike)
        fix = shell(f"{key}=${{{close}}}") if close else f"{key}=VALUE"
        return UserError(key, f"${{{name}}}", "there is no such key", fix)
    for one in sys.argv[1:]:
        if name.startswith(f"{key_of(one)}."):
            above, _, value = one.partition("=")
            return UserError(above, value, f"{key} refers to {name}, which is not there then", f"leave {above} out")
    return UserError(key, f"${{{name}}}", "there is no such key", f"{key}=VALUE")


def _unfit(text: str, typed: str) -> UserError | None:
    """A value that is several where one is asked for, or that names no page."""
    single = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?:\n| requires)", text, re.DOTALL)
    if "does not support sweep type" in text:
        typed = next(one for one in sys.argv[1:] if "interval(" in one)
    typed = single[1] if single else typed
    key, _, value = typed.partition("=")
    group = key.partition("@")[0]
    if single and offers.has(key):
        return UserError(key, value, "one value, or a sweep", offers.several(key, value))
    if "does not support sweep type" in text and offers.has(key):
        return UserError(key, value, "only a search takes an interval", offers.with_value(key, ""))
    if "Config group override must be" in text and offers.has(key):
        out = f"leave {key} out, or " if value.lower() == "null" and offers.standing()[key] is None else ""
        return UserError(key, value, f"it is the name of a page in conf/{group}", f"{out}{key}={member(group, value)}")
    return None if not key or offers.has(key) else _no_such_key(key, value)
