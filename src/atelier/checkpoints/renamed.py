"""Names of before: what the config and the weights of an older run call things, and what they are called today."""

from __future__ import annotations

from typing import Any

TARGETS = {  # a `_target_`, or with a dot at the end the beginning of one
    "atelier.trainer.": "atelier.runs.trainer.",
    "atelier.loggers.": "atelier.runs.loggers.",
    "atelier.callbacks.judging.": "atelier.evaluation.evaluator.",
    "atelier.nets.conditioning.Condition": "atelier.nets.conditioning.ConditionEmbedder",
}
WEIGHTS = {"nothing": "null_embedding"}  # the last part of a weight's name


def today(node: Any) -> Any:
    """A stored config, as plain values, in the names of today."""
    if isinstance(node, list):
        return [today(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: today(value) for key, value in node.items()}
    if "_target_" in node:
        node["_target_"] = _target(str(node["_target_"]))
    return node


def weights(node: Any) -> Any:
    """A loaded checkpoint or state dict, its weights under the names of today; changed in place."""
    for key in list(node) if isinstance(node, dict) else ():
        value = weights(node.pop(key))
        place, dot, last = str(key).rpartition(".")
        node[place + dot + WEIGHTS[last] if last in WEIGHTS else key] = value
    return node


def _target(path: str) -> str:
    old = next((old for old in TARGETS if path == old or old.endswith(".") and path.startswith(old)), path)
    return TARGETS.get(old, old) + path.removeprefix(old)
