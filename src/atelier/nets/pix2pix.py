"""The U-Net of image-to-image translation (Isola et al. 2017, pix2pix)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.layers import as_published

Norm = Literal["batch", "instance", "none"]
DROPOUT = 0.5


class UNetTranslator(nn.Module):
    """4x4 convolutions of stride 2 down and up again, each map of the way down handed over to the way up.

    Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Networks, section 3.2.1 and appendix
    6.1.1. Theirs for 256 px: width 64, n_downs 8, n_dropout 3, 54.414 M weights.

    Args:
        image_size: side of the images in training, a multiple of 2**n_downs; sources of any such sides are translated.
        in_channels: channels of the source.
        source_levels: planes that each plane of the source becomes, 1 = the plane itself. More are for label maps,
            whose grey levels are names: each becomes a plane of its own (`spread`), as the U-Net alone learns names
            slowly.
        image_channels: channels of the result.
        width: channels of the first map; twice as many at each halving, at most 8 times.
        n_downs: halvings.
        norm: normalisation behind all convolutions but the outermost two and the innermost. "instance": each map of
            each image by its own mean and variance, with a learned scale and shift, which is what the published batch
            norm is in training and sampling alike at their batch size of 1. "batch": by those of the batch in training
            and by running averages at sampling, where no image may depend on others. "none": nothing is normalised, all
            have biases.
        n_dropout: innermost blocks of the way up that have dropout, p = 1/2, the only noise; fewer than `n_downs`.

    Raises:
        UserError: the image cannot be halved so often, or there are not so many blocks with dropout.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        in_channels: PositiveInt,
        source_levels: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        n_downs: PositiveInt,
        norm: Norm,
        n_dropout: NonNegInt,
    ) -> None:
        super().__init__()
        if image_size % 2**n_downs:
            problem = f"{image_size} px cannot be halved {n_downs} times"
            raise UserError(".n_downs", n_downs, problem, _fix(image_size, n_downs))
        if n_dropout >= n_downs:
            problem, fix = f"{n_downs} halvings have {n_downs - 1} such blocks", f".n_dropout={n_downs - 1}"
            raise UserError(".n_dropout", n_dropout, problem, fix)
        self.in_channels, self.image_channels = in_channels, image_channels
        self.source_levels, self.size_divisor, self.n_dropout = source_levels, 2**n_downs, n_dropout
        self.widths = [width * min(8, 2**i) for i in range(n_downs)]
        self.first = _down(in_channels * source_levels, width, norm, normed=False)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(0.2), *_down(n_in, n_out, norm, normed=i < n_downs - 2))
            for i, (n_in, n_out) in enumerate(pairwise(self.widths))
        )
        inner = [self.widths[-1], *(2 * n for n in self.widths[-2::-1])]   # what comes up, with what was handed over
        self.ups = nn.ModuleList(
            _up(n_in, n_out, norm) for n_in, n_out in zip(inner[:-1], self.widths[-2::-1], strict=True)
        )
        self.last = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(inner[-1], image_channels, 4, 2, 1))
        self.apply(as_published)

    def mask_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C, h, w) of the dropout masks of one source, from the innermost block on."""
        n = len(self.downs)
        return [(self.widths[n - 1 - i], height >> (n - i), width >> (n - i)) for i in range(self.n_dropout)]

    def kept(self, uniform: Tensor) -> Tensor:
        """A mask of uniform numbers in [0, 1): 0 for those below p, 1 / (1 - p) for the others."""
        return (uniform >= DROPOUT).float() / (1 - DROPOUT)

    def forward(self, source: Tensor, masks: list[Tensor]) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1].

        Args:
            source: (B, C', H, W), sides multiples of 2**n_downs.
            masks: (B, c, h, w) each, as `mask_shapes` tells, of 0 and 1 / (1 - p).
        """
        planes = source if self.source_levels == 1 else spread(source, self.source_levels) # (B, C' levels, H, W)
        h = self.first(planes)                                             # (B, width, H / 2, W / 2)
        over = []
        for down in self.downs:
            over.append(h)
            h = down(h)                                                    # (B, c, h / 2, w / 2)
        for i, up in enumerate(self.ups):
            h = up(h)                                                      # (B, c, 2 h, 2 w)
            if i < self.n_dropout:
                h = h * masks[i].to(h.dtype)
            h = torch.cat([h, over.pop()], dim=1)                          # (B, 2 c, 2 h, 2 w)
        return self.last(h).float().tanh()                                 # (B, C, H, W)


def spread(x: Tensor, levels: int) -> Tensor:
    """Each plane as `levels` planes, one for each of as many evenly spaced values: (B, C levels, H, W).

    The k-th is 1 at the k-th value in [-1, 1] and falls to 0 at its neighbours; values on the levels become one-hot.
    """
    centres = torch.linspace(-1, 1, levels, device=x.device)[:, None, None]
    away = (x[:, :, None] - centres).abs() * (levels - 1) / 2              # (B, C, levels, H, W)
    return rearrange((1 - away).clamp(min=0), "b c levels h w -> b (c levels) h w")


def _down(n_in: int, n_out: int, norm: Norm, normed: bool) -> nn.Sequential:
    """Half the size; the shift is left to norms."""
    convolution = nn.Conv2d(n_in, n_out, 4, 2, 1, bias=norm == "none")
    return nn.Sequential(convolution, _norm(n_out, norm) if normed else nn.Identity())


def _up(n_in: int, n_out: int, norm: Norm) -> nn.Sequential:
    """Twice the size."""
    convolution = nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=norm == "none")
    return nn.Sequential(nn.ReLU(), convolution, _norm(n_out, norm))


def _norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels, affine=True)


def _fix(image_size: int, n_downs: int) -> str:
    fitting = [n for n in range(1, n_downs) if image_size % 2**n == 0]
    if fitting:
        return f".n_downs={fitting[-1]}"
    return f"data.image_size={2**n_downs * max(1, round(image_size / 2**n_downs))}"
