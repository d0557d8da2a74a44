"""The U-Net of DDPM: residual blocks at several map sizes, attention at some, skips across."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import Levels, PositiveInt, Probability, Width
from atelier.nets.layers import Down, ResBlock, SelfAttention, TimeEmbedding, Up, norm, zeroed


class UNet(nn.Module):
    """(x, time, cond) -> a map like x   (Ho et al. 2020, DDPM, appendix B).

    Args:
        image_size: height and width of x; must halve evenly down to the smallest map.
        image_channels: channels of x.
        width: channels of the first level; the embedding has 4 times as many.
        multipliers: one level per entry, width * entry channels each, half the size of the one above.
        n_blocks: residual blocks per level on the way down (one more on the way up).
        attention: map sizes at which each block is followed by attention; None: the smallest. The middle always has it.
        heads: heads of the attention, by number.
        dropout: share of values left out inside the residual blocks.
        scale_shift: whether the embedding scales and shifts (see `ResBlock`) or is added.
        patch_size: 2 folds 2x2 pixels into channels first, so every map is half as large; None: folds down to 16x16
            maps. A fold of more numbers than `width` ends in `PixelHead`, as its maps cannot hold what they are to give
            back.
        cond_dim: size of the condition's vector, added to the time's; None: unconditional.
        learned_variance: whether it gives 2 C channels, those of x and then as many numbers that say how much noise a
            step back has (Nichol & Dhariwal 2021, Improved DDPM, section 3.1).

    Raises:
        UserError: an attention size that no level has, or an image size that does not halve evenly.
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
        dropout: Probability = 0.0,
        scale_shift: bool = False,
        patch_size: PositiveInt | None = 1,
        cond_dim: PositiveInt | None = None,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size = patch_size or max(1, image_size // 16)
        self.shape = (image_channels, image_size, image_size)
        self.cond_sizes = {} if cond_dim is None else {"vector": cond_dim}
        sizes = _map_sizes(image_size, patch_size, len(multipliers))
        widths, dim, deepest = [width * m for m in multipliers], 4 * width, len(multipliers) - 1
        folded, n_out = image_channels * patch_size**2, 1 + learned_variance
        at = _attentive(sizes, attention, widths, heads)
        self.time = nn.Sequential(TimeEmbedding(width), nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cond = None if cond_dim is None else nn.Linear(cond_dim, dim)
        self.stem = nn.Conv2d(folded, width, 3, padding=1)

        def block(n_in: int, level: int) -> UNetBlock:
            return UNetBlock(n_in, widths[level], dim, dropout, scale_shift, heads if sizes[level] in at else 0)

        self.down, n, skips = nn.ModuleList(), width, [width]
        for level in range(deepest + 1):
            for _ in range(n_blocks):
                self.down.append(block(n, level))
                skips.append(n := widths[level])
            if level < deepest:
                self.down.append(Down(n))
                skips.append(n)
        self.middle = nn.ModuleList([UNetBlock(n, n, dim, dropout, scale_shift, k) for k in (heads, 0)])
        self.up = nn.ModuleList()
        for level in range(deepest, -1, -1):
            for _ in range(n_blocks + 1):
                self.up.append(block(n + skips.pop(), level))
                n = widths[level]
            if level > 0:
                self.up.append(Up(n))
        self.pixels = PixelHead(n, image_channels, patch_size, dim, n_out) if folded > width else None
        last = nn.Identity() if self.pixels else zeroed(nn.Conv2d(n, n_out * folded, 3, padding=1))
        self.head = nn.Sequential(norm(n), nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), time (B,), cond with a vector (B, cond_dim) or None -> (B, C or 2 C, H, W)."""
        embedding = self.time(time)                                        # (B, D)
        if self.cond is not None:
            embedding = embedding + self.cond(cond.vector)                     # (B, D)
        embedding = F.silu(embedding)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))               # (B, C, H / patch, W / patch)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, UNetBlock) else layer(h)
        h = self.head(h)                                                   # (B, C, H / patch, W / patch)
        if self.pixels is not None:
            return self.pixels(h, x, embedding)                            # (B, C or 2 C, H, W)
        return F.pixel_shuffle(h, self.patch_size)                         # (B, C or 2 C, H, W)


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
    """A residual block, with attention behind it where `heads` > 0."""

    def __init__(self, n_in: int, n_out: int, dim: int, dropout: float, scale_shift: bool, heads: int) -> None:
        super().__init__()
        self.residual = ResBlock(n_in, n_out, dim, dropout, scale_shift)
        self.attention = SelfAttention(n_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))                 # (B, C, H, W)


def _map_sizes(image_size: int, patch_size: int, n_levels: int) -> list[int]:
    step = patch_size * 2 ** (n_levels - 1)
    if image_size % step:
        problem = f"{n_levels} levels and patch {patch_size} need a multiple of {step}"
        fix = f"data.image_size={-(-image_size // step) * step}"
        raise UserError("data.image_size", image_size, problem, fix)
    return [image_size // patch_size // 2**i for i in range(n_levels)]


def _attentive(sizes: list[int], attention: list[int] | None, widths: list[int], heads: int) -> list[int]:
    """Map sizes at which blocks have attention, whose channels the heads divide, as they do those of the middle."""
    attention = sizes[-1:] if attention is None else attention
    missed = [size for size in attention if size not in sizes]
    if missed:
        problem = f"no map has size {missed[0]}; the levels have {sizes}"
        raise UserError(".attention", attention, problem, f".attention=[{sizes[-1]}]")
    with_attention = [width for width, size in zip(widths, sizes, strict=True) if size in attention]
    uneven = [width for width in with_attention + widths[-1:] if width % heads]
    if uneven:
        problem = f"attention over {uneven[0]} channels needs a divisor of that"
        raise UserError(".heads", heads, problem, ".heads=1")
    return attention
