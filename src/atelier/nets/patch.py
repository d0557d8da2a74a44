"""A discriminator that scores overlapping patches, each by itself (Isola et al. 2017, pix2pix)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.nets.layers import as_published


class PatchDiscriminator(nn.Module):
    """Images to a map of logits: 4x4 convolutions, `n_layers` of stride 2 and two of stride 1.

    Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Networks, appendix 6.1.2. One logit
    sees 9 * 2**n_layers - 2 pixels a side: 16, 34, 70, 142 for 1, 2, 3, 4 layers.

    Args:
        image_size: side of what it sees, at least 3 * 2**n_layers.
        in_channels: channels of what it sees; for pairs those of both images.
        width: channels of the first convolution; twice as many at each further one, at most 8 times.
        n_layers: halvings; 3 is the 70x70 of the paper.
        norm: normalisation behind all convolutions but the first and the last: "batch" as published there, "instance"
            as in CycleGAN (Zhu et al. 2017), where each image is scored alone.

    Raises:
        UserError: the image is too small for so many layers.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        in_channels: PositiveInt,
        width: PositiveInt,
        n_layers: PositiveInt,
        norm: Literal["batch", "instance"],
    ) -> None:
        super().__init__()
        self.image_size = image_size
        if image_size < 3 * 2**n_layers:
            problem = f"{n_layers} layers need {3 * 2**n_layers} px, the images have {image_size}"
            raise UserError(".n_layers", n_layers, problem, _fix(image_size))
        widths = [width * min(8, 2**i) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(n_layers):
            stride = 2 if i < n_layers - 1 else 1
            layers += _layer(widths[i], widths[i + 1], stride, norm)
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers.apply(as_published)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, h, w) float32, h = image_size / 2**n_layers - 2."""
        return self.layers(x).float()                                      # (B, 1, h, w)


def _layer(n_in: int, n_out: int, stride: int, norm: str) -> list[nn.Module]:
    """The bias is left to the norm where that has one."""
    convolution = nn.Conv2d(n_in, n_out, 4, stride, padding=1, bias=norm == "instance")
    return [convolution, nn.BatchNorm2d(n_out) if norm == "batch" else nn.InstanceNorm2d(n_out), nn.LeakyReLU(0.2)]


def _fix(image_size: int) -> str:
    fitting = [n for n in range(1, 9) if 3 * 2**n <= image_size]
    return f".n_layers={fitting[-1]}" if fitting else "data.image_size=8"
