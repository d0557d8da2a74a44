"""Attention of a U-Net that also looks at tokens. B batch, C channels, H, W size, N = H W, T tokens of E numbers."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.nets.layers import CrossAttention, attended, zeroed


class SpatialTransformer(nn.Module):
    """The places of a map through transformer blocks, plus the input (Rombach et al. 2022, LDM, appendix E.2.1).

    Only the last layer starts at 0. It has the layers of Stable Diffusion, with no dropout, as there; the first and
    the last, 1x1 convolutions in version 1 and linear in version 2, are linear, which is the same.

    Args:
        channels: C.
        heads: heads of both kinds of attention.
        token_dim: numbers E of a token.
        depth: number of blocks.
        groups: groups of the norm in front.
    """

    def __init__(self, channels: int, heads: int, token_dim: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList([CrossBlock(channels, heads, token_dim) for _ in range(depth)])
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (B, C, H, W), tokens (B, T, E), mask (B, T) bool, true where there is a token."""
        height = x.shape[2]
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))  # (B, N, C)
        for block in self.blocks:
            h = block(h, tokens, mask, height)                             # (B, N, C)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height)   # (B, C, H, W)


class CrossBlock(nn.Module):
    """Attention to all places, then to the tokens, then a perceptron, each behind a norm and added."""

    def __init__(self, channels: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.cross = CrossAttention(channels, token_dim, heads, bias=False)
        self.mlp = nn.Sequential(GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, height: int) -> Tensor:
        """x (B, N, C) of a map of that height, tokens (B, T, E), mask (B, T)."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (qkv heads c) -> qkv b heads n c", qkv=3, heads=self.heads)
        x = x + self.out(rearrange(attended(q, k, v), "b heads n c -> b n (heads c)"))     # (B, N, C)
        x = x + self.cross(self.norm2(x), tokens, mask, height)            # (B, N, C)
        return x + self.mlp(self.norm3(x))                                 # (B, N, C)


class GEGLU(nn.Module):
    """A linear layer, each number of which is scaled by the GELU of another (Shazeer 2020, equation 6)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(n_in, 2 * n_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)                        # (..., n_out) each
        return value * F.gelu(gate)
