"""The U-Net of DDPM: residual blocks at several map sizes, attention at some, skips across."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import Levels, NonNegInt, PositiveFloat, PositiveInt, Probability, Width
from atelier.nets.autoencoder import Halve
from atelier.nets.denoising import cond_sizes
from atelier.nets.layers import (
    Down,
    ResBlock,
    SelfAttention,
    TimeEmbedding,
    Up,
    checkpointed,
    n_groups,
    zeroed,
)
from atelier.nets.spatial_transformer import SpatialTransformer
from atelier.nets.widening import with_planes


class UNet(nn.Module):
    """(x, time, cond) -> a map like x   (Ho et al. 2020, DDPM, appendix B; ADM: Dhariwal & Nichol 2021, section 3).

    Args:
        image_size: height and width of x; must halve evenly down to the smallest map.
        image_channels: channels C of x.
        width: channels of the first level; the embedding has 4 times as many.
        multipliers: one level per entry, width * entry channels each, half the size of the one above.
        n_blocks: residual blocks per level on the way down (one more on the way up).
        attention: map sizes at which each block is followed by attention; None: the smallest. The middle always has it.
        heads: heads of the attention, by number.
        head_width: channels of a head, in place of a number of heads, which grows with the maps then (ADM: 64).
        dropout: share of values left out inside the residual blocks.
        scale_shift: whether the embedding scales and shifts (see `ResBlock`) or is added.
        resample_in_blocks: whether maps change their size inside a residual block (ADM) or by a convolution.
        patch_size: 2 folds 2x2 pixels into channels first, so every map is half as large; None: folds down to 16x16
            maps. A fold of more numbers than `width` ends in `PixelHead`, as its maps cannot hold what they are to give
            back.
        cond_dim: size of the condition's vector, added to the time's; None: unconditional.
        learned_variance: whether it gives 2 C channels, those of x and then as many numbers that say how much noise a
            step back has (Nichol & Dhariwal 2021, Improved DDPM, section 3.1).
        checkpointing: whether blocks are computed again on the way back: little memory, a third more work.
        norm_groups: groups of every norm; None: up to 32, of 4 or more channels each.
        norm_eps: number added to the variance in every norm.
        pad_below: whether a convolution that halves a map is padded below and right alone, as DDPM's own.
        freq_shift: 1 ends the frequencies of the time at 1/10000, 0 one step before it (ADM).
        token_dim: size E of each of the condition's tokens, at which every attention looks as well then: it is a
            `SpatialTransformer` (Rombach et al. 2022, LDM, section 3.3); None: it takes none.
        plane_channels: number F of the condition's planes, which are seen beside x, at first with weights of 0.
        depths: number of transformer blocks of an attention of each level, the last also of the middle (Podell et al.
            2023, SDXL, table 1), for a net of tokens; None: one.
        deep_cond: whether the condition's vector goes through two linear layers with a SiLU between, as the time does
            (SDXL), in place of one.

    Raises:
        UserError: an attention size that no level has, an image size that does not halve evenly, depths of other
            levels or without tokens, or two layers for a vector that is none.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: Width,
        multipliers: Levels,
        n_blocks: PositiveInt,
        attention: list[PositiveInt] | None,
        heads: PositiveInt = 1,
        head_width: PositiveInt | None = None,
        dropout: Probability = 0.0,
        scale_shift: bool = False,
        resample_in_blocks: bool = False,
        patch_size: PositiveInt | None = 1,
        cond_dim: PositiveInt | None = None,
        learned_variance: bool = False,
        checkpointing: bool = False,
        norm_groups: PositiveInt | None = None,
        norm_eps: PositiveFloat = 1e-6,
        pad_below: bool = False,
        freq_shift: Literal[0, 1] = 1,
        token_dim: PositiveInt | None = None,
        plane_channels: NonNegInt = 0,
        depths: Levels | None = None,
        deep_cond: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size = patch_size or max(1, image_size // 16)
        self.shape, self.checkpointing = (image_channels, image_size, image_size), checkpointing
        self.cond_sizes = cond_sizes(cond_dim, token_dim, plane_channels)
        sizes, widths = map_sizes(image_size, patch_size, len(multipliers)), [width * m for m in multipliers]
        _check_groups(norm_groups, [width, *widths])
        shared = (heads, head_width, dropout, scale_shift, resample_in_blocks, pad_below, norm_groups, norm_eps)
        self.parts = parts = UNetParts(4 * width, token_dim, *shared)
        self.widths, self.n_blocks = widths, n_blocks
        self.attends = attentive(sizes, attention, widths, heads, head_width)
        *at, middle = _depths(depths, self.attends, token_dim)
        time = TimeEmbedding(width, freq_shift)
        self.time = nn.Sequential(time, nn.Linear(width, parts.dim), nn.SiLU(), nn.Linear(parts.dim, parts.dim))
        self.cond = _vector_layers(cond_dim, parts.dim, deep_cond)
        folded, n_out = image_channels * patch_size**2, 1 + learned_variance
        self.stem = with_planes(nn.Conv2d(folded, width, 3, padding=1), plane_channels * patch_size**2)
        self.down, skips = _way_down(parts, width, widths, n_blocks, at)
        self.middle = nn.ModuleList([parts.block(widths[-1], widths[-1], depth) for depth in (middle, 0)])
        self.up = _way_up(parts, skips, widths, n_blocks, at)
        n = widths[0]
        self.pixels = PixelHead(n, image_channels, patch_size, parts.dim, n_out) if folded > width else None
        last = nn.Identity() if self.pixels else zeroed(nn.Conv2d(n, n_out * folded, 3, padding=1))
        self.head = nn.Sequential(parts.norm(n), nn.SiLU(), last)

    def resize(self, image_size: PositiveInt) -> None:
        """Denoise maps of another size from here on; attention stays at the levels where it is.

        Raises:
            UserError: the size does not halve evenly.
        """
        step = self.patch_size * 2 ** (len(self.widths) - 1)
        if image_size % step:
            problem = f"{len(self.widths)} levels need maps of a multiple of {step}"
            raise UserError(".image_size", image_size, problem, "a larger data.image_size")
        self.shape = (self.shape[0], image_size, image_size)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), time (B,), cond with what `cond_sizes` names, or None -> (B, C or 2 C, H, W)."""
        embedding = self.time(time)                                        # (B, D)
        if self.cond is not None:
            embedding = embedding + self.cond(cond.vector)                     # (B, D)
        embedding = F.silu(embedding)
        given = torch.cat([x, cond.planes], dim=1) if "planes" in self.cond_sizes else x       # (B, C + F, H, W)
        tokens = (cond.tokens, cond.mask) if "tokens" in self.cond_sizes else ()
        h = self.stem(F.pixel_unshuffle(given, self.patch_size))           # (B, C, H / patch, W / patch)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, embedding, *tokens)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, embedding, *tokens)
        for layer in self.up:
            h = torch.cat([h, skips.pop()], dim=1) if isinstance(layer, UNetBlock) else h
            h = self._run(layer, h, embedding, *tokens)
        h = self.head(h)                                                   # (B, C, H / patch, W / patch)
        if self.pixels is not None:
            return self.pixels(h, x, embedding)                            # (B, C or 2 C, H, W)
        return F.pixel_shuffle(h, self.patch_size)                         # (B, C or 2 C, H, W)

    def _run(self, layer: nn.Module, h: Tensor, embedding: Tensor, *tokens: Tensor) -> Tensor:
        """What a layer makes of h (B, C, H, W), those that hear the embedding or tokens and their mask with them."""
        if isinstance(layer, UNetBlock):
            return checkpointed(layer, self.checkpointing)(h, embedding, *tokens)
        if isinstance(layer, ResBlock):
            return checkpointed(layer, self.checkpointing)(h, embedding)
        return layer(h)


@dataclass(frozen=True)
class UNetParts:
    """What all blocks of a U-Net share; its fields are arguments of `UNet`, `dim` the size of the embedding."""

    dim: int
    token_dim: int | None
    heads: int
    head_width: int | None
    dropout: float
    scale_shift: bool
    resample_in_blocks: bool
    pad_below: bool
    norm_groups: int | None
    norm_eps: float

    def groups_of(self, channels: int) -> int:
        return self.norm_groups or n_groups(channels)

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.groups_of(channels), channels, eps=self.norm_eps)

    def heads_of(self, channels: int) -> int:
        return self.heads if self.head_width is None else channels // self.head_width

    def residual(self, n_in: int, n_out: int, resample: nn.Module | None = None) -> ResBlock:
        return ResBlock(n_in, n_out, self.dim, self.dropout, self.scale_shift, self.norm, resample)

    def block(self, n_in: int, n_out: int, depth: int) -> UNetBlock:
        return UNetBlock(self.residual(n_in, n_out), self.attention(n_out, depth) if depth else nn.Identity())

    def attention(self, channels: int, depth: int) -> nn.Module:
        if self.token_dim is None:
            return SelfAttention(channels, self.heads_of(channels), self.norm)
        groups = self.groups_of(channels)
        return SpatialTransformer(channels, self.heads_of(channels), self.token_dim, depth, groups)

    def half(self, channels: int) -> nn.Module:
        if self.resample_in_blocks:
            return self.residual(channels, channels, nn.AvgPool2d(2))
        return Halve(channels) if self.pad_below else Down(channels)

    def twice(self, channels: int) -> nn.Module:
        if self.resample_in_blocks:
            return self.residual(channels, channels, nn.Upsample(scale_factor=2.0, mode="nearest"))
        return Up(channels)


def _way_down(
    parts: UNetParts, width: int, widths: list[int], n_blocks: int, depths: list[int]
) -> tuple[nn.ModuleList, list[int]]:
    """The layers of the way down, and the channels of what came before and behind each."""
    layers, skips = nn.ModuleList(), [width]
    for level, n_out in enumerate(widths):
        for _ in range(n_blocks):
            layers.append(parts.block(skips[-1], n_out, depths[level]))
            skips.append(n_out)
        if level < len(widths) - 1:
            layers.append(parts.half(n_out))
            skips.append(n_out)
    return layers, skips


def _way_up(
    parts: UNetParts, skips: list[int], widths: list[int], n_blocks: int, depths: list[int]
) -> nn.ModuleList:
    """The layers of the way up, whose blocks take what was skipped, the last first."""
    layers, n, skips = nn.ModuleList(), widths[-1], list(skips)
    for level in range(len(widths) - 1, -1, -1):
        for _ in range(n_blocks + 1):
            layers.append(parts.block(n + skips.pop(), widths[level], depths[level]))
            n = widths[level]
        if level > 0:
            layers.append(parts.twice(n))
    return layers


class PixelHead(nn.Module):
    """Maps to pixels beside the pixels that came in, where maps are narrower than what they fold.

    Noise has no shape that fewer numbers than its own could tell, so what a net says of it must see it: each pixel is
    scaled by what the embedding says and added, and two convolutions at full size, with the embedding between them,
    draw what lies finer than a map. 4 numbers a colour there cost less than a convolution from the maps to a wide fold.
    It makes `n_out` images, one behind the other in the channels.
    """

    def __init__(self, n_in: int, image_channels: int, patch_size: int, dim: int, n_out: int) -> None:
        super().__init__()
        self.patch_size, self.n_out = patch_size, n_out
        self.widths = [4 * image_channels, 4 * image_channels, n_out * image_channels]
        self.spread = nn.Conv2d(n_in, self.widths[0] * patch_size**2, 1)
        self.look = nn.Conv2d(image_channels, self.widths[0], 3, padding=1)
        self.embedding = zeroed(nn.Linear(dim, sum(self.widths)))
        self.last = zeroed(nn.Conv2d(self.widths[0], n_out * image_channels, 3, padding=1))

    def forward(self, maps: Tensor, x: Tensor, embedding: Tensor) -> Tensor:
        """`maps` (B, n_in, H / patch, W / patch), x (B, C, H, W), `embedding` (B, D): maps and embedding activated."""
        modulation = self.embedding(embedding)[:, :, None, None].split(self.widths, dim=1)
        scale, shift, kept = modulation                                    # (B, 4 C, 1, 1) twice, (B, n_out C, 1, 1)
        h = F.pixel_shuffle(self.spread(maps), self.patch_size) + self.look(x) # (B, 4 C, H, W)
        h = F.silu(h * (1 + scale) + shift)                                # (B, 4 C, H, W)
        return kept * x.repeat(1, self.n_out, 1, 1) + self.last(h)         # (B, n_out C, H, W)


class UNetBlock(nn.Module):
    """A residual block, with attention or nothing behind it."""

    def __init__(self, residual: ResBlock, attention: nn.Module) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, embedding: Tensor, *tokens: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, D) activated; where the net takes any, tokens (B, T, E) and their mask."""
        h = self.residual(x, embedding)                                    # (B, C, H, W)
        return self.attention(h, *tokens) if isinstance(self.attention, SpatialTransformer) else self.attention(h)


def map_sizes(image_size: int, patch_size: int, n_levels: int) -> list[int]:
    """Height and width of the maps of each level.

    Raises:
        UserError: the image does not halve evenly.
    """
    step = patch_size * 2 ** (n_levels - 1)
    if image_size % step:
        problem = f"{n_levels} levels and patch {patch_size} need a multiple of {step}"
        fix = f"data.image_size={-(-image_size // step) * step}"
        raise UserError("data.image_size", image_size, problem, fix)
    return [image_size // patch_size // 2**i for i in range(n_levels)]


def attentive(
    sizes: list[int], attention: list[int] | None, widths: list[int], heads: int, head_width: int | None = None
) -> list[bool]:
    """Which levels have attention; heads divide their channels, as they do those of the last level, always attended.

    Raises:
        UserError: an attention size that no level has, or heads that do not divide.
    """
    attention = sizes[-1:] if attention is None else attention
    missed = [size for size in attention if size not in sizes]
    if missed:
        problem = f"no map has size {missed[0]}; the levels have {sizes}"
        raise UserError(".attention", attention, problem, f".attention=[{sizes[-1]}]")
    with_attention = [width for width, size in zip(widths, sizes, strict=True) if size in attention]
    uneven = [width for width in with_attention + widths[-1:] if width % (head_width or heads)]
    if uneven:
        problem = f"attention over {uneven[0]} channels needs a divisor of that"
        if head_width is not None:
            raise UserError(".head_width", head_width, problem, ".head_width=null")
        raise UserError(".heads", heads, problem, ".heads=1")
    return [size in attention for size in sizes]


def _depths(depths: list[int] | None, attends: list[bool], token_dim: int | None) -> list[int]:
    """Blocks of an attention of each level, 0 where it has none, then those of the middle's."""
    if depths is not None and token_dim is None:
        raise UserError(".depths", depths, "transformer blocks need tokens to look at", ".depths=null")
    plain = [1] * len(attends)
    depths = plain if depths is None else depths
    if len(depths) != len(attends):
        problem = f"it says {len(depths)} for {len(attends)} levels"
        raise UserError(".depths", depths, problem, f".depths=[{','.join(map(str, plain))}]")
    return [depth * attended for depth, attended in zip(depths, attends, strict=True)] + depths[-1:]


def _vector_layers(cond_dim: int | None, dim: int, deep: bool) -> nn.Module | None:
    """What makes `dim` numbers of a condition's vector; None where there is none."""
    if deep and cond_dim is None:
        raise UserError(".deep_cond", deep, "two layers need a vector to read", ".deep_cond=false")
    if cond_dim is None:
        return None
    first = nn.Linear(cond_dim, dim)
    return nn.Sequential(first, nn.SiLU(), nn.Linear(dim, dim)) if deep else first


def _check_groups(norm_groups: int | None, widths: list[int]) -> None:
    uneven = [width for width in widths if width % (norm_groups or 1)]
    if uneven:
        raise UserError(".norm_groups", norm_groups, f"it does not divide the width {uneven[0]}", ".norm_groups=null")
