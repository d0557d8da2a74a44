"""An image to an image of the same size: down, residual blocks, up (Johnson et al. 2016; Zhu et al. 2017, CycleGAN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.layers import as_published
from atelier.nets.layers import norm as group_norm

SHARE = 2.0  # of the source in what a residual net's tanh sees: 1 becomes 0.96


class ResNetTranslator(nn.Module):
    """c7s1-k, d2k, d4k, n residual blocks, u2k, uk, c7s1-3 in the words of CycleGAN's appendix 7.2.

    Args:
        in_channels, image_channels: channels of the source and of the image, which ends in tanh.
        width: k, channels at full size; twice as many at each halving.
        n_downs: halvings; published: 2.
        n_blocks: residual blocks at the smallest size; published: 6 for 128 px, 9 for 256 px and more.
        patch_size: pixels a side that are made channels before the first convolution and pixels again after the last
            one, which spares small machines the full size; published: 1.
        norm: "instance" as published, without scale and shift; "group": GroupNorm, which leaves a map its mean.
        padding: "reflect" as published, or "zeros".
        residual: whether the net says what is to be added to twice the source before the tanh, and starts with nothing;
            the source must have the image's channels.

    Raises:
        UserError: the last map holds fewer numbers than the pixels it is to become, and no source is added to them.
    """

    def __init__(
        self,
        *,
        in_channels: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        n_downs: NonNegInt,
        n_blocks: PositiveInt,
        patch_size: PositiveInt,
        norm: Literal["instance", "group"],
        padding: Literal["reflect", "zeros"],
        residual: bool,
    ) -> None:
        super().__init__()
        if width < (folded := image_channels * patch_size**2) and not residual:
            problem = f"patch {patch_size} makes {folded} numbers of each place of so wide a map"
            raise UserError(".width", width, problem, f".width={folded}")
        self.residual, self.size_divisor = residual, patch_size * 2**n_downs
        make = nn.InstanceNorm2d if norm == "instance" else group_norm
        ends, widths = 7 if patch_size == 1 else 3, [width * 2**i for i in range(n_downs + 1)]
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch_size)]
        stem = nn.Conv2d(in_channels * patch_size**2, width, ends, padding=ends // 2, padding_mode=padding)
        layers += _block(stem, make)
        looked_at = {0: in_channels * patch_size**2}
        for n in widths[:-1]:
            looked_at[len(layers)] = 2 * n
            layers += _block(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1), make)
        looked_at |= {len(layers) + k: widths[-1] for k in (0, n_blocks // 2)}
        layers += [TranslatorBlock(widths[-1], make, padding) for _ in range(n_blocks)]
        for n in widths[:0:-1]:
            layers += _block(nn.ConvTranspose2d(n, n // 2, 3, stride=2, padding=1, output_padding=1), make)
        last = nn.Conv2d(width, folded, ends, padding=ends // 2, padding_mode=padding)
        self.layers = nn.Sequential(*layers, last, nn.PixelShuffle(patch_size)).apply(as_published)
        if residual:
            nn.init.zeros_(last.weight)
        self.looked_at = looked_at

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of sources (B, C', H, W), whose sides divide by `multiple`."""
        h = self.layers(x).float()                                         # (B, C, H, W)
        return (h + SHARE * x.float() if self.residual else h).tanh()

    def features(self, x: Tensor) -> list[Tensor]:
        """What the first half sees in x, a list of maps (B, C, h, w) (Park et al. 2020, CUT, appendix C.1).

        The pixels, the maps behind each halving convolution, behind the first and behind the middle residual block.
        `looked_at` says behind which layers, and how many channels C those give.
        """
        found = []
        for k, layer in enumerate(self.layers[: max(self.looked_at) + 1]):
            x = layer(x)
            if k in self.looked_at:
                found.append(x)
        return found


class TranslatorBlock(nn.Module):
    """Two 3x3 convolutions with norms, plus the input; no ReLU behind the sum (Gross & Wilber 2016)."""

    def __init__(self, channels: int, make: Callable[[int], nn.Module], padding: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding) for _ in range(2))
        self.norm1, self.norm2 = make(channels), make(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))                              # (B, C, H, W)
        return x + self.norm2(self.conv2(h))


def check_divides(image_size: int, size_divisor: int) -> None:
    """Raises:
    UserError: images of this size do not divide as often as the nets halve them.
    """
    if image_size % size_divisor:
        fix = f"data.image_size={max(1, round(image_size / size_divisor)) * size_divisor}"
        raise UserError("data.image_size", image_size, f"this net needs a multiple of {size_divisor}", fix)


def _block(conv: nn.Module, make: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [conv, make(conv.out_channels), nn.ReLU()]
