"""Every GAN where a set tells it nothing, of all images or of some."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch

from atelier.runs import build
from tests.compose import composed
from tests.tiny import COMMON

SIZES = {
    "gan": ["model.generator.width=8", "model.discriminator.width=8"],
    "dcgan": ["model.generator.width=2", "model.discriminator.width=2"],
    "cgan": ["model.generator.width=2", "model.discriminator.width=2"],
    "r3gan": [f"model.{net}.{part}=4" for net in ("generator", "discriminator") for part in ("width", "group_width")],
    "progan": ["model.generator.channel_base=32", "model.generator.channel_max=8"],
    "stylegan": ["model.generator.channel_base=32", "model.generator.channel_max=8"],
    "stylegan2": ["model.generator.channel_base=64", "model.generator.channel_max=8"],
}
FLAT = {"stylegan": 3000}  # its constant starts flat, where instance norm makes gradients 316 times as large
CONDITIONING = {"nothing": [], "attributes": ["attributes"]}


def test_all_gans_are_here() -> None:
    families = ("models.gan.", "models.progan.", "models.stylegan.", "models.stylegan2.")
    pages = Path(__file__).parents[2].glob("conf/model/*.yaml")
    assert {page.stem for page in pages if any(f in page.read_text() for f in families)} == set(SIZES)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("page", SIZES)
def test_gradients_stay_in_range(monkeypatch: pytest.MonkeyPatch, page: str, conditioning: str) -> None:
    """Of both players and the penalty, for images that have none of the attributes, beside those that have some."""
    torch.manual_seed(0)
    words = [f"model={page}", *COMMON, *SIZES[page], f"data.conditions=[{','.join(CONDITIONING[conditioning])}]"]
    model = build.model(composed(*words), Path("unused"))
    optimizers, norms = model.configure_optimizers(), {}
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())

    def take(optimizer: torch.optim.Optimizer, name: str) -> None:
        norms[name] = max(norms.get(name, 0.0), model.clip(optimizer).item())
        optimizer.step()

    monkeypatch.setattr(model, "take", take)
    attributes = torch.zeros(8, 14)
    attributes[:4, :3] = 1
    batch = {"image": 2 * torch.rand(8, 3, 8, 8) - 1, "label": torch.arange(8), "attributes": attributes}
    n_arguments = len(signature(model.training_step).parameters)
    for k in range(2):
        model.training_step(*(batch, k)[:n_arguments])
    assert len(norms) >= 2 and all(1e-9 < norm < FLAT.get(page, 300) for norm in norms.values()), norms
