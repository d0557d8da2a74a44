"""A convolutional autoencoder round a quantiser, cheap on a CPU: most of it works at a quarter of the size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.nets.quantizers import DETERMINISTIC_LOGVAR, FSQ, Quantized, VectorQuantizer
from atelier.nets.vae import decoder, encoder


class VQNet(nn.Module):
    """Images to a map of codes and back (van den Oord et al. 2017, section 4.1, with normed residual blocks).

    Latents are the encoder's, before they are quantised: the quantiser belongs to the decoder (Rombach et al. 2022,
    section 3.1), so that a diffusion model can stand on this net as on any other.

    Args:
        image_size: side of the images; folds and halves evenly.
        image_channels: channels of the images.
        width: channels of the largest maps, doubled at each halving.
        patch_size: 2 folds 2x2 pixels into channels first; None: folds down to 16x16 maps.
        n_downs: halvings after that.
        n_blocks: residual blocks at each map size, on the way down and on the way up.
        quantizer: latents to codes.

    Raises:
        UserError: the image size does not fold and halve evenly.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: PositiveInt,
        patch_size: PositiveInt | None,
        n_downs: NonNegInt,
        n_blocks: PositiveInt,
        quantizer: VectorQuantizer | FSQ,
    ) -> None:
        super().__init__()
        patch_size = patch_size or max(1, image_size // 16)
        step = patch_size * 2**n_downs
        if image_size % step:
            problem = f"patch {patch_size} and {n_downs} halvings need a multiple of {step}"
            raise UserError("data.image_size", image_size, problem, f"data.image_size={-(-image_size // step) * step}")
        self.quantizer, self.n_codes = quantizer, quantizer.n_codes
        self.code_shape = (image_size // step, image_size // step)
        self.latent_shape = (quantizer.dim, *self.code_shape)
        self.encoder = encoder(image_channels, width, patch_size, n_downs, n_blocks, quantizer.dim)
        self.decoder = decoder(quantizer.dim, width, patch_size, n_downs, n_blocks, image_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Images (B, C, H, W) given back, and what they were quantised to."""
        quantized = self.quantizer(self.encoder(x))
        return self.decoder(quantized.z).float(), quantized                # (B, C, H, W)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, h, w) before quantisation, float32, and a log-variance that says they are certain."""
        z = self.encoder(x).float()                                        # (B, D, h, w)
        return z, torch.full_like(z, DETERMINISTIC_LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, D, h, w), which are quantised first."""
        return self.decoder(self.quantizer(z).z).float()                   # (B, C, H, W)

    def codes(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 of images (B, C, H, W)."""
        return self.quantizer(self.encoder(x)).codes

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) of codes (B, h, w)."""
        return self.decoder(self.quantizer.embed(codes)).float()           # (B, C, H, W)
