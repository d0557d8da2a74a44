"""AdamW: which pass over the weights it takes, and that clipping sees gradients as they are."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from atelier.models.base import Generator
from atelier.models.two_players import TwoPlayers
from atelier.optim import adamw, lr_factor, one_pass

PAGE = {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0}
PAGE |= {"warmup_images": 0, "decay": "constant", "decay_from": 0, "decay_to": 1}


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("cuda", True), ("meta", None), ("mps", None)])
def test_one_pass_where_there_are_kernels(device: str, fused: bool | None) -> None:
    assert one_pass([SimpleNamespace(device=torch.device(device))] * 2) is fused
    assert one_pass([SimpleNamespace(device=torch.device(d)) for d in (device, "meta")]) is None
    if device in ("cpu", "meta"):
        group = adamw([nn.Parameter(torch.zeros(3, device=device))], **PAGE).param_groups[0]
        assert (group["fused"], group["foreach"]) == (fused, None)


def test_a_checkpoint_of_another_pass_takes_this_ones() -> None:
    """As GPU runs were saved, whose loop went tensor by tensor."""
    torch.manual_seed(0)
    start = torch.randn(5)
    before, after = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    slow = torch.optim.AdamW([before], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, fused=False)
    one = adamw([after], **PAGE)
    before.grad = torch.randn(5)
    slow.step()
    with torch.no_grad():
        after.copy_(before)
    one.load_state_dict(copy.deepcopy(slow.state_dict()))
    assert one.param_groups[0]["fused"] is True and one.state[after]["step"] == 1
    before.grad = torch.randn(5)
    after.grad = before.grad.clone()
    slow.step()
    one.step()
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("decay", "half", "end"), [("constant", 1.0, 1.0), ("cosine", 0.505, 0.01), ("linear", 0.5, 0.0)]
)
def test_a_rate_ends_where_its_decay_says(decay: str, half: float, end: float) -> None:
    factors = [lr_factor(n, 0, decay, 1000, 3000) for n in (0, 1000, 2000, 3000, 5000)]
    assert factors == pytest.approx([1.0, 1.0, half, end, end])


class Clipped:
    """w x, whose loss has a gradient of norm 40 in all; what it clips is noted."""

    ema_nets, players = ("net",), (("net",), ("discriminator",))

    def line(self) -> None:
        self.net, self.norms = nn.Linear(4, 1, bias=False), []
        nn.init.zeros_(self.net.weight)

    def clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        self.norms.append(float(super().clip(optimizer)))
        self.clipped = self.net.weight.grad.norm().item()
        return torch.tensor(self.norms[-1])

    def sample(self, cond: Any, rngs: Any) -> Tensor:
        raise NotImplementedError


class Line(Clipped, Generator):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer, self.grad_clip = partial(adamw, **PAGE), 1.0
        self.line()

    def training_step(self, x: Tensor) -> Tensor:
        return 20 * self.net(x).sum()


class LineByHand(Clipped, TwoPlayers, Generator):
    def __init__(self) -> None:
        super().__init__(None, partial(adamw, **PAGE), None, grad_clip=1.0)
        self.line()

    def training_step(self, x: Tensor) -> None:
        self.step(self.optimizers(), 20 * self.net(x).sum(), "line")


@pytest.mark.parametrize("kind", [Line, LineByHand])
def test_float16_is_clipped_by_the_norm_of_its_gradients(kind: type) -> None:
    """Lightning leaves the gradients of a fused optimizer scaled, 1,024 times as large here."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, quiet = kind(), {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        enable_progress_bar=False,
        **quiet,
    )
    trainer.fit(model, DataLoader(torch.ones(2, 4), batch_size=1))
    assert model.optimizers().param_groups[0]["fused"] is True
    assert model.norms == [40.0, 40.0] and model.clipped == pytest.approx(1)
    assert model.net.weight.tolist() == [[pytest.approx(-0.2, rel=1e-4)] * 4]  # two steps of the rate


def test_float16_skips_a_step_that_is_not_finite() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = nn.Parameter(torch.ones(2))
    optimizer = adamw([weight], **PAGE)
    scaler.scale((weight * torch.tensor([1.0, torch.inf])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1, 1] and scaler.get_scale() == 4
