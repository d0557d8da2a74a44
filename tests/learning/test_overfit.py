"""Each family learns 8 images by heart: one that cannot has a bug.

Distances are root mean square errors of [-1, 1] pixels; to the nearest of the 8 where nothing says which is meant.
A grey picture is 0.5 away or more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_uint8
from atelier.metrics.image import psnr
from atelier.runs import folders
from tests.compose import composed

COMMON = [
    "data=shapes", "data.limit=8", "data.batch_size=32", "eval.n_samples=8", "eval.n_real=8", "eval.batch_size=8",
    "metrics=none", "trainer=cpu", "trainer.precision=32-true", "checkpoint.every_images=1000000",
    "callbacks.grids.every_images=1000000", "callbacks.grids.n=8", "callbacks.ema.half_lives=[1000]",
]  # fmt: skip


STAR = [
    "adversarial@model.loss=non_saturating", "model.gp_weight=0", "model.r1_gamma=1", "model.n_critic=1",
    "model.generator.width=16", "model.generator_optimizer.lr=1e-3", "model.discriminator_optimizer.lr=5e-4",
    "model.identity_weight=10",
]  # fmt: skip


def learned(folder: Path, *words: str) -> folders.LoadedRun:
    train.train(composed(*COMMON, *words, run_dir=folder))
    return folders.load(folder, ema=True)


def images(loaded: folders.LoadedRun) -> tuple[Tensor, dict[str, Tensor]]:
    batch = loaded.data.split("train").read(list(range(8)), None)
    return batch["image"], loaded.model.condition(batch, "")


def distances(loaded: folders.LoadedRun) -> tuple[Tensor, Tensor]:
    """Of 8 samples, each under the condition of an image: to that image, and to the nearest."""
    real, cond = images(loaded)
    with torch.inference_mode():
        found = loaded.model.sample(cond, ImageRngs(1, 0, 8))
    apart = torch.cdist(found.flatten(1), real.flatten(1)) / real[0].numel() ** 0.5
    return apart.diagonal(), apart.amin(1)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> folders.LoadedRun:
    words = ["model=vae", "model.net.width=16", "budget.images=16000", "model.beta=0.1"]
    return learned(tmp_path_factory.mktemp("vae"), *words, "model.optimizer.warmup_images=500")


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory: pytest.TempPathFactory) -> folders.LoadedRun:
    words = ["model=vqvae", "model.net.width=16", "model.net.quantizer.n_codes=64", "budget.images=24000"]
    return learned(tmp_path_factory.mktemp("vqvae"), *words)


def given_back(loaded: folders.LoadedRun) -> float:
    """PSNR of the worst of the 8 reconstructions."""
    real, _ = images(loaded)
    with torch.inference_mode():
        back = loaded.model.decode(loaded.model.encode(real))
    return psnr(to_uint8(back), to_uint8(real)).min().item()


@pytest.mark.slow
def test_vae_gives_its_images_back(vae: folders.LoadedRun) -> None:
    assert given_back(vae) > 25


@pytest.mark.slow
def test_vqvae_gives_its_images_back(vqvae: folders.LoadedRun) -> None:
    assert given_back(vqvae) > 25


@pytest.mark.slow
def test_ae_gives_its_images_back(tmp_path: Path) -> None:
    assert given_back(learned(tmp_path, "model=ae", "model.net.width=16", "budget.images=16000")) > 25


@pytest.mark.slow
@pytest.mark.parametrize("page", ["autoencoder_kl", "vqgan"])
def test_first_stages_give_their_images_back(page: str, tmp_path: Path) -> None:
    words = [f"model={page}", "model.net.width=16", "model.discriminator.n_layers=1", "budget.images=16000"]
    words += ["model.discriminator_start=8000", "model.adversarial_start=10000", "model.generator_optimizer.lr=1e-3"]
    assert given_back(learned(tmp_path, *words)) > 25


@pytest.mark.slow
def test_vqprior_draws_the_image_that_is_asked_for(tmp_path: Path, vqvae: folders.LoadedRun) -> None:
    words = ["model=vqprior", f"model.first_stage.run={vqvae.folder}", "model.net.width=32", "budget.images=16000"]
    asked, _ = distances(learned(tmp_path, *words))
    assert asked.median() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("page", ["glow model.net.width=24 model.net.steps=4", "realnvp model.net.width=8"])
def test_flows_find_their_images_probable(page: str, tmp_path: Path) -> None:
    """And others not."""
    words = [*f"model={page}".split(), "model.net.n_levels=2", "budget.images=16000", "model.optimizer.lr=4e-3"]
    loaded = learned(tmp_path, *words)
    real, cond = images(loaded)
    batch = loaded.data.split("test").read(list(range(8)), None)
    rngs = ImageRngs(0, 0, 8)
    with torch.inference_mode():
        known = loaded.model.nll(real, cond, rngs) / (real[0].numel() * torch.log(torch.tensor(2.0)))
        other = loaded.model.nll(batch["image"], loaded.model.condition(batch, ""), rngs.again())
    assert known.max() < 2 and other.median() > 2 * known.max() * (real[0].numel() * torch.log(torch.tensor(2.0)))


@pytest.mark.slow
def test_ddpm_draws_the_image_that_is_asked_for(tmp_path: Path) -> None:
    words = ["model=flow", "model.net.width=16", "budget.images=24000", "model.optimizer.warmup_images=500"]
    asked, _ = distances(learned(tmp_path, *words, "model.guider.guidance=1.0", "model.optimizer.lr=2e-3"))
    assert asked.median() < 0.2


@pytest.mark.slow
def test_gan_draws_the_image_that_is_asked_for(tmp_path: Path) -> None:
    words = ["model=cgan", "model.generator.width=16", "model.discriminator.width=16", "budget.images=24000"]
    words += ["model.generator.conditioning=norm", "model.r1_gamma=0.3"]
    asked, _ = distances(learned(tmp_path, *words))
    assert asked.median() < 0.3


@pytest.mark.slow
def test_ldm_draws_the_image_that_is_asked_for(tmp_path: Path, vae: folders.LoadedRun) -> None:
    words = ["model=ldm", f"model.first_stage.run={vae.folder}", "model.net.width=32", "budget.images=32000"]
    words += ["model.optimizer.warmup_images=500", "model.guider.guidance=1.0", "model.optimizer.lr=2e-3"]
    asked, _ = distances(learned(tmp_path, *words))
    assert asked.median() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("page", ["stylegan2", "stylegan", "r3gan"])
def test_other_gans_draw_the_image_that_is_asked_for(page: str, tmp_path: Path) -> None:
    size = "model.generator.width=16" if page == "r3gan" else "model.generator.channel_base=256"
    words = [f"model={page}", size, "budget.images=24000", "data.batch_size=16", "model.r1_gamma=0.3"]
    if page != "r3gan":
        words += [f"model.{player}_optimizer.lr=1e-2" for player in ("generator", "discriminator")]
        words += ["model.style_mixing_prob=0"]
    if page == "stylegan":
        words += ["model.stable_images=1000", "model.fade_images=1000"]
    asked, _ = distances(learned(tmp_path, *words))
    assert asked.median() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "pix2pix label_map 22",
        "srresnet low_resolution 26",
        "stargan attribute_transfer 15",
        "cyclegan fill 15",
        "cut fill 13",
    ],
)
def test_translators_make_the_answers_to_their_sources(page: str, tmp_path: Path) -> None:
    name, task, decibels = page.split()
    words = [f"model={name}", f"data.task={task}", "data.batch_size=8", "budget.images=16000"]
    words += {"srresnet": ["data.image_size=32"], "stargan": STAR, "pix2pix": ["model.generator.source_levels=7"]}.get(
        name, []
    )
    loaded = learned(tmp_path, *words)
    batch = loaded.data.split("train").read(list(range(8)), None)
    for case in loaded.model.cases:
        with torch.inference_mode():
            made = loaded.model.sample(loaded.model.condition(batch, case), ImageRngs(1, 0, 8))
        found = psnr(to_uint8(made), to_uint8(loaded.model.answer(batch, case)))
        assert found.median() > float(decibels), (case, found)
