"""Generator and discriminator of StyleGAN2 (Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN).

Plain PyTorch. B batch, C channels, H, W height, width, W also the size of a style, L layers that take one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.precision import float32
from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.nets.equalized import GAIN, EqualizedConv, EqualizedLinear, MinibatchStd, active, pixel_norm
from atelier.nets.progan import GROUP, widths
from atelier.nets.resample import DownFiltered, Resample, UpFiltered
from atelier.nets.stylegan import Mapping

TAPS = [1, 3, 3, 1]


class ModulatedConv(nn.Module):
    """A convolution whose weights each image scales by its style, and scales back to unit output (eq. 1 and 3).

    Scaling the input by the style and the output by what demodulates is the same, and one convolution for all images.

    Args:
        up: whether the size doubles on the way, through the filter.
        demodulate: whether weights are brought back to length 1; not for colours.
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: int, style_dim: int, up: bool = False, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.style = EqualizedLinear(style_dim, n_in, bias=1.0)
        self.scale, self.demodulate = 1 / math.sqrt(n_in * kernel**2), demodulate
        self.blur = Resample(TAPS, gain=4.0) if up else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Without bias; x (B, C, H, W), w (B, W)."""
        style, weight = self.style(w).float(), self.weight * self.scale    # (B, C), (C', C, k, k)
        if self.demodulate:
            with float32(x.device):
                squares = weight.float().square().sum((2, 3))              # (C', C)
                size = (style.square() @ squares.T + 1e-8).rsqrt()         # (B, C') float32
        x = x * style[:, :, None, None].to(x.dtype)
        if self.blur is None:
            y = F.conv2d(x, weight, padding=weight.shape[2] // 2)          # (B, C', H, W)
        else:
            y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)    # (B, C', 2 H + 1, 2 W + 1)
            y = self.blur.filtered(y, (1, 1), 1)                           # (B, C', 2 H, 2 W)
        return y * size[:, :, None, None].to(y.dtype) if self.demodulate else y


class StyledConv(nn.Module):
    """Modulated convolution, noise of a learned strength, bias, leaky ReLU."""

    def __init__(self, n_in: int, n_out: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(n_in, n_out, 3, style_dim, up)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        y = self.conv(x, w)
        return active(y + self.strength * noise.to(y.dtype) + self.conv.bias[:, None, None])      # (B, C', H, W)


class Synthesis(nn.Module):
    """Styles to an image: a constant, two convolutions a size, colours of all sizes added up (figure 7b)."""

    def __init__(self, image_channels: int, channels: list[int], style_dim: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(channels[0], 4, 4))
        convs, colours = [StyledConv(channels[0], channels[0], style_dim)], []
        for n_in, n_out in pairwise(channels):
            convs += [StyledConv(n_in, n_out, style_dim, up=True), StyledConv(n_out, n_out, style_dim)]
        for n in channels:
            colours.append(ModulatedConv(n, image_channels, 1, style_dim, demodulate=False))
        self.convs, self.colours = nn.ModuleList(convs), nn.ModuleList(colours)
        self.up = UpFiltered(TAPS)
        self.n_styles = 2 * len(channels)
        self.noise_sizes = [4 * 2 ** ((k + 1) // 2) for k in range(len(convs))]

    def forward(self, styles: Tensor, noises: list[Tensor]) -> Tensor:
        """styles (B, L, W), noises (B, 1, h, w) of each of `noise_sizes`."""
        h = self.constant.expand(len(styles), -1, -1, -1)                  # (B, C0, 4, 4)
        h = self.convs[0](h, styles[:, 0], noises[0])
        image = self._colour(0, h, styles[:, 1])                           # (B, 3, 4, 4)
        for level in range(1, len(self.colours)):
            k = 2 * level - 1
            h = self.convs[k](h, styles[:, k], noises[k])                  # (B, C, 2 H, 2 W)
            h = self.convs[k + 1](h, styles[:, k + 1], noises[k + 1])
            image = self.up(image) + self._colour(level, h, styles[:, k + 2])
        return image                                                       # (B, 3, H, W) float32

    def _colour(self, level: int, h: Tensor, w: Tensor) -> Tensor:
        layer = self.colours[level]
        return layer(h, w).float() + layer.bias[:, None, None]


class StyleGAN2Generator(nn.Module):
    """Mapping and synthesis.

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images; nothing bounds them.
        noise_dim: size of z.
        cond_dim: size of the condition, 0 for none.
        style_dim: size of a style.
        n_layers: layers of the mapping.
        mapping_lr_multiplier: learning rate of the mapping as a factor of the other layers'; published: 0.01, for runs
            of 25 M images.
        channel_base, channel_max: `channel_base` / s channels in a map of size s, at most `channel_max`,
            published: 32768, 512 (configuration F).
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        cond_dim: NonNegInt,
        style_dim: PositiveInt,
        n_layers: PositiveInt,
        mapping_lr_multiplier: PositiveFloat = 0.01,
        channel_base: PositiveInt,
        channel_max: PositiveInt,
    ) -> None:
        super().__init__()
        sizes = {"noise_dim": noise_dim, "cond_dim": cond_dim, "style_dim": style_dim, "n_layers": n_layers}
        self.mapping = Mapping(**sizes, lr_multiplier=mapping_lr_multiplier)
        self.synthesis = Synthesis(image_channels, widths(image_size, channel_base, channel_max), style_dim)
        self.noise_dim = noise_dim

    def forward(self, z: Tensor, cond: Tensor, noises: list[Tensor]) -> Tensor:
        """Images (B, C, H, W) float32."""
        w = self.mapping(z, cond)
        return self.synthesis(w[:, None].expand(-1, self.synthesis.n_styles, -1), noises)


class StyleGAN2Discriminator(nn.Module):
    """Residual blocks down to 4x4 (figure 7c), the minibatch deviation, two dense layers.

    With a condition the logit is the features' product with it, made as long as a style (Karras et al. 2020, ADA code).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        cond_dim: size of the condition, 0 for none.
        channel_base, channel_max: `channel_base` / s channels in a map of size s, at most `channel_max`,
            as the generator's.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        cond_dim: NonNegInt,
        channel_base: PositiveInt,
        channel_max: PositiveInt,
    ) -> None:
        super().__init__()
        channels = widths(image_size, channel_base, channel_max)[::-1]
        self.pixels = EqualizedConv(image_channels, channels[0], 1)
        self.blocks = nn.ModuleList(DownBlock(n_in, n_out) for n_in, n_out in pairwise(channels))
        n = channels[-1]
        self.spread, self.conv = MinibatchStd(GROUP), EqualizedConv(n + 1, n, 3)
        self.dense, self.score = EqualizedLinear(n * 16, n), EqualizedLinear(n, cond_dim or 1)
        self.cond_dim = cond_dim

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = active(self.pixels(x))
        for block in self.blocks:
            h = block(h)                                                   # (B, C', H / 2, W / 2)
        h = active(self.conv(self.spread(h))).flatten(1)                   # (B, 16 C)
        score = self.score(active(self.dense(h))).float()                  # (B, 1 or E)
        return (score * pixel_norm(cond)).sum(1) / math.sqrt(self.cond_dim) if self.cond_dim else score.squeeze(1)


class DownBlock(nn.Module):
    """Two convolutions, the second behind the filter at half the size, and a skip, together of unit size."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = EqualizedConv(n_in, n_in, 3), HalvingConv(n_in, n_out)
        self.skip, self.down = EqualizedConv(n_in, n_out, 1, bias=False), DownFiltered(TAPS)

    def forward(self, x: Tensor) -> Tensor:
        h = active(self.conv2(active(self.conv1(x))))                      # (B, C', H / 2, W / 2)
        return (h + self.skip(self.down(x))) / GAIN


class HalvingConv(EqualizedConv):
    """A 3x3 convolution at every second pixel, behind the filter."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3)
        self.blur = Resample(TAPS, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blur.filtered(x, (2, 2), 1)                               # (B, C, H + 1, W + 1)
        return F.conv2d(x, self.weight * self.scale, self.bias, stride=2)  # (B, C', H / 2, W / 2)
