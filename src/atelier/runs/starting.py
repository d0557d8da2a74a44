"""A run that begins with the weights of a finished one: a text-to-image model that is to fill holes, another set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from atelier.core.lines import say
from atelier.runs import build, preflight, pretrained

if TYPE_CHECKING:
    from atelier.models.base import Model


def start_from(model: Model, cfg: DictConfig) -> None:
    """Give a model the weights of the finished run that `start_from` names, if any.

    Its first layer may look at planes that the other's did not; their weights begin at zero, so that it begins as the
    other. Everything else is the same, also the runs that both stand on, by their hashes.

    Raises:
        UserError: no finished run lies there, or the two are not alike.
    """
    if cfg.start_from is None or cfg.get("lora") is not None:  # adapters: `build.model` has them
        return
    folder = preflight.beginning(cfg.start_from)
    stored = build.stored_config(folder)
    pretrained.refuse_other_parts(cfg, stored, folder)
    model.begin_with(build.weights(folder / "weights.safetensors", "start_from"), "start_from")
    say(f"begins with the weights of {folder}")
