"""What is offered in place of what a command got wrong: a key, a page or a value, as it is typed.

A key is looked for among those of the pages that the command chooses, so that what is offered composes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection
from typing import Any

from atelier.checkpoints.renamed import argument
from atelier.cli.given import is_name
from atelier.core.errors import nearest
from atelier.core.words import shell, word
from atelier.runs.pages import HIDDEN, chosen, is_group, keys_of_page, known_keys, member, members, placed, script_name
from atelier.runs.pages import standing as all_standing

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
LONG = 90  # characters of a fix behind which its line has no room for the rest


def standing() -> dict[str, str | None]:
    """Each group that this command has, as it is typed, and its page."""
    return all_standing(script_name(), tuple(sys.argv[1:]))


def keys() -> dict[str, Any]:
    """The dotted keys of this command in their order, with their values as written."""
    found = sorted(chosen(script_name(), tuple(sys.argv[1:])).items())
    return {key: one for key, one in found if key.rpartition(".")[2] not in HIDDEN and not key.startswith("choices")}


def has(key: str) -> bool:
    """Whether this command has such a key or group."""
    return key in keys() or key in standing()


def for_key(key: str, value: str, known_wrong: bool = False) -> str:
    """The nearest key of this command with a value; the key itself only where it is not known to be wrong."""
    known, last = keys(), key.split(".")[-1]
    elsewhere = ELSEWHERE.get(last, "")
    if elsewhere and (elsewhere in known or "=" in elsewhere and script_name() == "train"):
        return elsewhere if "=" in elsewhere else f"{elsewhere}={value if value and key == last else 'VALUE'}"
    if last in ("device", "accelerator"):
        return device(value)
    if key.startswith("choices.") and value in members(last):
        return f"{last}={value}"
    if key.startswith(("choices.", "hydra.")) or last.startswith("_"):  # what pages say, not a user
        return f"leave {key} out"
    if found := placed(key, value) or (on_another_page(key, value) if known_wrong else None):
        return found
    if "@" in key:
        return f"leave {key} out"
    leaves = [name for name, shipped in known.items() if not isinstance(shipped, dict)]
    leaves += [group for group in standing() if "@" not in group and "." not in key]
    if close := nearest(key, [name for name in leaves if not (known_wrong and name == key)]):
        return with_value(close, value)
    close = nearest(key, [name for name in known_keys(script_name()) if name != key])
    return (close and on_another_page(close, value, key)) or f"leave {key} out"


def with_value(key: str, value: str) -> str:
    """A key that there is, with the value that was meant for another where it can stand there."""
    if is_group(key):
        return f"{key}={member(key, value)}"
    return _set(key, value, shipped(key))


def _set(key: str, value: str, shipped: Any) -> str:
    return shell(f"{key}={value}") if value and alike(value, shipped) else f"{key}=VALUE"


def shipped(key: str) -> Any:
    """What a key of this command has where nothing else is typed; an interpolation is followed."""
    return keys().get(origin(key))


def origin(key: str, typed: Collection[str] = ()) -> str:
    """The key that the value of another is taken from, but for those that were typed."""
    value = keys().get(key)
    found = re.search(r"\$\{(\w[\w.]*)\}", value) if isinstance(value, str) and key not in typed else None
    return origin(found[1], typed) if found else key


def device(value: str) -> str:
    """How the CPU is taken, or a GPU: to train by a page, else by what is there."""
    if script_name() == "train":
        return f"trainer={'cpu' if value == 'cpu' else 'gpu'}"
    return "leave it out: a GPU is taken where there is one (CUDA_VISIBLE_DEVICES= hides them)"


def alike(value: str, shipped: Any) -> bool:
    """Whether a value as typed can stand where a page has `shipped`; where that is null, a word or a number can."""
    if isinstance(shipped, bool):
        return value.lower() in ("true", "false")
    if isinstance(shipped, int):
        return re.fullmatch(r"\+?[\d_]+", value) is not None
    if isinstance(shipped, float):
        return re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?", value.lower()) is not None
    if isinstance(shipped, list | dict):
        return bool(shipped) and value[:1] == ("[" if isinstance(shipped, list) else "{")
    return re.fullmatch(r"[\w./~-]+", value) is not None


def takes_text(key: str) -> bool:
    """Whether a key takes any words; what is no name takes a few."""
    return not is_group(key) and is_name(key)


def several(key: str, value: str) -> str:
    """What `key=a,b` may have meant: a list where the key takes one, else a sweep, or a name with a comma in it."""
    if isinstance(shipped(key), list):
        return f"{key}=[{value}]"
    sweeps = script_name() == "train" and key != "run_dir" and not value.startswith("interval")
    ways = [f"python train.py -m {shell(f'{key}={value}')}"] if sweeps else []
    ways += [word(key, value)] if takes_text(key) else []
    both = ", or ".join(ways)
    return ways[-1] if len(both) > LONG else both or with_value(key, "")


def on_another_page(key: str, value: str, given: str = "") -> str | None:
    """The page that has this key, of the group that stands where it begins, and the key; None where none has it.

    Args:
        key: dotted key of some page.
        value: text that it is to have.
        given: key that was typed in its place; "": the same.
    """
    places = {typed.rpartition("@")[2]: typed for typed in standing()}
    place = max((place for place in places if key.startswith(f"{place}.")), key=len, default="")
    group, now = places.get(place, "").partition("@")[0], _there(place)
    page = _with_key(group, key.removeprefix(f"{place}."), now) if now or script_name() == "train" else None
    if page is None:
        return None
    there = keys_of_page(group, page)[key.removeprefix(f"{place}.")]
    typed, other = places[place], f"{places[place]}={page} {_set(key, value, there)}"
    by_hand = standing()[typed] is None or any(one.startswith((f"{typed}=", "experiment=")) for one in sys.argv[1:])
    return f"leave {given or key} out, or {other}" if by_hand and script_name() == "train" else other


def _there(place: str) -> dict[str, Any]:
    """The keys of what stands at a place of this command; of a sampler or guider, of that of its run.

    Where there is no run yet, of the default one.
    """
    from omegaconf import OmegaConf

    from atelier.runs import build, folders

    front, found = f"{place}.", chosen(script_name(), tuple(sys.argv[1:]))
    if place in ("sampler", "guider") and script_name() != "train":
        front, found = f"model.{front}", chosen("train", ())
        asked = next((one.partition("=")[2] for one in sys.argv[1:] if one.startswith("run=")), "last")
        with contextlib.suppress(Exception):  # whatever is wrong with the run is told when it is opened
            model = build.stored_config(folders.find(asked)).model
            return OmegaConf.to_container(model[place]) if place in model else {}
    return {key.removeprefix(front): one for key, one in found.items() if key.startswith(front)}


def _with_key(group: str, key: str, now: dict[str, Any]) -> str | None:
    """The page of a group with this key that is most like what stands there now; None where none has it."""
    pages = {page: keys_of_page(group, page) for page in members(group)}
    alike = {page: {k for k, v in own.items() if now.get(k) == v} for page, own in pages.items() if key in own}
    order = {page: ("_target_" in same, page != "none", len(same)) for page, same in alike.items()}
    return max(order, key=order.__getitem__, default=None)


def renamed(key: str, value: str) -> tuple[str, str] | None:
    """What a key of before is called today, and the override that does what `key=value` did.

    None where it was no key of the classes that this command's pages name, or where they have not the key of today.
    """
    known = chosen(script_name(), tuple(sys.argv[1:]))
    place, dot, last = key.rpartition(".")
    today, now = RENAMED.get(key), value
    if today is None and last not in HIDDEN and (target := known.get(f"{place}._target_")):
        typed = {"true": True, "false": False}.get(value.lower(), value)
        name, now = argument(target, last, typed)
        today = f"{place}{dot}{name}"
        now = value if now is typed else now
    if today in (None, key) or today.partition("=")[0].rpartition("@")[2] not in known:
        return None
    return today, today if "=" in today else f"{today}={now or 'VALUE'}"
