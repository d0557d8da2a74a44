"""Names of before: what the config and the weights of an older run call things, and what they are called today."""

from __future__ import annotations

from typing import Any

TARGETS = {  # the beginning of a `_target_`
    "atelier.trainer.": "atelier.runs.trainer.",
    "atelier.loggers.": "atelier.runs.loggers.",
    "atelier.callbacks.judging.": "atelier.evaluation.evaluator.",
    "atelier.models.progan.StyleGAN": "atelier.models.stylegan.StyleGAN",
}


def today(node: Any) -> Any:
    """A stored config, as plain values, in the names of today."""
    if isinstance(node, list):
        return [today(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: today(value) for key, value in node.items()}
    if "_target_" in node:
        node["_target_"] = _target(node["_target_"])
    return node


def _target(path: str) -> str:
    old = next((old for old in TARGETS if str(path).startswith(old)), None)
    return path if old is None else TARGETS[old] + path.removeprefix(old)
