"""Super-resolution by a net that was first taught the mean and then to look real (Ledig et al. 2017, SRGAN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.adversarial import Adversarial
from atelier.losses.perceptual import LPIPS, Pyramid, VGGFeatures
from atelier.models.base import Cond, Translator
from atelier.models.two_players import TwoPlayers, no_weight_grads
from atelier.nets.contracts import Upscaler, keeps
from atelier.nets.esrgan import RRDBNet
from atelier.nets.srgan import SRDiscriminator, SRResNet


class SRGAN(TwoPlayers, Translator):
    """Enlarges `source` to `image`, by two players or, without a discriminator, by the net alone (SRResNet, RRDBNet).

    The net's loss is pixel_weight * pixel + perceptual_weight * content + adversarial_weight * adversarial, each a mean
    over the values of an image or over logits (Ledig et al. 2017, eq. 3, which has no pixel term; Wang et al. 2018,
    ESRGAN, eq. 3, which has). One batch is a step of each player. Batch norm takes the running statistics at sampling.

    Args:
        net: sources to images; None: that of the first stage.
        discriminator: images to logits; None: there is none, and no loss of players.
        loss: losses of the two players.
        perceptual: distance of images; None: there is none.
        pixel_loss: "l1": mean |x - x'|, "l2": mean (x - x')^2, which alone is what PSNR asks for.
        pixel_weight, perceptual_weight, adversarial_weight: weights of the three terms.
        generator_optimizer: parameters of the net -> optimizer.
        discriminator_optimizer: parameters -> optimizer.
        grad_clip: global gradient norm of either player.
        first_stage: the net of a finished run, from whose weights training starts.
        r1_gamma, r2_gamma: weights of the discriminator's squared gradient at images and at results, each halved
            (Mescheder et al. 2018, eq. 9 and 10), which keep it from running far ahead of the net.

    Raises:
        UserError: no net or two; the first stage does not enlarge; a discriminator without its loss or its optimizer,
            or its weight or penalty without it; a penalty on one with batch norm.
    """

    idea = (
        "A net makes a small image several times as wide. "
        "The pixels tell it what is there, and a discriminator, where there is one, that details look real."
    )
    formula = (
        "L_G = w_1 |x - G(source)| + w_2 perceptual(x, G(source)) + w_3 E l_G(D(G(source)))\n"
        "L_D = E l_D(D(x), D(G(source)))"
    )

    needs = frozenset({"source"})
    ema_nets = ("net",)  # lent by part() to the run that stands on this one
    players = ("net",), ("discriminator",)

    def __init__(
        self,
        net: SRResNet | RRDBNet | None,
        discriminator: SRDiscriminator | None,
        loss: Adversarial | None,
        perceptual: LPIPS | Pyramid | VGGFeatures | None,
        pixel_loss: Literal["l1", "l2"],
        pixel_weight: NonNegFloat,
        perceptual_weight: NonNegFloat,
        adversarial_weight: NonNegFloat,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable | None,
        grad_clip: PositiveFloat | None,
        first_stage: Upscaler | None = None,
        r1_gamma: NonNegFloat = 0.0,
        r2_gamma: NonNegFloat = 0.0,
    ) -> None:
        super().__init__(loss, generator_optimizer, discriminator_optimizer, grad_clip)
        self.net = _one(net, first_stage)
        self.scale_factor, self.receptive_radius = self.net.scale_factor, self.net.receptive_radius
        _complete({"discriminator": discriminator, "loss": loss, "discriminator_optimizer": discriminator_optimizer})
        weights = {"adversarial_weight": adversarial_weight, "r1_gamma": r1_gamma, "r2_gamma": r2_gamma}
        for name, weight in weights.items():
            if discriminator is None and weight > 0:
                raise UserError(f".{name}", weight, "there is no discriminator", f".{name}=0")
        self.penalised = max(r1_gamma, r2_gamma) > 0
        if self.penalised and not discriminator.per_sample:
            problem = "with batch norm a gradient is not of one image, as penalties want"
            raise UserError(".discriminator.norm", "batch", problem, ".discriminator.norm=none")
        self.discriminator, self.perceptual, self.pixel_loss = discriminator, perceptual, pixel_loss
        self.pixel_weight, self.perceptual_weight = pixel_weight, perceptual_weight
        self.adversarial_weight, self.r1_gamma, self.r2_gamma = adversarial_weight, r1_gamma, r2_gamma

    def training_step(self, batch: Batch) -> None:
        x = batch["image"]
        made = self.net(self._source(batch))
        loss = self._content(x, made)
        if self.discriminator is None:
            self.report("loss", loss)
            self.step(self.optimizers(), loss, "generator")
            return
        generator_optimizer, discriminator_optimizer = self.optimizers()
        loss = loss + self.adversarial_weight * self._adversarial(x, made)
        self.report("loss", loss)
        self.step(generator_optimizer, loss, "generator")
        loss = self._discriminator_loss(x, made)
        self.step(discriminator_optimizer, loss, "discriminator", self.penalised)

    def _source(self, batch: Batch) -> Tensor:
        source, size = batch["source"], batch["image"].shape[-1]
        if source.shape[-1] * self.scale_factor != size:
            problem = f"sources of {source.shape[-1]} px do not become images of {size} px by it"
            fix = f".net.scale_factor={size // source.shape[-1]}"
            raise UserError(".net.scale_factor", self.scale_factor, problem, fix).at("model")
        return source

    def _content(self, x: Tensor, made: Tensor) -> Tensor:
        """pixel_weight * pixel distance + perceptual_weight * perceptual distance: scalar."""
        error = x - made
        pixel = error.abs().mean() if self.pixel_loss == "l1" else error.square().mean()
        self.report("pixel", pixel)
        if self.perceptual is None:
            return self.pixel_weight * pixel
        distance = self.perceptual(x, made).mean()
        self.report("perceptual", distance)
        return self.pixel_weight * pixel + self.perceptual_weight * distance

    def _adversarial(self, x: Tensor, made: Tensor) -> Tensor:
        with no_weight_grads(self.discriminator):
            real = self.compared(self.discriminator, x)
            adversarial = self.loss.generator(real, self.discriminator(made))
        self.report("generator", adversarial)
        return adversarial

    def _discriminator_loss(self, x: Tensor, made: Tensor) -> Tensor:
        x, made = x.detach().requires_grad_(self.r1_gamma > 0), made.detach().requires_grad_(self.r2_gamma > 0)
        with float32(self.device, self.r1_gamma > 0):  # what a penalty is of, and no other pass
            real = self.discriminator(x)
        with float32(self.device, self.r2_gamma > 0):
            fake = self.discriminator(made)
        loss = self.loss.discriminator(real, fake)
        self.report_adversarial(loss, real, fake)
        loss = loss + self.zero_centred_penalty("r1", self.r1_gamma, real, x)
        return loss + self.zero_centred_penalty("r2", self.r2_gamma, fake, made)

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        """Images (n, C, scale_factor H, scale_factor W) of sources (n, C, H, W) of any size, without noise."""
        return self.net(cond["source"])


def _one(net: SRResNet | RRDBNet | None, first_stage: Upscaler | None) -> Upscaler:
    if (net is None) == (first_stage is None):
        problem = "there is no net" if net is None else "the first stage has the net already"
        raise UserError(".net", net and type(net).__name__, problem, "model=srresnet" if net is None else "model=srgan")
    if net is None:
        keeps(first_stage, Upscaler, ".first_stage")
    return first_stage if net is None else net


def _complete(player: dict[str, object]) -> None:
    """Either all that the second player needs or nothing of it."""
    absent = [name for name, part in player.items() if part is None]
    if 0 < len(absent) < len(player):
        raise UserError(f".{absent[0]}", None, f"it goes with {min(player.keys() - absent)}", "model=srgan")
