"""Autoregressive prior over the codes of a frozen autoencoder (van den Oord et al. 2017, 3.3; Esser et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.condition import Condition
from atelier.core.errors import within
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat, Probability
from atelier.core.rng import ImageRngs
from atelier.models.base import Cond, Generator
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.contracts import CodeStage, keeps
from atelier.nets.frozen import Frozen
from atelier.nets.transformer import CausalTransformer

COLD = 1e-4  # a temperature at which the likeliest code is all but certain


class VQPrior(Generator):
    """One code after another, row by row: log p(codes) = sum over k of log p(code k | codes before, condition).

    Args:
        net: number of codes, number of places -> transformer.
        embedder: conditions to one vector.
        cond_dropout: share of training images whose condition is left out, for guidance.
        guidance: guidance used unless another is asked for; 1 = off.
        temperature: number that logits are divided by, unless another is asked for.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
        first_stage: images to codes and back.

    Raises:
        UserError: the first stage has no codes.
    """

    idea = (
        "A transformer writes the codes of a frozen autoencoder one after another, each by those before it. "
        "The decoder of the autoencoder makes the image of them."
    )
    formula = "L = -1/N sum_k log p(code_k | code_1 .. code_k-1, condition)"
    ema_nets = ("net", "embedder")
    takes_pieces = True

    def __init__(
        self,
        net: Callable,
        embedder: ConditionEmbedder,
        cond_dropout: Probability,
        guidance: NonNegFloat,
        temperature: PositiveFloat,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
        first_stage: CodeStage,
    ) -> None:
        super().__init__()
        keeps(first_stage, CodeStage, ".first_stage")
        self.first = Frozen(first_stage)
        n_places = math.prod(first_stage.latent_shape[1:])
        with within(".net"):
            self.net: CausalTransformer = net(n_codes=first_stage.n_codes, n_places=n_places)
        self.embedder, self.cond_dropout = embedder, cond_dropout
        self.needs = frozenset(embedder.conditions)
        self.guidance, self.temperature = guidance, temperature
        self.optimizer, self.grad_clip = optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        codes = self.codes(batch["image"])
        cond = self.embedder(self.condition(batch, ""), len(codes), self.cond_dropout)
        loss = F.cross_entropy(self.net(codes, cond).flatten(0, 1), codes.flatten())
        self.report("nats_per_code", loss)
        self.report("loss", loss)
        return loss

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes (B, N) of images, row by row."""
        with float32(x.device):
            return self.first.net.codes(x).flatten(1)

    def sample(
        self,
        cond: Cond,
        rngs: ImageRngs,
        *,
        temperature: NonNegFloat | None = None,
        guidance: NonNegFloat | None = None,
    ) -> Tensor:
        """Images (n, C, H, W).

        Args:
            temperature: number in place of the model's own; 0 = the likeliest code at each place.
            guidance: logits_u + guidance (logits_c - logits_u); 1 = off, 0 = without condition.
        """
        strength = (self.guidance if guidance is None else guidance) if self.needs else 1.0
        warmth = max(self.temperature if temperature is None else temperature, COLD)
        u = rngs.rand(self.net.n_places, device=self.device)
        with float32(self.device):
            codes = self._drawn(self._conditions(cond, len(rngs), strength), strength, warmth, u)
            return self.first.net.decode_codes(codes.unflatten(1, self.first.net.latent_shape[1:])).clamp(-1, 1)

    def _conditions(self, cond: Cond, n: int, strength: float) -> Condition:
        """The condition of what was asked, of nothing, or where both are needed of both: n or 2 n images."""
        if strength == 0:
            return self.embedder.null(n)
        known = self.embedder(cond, n)
        return known if strength == 1 else known.cat(self.embedder.null(n))

    def _drawn(self, cond: Condition, strength: float, temperature: float, u: Tensor) -> Tensor:
        """Codes (n, N) by inverting the distribution function of each place at `u` (n, N)."""
        codes: list[Tensor] = []
        code, seen = None, None
        for k in range(self.net.n_places):
            logits, seen = self.net.step(code, cond, seen)
            if len(logits) > len(u):
                known, null = logits.chunk(2)
                logits = null + strength * (known - null)
            codes.append(inverted(logits / temperature, u[:, k]))
            code = codes[-1].repeat(len(cond) // len(u))
        return torch.stack(codes, dim=1)

    def protocol(self) -> dict[str, Any]:
        guidance = self.guidance if self.needs else 1.0
        return {"guidance": guidance, "temperature": self.temperature, "nfe": self.net.n_places}


def inverted(logits: Tensor, u: Tensor) -> Tensor:
    """The codes (B,) at which the distribution function of softmax(logits) (B, V) passes u (B,) in [0, 1)."""
    borders = logits.double().softmax(1).cumsum(1)  # (B, V)
    return torch.searchsorted(borders, u[:, None] * borders[:, -1:], right=True)[:, 0]
