"""Nets of SRGAN: a residual net that enlarges images, and the discriminator of its results.

Ledig et al. 2017, Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from atelier.core.precision import float32
from atelier.core.ranges import PositiveInt
from atelier.images.bicubic import enlarged
from atelier.nets.layers import zeroed

STAGES: dict[int, tuple[int, ...]] = {2: (2,), 3: (3,), 4: (2, 2)}  # factor -> what each stage enlarges by
INNER = 3  # kernel of all convolutions but the first and the last
CUBIC = 2  # pixels of the source to either side that a bicubic enlargement looks at
WIDTHS, STRIDES = (1, 1, 2, 2, 4, 4, 8, 8), (1, 2, 1, 2, 1, 2, 1, 2)
SLOPE = 0.2  # of the discriminator's leaky ReLU


class SRResNet(nn.Module):
    """Images to images `scale_factor` times as wide (Ledig et al. 2017, figure 4).

    k9n64 and PReLU; residual blocks k3n64 with a PReLU between their two convolutions; k3n64 and a skip over all
    blocks; a convolution, a pixel shuffle (Shi et al. 2016) and a PReLU for each doubling; k9 to the image. The slope
    of a PReLU is one number a channel (He et al. 2015). Published: width 64, 16 blocks, kernel 9, batch norm, no
    `residual`: 1,548,547 parameters for colour and factor 4. It takes sources of any size.

    Args:
        image_channels: channels of source and result.
        width: channels.
        n_blocks: residual blocks.
        scale_factor: width of a result in widths of its source.
        kernel: side of the first and the last kernel, which at 9 costs more than all blocks of a small net; later
            practice has 3.
        norm: "batch" behind the convolutions of the blocks and the one after them, running statistics at test; later
            practice leaves it out (Lim et al. 2017, EDSR, 3.1; Wang et al. 2018, ESRGAN, 3.1).
        residual: whether the net adds to the bicubic enlargement of its source, from 0 on, instead of making the whole
            image (as in Kim et al. 2016, VDSR): small nets learn faster so.
    """

    def __init__(
        self,
        *,
        image_channels: PositiveInt,
        width: PositiveInt,
        n_blocks: PositiveInt,
        scale_factor: Literal[2, 3, 4],
        kernel: Literal[3, 9], norm: Literal["batch", "none"], residual: bool,
    ) -> None:
        super().__init__()
        self.scale_factor, self.residual, batch_norm = scale_factor, residual, norm == "batch"
        self.receptive_radius = _reach(n_blocks, scale_factor, kernel)
        self.first = nn.Sequential(nn.Conv2d(image_channels, width, kernel, padding=kernel // 2), nn.PReLU(width))
        body = [_Block(width, batch_norm) for _ in range(n_blocks)]
        self.body = nn.Sequential(*body, *_layer(width, batch_norm))
        stages: list[nn.Module] = []
        for times in STAGES[scale_factor]:
            wider = nn.Conv2d(width, width * times**2, INNER, padding=INNER // 2)
            stages += [wider, nn.PixelShuffle(times), nn.PReLU(width)]
        self.up = nn.Sequential(*stages)
        last = nn.Conv2d(width, image_channels, kernel, padding=kernel // 2)
        self.last = zeroed(last) if residual else last

    def forward(self, x: Tensor) -> Tensor:
        """Results (B, C, factor H, factor W) float32 of sources (B, C, H, W) in [-1, 1]."""
        h = self.first(x)                                                  # (B, N, H, W)
        h = h + self.body(h)                                               # (B, N, H, W)
        made = self.last(self.up(h)).float()                               # (B, C, f H, f W)
        if not self.residual:
            return made
        with float32(x.device):
            return enlarged(x.float(), self.scale_factor) + made           # (B, C, f H, f W)


class _Block(nn.Module):
    """Convolution, PReLU, convolution, plus the input."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_layer(width, batch_norm), nn.PReLU(width), *_layer(width, batch_norm))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)                                          # (B, N, H, W)


def _layer(width: int, batch_norm: bool) -> list[nn.Module]:
    """A convolution, and its norm, to which the bias is left."""
    convolution = nn.Conv2d(width, width, INNER, padding=INNER // 2, bias=not batch_norm)
    return [convolution, nn.BatchNorm2d(width)] if batch_norm else [convolution]


def _reach(n_blocks: int, scale_factor: int, kernel: int) -> int:
    """How far a pixel of the result looks into the source: walked from the last layer back.

    The results of a source pixel are 0 .. factor - 1; each layer widens the span that they look at, each stage makes it
    coarser.
    """
    low, high = -(kernel // 2), scale_factor - 1 + kernel // 2
    for times in STAGES[scale_factor][::-1]:
        low, high = low // times - INNER // 2, high // times + INNER // 2
    inside = (2 * n_blocks + 1) * (INNER // 2) + kernel // 2
    return max(CUBIC, max(-low, high) + inside)


class SRDiscriminator(nn.Module):
    """Images to one logit each (Ledig et al. 2017, figure 4).

    Eight 3x3 convolutions of strides 1, 2, 1, 2, ..., leaky ReLU 0.2 and a norm behind all but the first; then two
    dense layers, so that it sees one size only. Attribute `per_sample`: whether a logit is of its image alone, as
    penalties want.

    Args:
        image_size: side of the images.
        image_channels: channels of the images.
        width: channels of the first two convolutions, doubled at every second one; 64 as published.
        dense: size of the first dense layer; 1024 as published.
        norm: "batch": a norm behind convolutions, as published; "none": convolutions start from weights that keep the
            size of activations as norms would (He et al. 2015, eq. 15).
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        dense: PositiveInt,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        self.per_sample = norm == "none"
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, INNER, padding=1), nn.LeakyReLU(SLOPE)]
        for (n_in, n_out), stride in zip(pairwise(width * k for k in WIDTHS), STRIDES[1:], strict=True):
            norms = [] if self.per_sample else [nn.BatchNorm2d(n_out)]
            convolution = nn.Conv2d(n_in, n_out, INNER, stride, padding=1, bias=self.per_sample)
            layers += [convolution, *norms, nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers)
        if self.per_sample:
            self.layers.apply(_kept_in_size)
        side = -(-image_size // 2 ** STRIDES.count(2))  # each stride rounds up
        self.head = nn.Sequential(nn.Linear(8 * width * side**2, dense), nn.LeakyReLU(SLOPE), nn.Linear(dense, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,) float32 of images (B, C, S, S)."""
        h = self.layers(x)                                                 # (B, 8 N, S / 16, S / 16)
        return self.head(h.flatten(1)).squeeze(1).float()                  # (B,)


def _kept_in_size(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, SLOPE)
        nn.init.zeros_(layer.bias)
