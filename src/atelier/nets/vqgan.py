"""The autoencoder with a quantised latent of VQGAN (Esser et al. 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from atelier.core.ranges import Levels, PositiveInt, Probability, Width
from atelier.nets.autoencoder import Decoder, Encoder, Layout
from atelier.nets.quantizers import DETERMINISTIC_LOGVAR, FSQ, Quantized, VectorQuantizer


class VQGANNet(nn.Module):
    """Images to latents that are quantised before they are decoded (Esser et al. 2021; Rombach et al. 2022, VQ-reg).

    Args:
        image_size, image_channels, width, multipliers, n_blocks, attention, middle_attention, norm_groups, dropout: the
            fields of `Layout`.
        latent_channels: channels between encoder and decoder; 1x1 convolutions lead to the quantiser's own Z and back.
        quantizer: latents to codes.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: Width,
        multipliers: Levels,
        n_blocks: PositiveInt,
        attention: list[PositiveInt],
        middle_attention: bool,
        norm_groups: PositiveInt | None,
        dropout: Probability,
        latent_channels: PositiveInt,
        quantizer: VectorQuantizer | FSQ,
    ) -> None:
        super().__init__()
        sizes = image_size, image_channels, width, multipliers, n_blocks
        self.layout = Layout(*sizes, attention, middle_attention, norm_groups, dropout)
        self.latent_shape = self.layout.latent_shape(quantizer.dim)
        self.code_shape = self.latent_shape[1:]
        self.quantizer, self.n_codes = quantizer, quantizer.n_codes
        self.latent_channels = latent_channels
        self.encoder, self.decoder = Encoder(self.layout, latent_channels), Decoder(self.layout, latent_channels)
        self.quant = nn.Conv2d(latent_channels, quantizer.dim, 1)
        self.post_quant = nn.Conv2d(quantizer.dim, latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before they are quantised, (B, Z, h, w) float32, and -20 as their log-variance."""
        z = self.quant(self.encoder(x)).float()                                # (B, Z, h, w)
        return z, z.new_full(z.shape, DETERMINISTIC_LOGVAR)

    def image(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of quantised latents."""
        return self.decoder(self.post_quant(z)).float()

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of latents, which are quantised first."""
        return self.image(self.quantizer(z).z)

    def codes(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 in [0, n_codes) of images."""
        return self.quantizer(self.encode(x)[0]).codes

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of codes (B, h, w)."""
        return self.image(self.quantizer.embed(codes))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized, Tensor]:
        """Latents before they are quantised, what becomes of them, the image: what training goes through."""
        z = self.encode(x)[0]
        found = self.quantizer(z)
        return z, found, self.image(found.z)
