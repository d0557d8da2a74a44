"""A run that begins with the weights of a finished one: a text-to-image model that is to fill holes, another set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from atelier.core.errors import UserError
from atelier.runs import build, preflight

if TYPE_CHECKING:
    from atelier.models.base import Model


def start_from(model: Model, cfg: DictConfig) -> None:
    """Give a model the weights of the finished run that `start_from` names, if any.

    Its first layer may look at planes that the other's did not; their weights begin at zero, so that it begins as the
    other. Everything else is the same, also the runs that both stand on, by their hashes.

    Raises:
        UserError: no finished run lies there, or the two are not alike.
    """
    if cfg.start_from is None:
        return
    from safetensors.torch import load_file

    from atelier.checkpoints import renamed

    folder = preflight.beginning(cfg.start_from)
    stored = build.stored_config(folder)
    own, theirs = (_hashes(one) for one in (cfg, stored))
    if own.keys() == theirs.keys() and own != theirs:
        name = next(name for name in own if own[name] != theirs[name])
        problem = f"it stands on another {name}, whose numbers mean something else"
        raise UserError("start_from", folder, problem, f"model.{name}.run={build.section(stored, name).run}")
    model.begin_with(renamed.weights(load_file(folder / "weights.safetensors")), "start_from")
    print(f"begins with the weights of {folder}", flush=True)


def _hashes(cfg: DictConfig) -> dict[str, str]:
    """Part -> hash of its weights."""
    return {name: build.section(cfg, name).get("sha256", "") for name in build.parts(cfg)}
