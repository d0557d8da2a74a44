"""Penalties on a net's gradients, in float32."""

import torch
from torch import Tensor


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """E ||dD/dx||^2 over real images   (Mescheder et al. 2018, eq. 9, without gamma / 2).

    Args:
        logits: (B,), of x alone.
        x: (B, C, H, W), requires grad.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()
