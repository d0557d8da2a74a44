"""One generator for all attributes, and a discriminator that also tells them (Choi et al. 2018, StarGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt

SLOPE = 0.01


class StarGenerator(nn.Module):
    """An image and the attributes that it is to get, to an image.

    Choi et al. 2018, StarGAN: Unified Generative Adversarial Networks for Multi-Domain Image-to-Image Translation,
    appendix 7.2, table 4. Theirs for 5 attributes: width 64, n_blocks 6, 8,430,528 weights.

    Attributes enter as constant maps. Instance norm takes the mean of a map away: what such a constant leaves behind a
    convolution is seen only against the zeros around the image, so the padding is of zeros and not of reflections, with
    which attributes would vanish. The statistics are those of each image in training and at sampling alike: running
    ones would make an image another one in eval mode.

    Args:
        image_size: side of the images in training, a multiple of 4; images of any such sides are translated.
        image_channels: channels of the images.
        n_attributes: A.
        width: channels at full size; four times as many in the middle.
        n_blocks: residual blocks there.
        residual: whether the net adds to 2 x before the tanh, so that an image is kept before anything is learned; not
            in the paper.

    Raises:
        UserError: the image cannot be halved twice.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        n_attributes: PositiveInt,
        width: PositiveInt,
        n_blocks: NonNegInt,
        residual: bool,
    ) -> None:
        super().__init__()
        if image_size % 4:
            fix = f"data.image_size={4 * max(1, round(image_size / 4))}"
            raise UserError("data.image_size", image_size, "this net needs a multiple of 4", fix)
        self.n_attributes, self.residual = n_attributes, residual
        plain, down, up = (nn.Conv2d, 7, 1, 3), (nn.Conv2d, 4, 2, 1), (nn.ConvTranspose2d, 4, 2, 1)
        self.layers = nn.Sequential(
            *_layer(*plain, image_channels + n_attributes, width),
            *_layer(*down, width, 2 * width),
            *_layer(*down, 2 * width, 4 * width),
            *(StarBlock(4 * width) for _ in range(n_blocks)),
            *_layer(*up, 4 * width, 2 * width),
            *_layer(*up, 2 * width, width),
            nn.Conv2d(width, image_channels, 7, padding=3, bias=False),
        )

    def forward(self, x: Tensor, attributes: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1] of images and attributes (B, A), 0 or 1."""
        maps = repeat(attributes.to(x.dtype), "b a -> b a h w", h=x.shape[2], w=x.shape[3])
        h = self.layers(torch.cat([x, maps], dim=1)).float()  # (B, C, H, W)
        return (h + 2 * x if self.residual else h).tanh()  # (B, C, H, W)


class StarBlock(nn.Module):
    """3x3 and instance norm twice, plus the input; no activation behind the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (_layer(nn.Conv2d, 3, 1, 1, channels, channels) for _ in range(2))
        self.layers = nn.Sequential(*first, *second[:2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # (B, C, H, W)


class StarDiscriminator(nn.Module):
    """Images to a map of logits, real or generated, and to the logits of their attributes (appendix 7.2, table 5).

    No norm, so that penalties see each image alone. Theirs for 5 attributes at 128 px: width 64, n_layers 6, 44,762,048
    weights.

    Args:
        image_size: side of what it sees, a multiple of 2**n_layers.
        image_channels: channels of the images.
        n_attributes: A.
        width: channels of the first map; twice as many at each further halving.
        n_layers: halvings.

    Raises:
        UserError: the image cannot be halved so often.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        n_attributes: PositiveInt,
        width: PositiveInt,
        n_layers: PositiveInt,
    ) -> None:
        super().__init__()
        if image_size % 2**n_layers:
            fitting = [n for n in range(1, n_layers) if image_size % 2**n == 0]
            size = 2**n_layers * max(1, round(image_size / 2**n_layers))
            fix = f".n_layers={fitting[-1]}" if fitting else f"data.image_size={size}"
            problem = f"{image_size} px cannot be halved {n_layers} times"
            raise UserError(".n_layers", n_layers, problem, fix)
        widths = [image_channels, *(width * 2**i for i in range(n_layers))]
        self.layers = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1) for i in range(n_layers))
        self.score = nn.Conv2d(widths[-1], 1, 3, padding=1, bias=False)
        self.attributes = nn.Conv2d(widths[-1], n_attributes, image_size // 2**n_layers, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 1, h, w), h = image_size / 2**n_layers, and those of the attributes (B, A), float32 both."""
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)  # (B, c, H / 2, W / 2)
        return self.score(x).float(), self.attributes(x).flatten(1).float()


def _layer(kind: type[nn.Module], size: int, stride: int, padding: int, n_in: int, n_out: int) -> list[nn.Module]:
    """Convolution, instance norm with scale and shift, ReLU."""
    convolution = kind(n_in, n_out, size, stride, padding, bias=False)
    return [convolution, nn.InstanceNorm2d(n_out, affine=True), nn.ReLU()]
