"""The ELBO by hand, and the latent verbs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from atelier.core.rng import ImageRngs
from atelier.losses.kl import kl_to_standard_normal, with_free_bits
from atelier.losses.likelihood import Gaussian
from atelier.models.ae import AE
from atelier.models.vae import VAE
from atelier.nets.vae import VAENet
from atelier.runs import folders

TINY = [  # beside tests/tiny.py:COMMON
    "model=vae",
    "model.net.width=4",
    "model.net.n_downs=1",
    "model.net.latent_channels=2",
]


class Fixed(nn.Module):
    """The posterior N(x / 2, 4), the likelihood's mean 3 z; latents as large as images."""

    latent_shape = image_shape = (1, 2, 2)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / 2, torch.full_like(x, math.log(4.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return 3 * z

    def forward(self, x: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, logvar = self.encode(x)
        return mean, logvar, self.decode(mean + 2 * eps)


def made(
    sigma: float = 0.5, beta: float = 1.0, beta_warmup_images: int = 0, free_bits: float = 0.0, draws: int = 1
) -> VAE:
    return VAE(
        Fixed(), Gaussian(sigma, learned=False), beta, beta_warmup_images, free_bits, draws, torch.optim.SGD, None
    )


X = torch.tensor([[[[0.5, -1.0], [0.25, 1.0]]], [[[0.0, 0.0], [-0.5, 0.75]]]])


def test_elbo_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With z = mean + 2 eps, eps = 0.1 everywhere, from torch's own Normal and KL."""
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.full(shape, 0.1))
    model = made(sigma=0.5, beta=0.25)
    loss = model.training_step({"image": X})
    posterior = torch.distributions.Normal(X / 2, 2.0)
    z = X / 2 + 0.2
    nll = -torch.distributions.Normal(3 * z, 0.5).log_prob(X).flatten(1).sum(1).mean()
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    torch.testing.assert_close(model.reported["nll"], nll)
    torch.testing.assert_close(model.reported["kl"], kl)
    torch.testing.assert_close(loss, (nll + 0.25 * kl) / 4)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [[0] * 3] * 2
    assert kl_to_standard_normal(torch.ones(1, 3), torch.zeros(1, 3)).sum().item() == pytest.approx(1.5)
    random = kl_to_standard_normal(torch.randn(1000, 4), 3 * torch.randn(1000, 4))
    assert random.min() > 0


def test_free_bits_are_counted_by_channel() -> None:
    """Channel means over the batch of summed KL: 1 and 6; below 2 nats nothing is gained by less."""
    kl = torch.tensor([[[[0.5, 0.5]], [[1.0, 3.0]]], [[[0.5, 0.5]], [[4.0, 4.0]]]], requires_grad=True)  # (2, 2, 1, 2)
    assert with_free_bits(kl, 0.0).item() == 7
    floored = with_free_bits(kl, 2.0)
    assert floored.item() == 8
    floored.backward()
    assert kl.grad.flatten(2).sum((0, 2)).tolist() == [0, 2]


def test_beta_rises_with_images_seen() -> None:
    model = made(beta=0.5, beta_warmup_images=1000)
    losses = []
    for seen in (0, 500, 1000, 5000):
        torch.manual_seed(0)
        model.images_seen = seen
        losses.append(model.training_step({"image": X}).item())
    kl = 0.5 * model.reported["kl"].item() / 4
    assert [loss - losses[0] for loss in losses] == pytest.approx([0, kl / 2, kl, kl], rel=1e-4)


def test_without_noise_and_kl_the_loss_is_the_autoencoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.zeros(shape))
    torch.manual_seed(0)
    net = VAENet(image_size=8, image_channels=1, width=4, n_downs=1, latent_channels=2, patch_size=None)
    batch, fixed = {"image": torch.rand(3, 1, 8, 8) * 2 - 1}, Gaussian(0.1, learned=False)
    vae = VAE(net, fixed, 0.0, 0, 0.0, 1, torch.optim.SGD, None).training_step(batch)
    assert torch.equal(vae, AE(net, fixed, torch.optim.SGD, None).training_step(batch))


def test_importance_sampling_reaches_the_evidence() -> None:
    """One grey level of [-1, 1] is 1 / 127.5 wide; this decoder's evidence of a pixel is N(x; 0, 9 + sigma^2)."""
    x = X[:1, :, :1, :1].mul(127.5).round().div(127.5)
    evidence = -torch.distributions.Normal(0.0, math.sqrt(9 + 0.25)).log_prob(x).sum() + math.log(127.5)
    many = x.expand(64, -1, -1, -1)
    bounds = [made(draws=draws).nll(many, {}, ImageRngs(0, 0, 64)).mean().item() for draws in (1, 8, 1000)]
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(evidence.item(), abs=0.03)


def test_the_likelihood_of_an_image_does_not_depend_on_the_batch() -> None:
    model = made(draws=3)
    together = model.nll(X, {}, ImageRngs(5, 0, 2))
    torch.testing.assert_close(together[1:], model.nll(X[1:], {}, ImageRngs(5, 1, 1)))


def test_elbo_bounds_the_likelihood() -> None:
    """E_q[log p(x|z)] - KL <= log p(x) = log N(x; 0, 9 + sigma^2), which this decoder has in closed form."""
    model, draws = made(), 4000
    x = X[:1].expand(draws, -1, -1, -1)
    torch.manual_seed(0)
    model.training_step({"image": x})
    elbo = -(model.reported["nll"] + model.reported["kl"])
    evidence = torch.distributions.Normal(0.0, math.sqrt(9 + 0.25)).log_prob(X[0]).sum()
    assert elbo < evidence
    exact = torch.distributions.Normal(3 * X[:1] / 9.25, math.sqrt(0.25 / 9.25))  # where the bound is tight
    z = exact.sample((draws,)).flatten(0, 1)
    prior = torch.distributions.Normal(0.0, 1.0)
    tight = -model.likelihood.nll(x, 3 * z).mean() - torch.distributions.kl_divergence(exact, prior).sum()
    assert tight.item() == pytest.approx(evidence.item(), abs=0.1)


def test_encode_is_the_mode_or_a_draw_of_the_posterior() -> None:
    model = made()
    assert torch.equal(model.encode(X), X / 2)
    draws = torch.stack([model.encode(X, ImageRngs(seed, 0, 2)) for seed in range(400)])
    torch.testing.assert_close(draws.mean(0), X / 2, atol=0.4, rtol=0)
    assert draws.std().item() == pytest.approx(2.0, abs=0.2)
    alone = model.encode(X[1:], ImageRngs(7, 1, 1))
    assert torch.equal(model.encode(X, ImageRngs(7, 0, 2))[1:], alone)


def test_decoded_images_lie_in_their_range_and_sample_is_render_of_draw() -> None:
    model = made()
    assert model.decode(torch.full((1, 1, 2, 2), 5.0)).max() == 1
    z = model.sample_latents(ImageRngs(0, 0, 3), {})
    assert z.shape == (3, 1, 2, 2)
    assert torch.equal(model.sample({}, ImageRngs(0, 0, 3)), model.generate(z, {}, ImageRngs(0, 0, 3)))


def test_losses_are_float32_under_bf16(finished: dict[str, Path]) -> None:
    loaded = folders.load(finished["vae"], ema=False)
    model, seen = loaded.model, []
    model.net.decoder.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step(loaded.data.test_batch(0, 2))
        mean, logvar = model.net.encode(torch.zeros(1, 3, 8, 8))
        assert kl_to_standard_normal(mean, logvar).dtype == torch.float32
    assert seen == [torch.bfloat16]  # autocast was on
    assert {loss.dtype, mean.dtype, logvar.dtype, *(v.dtype for v in model.reported.values())} == {torch.float32}
