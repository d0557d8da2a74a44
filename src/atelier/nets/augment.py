"""Augmentations that gradients pass through, for a discriminator that would learn its few images by heart.

Each image of a batch (B, C, H, W) is changed by its own draw, real and generated images by the same kinds of draws.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveInt, Probability

SHIFT = 1 / 8  # of the image's size
HALF = 0.5  # of the image's size: side of what is cut out


class DiffAugment(nn.Module):
    """Always on: colour, translation, cutout (Zhao et al. 2020, Differentiable Augmentation, section 3.2).

    Args:
        kinds: "color": brightness +- 0.5, saturation times 0 .. 2, contrast times 0.5 .. 1.5; "translation": by up to
            an eighth of the size, zeros behind; "cutout": a square of half the size becomes 0.
    """

    def __init__(self, *, kinds: list[Literal["color", "translation", "cutout"]]) -> None:
        super().__init__()
        self.kinds = kinds

    def forward(self, x: Tensor) -> Tensor:
        if "color" in self.kinds:
            x = recoloured(x)
        if "translation" in self.kinds:
            x = translated(x)
        return cut(x) if "cutout" in self.kinds else x

    def observe(self, real: Tensor) -> dict[str, Tensor]:
        """Nothing depends on how the discriminator does."""
        return {}


def recoloured(x: Tensor) -> Tensor:
    """Another brightness, saturation and contrast."""
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)                                     # (B, 1, H, W)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)                             # (B, 1, 1, 1)
    return mean + (x - mean) * (contrast + 0.5)


def translated(x: Tensor) -> Tensor:
    """Moved by whole pixels, zeros behind."""
    b, _, height, width = x.shape
    far = [int(size * SHIFT + 0.5) for size in (height, width)]
    rows, columns = (
        torch.arange(size, device=x.device) + torch.randint(-most, most + 1, (b, 1), device=x.device) + 1
        for size, most in zip((height, width), far, strict=True)
    )                                                                      # (B, H), (B, W): 0 and beyond are padding
    padded = F.pad(x, (1, 1, 1, 1))                                        # (B, C, H + 2, W + 2)
    rows, columns = rows.clamp(0, height + 1), columns.clamp(0, width + 1)
    images, rows, columns = rearrange(torch.arange(b), "b -> b 1 1"), rearrange(rows, "b h -> b h 1"), columns[:, None]
    return rearrange(padded[images, :, rows, columns], "b h w c -> b c h w")


def cut(x: Tensor) -> Tensor:
    """A square of half the size, its centre anywhere, becomes 0."""
    b, _, height, width = x.shape
    inside = []
    for size in (height, width):
        side = int(size * HALF + 0.5)
        first = torch.randint(0, size + (1 - side % 2), (b, 1), device=x.device) - side // 2
        place = torch.arange(size, device=x.device)
        inside.append((place >= first) & (place < first + side))           # (B, size)
    hole = rearrange(inside[0], "b h -> b 1 h 1") & rearrange(inside[1], "b w -> b 1 1 w")
    return x.masked_fill(hole, 0.0)


class ADA(nn.Module):
    """Each kind of change with probability p, which follows how sure the discriminator is of real images.

    Karras et al. 2020, Training Generative Adversarial Networks with Limited Data, sections 2 and 3, appendix B: the
    pipeline "bgc". Flips, quarter turns, whole-pixel shifts; scaling, rotation before and after, stretching, shifts;
    brightness, contrast, luma flip, hue, saturation. All movements are one bilinear look-up with mirrored borders, in
    place of the paper's filtered resampling at twice the size.

    Args:
        target: value of E sign(D(x)) over real images above which p rises and below which it falls.
        images_per_unit: images over which p can rise by 1.
        every_images: real images between two changes of p.
        p: probability to start with.
    """

    p: Tensor
    signs: Tensor
    seen: Tensor

    def __init__(
        self, *, target: Probability, images_per_unit: PositiveInt, every_images: PositiveInt, p: NonNegFloat
    ) -> None:
        super().__init__()
        self.target, self.images_per_unit, self.every_images = target, images_per_unit, every_images
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("signs", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def observe(self, real: Tensor) -> dict[str, Tensor]:
        """Count the signs of logits of real images, all ranks'; what is to be logged.

        p <- max(0, p + sign(r - target) n / images_per_unit), r the mean sign of the last n >= every_images images.
        """
        totals = ranks.summed(torch.stack([real.float().sign().sum(), real.new_tensor(float(len(real)))]))
        self.signs += totals[0]
        self.seen += totals[1]
        due = self.seen >= self.every_images
        r = self.signs / self.seen
        step = (r - self.target).sign() * self.seen / self.images_per_unit
        self.p.copy_(torch.where(due, (self.p + step).clamp(0, 1), self.p))
        for counter in (self.signs, self.seen):
            counter.masked_fill_(due, 0)
        return {"ada_p": self.p, "ada_sign": r}

    def forward(self, x: Tensor) -> Tensor:
        with float32(x.device):  # where a pixel comes from is no matter of eight bits
            return self._recoloured(self._moved(x.float()))

    def _happens(self, n: int) -> Tensor:
        """(n,) bool, true with probability p."""
        return torch.rand(n, device=self.p.device) < self.p

    def _moved(self, x: Tensor) -> Tensor:
        """Looked up at G applied to the grid of the image, whose sides are [-1, 1]."""
        b, device = len(x), x.device
        G = torch.eye(3, device=device).repeat(b, 1, 1)                    # (B, 3, 3)
        flip = torch.randint(0, 2, (b,), device=device) * 2.0 - 1
        G = G @ scaling(torch.where(self._happens(b), flip, 1.0), torch.ones(b, device=device))
        quarter = torch.randint(0, 4, (b,), device=device) * (math.pi / 2)
        G = G @ rotation(quarter * self._happens(b))
        whole = ((torch.rand(2, b, device=device) * 2 - 1) * SHIFT * x.shape[3]).round() * 2 / x.shape[3]
        G = G @ shift(*(whole * self._happens(b)))
        size = torch.exp2(torch.randn(b, device=device) * 0.2 * self._happens(b))
        G = G @ scaling(size, size)
        before = 1 - (1 - self.p).clamp(min=0).sqrt()                      # twice: together with probability p
        turn = torch.rand(b, device=device) < before
        G = G @ rotation((torch.rand(b, device=device) * 2 - 1) * math.pi * turn)
        stretch = torch.exp2(torch.randn(b, device=device) * 0.2 * self._happens(b))
        G = G @ scaling(stretch, 1 / stretch)
        turn = torch.rand(b, device=device) < before
        G = G @ rotation((torch.rand(b, device=device) * 2 - 1) * math.pi * turn)
        G = G @ shift(*(torch.randn(2, b, device=device) * SHIFT * 2 * self._happens(b)))
        grid = F.affine_grid(G[:, :2], list(x.shape), align_corners=False)  # (B, H, W, 2)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def _recoloured(self, x: Tensor) -> Tensor:
        """x (B, C, H, W); hue and saturation of colours alone."""
        b, device = len(x), x.device
        column = (b, 1, 1, 1)
        x = x + (torch.randn(b, device=device) * 0.2 * self._happens(b)).view(column)
        x = x * torch.exp2(torch.randn(b, device=device) * 0.5 * self._happens(b)).view(column)
        luma = x.mean(dim=1, keepdim=True)                                 # (B, 1, H, W)
        flip = (torch.randint(0, 2, (b,), device=device) * self._happens(b)).view(column)
        x = x - 2 * luma * flip
        if x.shape[1] != 3:
            return x
        x = hue_turned(x, (torch.rand(b, device=device) * 2 - 1) * math.pi * self._happens(b))
        luma = x.mean(dim=1, keepdim=True)
        return luma + (x - luma) * torch.exp2(torch.randn(b, device=device) * self._happens(b)).view(column)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, 3) of factors (B,)."""
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def rotation(angle: Tensor) -> Tensor:
    """(B, 3, 3) of angles (B,)."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)


def shift(x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, 3) of shifts (B,)."""
    matrix = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def hue_turned(x: Tensor, angle: Tensor) -> Tensor:
    """Colours (B, 3, H, W) turned about grey by angles (B,)   (Rodrigues' formula about (1, 1, 1) / sqrt(3))."""
    cos, sin = (f(angle).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    grey = x.mean(dim=1, keepdim=True)
    cross = (x.roll(-1, dims=1).roll(-1, dims=1) - x.roll(-1, dims=1)) / math.sqrt(3)    # (1, 1, 1) x colour
    return x * cos + cross * sin + grey * (1 - cos)
