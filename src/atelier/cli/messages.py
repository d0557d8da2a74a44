"""What a user reads when a command fails: one line, also for the complaints of Hydra, OmegaConf and torch."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atelier.checkpoints.renamed import argument
from atelier.cli.given import meant
from atelier.cli.guard import guarded
from atelier.core.errors import RankGone, UserError, causes, nearest, parsed
from atelier.core.launchers import rank, started
from atelier.core.lines import say
from atelier.core.stopping import piped
from atelier.core.words import shell, word
from atelier.runs import meeting
from atelier.runs.pages import CONF, chosen, known_keys, placed
from atelier.runs.preflight import of_link

ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
ELSEWHERE = {  # words of other projects -> ours
    "strategy": "trainer=ddp",
    "gradient_clip_val": "model.grad_clip",
    "accumulate_grad_batches": "data.batch_size",
    "max_epochs": "budget.images",
    "max_steps": "budget.images",
    "num_classes": "data.n_classes",
    "learning_rate": "model.optimizer.lr",
    "check_val_every_n_epoch": "eval.every_images",
    "val_check_interval": "eval.every_images",
}

RENAMED = {  # keys of before that are no argument of another name -> what does the same now
    "model.guidance": "model.guider.guidance",
    "model.objective.density": "time_distribution@model.objective.time_distribution",
    "model.objective.space": "weighting@model.objective.weighting=flow_error",
    "model.objective.floor": "model.objective.weighting.time_floor",
    "model.objective.mean": "model.objective.time_distribution.logit_mean",
    "model.objective.deviation": "model.objective.time_distribution.logit_std",
    "model.objective.mean_end": "model.objective.time_distribution.logit_mean_end",
    "model.objective.mean_images": "model.objective.time_distribution.logit_mean_images",
}


def user_error(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was raised from; None means that it is a bug."""
    outer = ""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause.at(_full_key(outer, ""))
        outer += f"{cause}\n"
    chain = list(causes(error))
    first = _composition_error(chain) or _folder(chain)
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
        sys.argv[1:] = meant(sys.argv[1:], _script() == "train")
        with guarded():
            main()


def check_words(words: list[str]) -> None:
    """Refuse what Hydra would take, or would explain at length.

    `+key` and `~key` would be read by nothing or take something needed away, `hydra...._target_` would be called.
    """
    from hydra._internal.utils import get_args_parser

    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for one in words:
        key, _, value = one.partition("=")
        if one.startswith("="):
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
    known, last = known_keys(_script()), key.split(".")[-1]
    elsewhere = ELSEWHERE.get(last, "")
    if elsewhere.partition("=")[0] in known:
        return elsewhere if "=" in elsewhere else f"{elsewhere}={value if value and key == last else 'VALUE'}"
    if last in ("device", "accelerator"):
        return _device(value)
    if chosen := placed(key, value):
        return chosen
    close = nearest(
        key,
        [
            name
            for name, shipped in known.items()
            if not isinstance(shipped, dict) and not (known_wrong and name == key)
        ],
    )
    if close is None:
        return f"python {_script()}.py --cfg job lists every key"
    if (CONF / close).is_dir():
        return f"{close}={_page(close, value)}"
    return shell(f"{close}={value}") if value and _alike(value, known[close]) else f"{close}=VALUE"


def _device(value: str) -> str:
    """How the CPU is taken, or a GPU: to train by a page, else by what is there."""
    if _script() == "train":
        return f"trainer={'cpu' if value == 'cpu' else 'gpu'}"
    return "leave it out: a GPU is taken where there is one (CUDA_VISIBLE_DEVICES= hides them)"


def _page(group: str, value: str) -> str:
    """The page of a group that is called so, or nearly; all of them where none is."""
    pages = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return value if value in pages else nearest(value, pages) or "|".join(pages)


def _alike(value: str, shipped: Any) -> bool:
    """Whether a value as typed can stand where a page has `shipped`; what has no value there takes anything."""
    while isinstance(shipped, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", shipped)):
        shipped = known_keys().get(found.group(1))
    if isinstance(shipped, bool):
        return value.lower() in ("true", "false")
    if isinstance(shipped, (int, float)):
        return re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?", value.lower()) is not None
    return True


def _script() -> str:
    """Whose keys are meant: `sample`, `evaluate`, `export`, or else `train`."""
    name = Path(sys.argv[0]).stem
    return name if name in ("sample", "evaluate", "export") else "train"


def _composition_error(chain: list[BaseException]) -> UserError | None:
    """Hydra's and OmegaConf's own complaints, each as one line."""
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    parse = next((e for e in chain if isinstance(e, OverrideParseException)), None)
    if parse is not None:
        key, _, value = parse.override.partition("=")
        text = isinstance(known_keys(_script()).get(key, ""), str | None)
        return UserError(key, value, "it cannot be parsed", word(key, value) if text else f"{key}=VALUE")
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


def _folder(chain: list[BaseException]) -> UserError | None:
    """The folder of a run or a sweep, which Hydra makes before any line of ours."""
    error = chain[0]
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [room for name in frames for room in ("hydra", "atelier") if f"{os.sep}{room}{os.sep}" in name]
    if not isinstance(error, OSError) or rooms[-1:] != ["hydra"]:
        return None
    problem = f"the folder cannot be made ({error.strerror}{of_link(error.filename)})"
    return UserError("run_dir", error.filename or "", problem, "run_dir=A_FOLDER_OF_YOURS")


def _loader(chain: list[BaseException]) -> UserError | None:
    """What a loader process could not do, or that it is gone, which torch tells in the training process, anywhere."""
    text = "\n".join(map(str, chain))
    if "in DataLoader worker process" in text and (own := parsed(text)):
        return own
    if found := re.search("unable to (?:open|allocate|write|mmap).*shared memory.*|insufficient shared memory", text):
        return UserError("data.num_workers", "", f"loader processes: {found.group(0)}", "data.num_workers=0")
    pattern = r"DataLoader worker \(pid.*?\) (?:is )?(killed by signal: [\w ]+|exited unexpectedly)"
    found = re.search(pattern, text)
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


def _several(key: str, value: str) -> str:
    """What `key=a,b` may have meant: a list where the key takes one, else a sweep, or a name with a comma in it."""
    shipped = known_keys(_script()).get(key)
    if isinstance(shipped, list):
        return f"{key}=[{value}]"
    sweep = f"python train.py -m {shell(f'{key}={value}')}"
    if _script() != "train":
        return word(key, value)
    return sweep if (CONF / key).is_dir() or isinstance(shipped, int | float) else f"{sweep}, or {word(key, value)}"


def _own(group: str, key: str) -> str | None:
    """The page of conf/<group> with this key that is most like what the run of this command has there.

    Where there is no run yet, the default one; None where it has nothing of the kind.
    """
    from omegaconf import OmegaConf

    from atelier.runs import build, folders

    asked = next((one.partition("=")[2] for one in sys.argv[1:] if one.startswith("run=")), "last")
    node = {key: value for key, value in chosen("train", ()).items() if key.startswith(f"model.{group}.")}
    node = {key.removeprefix(f"model.{group}."): value for key, value in node.items()}
    with contextlib.suppress(Exception):  # whatever is wrong with the run is told when it is opened
        model = build.stored_config(folders.find(asked)).model
        node = OmegaConf.to_container(model[group]) if group in model else {}
    pages = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((CONF / group).glob("*.yaml"))}
    with_key = [page for page, values in pages.items() if key.partition(".")[2].partition(".")[0] in values]
    alike = {page: {k for k, v in pages[page].items() if node.get(k) == v} for page in with_key}
    order = {page: ("_target_" in same, page != "none", len(same)) for page, same in alike.items()}
    return max(order, key=order.__getitem__, default=None) if node else None


def _is_group_override(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "Config group override must be" in str(error)


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
    typed = next((one.partition("=")[0] for one in sys.argv[1:] if one.startswith(f"{group}@")), group)
    if several := next((one.partition("=")[2] for one in sys.argv[1:] if one.startswith(f"{typed}=[")), None):
        lists = [key for key, value in known_keys().items() if key.startswith(f"{group}.") and isinstance(value, list)]
        fix = f"{lists[0]}={several}" if lists else f"{typed}={_page(group, page)}"
        return UserError(typed, several, f"it is the name of one page in conf/{group}", fix)
    return UserError(typed, page, f"there is no such page in conf/{group}", f"{typed}={_page(group, page)}")


def _unknown_key(text: str) -> UserError | None:
    found = re.search(r"Could not override '([^']+)'", text)
    if found is None and "not in struct" not in text:
        return None
    key = found.group(1) if found else _full_key(text)
    typed = re.search(r"To append to your config use \+[^=\s]+=(.*)", text)
    words = [word.partition("=")[2] for word in sys.argv[1:] if word.partition("=")[0] == key]
    value = typed.group(1) if typed else "".join(words[:1])
    group = key.partition(".")[0]
    if group in ("sampler", "guider"):
        own = _own(group, key)
        fix = f"{group}={own} {key}={value}" if own else f"leave {key} out"
        return UserError(key, value, f"name the {group} too" if own else f"the run has no {group}", fix)
    if found := renamed(key, value):
        today, fix = found
        return UserError(key, value, f"it is called {today} now", fix)
    return UserError(key, value, "there is no such key", _fix(key, value, known_wrong=True))


def renamed(key: str, value: str) -> tuple[str, str] | None:
    """What a key of before is called today, and the override that does what `key=value` did.

    None where it was no key of the classes that this command's pages name, or where they have not the key of today.
    """
    keys = chosen(_script(), tuple(sys.argv[1:]))
    place, dot, last = key.rpartition(".")
    today, now = RENAMED.get(key), value
    if today is None and (target := keys.get(f"{place}._target_")):
        typed = {"true": True, "false": False}.get(value.lower(), value)
        name, now = argument(target, last, typed)
        today = f"{place}{dot}{name}"
        now = value if now is typed else now
    if today in (None, key) or today.partition("=")[0].rpartition("@")[2] not in keys:
        return None
    return today, today if "=" in today else f"{today}={now or 'VALUE'}"


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
        return UserError(key, value, "one value, or a sweep", _several(key, value))
    if "Config group override must be" in text:
        pattern = r"([a-z_]+)=(null|true|false|[\d.]*)"
        words = [found.groups() for word in sys.argv[1:] if (found := re.fullmatch(pattern, word))]
        group, value = next(((k, v) for k, v in words if (CONF / k).is_dir()), ("model", "null"))
        pages = "|".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        return UserError(group, value, f"it is the name of a page in conf/{group}", f"{group}={pages}")
    return None
