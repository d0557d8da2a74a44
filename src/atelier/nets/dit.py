"""The diffusion transformer: patches as tokens, and blocks that the time and the condition scale, shift and gate.

B batch, C channels, H, W image size, P patch size, N = H W / P^2 patches, D width, K heads; of the condition: E size of
its vector or of each of T tokens, F planes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt, Probability
from atelier.nets.denoising import cond_sizes
from atelier.nets.layers import CrossAttention, TimeEmbedding, attended, checkpointed, mean_square_normed, zeroed
from atelier.nets.widening import with_planes

FREQUENCIES = 256  # numbers that a time becomes before it is embedded


class DiT(nn.Module):
    """(x, time, cond) -> a map like x   (Peebles & Xie 2023, DiT, section 3, with adaLN-Zero).

    Args:
        image_size: height and width of x.
        image_channels: channels C of x.
        patch_size: height and width P of what becomes a token; None: an eighth of the image's, so 64 tokens and the
            same cost at every size.
        width: D.
        n_layers: number of blocks.
        heads: K.
        dropout: share of values left out at the end of each residual branch.
        qk_norm: whether queries and keys are divided by their root mean square, which keeps attention from growing
            (Dehghani et al. 2023, ViT-22B, section 2; Esser et al. 2024, section 5.3.2).
        cond_dim: size E of the condition's vector, added to the time's; None: unconditional.
        learned_variance: whether it gives 2 C channels, as `UNet` does.
        checkpointing: whether blocks are computed again on the way back: little memory, a third more work.
        freq_shift: 1 ends the frequencies of the time at 1/10000, 0, as published, one step before it.
        mlp_norm_eps: number added to the variance in the norm before a perceptron.
        token_dim: size E of each of the condition's tokens, at which every block looks between its two parts (Chen et
            al. 2024, PixArt-alpha, section 2.3), but behind a norm of its own; None: it takes none.
        plane_channels: number F of the condition's planes, which are cut into patches with x; a net with planes or with
            tokens starts as the one without.

    Raises:
        UserError: the patches do not fill the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        patch_size: PositiveInt | None,
        width: PositiveInt,
        n_layers: PositiveInt,
        heads: PositiveInt,
        dropout: Probability = 0.0,
        qk_norm: bool = False,
        cond_dim: PositiveInt | None = None,
        learned_variance: bool = False,
        checkpointing: bool = False,
        freq_shift: Literal[0, 1] = 0,
        mlp_norm_eps: PositiveFloat = 1e-6,
        token_dim: PositiveInt | None = None,
        plane_channels: NonNegInt = 0,
    ) -> None:
        super().__init__()
        patch_size = patch_size or max(1, image_size // 8)
        _check(image_size, patch_size, width, heads)
        self.shape = (image_channels, image_size, image_size)
        self.cond_sizes = cond_sizes(cond_dim, token_dim, plane_channels)
        self.patch_size, self.checkpointing, self.n_out = patch_size, checkpointing, 1 + learned_variance
        self.patches = nn.Conv2d(image_channels, width, patch_size, stride=patch_size)
        self.register_buffer("positions", sines_of_places(width, image_size // patch_size), persistent=False)
        first = nn.Linear(FREQUENCIES, width)
        self.time = nn.Sequential(TimeEmbedding(FREQUENCIES, freq_shift), first, nn.SiLU(), nn.Linear(width, width))
        self.cond = None if cond_dim is None else nn.Linear(cond_dim, width)
        options = (dropout, qk_norm, mlp_norm_eps, token_dim)
        self.blocks = nn.ModuleList([DiTBlock(width, heads, *options) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, self.n_out * image_channels * patch_size**2)
        self._as_published()
        self.patches = with_planes(self.patches, plane_channels)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), time (B,), cond with what `cond_sizes` names, or None -> (B, C or 2 C, H, W)."""
        embedding = self.time(time)                                        # (B, D)
        if self.cond is not None:
            embedding = embedding + self.cond(cond.vector)                     # (B, D)
        embedding = F.silu(embedding)
        given = torch.cat([x, cond.planes], dim=1) if "planes" in self.cond_sizes else x       # (B, C + F, H, W)
        tokens = (cond.tokens, cond.mask) if "tokens" in self.cond_sizes else ()
        h = rearrange(self.patches(given), "b d h w -> b (h w) d") + self.positions    # (B, N, D)
        for block in self.blocks:
            h = checkpointed(block, self.checkpointing)(h, embedding, *tokens)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2) # (B, 1, D) each
        h = self.head(self.norm(h) * (1 + scale) + shift)                  # (B, N, P P C or P P 2 C)
        side = x.shape[2] // self.patch_size
        p = self.patch_size
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)    # (B, C or 2 C, H, W)

    def _as_published(self) -> None:
        """First weights: Glorot's, small ones where time and condition enter, none where they gate and at the end."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        for layer in (self.time[1], self.time[3], *([] if self.cond is None else [self.cond])):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            zeroed(layer)
        for block in self.blocks:
            if block.cross is not None:
                zeroed(block.cross.out)


class DiTBlock(nn.Module):
    """Attention and a perceptron, each behind a norm that the embedding scales and shifts, and gated by it.

    Between them it looks at tokens, where it is told their size.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        qk_norm: bool,
        mlp_norm_eps: float,
        token_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None for _ in range(2))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.cross = CrossAttention(width, token_dim, heads, bias=True, qk_norm=qk_norm) if token_dim else None

    def forward(
        self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D) of a square, embedding (B, D) activated, tokens (B, T, E), mask (B, T) bool."""
        modulation = self.modulation(embedding)[:, None].chunk(6, dim=2)   # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = self.attention(self.norm1(x) * (1 + scale1) + shift1)          # (B, N, D)
        x = x + gate1 * self.dropout(h)                                    # (B, N, D)
        if self.cross is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), tokens, mask, math.isqrt(x.shape[1])))
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))

    def attention(self, x: Tensor) -> Tensor:
        """Every token (B, N, D) looks at every other."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads c) -> qkv b heads n c", qkv=3, heads=self.heads)
        if self.query_norm is not None:
            q, k = mean_square_normed(self.query_norm, q), mean_square_normed(self.key_norm, k)
        h = attended(q, k, v, causal=False)                                # (B, K, N, D / K)
        return self.out(rearrange(h, "b heads n c -> b n (heads c)"))      # (B, N, D)


def sines_of_places(width: int, side: int) -> Tensor:
    """Of the places of a grid row by row, (side^2, D): sines and cosines of the column, then those of the row.

    Each of D / 4 frequencies, 1 .. 1/10000, geometrically spaced (Vaswani et al. 2017, section 3.5, in two
    dimensions).
    """
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))   # (D / 4,)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies                    # (side, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()                              # (side, D / 2)
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)              # (side, side, D / 2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def _check(image_size: int, patch_size: int, width: int, heads: int) -> None:
    if image_size % patch_size:
        fix = f"data.image_size={-(-image_size // patch_size) * patch_size}"
        raise UserError("data.image_size", image_size, f"patches of {patch_size} do not fill it", fix)
    if width % 4:
        problem = "places need sines and cosines of two axes, a multiple of 4"
        raise UserError(".width", width, problem, f".width={-(-width // 4) * 4}")
    if width % heads:
        raise UserError(".heads", heads, f"it does not divide the width {width}", ".heads=1")
