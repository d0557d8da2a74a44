"""Guidance, conditions, averages and batches in what a diffusion model samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from atelier.core.rng import ImageRngs
from atelier.diffusion.bound import bits, prior_term
from atelier.diffusion.objective import _named
from atelier.diffusion.samplers import Euler
from atelier.models.ddpm import DDPM
from atelier.runs import build, folders
from tests.compose import composed
from tests.conftest import overrides

TINY = [  # beside tests/tiny.py:COMMON
    "model=flow",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[]",
    "model.net.cond_dim=8",
    "model.embedder.dim=8",
    "model.net.dropout=0.2",
    "model.net.patch_size=2",
    "model.sampler.steps=2",
]

LEVEL = 1 / 127.5


@pytest.fixture
def loaded(finished: dict[str, Path]) -> folders.LoadedRun:
    """The tiny run with weights that tell its conditions apart."""
    found = folders.load(finished["ddpm"], ema=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in found.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return found


def sampled(
    loaded: folders.LoadedRun, n: int = 8, first: int = 0, cond: dict | None = None, **options: object
) -> torch.Tensor:
    cond = loaded.model.condition(loaded.data.test_batch(first, n), "") if cond is None else cond
    with torch.inference_mode():
        return loaded.model.sample(cond, ImageRngs(0, first, n), **options)


def test_guidance_1_calls_the_net_with_its_condition_alone(loaded: folders.LoadedRun) -> None:
    """Equal to the same model without guidance: the net under its condition, nothing else."""
    model, cond = loaded.model, loaded.model.condition(loaded.data.test_batch(0, 8), "")
    rngs, sizes = ImageRngs(0, 0, 8), []
    with torch.inference_mode():
        noise, told = rngs.randn(3, 8, 8), model.embedder(cond, 8)
        expected = model.diffusion_sampler.sampler(
            lambda x_t, t: model.objective.denoise(model.net, x_t, t, told).clamp(-1, 1),
            noise, model.objective.schedule, rngs,
        )  # fmt: skip
        hook = model.net.register_forward_hook(lambda net, args, out: sizes.append(len(out)))
        assert torch.equal(sampled(loaded, guidance=1.0), expected)
        hook.remove()
    assert set(sizes) == {8}
    assert (sampled(loaded, guidance=3.0) - expected).abs().max() > LEVEL


def test_guidance_0_asks_for_nothing(loaded: folders.LoadedRun) -> None:
    cond = loaded.model.condition(loaded.data.test_batch(0, 8), "")
    shuffled = {name: value.flip(0) for name, value in cond.items()}
    free, other = (sampled(loaded, cond=c, guidance=0.0) for c in (cond, shuffled))
    assert (free - other).abs().max() < 1e-5


def test_shuffled_conditions_change_samples(loaded: folders.LoadedRun) -> None:
    cond = loaded.model.condition(loaded.data.test_batch(0, 8), "")
    shuffled = {name: value.roll(1, 0) for name, value in cond.items()}
    difference = (sampled(loaded, cond=cond) - sampled(loaded, cond=shuffled)).abs().flatten(1).amax(1)
    assert difference.min() > LEVEL


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_image_k_is_that_of_any_batch(loaded: folders.LoadedRun, guidance: float) -> None:
    together = sampled(loaded, guidance=guidance)
    for k in (0, 5, 7):
        alone = sampled(loaded, n=1, first=k, guidance=guidance)
        assert (together[k] - alone[0]).abs().max() <= LEVEL
    assert (together[5] - together[4]).abs().max() > LEVEL


def test_ema_off_changes_samples(tmp_path: Path) -> None:
    words = ["model.optimizer.lr=0.01", "model.optimizer.warmup_images=0", "budget.images=32"]
    train.train(composed(*overrides("ddpm"), *words, run_dir=tmp_path))
    averaged, raw = (sampled(folders.load(tmp_path, ema=ema)) for ema in (True, False))
    assert (averaged - raw).abs().max() > LEVEL


def test_another_sampler_is_taken_for_this_request(loaded: folders.LoadedRun) -> None:
    own, other = sampled(loaded), sampled(loaded, sampler=Euler(steps=5, grid="karras"))
    assert (own - other).abs().max() > LEVEL
    assert torch.equal(own, sampled(loaded))
    assert loaded.model.protocol() == {
        "sampler": str(loaded.model.diffusion_sampler.sampler),
        "nfe": 2,
        "guidance": 2.0,
    }


def test_the_condition_is_dropped_as_often_as_asked() -> None:
    model: DDPM = build.model(composed(*overrides("ddpm"), "model.cond_dropout=0.3"), Path("unused"))
    n, vectors = 4000, []
    torch.manual_seed(0)
    del model.objective
    model.objective = lambda net, x, cond, images_seen: vectors.append(cond.vector) or cond.vector.sum(1)
    model.objective.terms = {}
    model.training_step({"image": torch.zeros(n, 1), "label": torch.zeros(n).long(), "attributes": torch.ones(n, 14)})
    dropped = (vectors[0] == model.embedder.null_embedding).all(1)
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_loss_is_the_mean_objective(loaded: folders.LoadedRun) -> None:
    model, batch = loaded.model, loaded.data.test_batch(0, 4)
    torch.manual_seed(5)
    loss = model.training_step(batch)
    torch.manual_seed(5)
    cond = model.embedder(model.condition(batch, ""), 4)
    cond = cond.drop(torch.rand(4) < model.cond_dropout, model.embedder.null(4))
    assert torch.equal(loss, model.objective(model.net, batch["image"], cond).mean())
    assert torch.equal(model.reported["loss"], loss.detach())


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_training_by_the_bound_tells_its_three_terms(loss: str) -> None:
    """Their sum is the bound that was brought down; a model of the plain error tells none and is not measured by it."""
    words = [*overrides("ddpm"), "model=iddpm", f"model.objective.loss={loss}", "model.net.heads=1"]
    model: DDPM = build.model(composed(*words), Path("unused"))
    batch = build.data(composed(*words)).test_batch(0, 4)
    model.training_step(batch)
    parts = [model.reported[f"vlb_{name}"].item() for name in ("prior", "steps", "image")]
    assert parts[0] == bits(prior_term(batch["image"], model.objective.schedule), batch["image"]).mean()
    if loss == "vlb":
        assert sum(parts[1:]) == pytest.approx(model.reported["loss"].item(), rel=1e-5)
    plain: DDPM = build.model(composed(*overrides("ddpm")), Path("unused"))
    plain.training_step(batch)
    assert set(plain.reported) == {"loss"} and model.trained_by_bound and not plain.trained_by_bound


def test_a_term_without_a_level_below_is_that_of_the_image() -> None:
    terms = _named(torch.tensor([4.0, 6.0, 2.0, 8.0]), torch.tensor([0.1, 0.0, 0.5, 0.0]), torch.tensor([1.0, 3.0]))
    assert {name: term.item() for name, term in terms.items()} == {"vlb_prior": 2, "vlb_steps": 1.5, "vlb_image": 3.5}


def test_losses_and_samples_are_float32_under_bf16(loaded: folders.LoadedRun) -> None:
    seen: list[torch.dtype] = []
    convolutions = [m for m in loaded.model.net.modules() if isinstance(m, torch.nn.Conv2d)]
    convolutions[-1].register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        per_image = loaded.model.objective(loaded.model.net, torch.zeros(2, 3, 8, 8), loaded.model.embedder.null(2))
        loss = loaded.model.training_step(loaded.data.test_batch(0, 2))
        images = sampled(loaded, n=2)
    assert set(seen) == {torch.bfloat16}  # autocast was on
    assert {per_image.dtype, loss.dtype, images.dtype} == {torch.float32}


@pytest.mark.parametrize(("recipe", "millions"), [("cifar10_ddpm", 35.746), ("celeba_ddpm", 78.7)])
def test_the_papers_nets_have_the_papers_size(recipe: str, millions: float) -> None:
    """Ho et al. 2020, section 4: 35.7 M; Song et al. 2021 (DDIM) use about 79 M at 64 px."""
    model = build.model(composed(f"experiment={recipe}"), Path("unused"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
