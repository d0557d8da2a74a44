"""Penalties on a net's gradients, summed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atelier.core.precision import float32


def r1_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """E ||dD/dx||^2: R1 where x are real images, R2 where they are generated.

    Mescheder et al. 2018, eq. 9 and 10, without their factor gamma / 2.

    Args:
        logits: (B,), each of its x alone.
        x: (B, C, H, W), requires grad.
    """
    with float32(x.device):
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """E (||dD/dx|| - 1)^2 at points between real and generated images.

    Gulrajani et al. 2017, WGAN-GP, eq. 3, without their factor lambda.

    Args:
        discriminator: images (B, C, H, W) -> logits (B,), each of its image alone.
        real, fake: (B, C, H, W), no gradients.
    """
    part = torch.rand(len(real), 1, 1, 1, device=real.device)
    x = torch.lerp(fake.float(), real.float(), part).requires_grad_()
    with float32(x.device):
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (gradient.float().flatten(1).norm(dim=1) - 1).square().mean()


def path_lengths(image: Tensor, styles: Tensor) -> Tensor:
    """How far a small step of a style moves each image: |J^T y|, (B,), y noise of length one for the whole image.

    J^T y is the gradient of image . y; the root mean square is over the layers that take a style (Karras et al. 2020,
    StyleGAN2, section 3.2).

    Args:
        image: (B, C, H, W), made of the styles.
        styles: (B, L, W), part of a graph.
    """
    y = torch.randn_like(image) / math.sqrt(image.shape[2] * image.shape[3])
    (gradient,) = torch.autograd.grad((image * y).sum(), styles, create_graph=True)
    return gradient.float().square().sum(2).mean(1).sqrt()
