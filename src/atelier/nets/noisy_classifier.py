"""Half a U-Net that tells the label of a noisy image: the way down, then attention that makes one vector of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import Levels, NonNegInt, PositiveInt, Probability, Width
from atelier.nets.conditioning import factors_of
from atelier.nets.layers import Down, ResBlock, SelfAttention, TimeEmbedding, norm
from atelier.nets.unet import attentive, map_sizes


class HalfUNet(nn.Module):
    """(x, time) -> logits of labels   (Dhariwal & Nichol 2021, ADM, section 4: the way down of their U-Net).

    Args:
        image_size: height and width of x; must halve evenly down to the smallest map.
        image_channels: channels of x.
        width: channels of the first level; the embedding has 4 times as many.
        multipliers: one level per entry, width * entry channels each, half the size of the one above.
        n_blocks: residual blocks per level.
        attention: map sizes at which each block is followed by attention.
        heads: heads of every attention, by number.
        dropout: share of values left out inside the residual blocks.
        scale_shift: whether the embedding scales and shifts (see `ResBlock`) or is added.
        patch_size: 2 folds 2x2 pixels into channels first; None: folds down to 16x16 maps.
        n_classes: number of labels.
        label_factors: numbers of each thing where a label numbers the combinations of several, the last counting
            fastest; each gets logits of its own, and log p is their sum. []: one thing.

    Raises:
        UserError: no labels, an image size that does not halve evenly, factors or heads that do not divide.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: Width,
        multipliers: Levels,
        n_blocks: PositiveInt,
        attention: list[PositiveInt],
        heads: PositiveInt,
        dropout: Probability,
        scale_shift: bool,
        patch_size: PositiveInt | None,
        n_classes: NonNegInt,
        label_factors: list[PositiveInt],
    ) -> None:
        super().__init__()
        self.patch_size = patch_size = patch_size or max(1, image_size // 16)
        self.shape, self.n_classes = (image_channels, image_size, image_size), n_classes
        if n_classes == 0:
            problem = "this set has no labels to tell apart"
            raise UserError("data.n_classes", n_classes, problem, "data=shapes, or another set with labels")
        self.factors = list(factors_of(n_classes, label_factors))
        sizes = map_sizes(image_size, patch_size, len(multipliers))
        widths, dim = [width * m for m in multipliers], 4 * width
        at = attentive(sizes, attention, widths, heads)
        self.time = nn.Sequential(TimeEmbedding(width), nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.stem = nn.Conv2d(image_channels * patch_size**2, width, 3, padding=1)
        n, self.down = width, nn.ModuleList()
        for level, wide in enumerate(widths):
            if level > 0:
                self.down.append(Down(n))
            for _ in range(n_blocks):
                self.down.append(ResBlock(n, wide, dim, dropout, scale_shift))
                n = wide
                if at[level]:
                    self.down.append(SelfAttention(n, heads))
        self.head = nn.Sequential(norm(n), nn.SiLU(), AttentionPool(n, sizes[-1], heads, sum(self.factors)))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, image_channels, H, W), time (B,) -> logits (B, L) of all factors, one behind the other."""
        embedding = F.silu(self.time(time))                                # (B, D)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))               # (B, C, H / patch, W / patch)
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
        return self.head(h)                                                # (B, L)

    def log_probability(self, logits: Tensor, label: Tensor) -> Tensor:
        """log p(label), (B,), of logits (B, L) and labels (B,) int64: the sum over factors."""
        found, rest = torch.zeros_like(logits[:, 0]), label
        for part in reversed(logits.split(self.factors, dim=1)):
            digit, rest = rest % part.shape[1], rest // part.shape[1]      # (B,)
            found = found + part.log_softmax(1).gather(1, digit[:, None])[:, 0]
        return found

    def likeliest(self, logits: Tensor) -> Tensor:
        """The label, (B,) int64, that logits (B, L) find most probable."""
        label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        for part in logits.split(self.factors, dim=1):
            label = label * part.shape[1] + part.argmax(1)
        return label


class AttentionPool(nn.Module):
    """A map to one vector: its mean, as a token, attends to itself and to all   (Radford et al. 2021, CLIP, 2.4).

    Args:
        channels: channels of the map.
        size: height and width of it.
        heads: heads of the attention, by number.
        n_out: size of the vector.
    """

    def __init__(self, channels: int, size: int, heads: int, n_out: int) -> None:
        super().__init__()
        self.heads = heads
        self.place = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.query, self.keys_values = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, n_out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c h w -> b (h w) c")                      # (B, N, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.place # (B, N + 1, C)
        q = rearrange(self.query(tokens[:, :1]), "b n (heads c) -> b heads n c", heads=self.heads)
        k, v = rearrange(
            self.keys_values(tokens), "b n (kv heads c) -> kv b heads n c", kv=2, heads=self.heads
        )                                                                  # (B, K, N + 1, C / K) each
        h = F.scaled_dot_product_attention(q, k, v)                        # (B, K, 1, C / K)
        return self.out(rearrange(h, "b heads 1 c -> b (heads c)"))        # (B, n_out)
