"""Latent diffusion on a frozen autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from atelier.core.batch import Batch, Cond
from atelier.core.condition import Embedder
from atelier.core.errors import UserError, within
from atelier.core.ranges import NonNegFloat, PositiveFloat, Probability
from atelier.core.rng import ImageRngs
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import Guider
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Sampler
from atelier.models.diffusion_model import DiffusionModel
from atelier.nets.codec import LatentCodec
from atelier.nets.conditions import NEGATIVE
from atelier.nets.contracts import FirstStage, keeps
from atelier.nets.denoising import ARGUMENTS, DenoisingNet, conditioned_by, denoises
from atelier.nets.frozen import Frozen
from atelier.nets.planes import LatentPlanes
from atelier.nets.unet import UNet


class LDM(DiffusionModel):
    """A denoising net in the latent space of a first stage.

    Args:
        codec: frozen net -> LatentCodec.
        net: image_size, image_channels -> denoising net, which get the size and the channels of the latents, and
            beside them token_dim and plane_channels where the condition has tokens and planes; or a net that is there
            already and trained further, as that of Stable Diffusion.
        objective, cond_dropout, sampler, guider, optimizer, grad_clip: arguments of DDPM, for latents.
        embedder: that of DDPM; where there are planes, plane_channels, plane_size -> embedder.
        first_stage: images to latents and back.
        planes: planes that the net sees beside its latents, made of Batch fields; None: it sees none.

    Raises:
        UserError: the first stage is no autoencoder, the loss is a bound of grey levels, or as in DDPM.
    """

    idea = (
        "A frozen autoencoder makes small latents of images, and one net learns to take noise away from these. "
        "Steps are cheap there, and the decoder makes the image at the end."
    )
    formula = "L = E_z,t,eps w(t) |net(alpha_t z + sigma_t eps, t, condition) - target|^2, z = encoder(x)"
    ema_nets = ("net", "embedder")

    def __init__(
        self,
        codec: Callable,
        objective: Objective,
        net: Callable | DenoisingNet,
        embedder: Callable | Embedder,
        cond_dropout: Probability,
        sampler: Sampler,
        guider: Guider,
        optimizer: Callable,
        grad_clip: PositiveFloat | None,
        first_stage: FirstStage,
        planes: LatentPlanes | None = None,
    ) -> None:
        super().__init__()
        keeps(first_stage, FirstStage, ".first_stage")
        if objective.loss != "simple":
            problem = "the bound counts grey levels, which latents have not"
            raise UserError(".objective.loss", objective.loss, problem, ".objective.loss=simple")
        shape = first_stage.latent_shape
        known = _embedder(embedder, planes, shape)
        if planes is not None and "planes" not in known.cond_sizes:
            problem = f"{type(known).__name__} hands none on to the net"
            fix = ".embedder of planes_alone, text_and_planes or instruction"
            raise UserError(".planes", type(planes).__name__, problem, fix)
        self.net = _net(net, known, shape)  # first: an optimizer knows weights by their order
        self.codec: LatentCodec = codec(Frozen(first_stage))
        self.objective, self.embedder, self.cond_dropout, self.planes = objective, known, cond_dropout, planes
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.diffusion_sampler = DiffusionSampler(objective, self.net, self.embedder, sampler, guider, clip=False)
        fields = frozenset() if planes is None else frozenset(planes.fields)
        self.needs = self.diffusion_sampler.conditions - {"planes"} | fields
        if "source" in self.needs:
            self.source_fields, self.answer_fields = {"": "source"}, {"": "image"}
        elif "image" in self.diffusion_sampler.conditions:  # a variation of an image is compared with it
            self.source_fields, self.answer_fields = {"": "image"}, {"": "image"}

    def condition(self, batch: Batch, case: str) -> Cond:
        negative = {NEGATIVE: batch[NEGATIVE]} if NEGATIVE in batch else {}
        return self._with_planes(super().condition(batch, case) | negative)

    def _with_planes(self, cond: Cond) -> Cond:
        return cond if self.planes is None else cond | {"planes": self.planes(cond, self.codec)}

    def training_step(self, batch: Batch) -> Tensor:
        moments = batch["moments"] if "moments" in batch else self.moments(batch["image"])
        cond = self.embedder(self.condition(batch, ""), len(moments), self.cond_dropout)
        loss = self.objective(self.net, self.codec.draw(moments), cond, self.images_seen).mean()
        self.report("loss", loss)
        return loss

    @property
    def first_stage(self) -> FirstStage:
        return self.codec.autoencoder.net

    def moments(self, x: Tensor) -> Tensor:
        return self.codec.moments(x)

    def calibrate(self, images: Callable[[int], Iterable[Tensor]]) -> str:
        with within(".codec"):
            return self.codec.measure(images)

    def encode(self, x: Tensor) -> Tensor:
        return self.codec.centre(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)

    def sample(
        self,
        cond: Cond,
        rngs: ImageRngs,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
        image_guidance: NonNegFloat | None = None,
    ) -> Tensor:
        """Images (n, C, H, W); as of any diffusion model, and pasted where a hole is filled.

        Args:
            sampler: sampler in place of the model's own.
            guidance: number in place of the guider's own.
            guider: guider in place of the model's own.
            image_guidance: number in place of the guider's own for the planes (`diffusion/guidance.py`, `Dual`).
        """
        how = self.diffusion_sampler.asked(sampler, guidance, guider, image_guidance)
        x = self.decode(how(cond, self.noise(rngs), rngs))
        return x if self.planes is None else self.planes.finished(x, cond)

    def inpaint(
        self,
        x: Tensor,
        mask: Tensor,
        cond: Cond,
        rngs: ImageRngs,
        resamplings: int,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """As of any diffusion model, but asked once and for all where it has learned to fill holes."""
        if self.planes is None or "mask" not in self.planes.fields:
            return super().inpaint(x, mask, cond, rngs, resamplings, sampler=sampler, guidance=guidance, guider=guider)
        cond = self._with_planes(cond | {"image": x, "mask": mask.float()})
        return self.sample(cond, rngs, sampler=sampler, guidance=guidance, guider=guider)


def _embedder(
    embedder: Callable | Embedder, planes: LatentPlanes | None, latent_shape: tuple[int, int, int]
) -> Embedder:
    """The embedder, which gets the number and the size of planes where it is not built yet."""
    if isinstance(embedder, nn.Module):
        return embedder
    channels = 0 if planes is None else planes.channels(latent_shape)
    with within(".embedder"):
        return embedder(plane_channels=channels, plane_size=latent_shape[1])


def _net(net: Callable | DenoisingNet, embedder: Embedder, latent_shape: tuple[int, int, int]) -> DenoisingNet:
    """The net, which gets the sizes of latents, tokens and planes where it is not built yet."""
    channels, _, size = latent_shape
    sizes = {ARGUMENTS[field]: n for field, n in embedder.cond_sizes.items() if field != "vector"}  # a page says that
    with within(".net"):
        made = net if isinstance(net, nn.Module) else net(image_size=size, image_channels=channels, **sizes)
    denoises(made, ".net")
    made.train()  # what is lent is not
    if isinstance(made, UNet):
        made.resize(size)
    conditioned_by(made, embedder, ".net")
    if made.shape != latent_shape:
        problem = f"it denoises {made.shape}, the latents are {latent_shape}"
        raise UserError(".net", type(made).__name__, problem, "a net and a first stage that belong together")
    return made
