"""Invertible layers of normalizing flows. B batch, C channels, H, W height, width, D condition.

A layer maps x (B, C, H, W) and a condition (B, D) to y and log |det dy/dx|, (B,) or () float64, and `inverse` maps y
back. Its own arithmetic is float32 under any autocast; only the nets inside couplings and priors follow that.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.precision import float32
from atelier.nets.layers import zeroed

EPS = 1e-6  # added to a measured standard deviation
ALPHA = 0.05  # of the logit
FASTER = 3  # by how much log-scales of channels learn faster than other weights (the published code of Glow)


def summed(log_scale: Tensor) -> Tensor:
    """The log-determinant of an elementwise scaling, (B,) float64."""
    return log_scale.flatten(1).sum(1, dtype=torch.float64)


class Chain(nn.Module):
    """One layer after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        logdet = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for layer in self.layers:
            x, change = layer(x, cond)
            logdet = logdet + change
        return x, logdet

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            y = layer.inverse(y, cond)
        return y


class Logit(nn.Module):
    """x in [-1/2, 1/2) to logit(ALPHA + (1 - 2 ALPHA) (x + 1/2)), all numbers (Dinh et al. 2017, RealNVP, 4.1).

    The paper keeps ALPHA clear of black alone, which leaves white at infinity; here it is kept clear of both ends, as
    in Papamakarios et al. 2017 (MAF), appendix E.
    """

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        p = ALPHA + (1 - 2 * ALPHA) * (x + 0.5)                            # (B, C, H, W)
        log_scale = math.log(1 - 2 * ALPHA) - p.log() - (-p).log1p()       # (B, C, H, W)
        return p.logit(), summed(log_scale)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        return (y.sigmoid() - ALPHA) / (1 - 2 * ALPHA) - 0.5               # (B, C, H, W)


class Squeeze(nn.Module):
    """Each 2x2 block of pixels becomes one pixel; upper rows come before lower ones, all colours of a pixel together.

    So half of the channels are half of the pixels in all colours (Dinh et al. 2017, 3.6).
    """

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        y = rearrange(x, "b c (h p) (w q) -> b (p q c) h w", p=2, q=2)     # (B, 4 C, H / 2, W / 2)
        return y, x.new_zeros((), dtype=torch.float64)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        return rearrange(y, "b (p q c) h w -> b c (h p) (w q)", p=2, q=2)  # (B, C / 4, 2 H, 2 W)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all ranks' batches, (C,) float64 each."""
    x = x.double()
    mean = ranks.mean(x.mean((0, 2, 3)))                                      # (C,)
    variance = ranks.mean((x - mean[:, None, None]).square().mean((0, 2, 3))) # (C,)
    return mean, variance.sqrt()


class ActNorm(nn.Module):
    """A scale and shift of each channel under which the first training batch has mean 0 and deviation 1.

    Kingma & Dhariwal 2018, Glow, 3.1. What is measured on that batch, the same on all ranks, stays in buffers and is
    saved; what is learned starts at 0. So an average of weights is right from the first step on.
    """

    mean: Tensor
    log_std: Tensor
    measured: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("log_std", torch.zeros(channels))
        self.register_buffer("measured", torch.zeros((), dtype=torch.uint8))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self._asked = False  # whether `measured` was read, which waits for the device

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self._asked:
            self._asked = True
            if not self.measured:
                self.measure(x)
        log_scale = FASTER * self.log_scale - self.log_std                 # (C,)
        y = (x - _map(self.mean)) * _map(log_scale.exp()) + _map(self.shift)  # (B, C, H, W)
        return y, x.shape[2] * x.shape[3] * log_scale.sum(dtype=torch.float64)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        scale = (self.log_std - FASTER * self.log_scale).exp()             # (C,)
        return (y - _map(self.shift)) * _map(scale) + _map(self.mean)      # (B, C, H, W)

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        mean, std = moments(x)
        self.mean.copy_(mean)
        self.log_std.copy_((std + EPS).log())
        self.measured.fill_(1)


def _map(values: Tensor) -> Tensor:
    return values[:, None, None]                                           # (C, 1, 1)


class InvertibleConv(nn.Module):
    """A 1x1 convolution whose weight is P L (U + diag(s)) (Kingma & Dhariwal 2018, Glow, 3.2, eq. 11).

    It starts as a random rotation, whose permutation P and signs of s stay. `lu` holds L below its diagonal, U above
    it and log |s| on it.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        s = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", s.sign().float())
        self.lu = nn.Parameter((lower.tril(-1) + upper.triu(1) + s.abs().log().diag()).float())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s), (C, C) each."""
        lower = self.lu.tril(-1) + torch.eye(len(self.lu), device=self.lu.device)
        return lower, self.lu.triu(1) + (self.sign * self.lu.diagonal().exp()).diag()

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        with float32(x.device):
            lower, upper = self.factors()
            y = F.conv2d(x, (self.permutation @ lower @ upper)[:, :, None, None])   # (B, C, H, W)
        return y, x.shape[2] * x.shape[3] * self.lu.diagonal().sum(dtype=torch.float64)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        with float32(y.device):
            lower, upper = (factor.double() for factor in self.factors())
            back = self.permutation.T.double()                             # P is orthogonal
            back = torch.linalg.solve_triangular(lower, back, upper=False, unitriangular=True)
            back = torch.linalg.solve_triangular(upper, back, upper=True)  # (C, C)
            return F.conv2d(y, back.to(y.dtype)[:, :, None, None])         # (B, C, H, W)


class ZeroConv(nn.Module):
    """3x3 convolution that starts at 0, its outputs scaled by a learned exp(3 s) (Kingma & Dhariwal 2018, 3.3)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = zeroed(nn.Conv2d(n_in, n_out, 3, padding=1))
        self.scale = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).float() * _map((FASTER * self.scale).exp())    # (B, C', H, W)


class ConvNet(nn.Module):
    """Three convolutions, the condition added as a bias of the two hidden maps (Kingma & Dhariwal 2018, section 5)."""

    def __init__(self, n_in: int, n_out: int, width: int, cond_dim: int) -> None:
        super().__init__()
        self.conv1 = he(nn.Conv2d(n_in, width, 3, padding=1))
        self.conv2 = he(nn.Conv2d(width, width, 1))
        self.conv3 = ZeroConv(width, n_out)
        self.conditioning = zeroed(nn.Linear(cond_dim, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        first, second = self.conditioning(cond)[:, :, None, None].chunk(2, dim=1) # (B, W, 1, 1) each
        h = F.relu(self.conv1(x) + first)                                  # (B, W, H, W)
        h = F.relu(self.conv2(h) + second)                                 # (B, W, H, W)
        return self.conv3(h)                                               # (B, C', H, W) float32


class ResNet(nn.Module):
    """Residual blocks of two 3x3 convolutions, the condition added between them (Dinh et al. 2017, 3.4 and 4.1).

    Without the paper's norms: batch statistics would make an image's likelihood depend on its neighbours, and any
    norm takes away the absolute values that a coupling must predict to a grey level.
    """

    def __init__(self, n_in: int, n_out: int, width: int, n_blocks: int, cond_dim: int) -> None:
        super().__init__()
        self.first = he(nn.Conv2d(n_in, width, 3, padding=1))
        self.inner = nn.ModuleList(he(nn.Conv2d(width, width, 3, padding=1)) for _ in range(n_blocks))
        self.conditioning = nn.ModuleList(zeroed(nn.Linear(cond_dim, width)) for _ in range(n_blocks))
        self.outer = nn.ModuleList(zeroed(nn.Conv2d(width, width, 3, padding=1)) for _ in range(n_blocks))
        self.last = ZeroConv(width, n_out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.first(x)                                                  # (B, W, H, W)
        for inner, conditioning, outer in zip(self.inner, self.conditioning, self.outer, strict=True):
            change = inner(F.relu(h)) + conditioning(cond)[:, :, None, None] # (B, W, H, W)
            h = h + outer(F.relu(change))                                  # (B, W, H, W)
        return self.last(F.relu(h))                                        # (B, C', H, W) float32


def he(layer: nn.Conv2d) -> nn.Conv2d:
    """Keeps the size of activations through ReLU (He et al. 2015, eq. 10)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class AffineCoupling(nn.Module):
    """One half of the channels moved and scaled by what a net makes of the other: y = (x + t) exp(s).

    Kingma & Dhariwal 2018, Glow, table 1; s = scale tanh(.), a learned scale of each channel, as in RealNVP. The
    published code has sigmoid(s + 2) in place of exp(s), which can only shrink: where a world has no noise, a pixel
    that the others tell must be blown up a hundredfold, and that cost 0.27 bits/dim after 12,800 images of shapes.
    """

    def __init__(self, channels: int, width: int, cond_dim: int) -> None:
        super().__init__()
        self.net = ConvNet(channels // 2, channels, width, cond_dim)
        self.scale = nn.Parameter(torch.ones(channels // 2))

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, dim=1)                                    # (B, C / 2, H, W) each
        shift, log_scale = self._change(kept, cond)
        moved = (moved + shift) * log_scale.exp()                          # (B, C / 2, H, W)
        return torch.cat([kept, moved], dim=1), summed(log_scale)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        kept, moved = y.chunk(2, dim=1)                                    # (B, C / 2, H, W) each
        shift, log_scale = self._change(kept, cond)
        return torch.cat([kept, moved * (-log_scale).exp() - shift], dim=1)

    def _change(self, kept: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.net(kept, cond).chunk(2, dim=1)                  # (B, C / 2, H, W) each
        return shift, _map(self.scale) * raw.tanh()


class MaskedCoupling(nn.Module):
    """y = m x + (1 - m) (x exp(s) + t), where a net makes s and t of m x (Dinh et al. 2017, RealNVP, eq. 9).

    s = scale tanh(.), with a learned scale of each channel. Args: mask: (1 or C, 1 or H, 1 or W), 1 = kept.
    """

    free: Tensor

    def __init__(self, channels: int, mask: Tensor, width: int, n_blocks: int, cond_dim: int) -> None:
        super().__init__()
        self.register_buffer("free", 1 - mask, persistent=False)
        self.net = ResNet(channels, 2 * channels, width, n_blocks, cond_dim)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._change(x, cond)
        return x * log_scale.exp() + shift, summed(log_scale)

    def inverse(self, y: Tensor, cond: Tensor) -> Tensor:
        shift, log_scale = self._change(y, cond)
        return (y - shift) * (-log_scale).exp()                            # (B, C, H, W)

    def _change(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.net(x * (1 - self.free), cond).chunk(2, dim=1)   # (B, C, H, W) each
        return self.free * shift, self.free * _map(self.scale) * raw.tanh()
