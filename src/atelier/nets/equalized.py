"""Layers whose weights all learn at one speed, and what keeps GANs built of them in range (Karras et al. 2018, ProGAN).

B batch, C channels, H, W height, width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SLOPE = 0.2  # of leaky ReLU
GAIN = math.sqrt(2)  # of activations, so that their size stays


class EqualizedLinear(nn.Module):
    """Weights of N(0, 1), divided by the root of the number of inputs when used (ProGAN, 4.1).

    Args:
        bias: initial value of the bias.
        lr_multiplier: learning rate as a factor of the other layers' (Karras et al. 2019, StyleGAN, appendix C).
    """

    def __init__(self, n_in: int, n_out: int, bias: float = 0.0, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((n_out,), bias / lr_multiplier))
        self.scale, self.lr_multiplier = lr_multiplier / math.sqrt(n_in), lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualizedConv(nn.Module):
    """A convolution that keeps the size of the map, with weights as `EqualizedLinear` has them."""

    def __init__(self, n_in: int, n_out: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.scale = 1 / math.sqrt(n_in * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.weight.shape[2] // 2)


def active(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the size of what goes through."""
    return F.leaky_relu(x, SLOPE) * GAIN


def pixel_norm(x: Tensor) -> Tensor:
    """Each vector of channels divided by its root mean square, float32 (ProGAN, 4.2)."""
    x = x.float()
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class MinibatchStd(nn.Module):
    """One more channel: how much a group of images differs, averaged over all pixels and channels (ProGAN, section 3).

    Args:
        group_size: images compared with each other; fewer where the batch does not divide.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        n = math.gcd(b, self.group_size)
        groups = rearrange(x.float(), "(g n) c h w -> g n (c h w)", g=n)   # (G, B / G, C H W)
        spread = (groups.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=1)       # (B / G,)
        plane = spread.repeat(n).view(b, 1, 1, 1).expand(b, 1, h, w).to(x.dtype)
        return torch.cat([x, plane], dim=1)                                # (B, C + 1, H, W)
