"""A family that needs gradients while it samples: short-run Langevin dynamics on an energy   (Nijkamp et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import evaluate
import sample as entry
import train
from atelier.core.batch import Batch
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Asked, ConditionalDenoise, Denoise, Guider
from atelier.diffusion.samplers import Euler, StepContext
from atelier.diffusion.schedules import NoiseLevel
from atelier.models.base import Cond, Generator, sampling_mode
from atelier.models.ldm import LDM
from atelier.optim import adamw
from atelier.runs import build, folders
from tests.compose import composed
from tests.conftest import overrides
from tests.tiny import COMMON


class Energy(Generator):
    """E(x) = |x - mean|^2 / (2 variance), descended with noise."""

    ema_nets = ("net",)
    needs_grad = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 1, 1)
        nn.init.zeros_(self.net.weight)

    def energy(self, x: Tensor) -> Tensor:
        return 50 * (x - 0.5).square().flatten(1).sum(1) + self.net(x).flatten(1).sum(1)  # (B,)

    def training_step(self, batch: Batch) -> Tensor:
        return self.energy(batch["image"]).mean() - self.energy(self.sample({}, ImageRngs(0, 0, 2))).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(
            self.parameters(),
            lr=1e-6,
            betas=[0.9, 0.99],
            weight_decay=0.0,
            warmup_images=0,
            decay="constant",
            decay_from=0,
            decay_to=16,
        )

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        x, step = rngs.randn(3, 8, 8, device=self.device), 0.005
        for _ in range(30):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.energy(x).sum(), x)
            x = x - step * slope + (2 * step) ** 0.5 * rngs.randn(3, 8, 8, device=self.device)
        return x.detach()


def test_it_trains_draws_its_grids_is_judged_and_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every place that samples; under inference mode there would be no gradient to take."""
    monkeypatch.setattr(build, "model", lambda cfg, folder: Energy())
    run = tmp_path / "run"
    words = [*COMMON, "budget.images=16", "eval.every_images=16", "callbacks.grids.every_images=8"]
    train.train(composed("model=flow", "data.conditions=[]", *words, run_dir=run))
    assert len(list((run / "samples").glob("samples_*.png"))) == 2
    entry.sample(composed(f"run={run}", "n=3", f"out={tmp_path / 'out'}", config="sample"))
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == 3
    evaluate.evaluate(composed(f"run={run}", "eval.n_samples=4", "eval.n_real=4", "metrics=none", config="evaluate"))
    assert (run / "evaluations.jsonl").exists()


# ---- a guider, or a sampler, of a family that needs none itself


def descent(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of squares of `value` at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(value(x).square().sum(), x)[0]


@dataclass(frozen=True, kw_only=True)
class Darker(Guider):
    """Guidance by the gradient of a brightness, as by that of a classifier   (Dhariwal & Nichol 2021, eq. 10)."""

    needs_grad: ClassVar[bool] = True
    shade: float = 0.0

    def __call__(self, denoise: ConditionalDenoise, asked: Asked) -> Denoise:
        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            denoised = denoise(x_t, t, asked.known)
            return denoised - self.guidance * descent(lambda x: denoise(x, t, asked.known) - self.shade, x_t)

        return guided


@dataclass(frozen=True, kw_only=True)
class Corrected(Euler):
    """Each step also goes down the norm of what is denoised."""

    needs_grad: ClassVar[bool] = True

    def step(self, x: Tensor, t: NoiseLevel, s: NoiseLevel, context: StepContext) -> tuple[Tensor, Tensor]:
        slope = descent(lambda x: context.predict(x, t), x)
        return super().step(x - 0.1 * slope, t, s, context)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "ddpm"
    train.train(composed(*overrides("ddpm"), "budget.images=8", run_dir=folder))
    return folder


def test_a_guider_may_need_gradients(run: Path) -> None:
    loaded = folders.load(run, ema=False)
    model, cond = loaded.model, loaded.model.condition(loaded.data.test_batch(0, 4), "")
    assert not model.needs_grad
    plain = sampled(model, cond, {})
    model.diffusion_sampler = replace(model.diffusion_sampler, guider=Darker(guidance=0.5))
    assert model.needs_grad and LDM.needs_grad.fget(SimpleNamespace(diffusion_sampler=model.diffusion_sampler))
    assert sampled(model, cond, {}).square().mean() < 0.9 * plain.square().mean()
    assert not model.diffusion_sampler.protocol()["guider"].count("guidance")


def sampled(model: Generator, cond: Cond, options: dict[str, Any]) -> Tensor:
    with sampling_mode(model, options):
        return model.sample(cond, ImageRngs(0, 0, 4), **options)


def test_a_sampler_of_a_request_may_need_gradients(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both places where a request brings one; under inference mode it would end in an error."""
    monkeypatch.setattr(build, "options", lambda *asked: {"sampler": Corrected(steps=2)})
    entry.sample(composed(f"run={run}", "n=2", f"out={tmp_path / 'out'}", config="sample"))
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == 2
    evaluate.evaluate(composed(f"run={run}", "eval.n_samples=2", "eval.n_real=2", "metrics=none", config="evaluate"))
    assert "Corrected" in (run / "evaluations.jsonl").read_text()


def test_langevin_comes_to_the_gaussian_of_its_energy() -> None:
    model = Energy()
    with sampling_mode(model, {}):
        x = model.sample({}, ImageRngs(0, 0, 50))
    variance = 0.01 / (1 - 0.5 * 0.5)  # of steps of 0.005 at a curvature of 100: x -> x / 2 + noise of variance 0.01
    assert x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert x.var().item() == pytest.approx(variance, rel=0.05)


def test_a_model_that_needs_none_samples_in_inference_mode() -> None:
    with sampling_mode(SimpleNamespace(needs_grad=False), {}):
        assert torch.is_inference_mode_enabled()
    with sampling_mode(SimpleNamespace(needs_grad=True), {}):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
