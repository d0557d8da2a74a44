"""Each family as small as it goes: 8 px, nets of a few hundred weights, seconds a run."""

from pathlib import Path

COMMON = [
    "data=shapes",
    "data.image_size=8",
    "data.batch_size=8",
    "data.n_train_scenes=20",
    "data.n_test_scenes=16",
    "budget.images=96",
    "eval.every_images=32",
    "eval.n_samples=8",
    "eval.n_real=8",
    "eval.batch_size=4",
    "checkpoint.every_images=24",
    "callbacks.table.every_images=8",
    "callbacks.grids.every_images=1000",
    "callbacks.grids.n=4",
    "callbacks.ema.half_lives=[16,64]",
    "callbacks.ema.ramp=1.0",
    "metrics=none",
    "trainer=cpu",
    "trainer.precision=32-true",
]
UNET = [
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[]",
    "model.net.cond_dim=8",
    "model.embedder.dim=8",
]
STANDS_ON = {"ldm": "vae", "vqprior": "vqvae"}  # a family -> the one whose run it needs, which comes before it
FOUR = ("ddpm", "gan", "vae", "ldm")  # the shapes of module: one optimizer, two, an autoencoder, one on another run
TINY: dict[str, list[str]] = {
    "ddpm": ["model=flow", *COMMON, *UNET, "model.net.dropout=0.2", "model.net.patch=2", "model.sampler.steps=2"],
    "ae": ["model=ae", *COMMON, "model.net.width=4", "model.net.downs=1", "model.net.latent_channels=2"],
    "vae": ["model=vae", *COMMON, "model.net.width=4", "model.net.downs=1", "model.net.latent_channels=2"],
    "gan": [
        "model=cgan",
        "augment@model.augment=ada",
        *COMMON,
        "model.augment.every_images=16",
        "model.augment.images_per_unit=200",
        "model.generator.width=2",
        "model.discriminator.width=2",
        "model.n_critic=2",
        "model.penalty_every=3",
        *(f"model.{part}={size}" for part, size in {"generator.noise_dim": 4, "generator.cond_dim": 4}.items()),
        "model.discriminator.cond_dim=4",
        "model.generator_embedder.dim=4",
        "model.discriminator_embedder.dim=4",
    ],
    "ldm": [
        "model=ldm",
        *COMMON,
        *UNET,
        "model.first_stage.run=FIRST",
        "model.net.image_size=4",
        "model.net.image_channels=2",
        "model.sampler.steps=2",
    ],
    "vqvae": [
        "model=vqvae",
        *COMMON,
        "model.net.width=4",
        "model.net.blocks=1",
        "model.net.quantizer.n_codes=8",
        "model.net.quantizer.dim=2",
    ],
    "vqprior": [
        "model=vqprior",
        *COMMON,
        "model.first_stage.run=FIRST",
        "model.net.width=8",
        "model.net.depth=1",
        "model.net.heads=2",
        "model.net.dropout=0.1",
        "model.embedder.dim=4",
    ],
    "first_stage": [
        "model=vqgan",
        *COMMON,
        "model.net.width=4",
        "model.net.multipliers=[1,2]",
        "model.net.latent_channels=2",
        "model.net.quantizer.n_codes=8",
        "model.net.quantizer.dim=2",
        "model.perceptual.levels=1",
        "model.discriminator.width=4",
        "model.discriminator.n_layers=1",
        "model.discriminator_from=16",
        "model.listen_from=40",
    ],
    "stylegan2": [
        "model=stylegan2",
        "augment@model.augment=ada",
        *COMMON,
        "model.augment.every_images=16",
        "model.augment.images_per_unit=200",
        "model.generator.base=64",
        "model.generator.most=8",
        *(f"model.generator.{part}=4" for part in ("noise_dim", "style_dim", "cond_dim")),
        "model.discriminator.cond_dim=4",
        "model.generator_embedder.dim=4",
        "model.discriminator_embedder.dim=4",
        "model.r1_every=3",
        "model.path_every=2",
    ],
    "normalizing_flow": [
        "model=glow",
        *COMMON,
        "model.net.width=4",
        "model.net.levels=2",
        "model.net.steps=1",
        "model.embedder.dim=4",
    ],
}


def tiny(family: str, root: Path | str) -> list[str]:
    """The words of a family's run, which stands on a run in `root`."""
    return [word.replace("FIRST", f"{root}/{STANDS_ON.get(family)}") for word in TINY[family]]
