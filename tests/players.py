"""In place of optimizers, where a test asks whose turn it is and what was learned then."""

from __future__ import annotations

from torch import Tensor, nn


class Recording:
    """Says whose turn it is and, in `gradients`, what its net was given."""

    def __init__(self, name: str, net: nn.Module, log: list[str]) -> None:
        self.name, self.net, self.log = name, net, log
        self.gradients: dict[str, Tensor] = {}

    def zero_grad(self) -> None:
        self.net.zero_grad()

    def step(self) -> None:
        self.log.append(self.name)
        self.gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}


class Watching:
    """Says whose turn it is, and which of a generator and a discriminator have gradients then."""

    def __init__(self, name: str, model: nn.Module, log: list[str]) -> None:
        self.name, self.model, self.log = name, model, log

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        nets = {"g": self.model.generator, "d": self.model.discriminator}
        self.log.append(self.name + "".join(k for k, net in nets.items() if learned(net)))


def learned(net: nn.Module) -> bool:
    """Whether any weight has a gradient; a weight with one that is zero counts too."""
    return any(p.grad is not None for p in net.parameters())
