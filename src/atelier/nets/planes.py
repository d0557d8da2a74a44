"""What a latent model sees beside its noisy latents, made of source images: planes of the latents' size."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.codec import LatentCodec


@runtime_checkable
class LatentPlanes(Protocol):
    """Makes planes (B, P, h, w) of the Batch fields that it names, for latents (B, Z, h, w)."""

    fields: tuple[str, ...]

    def channels(self, latent_shape: tuple[int, int, int]) -> int:
        """P, for latents of this shape (Z, h, w)."""
        ...

    def __call__(self, cond: Cond, codec: LatentCodec) -> Tensor:
        """Planes (B, P, h, w) of the fields of B images, by name; no gradient."""
        ...

    def finished(self, x: Tensor, cond: Cond) -> Tensor:
        """What becomes of images x (B, C, H, W) that were made under these fields."""
        ...


class FoldedSource:
    """The source itself, as a label map, whose pixels are folded into channels until it is as small as the latents.

    Values that number classes lie close together and mean very different things, so beside them stand the sines and
    cosines of pi 2^k times each, k < K, which a convolution can tell apart (Tancik et al. 2020, Fourier features).

    Args:
        source_size: height and width of the source.
        source_channels: channels C' of it.
        n_frequencies: number K; 0: the source alone.
    """

    fields = ("source",)

    def __init__(
        self, *, source_size: PositiveInt, source_channels: PositiveInt, n_frequencies: NonNegInt
    ) -> None:
        self.source_size, self.source_channels, self.n_frequencies = source_size, source_channels, n_frequencies

    def channels(self, latent_shape: tuple[int, int, int]) -> int:
        """C' (1 + 2 K) f^2, f the factor between source and latents."""
        factor, rest = divmod(self.source_size, latent_shape[1])
        if rest:
            problem = f"latents are {latent_shape[1]} wide, which does not divide it"
            raise UserError(".source_size", self.source_size, problem, "another first stage")
        return self.source_channels * (1 + 2 * self.n_frequencies) * factor**2

    def __call__(self, cond: Cond, codec: LatentCodec) -> Tensor:
        factor = self.source_size // codec.latent_shape[1]
        x = cond["source"]
        angles = [math.pi * 2**k * x for k in range(self.n_frequencies)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        return F.pixel_unshuffle(torch.cat([x, *waves], dim=1), factor)    # (B, C' (1 + 2 K) f^2, h, w)

    def finished(self, x: Tensor, cond: Cond) -> Tensor:
        return x


class SourceLatents:
    """The latents of the source, the mode of their posterior and, as published, without the codec's scale.

    (Brooks et al. 2023, InstructPix2Pix, section 3.2; the published model has them unscaled.)
    """

    fields = ("source",)

    def channels(self, latent_shape: tuple[int, int, int]) -> int:
        """Z."""
        return latent_shape[0]

    def __call__(self, cond: Cond, codec: LatentCodec) -> Tensor:
        return codec.mode_of(cond["source"])                               # (B, Z, h, w)

    def finished(self, x: Tensor, cond: Cond) -> Tensor:
        return x


class MaskedImage:
    """The hole's mask and the latents of the image without what lies below it (Rombach et al. 2022, section 4.5).

    The mask is pooled by its maximum to the latents' size and grown by one, so that no latent that has seen masked
    pixels counts as known. What lies below it is made 0, grey, first: nothing of it is ever looked at. The result is
    pasted: where the mask is 0, pixels are those of the image.
    """

    fields = ("image", "mask")

    def channels(self, latent_shape: tuple[int, int, int]) -> int:
        """1 + Z."""
        return 1 + latent_shape[0]

    def __call__(self, cond: Cond, codec: LatentCodec) -> Tensor:
        hole = cond["mask"] >= 0.5                                         # (B, 1, H, W)
        z = codec.centre(cond["image"].masked_fill(hole, 0))               # (B, Z, h, w)
        return torch.cat([latent_mask(hole, z.shape[2:]).to(z), z], dim=1)

    def finished(self, x: Tensor, cond: Cond) -> Tensor:
        """Pasted images."""
        return torch.where(cond["mask"] >= 0.5, x, cond["image"])


def latent_mask(mask: Tensor, size: torch.Size) -> Tensor:
    """Latents (B, 1, h, w), bool, that are to be filled where pixels (B, 1, H, W) are: where one of theirs or of a
    neighbour's is."""
    if mask.shape[2:] == size:
        return mask
    return F.max_pool2d(F.adaptive_max_pool2d(mask.float(), size), 3, 1, 1) > 0
