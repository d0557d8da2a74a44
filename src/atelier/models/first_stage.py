"""First stages of latent diffusion: autoencoders that learn from pixels, from features and from a discriminator.

Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis; Rombach et al. 2022, High-Resolution Image
Synthesis with Latent Diffusion Models, section 3.1 and appendix G.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, NonNegInt, PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Hinge, adaptive_weight
from atelier.losses.kl import kl_to_standard_normal
from atelier.losses.perceptual import LPIPS, Pyramid
from atelier.models.base import Autoencoder, Cond, DiscreteAutoencoder, takes
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.codec import Moments
from atelier.nets.contracts import FirstStage
from atelier.nets.patch import PatchDiscriminator
from atelier.nets.vqgan import VQGANNet

HINGE = Hinge()


class PerceptualAutoencoder(TwoPlayers, Autoencoder):
    """An autoencoder that learns from pixels, from features and from a discriminator; all but the bottleneck.

    Losses are means over the C H W values of an image: |x - x'| + perceptual + penalty + adversarial. Those of Esser et
    al. are so; those of Rombach et al. are sums, here divided by C H W, and so is the KL, summed over latents, which
    keeps its weight of 1e-6.

    A first stage has no prior: `sample_latents` gives noise with the mean and deviation that each latent channel had in
    training, so that `sample` shows what decoding such noise looks like; latents for images come from a model on top.

    Args:
        net: images to latents and back.
        discriminator: images to a map of logits.
        perceptual: distance of images beside the pixels'; None: there is none.
        perceptual_weight: weight of it, beside the mean |x - x'|.
        discriminator_weight: weight of the adversarial term, whose gradient at the last layer is first made as long as
            that of the reconstruction.
        discriminator_start: images shown when the discriminator begins to learn.
        adversarial_start: images shown when the adversarial loss begins.
        generator_optimizer: parameters of the net -> optimizer.
        discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.

    Raises:
        UserError: the net has the other bottleneck, or the adversarial loss begins before the discriminator learns.
    """

    ema_nets = ("net",)
    players = ("net",), ("discriminator",)
    kind: ClassVar[type]  # of net

    def __init__(
        self,
        net: KLNet | VQGANNet,
        discriminator: PatchDiscriminator,
        perceptual: LPIPS | Pyramid | None,
        perceptual_weight: NonNegFloat,
        discriminator_weight: NonNegFloat,
        discriminator_start: NonNegInt,
        adversarial_start: NonNegInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(HINGE, generator_optimizer, discriminator_optimizer, grad_clip)
        takes(net, self.kind, ".net", type(self))
        if adversarial_start < discriminator_start:
            problem = f"the discriminator learns from {discriminator_start} images on"
            raise UserError(
                ".adversarial_start", adversarial_start, problem, f".discriminator_start={adversarial_start}"
            )
        self.net, self.discriminator, self.perceptual = net, discriminator, perceptual
        self.perceptual_weight, self.discriminator_weight = perceptual_weight, discriminator_weight
        self.discriminator_start, self.adversarial_start = discriminator_start, adversarial_start
        self.moments = Moments((net.latent_shape[0], 1, 1))

    def training_step(self, batch: Batch) -> None:
        x = batch["image"]
        generator_optimizer, discriminator_optimizer = self.optimizers()
        z, back, penalty = self.through(x)
        reconstruction = self._reconstruction(x, back)
        loss = reconstruction + penalty
        if self.images_seen >= self.adversarial_start:
            loss = loss + self._adversarial(reconstruction, back)
        self.report("loss", loss)
        self.step(generator_optimizer, loss, "generator")
        if self.images_seen >= self.discriminator_start:
            self.step(discriminator_optimizer, self._discriminator_loss(x, back.detach()), "discriminator")
        self.moments.add(z.detach(), first=self.images_seen == 0)

    @abstractmethod
    def through(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, Z, h, w) as `decode` takes them, the images of them, and the bottleneck's weighted loss."""

    def _reconstruction(self, x: Tensor, back: Tensor) -> Tensor:
        """mean |x - x'| + weight * perceptual distance: scalar."""
        loss = (x - back).abs().mean()
        self.report("reconstruction", loss)
        if self.perceptual is None:
            return loss
        distance = self.perceptual(x, back).mean()
        self.report("perceptual", distance)
        return loss + self.perceptual_weight * distance

    def _adversarial(self, reconstruction: Tensor, back: Tensor) -> Tensor:
        """The generator's hinge loss, its gradient as long as the reconstruction's times `discriminator_weight`."""
        with no_weight_grads(self.discriminator):
            adversarial = self.loss.generator(None, self.discriminator(back))
        weight = adaptive_weight(reconstruction, adversarial, self.net.decoder.last_weight)
        self.report("generator", adversarial)
        self.report("adaptive_weight", weight)
        return self.discriminator_weight * weight * adversarial

    def _discriminator_loss(self, x: Tensor, back: Tensor) -> Tensor:
        """The discriminator's hinge loss."""
        real, fake = self.discriminator(x), self.discriminator(back)
        loss = self.loss.discriminator(real, fake)
        self.report_adversarial(loss, real, fake)
        return loss

    def sample_latents(self, rngs: ImageRngs, cond: Cond) -> Tensor:
        return self.moments.noise(rngs.randn(*self.net.latent_shape, device=self.device))

    def encode(self, x: Tensor, rngs: ImageRngs | None = None) -> Tensor:
        with float32(self.device):
            mean, logvar = self.net.encode(x)
        if rngs is None:
            return mean
        return mean + (0.5 * logvar).exp() * rngs.randn(*mean.shape[1:], device=mean.device)

    def decode(self, z: Tensor) -> Tensor:
        with float32(self.device):
            return self.net.decode(z).clamp(-1, 1)


class AutoencoderKL(PerceptualAutoencoder):
    """The latent is a Gaussian, held a little towards the standard normal (Rombach et al. 2022, KL-reg).

    Args:
        kl_weight: weight of the KL, which is summed over latents.
        net: images to latents and back; None: that of `first_stage`.
        first_stage: trained autoencoder, from whose weights training starts; all other arguments: see
            `PerceptualAutoencoder`.

    Raises:
        UserError: there is no net, or there are two, or that of the first stage has another bottleneck.
    """

    idea = (
        "An autoencoder whose latents are a small map, for another model to generate. "
        "A distance of features and a discriminator keep its images sharp, a slight KL its latents near a normal."
    )
    formula = (
        "L = |x - x'| + perceptual(x, x') + w KL(q(z | x) || N(0, 1)) + a E[-D(x')]\n"
        "L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(x'))"
    )

    kind = KLNet

    def __init__(
        self,
        net: KLNet | VQGANNet | None,
        discriminator: PatchDiscriminator,
        perceptual: LPIPS | Pyramid | None,
        perceptual_weight: NonNegFloat,
        kl_weight: NonNegFloat,
        discriminator_weight: NonNegFloat,
        discriminator_start: NonNegInt,
        adversarial_start: NonNegInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
        first_stage: FirstStage | None = None,
    ) -> None:
        super().__init__(
            net=_one(net, first_stage),
            discriminator=discriminator,
            perceptual=perceptual,
            perceptual_weight=perceptual_weight,
            discriminator_weight=discriminator_weight,
            discriminator_start=discriminator_start,
            adversarial_start=adversarial_start,
            generator_optimizer=generator_optimizer,
            discriminator_optimizer=discriminator_optimizer,
            grad_clip=grad_clip,
        )
        self.kl_weight = kl_weight

    def through(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw of the posterior costs its KL: summed over latents, mean over the batch, per pixel value of x."""
        eps = torch.randn(len(x), *self.net.latent_shape, device=x.device)
        mean, logvar, back = self.net(x, eps)
        kl = kl_to_standard_normal(mean, logvar).flatten(1).sum(1).mean()
        self.report("kl", kl)
        return mean + (0.5 * logvar).exp() * eps, back, self.kl_weight * (kl / x[0].numel())


class VQGAN(PerceptualAutoencoder, DiscreteAutoencoder):
    """The latent is a map of codebook entries (Esser et al. 2021, VQGAN; Rombach et al. 2022, VQ-reg).

    Args:
        codebook_weight: weight of the quantiser's loss.
        net: images to latents and back; all other arguments: see `PerceptualAutoencoder`.
    """

    idea = (
        "An autoencoder whose latents are a map of codes, for a transformer to write. "
        "A distance of features and a discriminator keep its images sharp."
    )
    formula = (
        "L = |x - x'| + perceptual(x, x') + commitment + a E[-D(x')]\nL_D = E max(0, 1 - D(x)) + E max(0, 1 + D(x'))"
    )

    kind = VQGANNet
    ddp_options = {"find_unused_parameters": True, "broadcast_buffers": False}  # every rank computes the same codebook

    def __init__(
        self,
        net: KLNet | VQGANNet,
        discriminator: PatchDiscriminator,
        perceptual: LPIPS | Pyramid | None,
        perceptual_weight: NonNegFloat,
        codebook_weight: NonNegFloat,
        discriminator_weight: NonNegFloat,
        discriminator_start: NonNegInt,
        adversarial_start: NonNegInt,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable,
        grad_clip: PositiveFloat | None,
    ) -> None:
        super().__init__(
            net=net,
            discriminator=discriminator,
            perceptual=perceptual,
            perceptual_weight=perceptual_weight,
            discriminator_weight=discriminator_weight,
            discriminator_start=discriminator_start,
            adversarial_start=adversarial_start,
            generator_optimizer=generator_optimizer,
            discriminator_optimizer=discriminator_optimizer,
            grad_clip=grad_clip,
        )
        self.codebook_weight = codebook_weight

    def through(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents before they are quantised, which costs the quantiser's loss."""
        z, found, back = self.net(x)
        self.report("commitment", found.loss)
        return z, back, self.codebook_weight * found.loss

    @property
    def n_codes(self) -> int:
        return self.net.n_codes

    def codes(self, x: Tensor) -> Tensor:
        with float32(self.device):
            return self.net.codes(x)


def _one(net: KLNet | VQGANNet | None, first_stage: FirstStage | None) -> KLNet | VQGANNet:
    """The net, or that of the first stage, which is trained on."""
    if (net is None) == (first_stage is None):
        fix = "model=autoencoder_kl" if net is None else "model=kl_tuned"
        problem = "there is no net" if net is None else "the first stage has the net already"
        raise UserError(".net", net and type(net).__name__, problem, fix)
    if net is not None:
        return net
    if not isinstance(first_stage, KLNet):
        problem, fix = "only an AutoencoderKL is trained on", ".first_stage.experiment=shapes_autoencoder_kl"
        raise UserError(".first_stage", type(first_stage).__name__, problem, fix)
    return first_stage.train()
