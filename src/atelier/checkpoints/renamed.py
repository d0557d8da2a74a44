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
    "atelier.callbacks.judging.Judging": "atelier.evaluation.evaluator.Evaluator",
    "atelier.nets.conditioning.Condition": "atelier.nets.conditioning.ConditionEmbedder",
    "atelier.models.progan.StyleGAN": "atelier.models.stylegan.StyleGAN",
}
TARGET = {"eps": "targets.Epsilon", "x0": "targets.X0", "v": "targets.Velocity", "flow": "targets.VectorField"}
LOGIT_NORMAL = {  # argument today -> (argument then, its default)
    "logit_mean": ("mean", 0.0),
    "logit_std": ("deviation", 1.0),
    "logit_mean_end": ("mean_end", None),
    "logit_mean_images": ("mean_images", 1),
}
KEYS = {  # names of classes, as today, -> their arguments
    "AutoencoderKL": {
        "discriminator_from": "discriminator_start",
        "listen_from": "adversarial_start",
        "penalty_weight": "kl_weight",
    },
    "CGANDiscriminator": {"spectral": "norm", "told": "conditioning"},
    "CGANGenerator": {"told": "conditioning"},
    "CausalTransformer": {"depth": "n_layers"},
    "DCDiscriminator": {"group": "mbstd_group_size", "most": "channel_max"},
    "DCGenerator": {"mapping": "mapping_dim", "most": "channel_max"},
    "DDPM LDM VQPrior": {"drop": "cond_dropout"},
    "GAN": {"codes": "categorical_codes", "lipschitz_weight": "gp_weight"},
    "ImagePool": {"channels": "image_channels"},
    "KLNet VQGANNet": {"blocks": "n_blocks"},
    "ProDiscriminator ProGenerator StyleGAN2Discriminator": {"base": "channel_base", "most": "channel_max"},
    "ProGAN": {"lipschitz_weight": "gp_weight", "pieces": "microbatches"},
    "Pyramid glow": {"levels": "n_levels"},
    "R3Discriminator R3Generator": {"blocks": "n_blocks", "most": "channel_max"},
    "RRDBNet": {"blocks": "n_blocks", "factor": "scale_factor"},
    "ResNetTranslator VAENet": {"downs": "n_downs", "patch": "patch_size"},
    "SRDiscriminator": {"batch_norm": "norm"},
    "SRGAN": {"pixel": "pixel_loss"},
    "SRResNet": {"batch_norm": "norm", "blocks": "n_blocks", "factor": "scale_factor"},
    "StarGAN": {"lipschitz_weight": "gp_weight"},
    "StyleGAN": {
        "lipschitz_weight": "gp_weight",
        "mean_memory": "style_ema_decay",
        "mixing": "style_mixing_prob",
        "pieces": "microbatches",
    },
    "StyleGAN2": {"mean_memory": "style_ema_decay", "mixing": "style_mixing_prob", "path_memory": "path_ema_decay"},
    "StyleGAN2Generator StyleGenerator": {
        "base": "channel_base",
        "depth": "n_layers",
        "mapping_speed": "mapping_lr_multiplier",
        "most": "channel_max",
    },
    "SuperRes": {"factor": "scale_factor"},
    "UNet": {"blocks": "n_blocks", "patch": "patch_size"},
    "UNetTranslator": {"downs": "n_downs", "levels": "source_levels"},
    "VAE": {"beta_images": "beta_warmup_images", "nll_draws": "nll_samples"},
    "VQGAN": {
        "discriminator_from": "discriminator_start",
        "listen_from": "adversarial_start",
        "penalty_weight": "codebook_weight",
    },
    "VQNet": {"blocks": "n_blocks", "downs": "n_downs", "patch": "patch_size"},
    "VectorQuantizer": {
        "commitment": "commitment_weight",
        "decay": "ema_decay",
        "kmeans": "kmeans_init",
        "revive_below": "dead_code_threshold",
    },
    "realnvp": {"blocks": "n_blocks", "levels": "n_levels"},
}
DATA = {"channels": "image_channels"}  # of every set
VALUES = {  # classes, as today, -> argument -> value -> word that it is now
    "CGANDiscriminator": {"norm": {True: "spectral", False: "none"}},
    "SRDiscriminator": {"norm": {True: "batch", False: "none"}},
    "SRResNet": {"norm": {True: "batch", False: "none"}},
    "Shapes": {"task": {"recast": "attribute_transfer"}},
}
WEIGHTS = {"nothing": "null_embedding", "told": "conditioning"}  # parts of a weight's name


def today(node: Any) -> Any:
    """A stored config, as plain values, in the names of today."""
    if isinstance(node, list):
        return [today(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: today(value) for key, value in node.items()}
    if "_target_" in node:
        node = _called(_target(str(node["_target_"])), node)
    if "judging" in node:
        node["evaluator"] = node.pop("judging")
    if isinstance(node.get("target"), str) and "weighting" in node:
        return _objective(node)
    if "objective" in node and "guidance" in node:
        node["guider"] = _made("guidance.ClassifierFree", {"guidance": node.pop("guidance")})
    return node


def argument(target: str, name: str, value: Any) -> tuple[str, Any]:
    """What an argument of a class or function of today, and its value, are called today."""
    ((name, value),) = ((key, word) for key, word in _called(target, {name: value}).items() if key != "_target_")
    return name, value


def _objective(old: dict[str, Any]) -> dict[str, Any]:
    """An objective of names and numbers as one of objects."""
    floor, space = old.get("floor", 0.0), old.get("space")
    weighting = _made("weightings.MinSNR", {"gamma": 5.0, "time_floor": floor})
    if old["weighting"] == "plain":
        weighting = _made("weightings.Plain")
    if space:
        weighting = _made("weightings.ErrorOf", {"loss_space": _made(TARGET[space]), "time_floor": floor})
    times = _made("times.Uniform")
    if old.get("density") == "logit_normal":
        times = _made("times.LogitNormal", {key: old.get(then, value) for key, (then, value) in LOGIT_NORMAL.items()})
    parts = {"target": _made(TARGET[old["target"]]), "weighting": weighting, "time_distribution": times}
    return {"_target_": old["_target_"], "schedule": old["schedule"], **parts}


def weights(node: Any) -> Any:
    """A loaded checkpoint or state dict, its weights under the names of today; changed in place."""
    for key in list(node) if isinstance(node, dict) else ():
        value = weights(node.pop(key))
        node[".".join(WEIGHTS.get(part, part) for part in key.split(".")) if isinstance(key, str) else key] = value
    return node


def _made(name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"_target_": f"atelier.diffusion.{name}", **(arguments or {})}


def _called(target: str, node: dict[str, Any]) -> dict[str, Any]:
    """A call, its arguments under the names that they have today."""
    name = target.rpartition(".")[2]
    keys = next((keys for classes, keys in KEYS.items() if name in classes.split()), {})
    keys = keys | (DATA if target.startswith("atelier.data.") else {})
    made = {keys.get(key, key): value for key, value in node.items()}
    for key, words in VALUES.get(name, {}).items():
        if isinstance(made.get(key), (str, bool)):
            made[key] = words.get(made[key], made[key])
    return made | {"_target_": target}


def _target(path: str) -> str:
    old = next((old for old in TARGETS if path == old or old.endswith(".") and path.startswith(old)), path)
    return TARGETS.get(old, old) + path.removeprefix(old)
