"""Losses of the two players, from logits (B,) to a scalar, in float32."""

import torch.nn.functional as F
from torch import Tensor


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-D(x)) + E softplus(D(G(z)))   (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """E softplus(-D(G(z)))   (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake.float()).mean()
