"""The deterministic autoencoder: its loss, its latents' moments, what it refuses."""

from __future__ import annotations

import pytest
import torch

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.losses.likelihood import Gaussian
from atelier.models.ae import AE
from atelier.nets.vae import VAENet

TINY = [  # beside tests/tiny.py:COMMON
    "model=ae",
    "model.net.width=4",
    "model.net.n_downs=1",
    "model.net.latent_channels=2",
]


def made(latent_channels: int = 2) -> AE:
    torch.manual_seed(0)
    net = VAENet(image_size=8, image_channels=3, width=4, n_downs=1, latent_channels=latent_channels, patch_size=None)
    return AE(net, Gaussian(0.1, learned=False), torch.optim.SGD, None)


X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_loss_is_the_squared_error_but_for_a_constant() -> None:
    model = made()
    loss = model.training_step({"image": X})
    error = (model.net.decode(model.net.encode(X)[0]) - X).square().mean()
    normal = torch.distributions.Normal(0.0, 0.1)
    assert loss.item() == pytest.approx((error / 0.02 - normal.log_prob(torch.tensor(0.0))).item(), rel=1e-5)


def test_encoding_is_the_same_with_noise_at_hand() -> None:
    model = made()
    assert torch.equal(model.encode(X), model.encode(X, ImageRngs(0, 0, 16)))
    assert model.decode(torch.full((1, 2, 4, 4), 1e3)).abs().max() <= 1


def test_it_draws_latents_with_the_moments_of_training() -> None:
    model = made()
    model.training_step({"image": X})
    z = model.net.encode(X)[0]
    torch.testing.assert_close(model.moments.mean, z.mean(0))
    drawn = model.sample_latents(ImageRngs(0, 0, 4000), {})
    torch.testing.assert_close(drawn.mean(0), z.mean(0), atol=0.05, rtol=0.05)
    torch.testing.assert_close(drawn.std(0), z.std(0, correction=0), atol=0.02, rtol=0.1)


def test_the_latent_is_smaller_than_the_image() -> None:
    made(latent_channels=11)
    with pytest.raises(UserError, match="no smaller than images") as error:
        made(latent_channels=12)
    assert error.value.key == ".net.latent_channels"
