"""Losses of the two players, from logits (B,) or (B, 1, h, w) to a scalar, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-D(x)) + E softplus(D(G(z)))   (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """E softplus(-D(G(z)))   (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake.float()).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))   (Lim & Ye 2017; Miyato et al. 2018, SNGAN, eq. 16)."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G(z))   (Miyato et al. 2018, SNGAN, eq. 17)."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at one weight, at most 1e4: a constant scalar

    (Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis, eq. 7, its delta as in their code).

    Args:
        reconstruction, adversarial: scalar losses; their graphs stay for the backward pass.
        weight: of the decoder's last layer.
    """
    norms = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
