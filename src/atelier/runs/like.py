"""A request that a picture of sample.py has within: `python sample.py like=PICTURE.png` makes it again."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from atelier.core.errors import UserError
from atelier.runs.pages import key_of, task_words

OWN = ("like", "out", "batch_size", "images_seen")  # of a request that are no part of what a picture is


def request(cfg: DictConfig) -> DictConfig:
    """The request of the picture that `like` names, but for what was typed; the config itself where it names none.

    Raises:
        UserError: the picture has no request within.
    """
    if cfg.like is None:
        return cfg
    typed = {key_of(word.lstrip("+~")).split(".")[0] for word in task_words()}
    typed |= {"adapter_weights"} if "adapters" in typed else set()  # one request
    found = {key: value for key, value in _within(cfg.like).items() if key not in {*typed, *OWN}}
    made = cfg.copy()
    OmegaConf.set_struct(made, False)
    for key, value in found.items():
        made[key] = value
    return made


def _within(path: str) -> dict[str, Any]:
    from atelier.images.pictures import REQUESTED, png_texts  # torchvision takes seconds, which a mistake need not wait

    try:
        return dict(json.loads(png_texts(path)[REQUESTED]))
    except (OSError, KeyError, ValueError, TypeError) as error:
        problem = getattr(error, "strerror", None) or "it is no picture with a request within"
        raise UserError("like", path, problem, "like=A_PICTURE that sample.py made") from error
