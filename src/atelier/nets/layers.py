"""Parts that several nets share. B batch, C channels, H, W height, width, D embedding, N tokens, K heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atelier.core.errors import UserError

M = TypeVar("M", bound=nn.Module)


def zeroed(layer: M) -> M:
    """The layer with all weights and biases 0: a residual branch that ends in it starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def as_published(layer: nn.Module) -> None:
    """First weights of DCGAN, pix2pix and CycleGAN, for `Module.apply`.

    Convolutions from N(0, 0.02), scales of norms from N(1, 0.02), biases 0 (Radford et al. 2016, 4; Isola et al. 2017,
    6.2; Zhu et al. 2017, 7.1).
    """
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d):
        if layer.weight is not None:
            nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d)), 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def n_groups(channels: int) -> int:
    """Up to 32, of 4 or more channels each: groups of one would erase an embedding added to a map."""
    return math.gcd(32, max(1, channels // 4), channels)


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with as many groups as `n_groups` says."""
    return nn.GroupNorm(n_groups(channels), channels, eps=1e-6)


def n_halvings(image_size: int) -> int:
    """Halvings from image_size down to 4.

    Raises:
        UserError: it is no power of two from 8 up.
    """
    halvings = math.log2(image_size / 4)
    if halvings < 1 or halvings != int(halvings):
        power = max(8, 2 ** round(math.log2(max(1, image_size))))
        fix = f"data.image_size={power}"
        raise UserError("data.image_size", image_size, "this net needs a power of two from 8 up", fix)
    return int(halvings)


class TimeEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced frequencies, 1 .. 1/10000 (Vaswani et al. 2017, 3.5).

    Args:
        dim: number of them together.
        shift: 1 ends at 1/10000 (Ho et al. 2020); 0 one step before it (Dhariwal & Nichol 2021; Peebles & Xie 2023).
    """

    frequencies: Tensor

    def __init__(self, dim: int, shift: int = 1) -> None:
        super().__init__()
        self.shift = shift
        half = torch.arange(dim // 2, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10_000) * half / (dim // 2 - shift))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.frequencies                  # (B, D / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)              # (B, D)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift the condition moves, from 1 and 0; without one they are learned as usual."""

    def __init__(self, channels: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not cond_dim)
        self.conditioning = zeroed(nn.Linear(cond_dim, 2 * channels)) if cond_dim else None

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.norm(x)
        if self.conditioning is None:
            return h
        scale, shift = self.conditioning(cond)[:, :, None, None].chunk(2, dim=1) # (B, C, 1, 1) each
        return h * (1 + scale) + shift                                           # (B, C, H, W)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 twice around the embedding, plus the input.

    The embedding is added before the second norm (Ho et al. 2020, DDPM, appendix B), or, with `scale_shift`, scales and
    shifts behind it, where the norm cannot take it away (Nichol & Dhariwal 2021, Improved DDPM, section 3).

    Args:
        norm: number of channels -> layer.
        resample: layer without weights that changes the size of both branches before the first convolution
            (Dhariwal & Nichol 2021, ADM, section 3); None: the size stays.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        dim: int,
        dropout: float,
        scale_shift: bool,
        norm: Callable[[int], nn.Module] = norm,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = norm(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.embedding = nn.Linear(dim, 2 * n_out if scale_shift else n_out)
        self.norm2 = norm(n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.skip = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`embedding` (B, D) comes activated."""
        h = F.silu(self.norm1(x))                                          # (B, n_in, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)                      # (B, n_in, 2 or 1/2 H, 2 or 1/2 W)
        h = self.conv1(h)                                                  # (B, C, H, W)
        modulation = self.embedding(embedding)[:, :, None, None]           # (B, C or 2 C, 1, 1)
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)                      # (B, C, 1, 1) each
            h = self.norm2(h) * (1 + scale) + shift                        # (B, C, H, W)
        else:
            h = self.norm2(h + modulation)                                 # (B, C, H, W)
        h = self.conv2(self.dropout(F.silu(h)))                            # (B, C, H, W)
        return self.skip(x) + h


class Residual(nn.Module):
    """Norm, SiLU, 3x3 twice, plus the input.

    Args:
        norm: number of channels -> layer.
    """

    def __init__(
        self, n_in: int, n_out: int, norm: Callable[[int], nn.Module] = norm, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                              # (B, C', H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))                # (B, C', H, W)
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Every pixel of a map attends to every other, plus the input (Ho et al. 2020, DDPM, appendix B).

    Args:
        norm: number of channels -> layer.
    """

    def __init__(self, channels: int, heads: int, norm: Callable[[int], nn.Module] = norm) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")           # (B, N, C)
        q, k, v = rearrange(self.qkv(tokens), "b n (qkv heads c) -> qkv b heads n c", qkv=3, heads=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)                        # (B, K, N, C / K)
        h = self.out(rearrange(h, "b heads n c -> b n (heads c)"))         # (B, N, C)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])      # (B, C, H, W)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Attention (B, K, N, D / K); in float32 on a CPU, where torch's is 2.5 times as fast there and back as in bf16.

    Args:
        q: queries (B, K, N, D / K).
        k: keys (B, K, T, D / K).
        v: values (B, K, T, D / K).
        causal: whether a place looks at itself and those before it alone.
        mask: keys that are there, (B, T) bool, in place of `causal`; an image that has none gets zeros; None: all are.
    """
    seen = None if mask is None else _in_sight(mask)
    if q.device.type != "cpu" or q.dtype == torch.float64:
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)
    else:
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)
    return h if mask is None else h * mask.any(1)[:, None, None, None]     # (B, K, N, D / K)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """How much of each key `attended` takes, the mean over heads, (B, N, T) float32: each row sums to 1, or 0 where
    an image has no key.

    Args:
        q: queries (B, K, N, D / K).
        k: keys (B, K, T, D / K).
        mask: keys that are there, (B, T) bool.
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().mT / math.sqrt(q.shape[3])          # (B, K, N, T)
        weights = scores.masked_fill(~_in_sight(mask), -math.inf).softmax(3).mean(1)   # (B, N, T)
    return weights * mask.any(1)[:, None, None]


def _in_sight(mask: Tensor) -> Tensor:
    """Keys that are there, (B, 1, 1, T); all where there are none, as a softmax over nothing is no number."""
    return (mask | ~mask.any(1, keepdim=True))[:, None, None]


def mean_square_normed(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    """The layer's norm of x in float32, which a mean of squares needs, as numbers of x's precision."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float()).to(x.dtype)


class CrossAttention(nn.Module):
    """Every place of a map attends to the tokens of its image (Rombach et al. 2022, LDM, section 3.3).

    `watch` is None but under `atelier.nets.attention_maps`: it is called with the weights and the map's height.

    Args:
        width: channels D of a place.
        token_dim: numbers E of a token.
        heads: K.
        bias: whether queries, keys and values have a bias, as in PixArt-alpha, or none, as in LDM.
        qk_norm: whether queries and keys are divided by their root mean square, see `DiT`.
    """

    def __init__(self, width: int, token_dim: int, heads: int, bias: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias), nn.Linear(token_dim, 2 * width, bias)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None for _ in range(2))
        self.out = nn.Linear(width, width)
        self.watch: Callable[[Tensor, int], None] | None = None

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, height: int) -> Tensor:
        """x (B, N, D) of a map of that height, tokens (B, T, E), mask (B, T) bool, true where there is one."""
        q = rearrange(self.q(x), "b n (heads c) -> b heads n c", heads=self.heads)             # (B, K, N, D / K)
        k, v = rearrange(self.kv(tokens), "b t (kv heads c) -> kv b heads t c", kv=2, heads=self.heads)
        if self.query_norm is not None:
            q, k = mean_square_normed(self.query_norm, q), mean_square_normed(self.key_norm, k)
        if self.watch is not None:
            self.watch(attention_weights(q, k, mask), height)
        h = attended(q, k, v, mask=mask)                                   # (B, K, N, D / K)
        return self.out(rearrange(h, "b heads n c -> b n (heads c)"))      # (B, N, D)


def checkpointed(layer: Callable[..., Tensor], on: bool) -> Callable[..., Tensor]:
    """The layer, which, where gradients are asked for and this is `on`, keeps its inputs alone and computes twice.

    Training deep nets with sublinear memory cost (Chen et al. 2016, section 3).
    """
    return partial(checkpoint, layer, use_reentrant=False) if on and torch.is_grad_enabled() else layer


class Down(nn.Module):
    """Half the size by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)                                                # (B, C, H / 2, W / 2)


class Up(nn.Module):
    """Twice the size by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))   # (B, C, 2 H, 2 W)
