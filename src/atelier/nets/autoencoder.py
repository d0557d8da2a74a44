"""Encoder and decoder that the first stages of latent diffusion share.

Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, appendix G;
Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis, appendix A.
B batch, C channels, H, W image size, f downsampling, Z latent channels, h, w = H / f, W / f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.layers import Residual, SelfAttention, Up


@dataclass(frozen=True)
class Layout:
    """What an encoder and its decoder share.

    Args:
        image_size: side of the images, a multiple of f = 2 ** (levels - 1).
        image_channels: channels of the images.
        width: channels that `multipliers` are multiples of.
        multipliers: one level per entry, width * entry channels each, half the size of the one before.
        n_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: map sizes at which each block is followed by attention.
        middle_attention: attention between the two blocks of the smallest map.
        norm_groups: groups of every norm; None: up to 32, of 4 or more channels each (32 where all widths divide by
            128).
        dropout: share of values left out inside the residual blocks.

    Raises:
        UserError: the image does not halve evenly, no map has an attention size, or the groups do not divide a width.
    """

    image_size: int
    image_channels: int
    width: int
    multipliers: list[int]
    n_blocks: int
    attention: list[int]
    middle_attention: bool
    norm_groups: int | None
    dropout: float

    def __post_init__(self) -> None:
        if self.image_size % self.factor:
            nearest = max(1, round(self.image_size / self.factor)) * self.factor
            problem = f"{len(self.multipliers)} levels need a multiple of {self.factor}"
            raise UserError("data.image_size", self.image_size, problem, f"data.image_size={nearest}")
        missed = [size for size in self.attention if size not in self.sizes]
        if missed:
            problem = f"no map has size {missed[0]}; the levels have {self.sizes}"
            raise UserError(".attention", self.attention, problem, f".attention=[{self.sizes[-1]}]")
        if any(width % self.groups for width in self.widths):
            problem = f"it does not divide the widths {self.widths}"
            raise UserError(".norm_groups", self.norm_groups, problem, ".norm_groups=null")

    @property
    def factor(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.width * m for m in self.multipliers]

    @property
    def sizes(self) -> list[int]:
        return [self.image_size // 2**i for i in range(len(self.multipliers))]

    @property
    def groups(self) -> int:
        return self.norm_groups or math.gcd(32, max(1, min(self.widths) // 4), *self.widths)

    def latent_shape(self, channels: int) -> tuple[int, int, int]:
        return channels, self.sizes[-1], self.sizes[-1]

    def block(self, n_in: int, level: int) -> StageBlock:
        return StageBlock(n_in, self.widths[level], self.groups, self.dropout, self.sizes[level] in self.attention)

    def middle(self) -> nn.Sequential:
        n = self.widths[-1]
        return nn.Sequential(*(StageBlock(n, n, self.groups, self.dropout, a) for a in (self.middle_attention, False)))

    def head(self, n_in: int, n_out: int) -> nn.Sequential:
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1)
        return nn.Sequential(nn.GroupNorm(self.groups, n_in, eps=1e-6), nn.SiLU(), convolution)


class Encoder(nn.Module):
    """Images (B, C, H, W) to a map (B, n_out, h, w)."""

    def __init__(self, layout: Layout, n_out: int) -> None:
        super().__init__()
        n, last = layout.widths[0], len(layout.widths) - 1
        self.stem = nn.Conv2d(layout.image_channels, n, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(layout.widths):
            blocks = [layout.block(n if k == 0 else width, i) for k in range(layout.n_blocks)]
            self.levels.append(Stage(blocks, Halve(width) if i < last else None))
            n = width
        self.middle = layout.middle()
        self.head = layout.head(n, n_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)                                                       # (B, width, H, W)
        for level in self.levels:
            h = level(h)
        return self.head(self.middle(h))                                       # (B, n_out, h, w)


class Decoder(nn.Module):
    """Maps (B, n_in, h, w) to images (B, C, H, W)."""

    def __init__(self, layout: Layout, n_in: int) -> None:
        super().__init__()
        n, last = layout.widths[-1], len(layout.widths) - 1
        self.stem = nn.Conv2d(n_in, n, 3, padding=1)
        self.middle = layout.middle()
        self.levels = nn.ModuleList()
        for i in range(last, -1, -1):
            width = layout.widths[i]
            blocks = [layout.block(n if k == 0 else width, i) for k in range(layout.n_blocks + 1)]
            self.levels.append(Stage(blocks, Up(width) if i > 0 else None))
            n = width
        self.head = layout.head(n, layout.image_channels)

    @property
    def last_weight(self) -> Tensor:
        """Of the convolution that makes the pixels."""
        return self.head[-1].weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.stem(z))                                          # (B, C, h, w)
        for level in self.levels:
            h = level(h)
        return self.head(h)                                                    # (B, C, H, W)


class Stage(nn.Module):
    """Blocks of one map size, and the step to the next."""

    def __init__(self, blocks: list[StageBlock], resample: Halve | Up | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))                                   # (B, C', 2 or 1/2 H, 2 or 1/2 W)


class StageBlock(nn.Module):
    """A residual block, with attention behind it where asked for."""

    def __init__(self, n_in: int, n_out: int, groups: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.residual = Residual(n_in, n_out, partial(nn.GroupNorm, groups, eps=1e-6), dropout)
        self.attention = SelfAttention(n_out, heads=1) if attention else nn.Identity()
        if attention:
            self.attention.norm = nn.GroupNorm(groups, n_out, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.residual(x))                                # (B, C', H, W)


class Halve(nn.Module):
    """Half the size by a strided convolution, padded below and right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))                               # (B, C, H / 2, W / 2)
