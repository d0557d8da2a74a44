"""float16 with a gradient scaler under two optimizers that are stepped by hand: what a T4 or a V100 trains with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from atelier.models.two_players import TwoPlayers
from atelier.runs import build
from tests.compose import composed
from tests.conftest import overrides
from tests.models.test_two_players import batch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCALE = 2.0**12
MEMBERS = {
    "gan": ["model.penalty_every=1", "model.n_critic=1"],
    "gan lazy": ["model.penalty_every=2", "model.n_critic=1"],
    "stylegan2": [],
    "progan": [],
    "stargan": ["model.n_critic=1"],
    "cyclegan": [],
    "first_stage": [
        "model.discriminator_start=0",
        "model.adversarial_start=0",
        "model.net.quantizer.kmeans_init=false",
    ],
}


def trained(
    name: str, device: str, scaler: torch.amp.GradScaler | None, monkeypatch: pytest.MonkeyPatch, ruined: str = ""
) -> tuple[TwoPlayers, dict[str, Tensor], dict[str, Tensor]]:
    """A model after one batch, its weights before, and what it reported; `ruined`: of this player the loss is huge."""
    torch.manual_seed(0)
    model = build.model(composed(*overrides(name.split()[0]), *MEMBERS[name]), Path("unused"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    if ruined:
        own = model.step
        huge = lambda o, loss, turn, *more: own(o, loss * (1e38 if turn == ruined else 1), turn, *more)  # noqa: E731
        monkeypatch.setattr(model, "step", huge)
    x = torch.rand(4, 3, 8, 8)
    images = dict.fromkeys(("image", "image_a", "image_b"), x) | {"target": torch.ones(4, 14)}
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        plugins=[MixedPrecision("16-mixed", device, scaler)] if scaler else [],
        precision=None if scaler else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)
    trainer.fit(model, DataLoader([batch() | images], collate_fn=lambda items: items[0], batch_size=1))
    return model, before, model.reported


def scaler_of(device: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_are_those_of_float32_and_not_scaled(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they are clipped and told; penalties among them, whose own gradient is taken before anything is scaled."""
    whole = trained(name, device, None, monkeypatch)[2]
    scaler = scaler_of(device)
    half = trained(name, device, scaler, monkeypatch)[2]
    norms = [term for term in whole if term.endswith("_gradient")]
    assert len(norms) >= 2 and set(half) == set(whole)
    for term in norms:
        assert half[term].item() == pytest.approx(whole[term].item(), rel=0.1, abs=1e-4), term
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gan", "stylegan2", "cyclegan", "first_stage"])
def test_a_player_whose_gradients_overflow_alone_skips_its_step(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = scaler_of(device)
    model, before, _ = trained(name, device, scaler, monkeypatch, ruined="discriminator")
    changed = {key for key, p in model.named_parameters() if not torch.equal(p.detach().cpu(), before[key])}
    assert not any("discriminator" in key.split(".")[0] for key in changed) or name == "stylegan2"
    assert any("discriminator" not in key.split(".")[0] for key in changed)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert scaler.get_scale() == SCALE / 2
