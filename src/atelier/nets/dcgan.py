"""Generator of transposed convolutions and its discriminator (Radford et al. 2016, DCGAN)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.equalized import EqualizedLinear, MinibatchStd
from atelier.nets.layers import ConditionalBatchNorm, as_published, n_halvings

SLOPE = 0.2  # of leaky ReLU


def mapping_of(noise_dim: int, width: int) -> nn.Sequential:
    """Two dense layers (B, Z) -> (B, W)."""
    first, second = EqualizedLinear(noise_dim, width), EqualizedLinear(width, width)
    return nn.Sequential(first, nn.LeakyReLU(SLOPE), second, nn.LeakyReLU(SLOPE))


class DCGenerator(nn.Module):
    """4x4 maps doubled by transposed convolutions, batch norm and ReLU between (Radford et al. 2016, DCGAN, figure 1).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images, which end in tanh.
        noise_dim: size of z.
        width: channels of the last hidden map, half the image's size; twice as many at each halving.
        channel_max: channels of any map.
        mapping_dim: units of two dense layers through which z also scales and shifts behind each batch norm (Chen et
            al. 2019, On Self Modulation for GANs, eq. 3 and 4; here one mapping serves all); 0: it does not.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        noise_dim: PositiveInt,
        width: PositiveInt,
        channel_max: PositiveInt,
        mapping_dim: NonNegInt = 0,
    ) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        self.mapping = mapping_of(noise_dim, mapping_dim) if mapping_dim else None
        widths = [min(channel_max, width * 2**i) for i in range(n_halvings(image_size))][::-1]
        first = nn.ConvTranspose2d(noise_dim, widths[0], 4, bias=False)
        later = (nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=False) for n_in, n_out in pairwise(widths))
        self.convs = nn.ModuleList([first, *later])
        self.norms = nn.ModuleList(ConditionalBatchNorm(n, mapping_dim) for n in widths)
        self.last = nn.ConvTranspose2d(widths[-1], image_channels, 4, 2, 1, bias=False)
        self.apply(as_published)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        style = z if self.mapping is None else self.mapping(z)             # (B, M)
        h = z[:, :, None, None]                                            # (B, Z, 1, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h), style))                               # (B, C, H, W)
        return self.last(h).tanh().float()                                 # (B, C, H, W)


class DCDiscriminator(nn.Module):
    """Strided convolutions down to 4x4, batch norm on all but the first, leaky ReLU (Radford et al. 2016, section 3).

    Args:
        image_size: a power of two from 8 up.
        image_channels: channels of the images.
        width: channels of the first hidden map, half the image's size; twice as many at each halving.
        channel_max: channels of any map.
        mbstd_group_size: images whose deviation is one more channel of the 4x4 map, with a 3x3 convolution behind it
            (Karras et al. 2018, ProGAN, section 3); 0: neither. Penalties take a logit for that of its image alone all
            the same, as in StyleGAN2.
        norm: "spectral": weights divided by their largest singular value (Miyato et al. 2018, SNGAN, eq. 8) and no
            batch norm; "none": neither. With batch norm an image's logit depends on the others of its batch, which a
            penalty on its gradient cannot have.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        channel_max: PositiveInt,
        norm: Literal["batch", "spectral", "none"],
        mbstd_group_size: NonNegInt = 0,
    ) -> None:
        super().__init__()
        widths = [min(channel_max, width * 2**i) for i in range(n_halvings(image_size))]
        self.per_sample = norm != "batch"
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([image_channels, *widths]):
            layers.append(nn.Conv2d(n_in, n_out, 4, 2, 1, bias=norm != "batch"))
            layers += [nn.BatchNorm2d(n_out)] if norm == "batch" and n_in != image_channels else []
            layers.append(nn.LeakyReLU(SLOPE))
        if mbstd_group_size:
            layers += [MinibatchStd(mbstd_group_size), nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)]
            layers.append(nn.LeakyReLU(SLOPE))
        layers.append(nn.Conv2d(widths[-1], 1, 4, bias=norm != "batch"))
        self.layers = nn.Sequential(*layers).apply(as_published)
        if norm == "spectral":
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    spectral_norm(layer)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, None]:
        """Logits (B,)."""
        return self.layers(x).flatten().float(), None                      # (B,)
