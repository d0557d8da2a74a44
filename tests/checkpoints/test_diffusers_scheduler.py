"""Schedulers of diffusers: what their files say here, and what ours say there, by the ways that both take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier.checkpoints import diffusers_scheduler
from atelier.checkpoints.diffusers_scheduler import Scheduler
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.multistep import PLMS, DPMSolver2M
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Sampler, last
from atelier.diffusion.schedules import Cosine, DiscreteSchedule, Flow, Linear, ScaledLinear, ZeroTerminal
from atelier.diffusion.targets import X0, Epsilon, Target, VectorField, Velocity

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs

SHAPE, N = (2, 3, 4, 4), 10
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
V = {"prediction_type": "v_prediction", "clip_sample": False}
PUBLISHED = {  # as the configs of the published models say
    "SD1": ("PNDM", BETAS | {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "SD2": ("DDIM", BETAS | LEADING | V | {"set_alpha_to_one": False}),
    "zero SNR": ("DDIM", BETAS | V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "SDXL": ("EulerDiscrete", BETAS | LEADING),
    "turbo": ("EulerAncestralDiscrete", BETAS | {"timestep_spacing": "trailing"}),
    "karras": ("EulerDiscrete", BETAS | {"use_karras_sigmas": True}),
    "DDPM": ("DDPM", {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}),
    "x0": ("DDIM", {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}),
}  # fmt: skip


def net(x: Tensor) -> Tensor:
    """An answer that does not know the time, and is about the noise where there is much."""
    return x.double() - torch.tanh(torch.einsum("ij,njhw->nihw", MIX, x.double())) / 20


def our_end(found: Scheduler) -> Tensor:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = found.schedule.pair(t, like=x_t)
        return found.target.denoised(net(x_t), x_t, alpha, sigma)

    return last(found.sampler.trajectory(denoise, NOISE, found.schedule, ImageRngs(7, 0, SHAPE[0])))


def their_end(made: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """With the noise that ours draws."""
    rngs = ImageRngs(7, 0, SHAPE[0])
    for module in ("ddpm", "ddim", "euler_ancestral_discrete"):
        drawn = lambda *_, **__: rngs.randn(*SHAPE[1:]).double()  # noqa: E731
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", drawn)
    made.set_timesteps(N)
    scaled = hasattr(made, "sigmas")  # of Euler, whose x is not brought to unit size
    x = NOISE * float((made.sigmas[0] ** 2 + 1).sqrt()) if scaled else NOISE
    for t in made.timesteps:
        x = made.step(net(made.scale_model_input(x, t)), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_leads_where_theirs_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = PUBLISHED[name]
    theirs = getattr(diffusers, f"{kind}Scheduler")(**options)
    theirs.save_pretrained(tmp_path)
    found = diffusers_scheduler.read(tmp_path, N)
    torch.testing.assert_close(our_end(found), their_end(theirs, monkeypatch).double(), atol=3e-5, rtol=3e-5)


OURS = [
    (ScaledLinear(), Epsilon(), PLMS(steps=N, spacing="leading", offset=1, to_image=False)),
    (Linear(), Velocity(), DDIM(steps=N, spacing="leading", offset=1, to_image=False)),
    (ZeroTerminal(ScaledLinear()), Velocity(), DDIM(steps=N)),
    (Cosine(), X0(), Ancestral(steps=N, variance="large")),
    (ScaledLinear(500, 1e-3, 2e-2), Epsilon(), Euler(steps=N, grid="karras")),
    (ScaledLinear(), Epsilon(), DDIM(steps=N, eta=1.0)),
]


@pytest.mark.parametrize(("schedule", "target", "sampler"), OURS, ids=lambda one: type(one).__name__)
def test_what_is_written_is_read_again(
    schedule: DiscreteSchedule, target: Target, sampler: Sampler, tmp_path: Path
) -> None:
    diffusers_scheduler.write(Scheduler(schedule, target, sampler), tmp_path)
    found = diffusers_scheduler.read(tmp_path, N)
    torch.testing.assert_close(found.schedule.logsnrs, schedule.logsnrs, atol=1e-6, rtol=1e-6)
    assert type(found.target) is type(target) and found.sampler == sampler
    kind = json.loads((tmp_path / diffusers_scheduler.CONFIG).read_text())["_class_name"]
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.logsnrs.sigmoid(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("changed", "problem"), [
    ({"_class_name": "LCMScheduler"}, "it holds a LCMScheduler, not PNDMScheduler, "),
    ({"clip_sample": True}, "clip_sample is True, not False"),
    ({"thresholding": True}, "thresholding is True, not False"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule is sigmoid"),
    ({"prediction_type": "flow"}, "prediction_type is flow, not epsilon or v_prediction or sample"),
])  # fmt: skip
def test_what_no_sampler_here_does_is_refused(changed: dict[str, Any], problem: str, tmp_path: Path) -> None:
    diffusers_scheduler.write(Scheduler(ScaledLinear(), Epsilon(), DDIM(steps=N)), tmp_path)
    path = tmp_path / diffusers_scheduler.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError) as caught:
        diffusers_scheduler.read(tmp_path)
    assert caught.value.problem.startswith(problem)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable scheduler_config.json"):
        diffusers_scheduler.read(tmp_path)
    (tmp_path / diffusers_scheduler.CONFIG).write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        diffusers_scheduler.read(tmp_path)


@pytest.mark.parametrize(("schedule", "target", "sampler"), [
    (Flow(), VectorField(), Euler(steps=N)),
    (ScaledLinear(), VectorField(), Euler(steps=N)),
    (ScaledLinear(), Epsilon(), DPMSolver2M(steps=N)),
    (ScaledLinear(), Epsilon(), DDIM(steps=N, grid="logsnr")),
    (ScaledLinear(), Epsilon(), DDIM(steps=N, eta=0.5)),
    (ScaledLinear(), Epsilon(), Euler(steps=N, to_image=False)),
])  # fmt: skip
def test_what_diffusers_has_not_is_not_written(schedule: Any, target: Target, sampler: Sampler, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scheduler of diffusers"):
        diffusers_scheduler.write(Scheduler(schedule, target, sampler), tmp_path / "x")
    assert not (tmp_path / "x").exists()
