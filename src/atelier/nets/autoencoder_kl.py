"""The autoencoder with a Gaussian latent that latent diffusion stands on (Rombach et al. 2022, KL-reg)."""

from __future__ import annotations

from torch import Tensor, nn

from atelier.core.ranges import Levels, PositiveInt, Probability, Width
from atelier.nets.autoencoder import Decoder, Encoder, Layout


class KLNet(nn.Module):
    """Images to a diagonal Gaussian over latents, latents to images (Rombach et al. 2022, KL-reg).

    Args:
        image_size, image_channels, width, multipliers, n_blocks, attention, middle_attention, norm_groups, dropout: the
            fields of `Layout`.
        latent_channels: Z.
        quant_conv: a 1x1 convolution on either side of the latent, as published.
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
        quant_conv: bool = True,
    ) -> None:
        super().__init__()
        sizes = image_size, image_channels, width, multipliers, n_blocks
        self.layout = Layout(*sizes, attention, middle_attention, norm_groups, dropout)
        self.latent_shape = self.layout.latent_shape(latent_channels)
        self.latent_channels = n = latent_channels
        self.encoder, self.decoder = Encoder(self.layout, 2 * n), Decoder(self.layout, n)
        self.quant = nn.Conv2d(2 * n, 2 * n, 1) if quant_conv else nn.Identity()
        self.post_quant = nn.Conv2d(n, n, 1) if quant_conv else nn.Identity()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), (B, Z, h, w) float32 each, log-variance within [-30, 20]."""
        mean, logvar = self.quant(self.encoder(x)).float().chunk(2, dim=1)     # (B, Z, h, w) each
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of latents."""
        return self.decoder(self.post_quant(z)).float()

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-variance and decoded mean + std eps: what training goes through."""
        mean, logvar = self.encode(x)
        return mean, logvar, self.decode(mean + (0.5 * logvar).exp() * eps)
