"""Losses of the two players, from logits (B,) or (B, 1, h, w) to a scalar, in float32.

Each is a pair: what the discriminator and what the generator brings down. The generator's sees the logits of real
images too, which only a relativistic one needs: others are given None.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core import ranks


class Adversarial(ABC):
    """A pair of losses. `needs_real_logits`: the generator's needs the logits of as many real images."""

    needs_real_logits: ClassVar[bool] = False

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Scalar float32 of the logits of real and of generated images."""

    @abstractmethod
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """Scalar float32."""


class NonSaturating(Adversarial):
    """Cross-entropy; the generator makes the discriminator say "real" (Goodfellow et al. 2014, GAN, eq. 1 and 3)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """E softplus(-D(x)) + E softplus(D(G(z)))."""
        return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """E softplus(-D(G(z)))."""
        return F.softplus(-fake.float()).mean()


class LeastSquares(Adversarial):
    """Squared distance to 1 and 0 (Mao et al. 2017, LSGAN, eq. 9)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2."""
        return ((real.float() - 1).square().mean() + fake.float().square().mean()) / 2

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """1/2 E (D(G(z)) - 1)^2."""
        return (fake.float() - 1).square().mean() / 2


class Hinge(Adversarial):
    """Logits beyond 1 on their side are good enough (Lim & Ye 2017; Miyato et al. 2018, SNGAN, eq. 16 and 17)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))."""
        return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """-E D(G(z))."""
        return -fake.float().mean()


class Wasserstein(Adversarial):
    """The difference of means, an estimate of a distance where D is 1-Lipschitz (Arjovsky et al. 2017, WGAN, eq. 2).

    Wants the penalty that keeps it so (`losses.regularizers.gradient_penalty`).
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """E D(G(z)) - E D(x)."""
        return fake.float().mean() - real.float().mean()

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """-E D(G(z))."""
        return -fake.float().mean()


class Relativistic(Adversarial):
    """Each generated image against the real one of the same place.

    Jolicoeur-Martineau 2019, The Relativistic Discriminator; Huang et al. 2024, R3GAN, eq. 2.
    """

    needs_real_logits = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """E softplus(D(G(z)) - D(x))."""
        return F.softplus(fake.float() - real.float()).mean()

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """E softplus(D(x) - D(G(z)))."""
        return F.softplus(real.float() - fake.float()).mean()


class RelativisticAverage(Adversarial):
    """Each image against the mean of the other kind.

    Jolicoeur-Martineau 2019, The Relativistic Discriminator; Wang et al. 2018, ESRGAN, eq. 1 and 2. Means are those
    of all that is shown at once, over all ranks.
    """

    needs_real_logits = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """E softplus(-(D(x) - E D(G(z)))) + E softplus(D(G(z)) - E D(x))."""
        real, fake = real.float(), fake.float()
        real_mean, fake_mean = ranks.mean_learned(real.mean()), ranks.mean_learned(fake.mean())
        return F.softplus(fake_mean - real).mean() + F.softplus(fake - real_mean).mean()

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """The same with the two kinds exchanged."""
        return self.discriminator(fake, real)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """The weight of the adversarial loss: |grad of reconstruction| / (|grad of adversarial| + 1e-4), at most 1e4.

    A constant scalar, measured at one weight of the net, of the gradients of all ranks (Esser et al. 2021, Taming
    Transformers for High-Resolution Image Synthesis, eq. 7, its delta as in their code).

    Args:
        reconstruction, adversarial: scalar losses; their graphs stay for the backward pass.
        weight: the decoder's last layer's.
    """
    norms = [
        ranks.mean(torch.autograd.grad(loss, weight, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
