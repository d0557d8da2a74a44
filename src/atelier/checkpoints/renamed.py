"""Names of before: what the config and the weights of an older run call things, and what they are called today."""

from __future__ import annotations

from typing import Any

TARGETS = {  # a `_target_`, or with a dot at the end the beginning of one
    "atelier.nets.autoencoder.KLNet": "atelier.nets.autoencoder_kl.KLNet",
    "atelier.nets.autoencoder.VQGANNet": "atelier.nets.vqgan.VQGANNet",
    "atelier.nets.dcgan.MLPGenerator": "atelier.nets.gan.MLPGenerator",
    "atelier.nets.dcgan.MLPDiscriminator": "atelier.nets.gan.MLPDiscriminator",
    "atelier.nets.flows.": "atelier.nets.normalizing_flow.",
    "atelier.nets.gan.DiscriminatorNet": "atelier.nets.cgan.CGANDiscriminator",
    "atelier.nets.gan.GeneratorNet": "atelier.nets.cgan.CGANGenerator",
    "atelier.nets.progan.StyleGenerator": "atelier.nets.stylegan.StyleGenerator",
    "atelier.nets.rrdb.": "atelier.nets.esrgan.",
    "atelier.nets.stylegan2.StyleDiscriminator": "atelier.nets.stylegan2.StyleGAN2Discriminator",
    "atelier.nets.stylegan2.StyleGenerator": "atelier.nets.stylegan2.StyleGAN2Generator",
    "atelier.diffusion.samplers.DDPM": "atelier.diffusion.samplers.Ancestral",
    "atelier.trainer.": "atelier.runs.trainer.",
    "atelier.loggers.": "atelier.runs.loggers.",
    "atelier.callbacks.judging.": "atelier.evaluation.evaluator.",
    "atelier.nets.conditioning.Condition": "atelier.nets.conditioning.ConditionEmbedder",
    "atelier.models.progan.StyleGAN": "atelier.models.stylegan.StyleGAN",
}
TARGET = {"eps": "targets.Epsilon", "x0": "targets.X0", "v": "targets.Velocity", "flow": "targets.VectorField"}
LOGIT_NORMAL = {"mean": 0.0, "deviation": 1.0, "mean_end": None, "mean_images": 1}
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
    if isinstance(node.get("target"), str) and "weighting" in node:
        return _objective(node)
    if "objective" in node and "guidance" in node:
        node["guider"] = _made("guidance.ClassifierFree", {"guidance": node.pop("guidance")})
    return node


def _objective(old: dict[str, Any]) -> dict[str, Any]:
    """An objective of names and numbers as one of objects."""
    floor, space = old.get("floor", 0.0), old.get("space")
    weighting = _made("weightings.MinSNR", {"gamma": 5.0, "floor": floor})
    if old["weighting"] == "plain":
        weighting = _made("weightings.Plain")
    if space:
        weighting = _made("weightings.ErrorOf", {"space": _made(TARGET[space]), "floor": floor})
    times = _made("times.Uniform")
    if old.get("density") == "logit_normal":
        times = _made("times.LogitNormal", {key: old.get(key, value) for key, value in LOGIT_NORMAL.items()})
    parts = {"target": _made(TARGET[old["target"]]), "weighting": weighting, "time_distribution": times}
    return {"_target_": old["_target_"], "schedule": old["schedule"], **parts}


def weights(node: Any) -> Any:
    """A loaded checkpoint or state dict, its weights under the names of today; changed in place."""
    for key in list(node) if isinstance(node, dict) else ():
        value = weights(node.pop(key))
        place, dot, last = str(key).rpartition(".")
        node[place + dot + WEIGHTS[last] if last in WEIGHTS else key] = value
    return node


def _made(name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"_target_": f"atelier.diffusion.{name}", **(arguments or {})}


def _target(path: str) -> str:
    old = next((old for old in TARGETS if path == old or old.endswith(".") and path.startswith(old)), path)
    return TARGETS.get(old, old) + path.removeprefix(old)
