"""What every diffusion model can be asked: to make images, to change them, and to show how it does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Cond
from atelier.core.condition import Embedder
from atelier.core.errors import within
from atelier.core.ranges import NonNegFloat
from atelier.core.rng import ImageRngs
from atelier.diffusion import diagnostics
from atelier.diffusion.diffusion_sampler import DiffusionSampler, noised
from atelier.diffusion.guidance import ClassifierFree, Guider
from atelier.diffusion.samplers import Sampler
from atelier.diffusion.schedules import Flow
from atelier.models.base import Generator
from atelier.nets import lora
from atelier.nets.attention_maps import attention_maps, joined
from atelier.nets.conditions import Texts, readers, text_reader, word_spans
from atelier.nets.denoising import DenoisingNet
from atelier.nets.planes import latent_mask
from atelier.nets.words import refuse_long

UNGUIDED = {"guider": ClassifierFree(guidance=1.0)}  # options of a diffusion model: the condition alone
UNKNOWN = {"guider": ClassifierFree(guidance=0.0)}  # nothing is known of what is made


class DiffusionModel(Generator):
    """Makes images by a denoising net, of pixels or of latents, and changes images by it.

    `net` has the shape of what it denoises; `diffusion_sampler` asks it for images.
    """

    takes_adapters = True
    takes_pieces = True

    net: DenoisingNet
    embedder: Embedder
    diffusion_sampler: DiffusionSampler

    @property
    def kind(self) -> str:
        flow = isinstance(self.diffusion_sampler.objective.schedule, Flow)
        return f"{super().kind}{' by flow matching' * flow}"

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """What is denoised of images (B, C, H, W): (B, *net.shape), without noise of its own."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of what was denoised, (B, *net.shape)."""

    def adapt(self, recipe: lora.Recipe) -> None:
        """Put adapters on the net and on what reads texts, which from here on are all that is trained.

        Raises:
            UserError: the recipe names layers that they have not.
        """
        self.given = frozenset(dict(self.named_parameters()))
        self.requires_grad_(False)
        texts = [source for source in self.embedder.modules() if isinstance(source, Texts)]
        with within("lora"):
            recipe.on(self.net)
            for source in texts:
                source.adapt(recipe)
            if not texts:
                recipe.refuse_no_texts(self.embedder)

    @property
    def needs_grad(self) -> bool:
        return self.diffusion_sampler.needs_grad

    def protocol(self) -> dict[str, Any]:
        return self.diffusion_sampler.protocol()

    def sample(
        self,
        cond: Cond,
        rngs: ImageRngs,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images (n, C, H, W).

        Args:
            sampler: sampler in place of the model's own.
            guidance: number in place of the guider's own; classifier-free, D_u + guidance (D_c - D_u): 1 = off.
            guider: guider in place of the model's own.
        """
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        return self.decode(how(cond, self.noise(rngs), rngs))

    def noise(self, rngs: ImageRngs) -> Tensor:
        """Standard normal noise that samples start from, (len(rngs), *net.shape)."""
        return rngs.randn(*self.net.shape, device=self.device)

    def edit(
        self,
        x: Tensor,
        cond: Cond,
        rngs: ImageRngs,
        strength: float,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """SDEdit of images x (B, C, H, W): noised to time `strength` in (0, 1], then denoised under a condition."""
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        return self.decode(how.edit(cond, self.encode(x), rngs, strength))

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
        """Images x (B, C, H, W) where the mask (B, 1, H, W), bool, is false; where it is true, pixels that fit.

        What is below the mask is not looked at. A latent is to be filled where it or one beside it has masked pixels.
        """
        known = x.masked_fill(mask, 0)
        z = self.encode(known)
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        filled = self.decode(how.inpaint(cond, z, latent_mask(mask, z.shape[2:]), rngs, resamplings))
        return torch.where(mask, filled, x)

    def invert(
        self,
        x: Tensor,
        own: Cond | None,
        cond: Cond,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Tensor:
        """Images that DDIM makes, under a condition, of the noise that it inverts images x (B, C, H, W) to.

        Args:
            own: condition of x, under which it is inverted without guidance; None: nothing is known of it.
            cond: condition of the result.
            sampler: sampler whose times DDIM takes; None: the model's own.
            guidance: guidance on the way back, as in `sample`.
            guider: guider on the way back, as in `sample`.
        """
        known, unguided = (cond, UNKNOWN) if own is None else (own, UNGUIDED)
        x_t, times = self.diffusion_sampler.asked(sampler, **unguided).invert(known, self.encode(x))
        return self.decode(self.diffusion_sampler.asked(sampler, guidance, guider).revert(cond, x_t, times))

    def noising(self, x: Tensor, rngs: ImageRngs, n_frames: int) -> Iterator[Tensor]:
        """Images x (B, C, H, W) noised to evenly spaced times from 0 to 1, (B, C, H, W) each, as far as they show."""
        z, noise = self.encode(x), self.noise(rngs)
        schedule = self.diffusion_sampler.objective.schedule
        for t in torch.linspace(0, 1, n_frames, dtype=torch.float64, device=x.device):
            yield self._shown(noised(z, noise, t[None], schedule).float(), t)

    def denoising(
        self,
        cond: Cond,
        rngs: ImageRngs,
        n_frames: int,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After so many of the steps of `sample`, or all if they are fewer: x_t, and the denoised images.

        They are (B, C, H, W) each; the last x_t are the samples.
        """
        how = self.diffusion_sampler.asked(sampler, guidance, guider)
        times = how.times(self.device)[1:]
        chosen = set(torch.linspace(0, len(times) - 1, min(n_frames, len(times))).round().int().tolist())
        way = how.trajectory(cond, self.noise(rngs), rngs)
        for k, (t, (z, denoised)) in enumerate(zip(times, way, strict=True)):
            if k in chosen:
                yield self._shown(z, t), self.decode(denoised)

    def refuse_long(self, name: str, texts: list[str], key: str) -> None:
        for reader in readers(self.diffusion_sampler.embedder, name):
            if not reader.cut:
                refuse_long(
                    reader.encoder, texts, key, "a run with model.embedder...cut=true, which reads their beginning"
                )

    @property
    def reads_words(self) -> bool:
        """Whether its net looks at the tokens of texts, and of nothing else."""
        return text_reader(self.diffusion_sampler.embedder) is not None

    def words(self, cond: Cond) -> list[list[tuple[str, range]]]:
        """The words of each text of a condition, and the numbers of each one's tokens."""
        reader = text_reader(self.diffusion_sampler.embedder)
        return [word_spans(reader.encoder, text) for text in cond[reader.conditions[0]]]

    def attending(
        self,
        cond: Cond,
        rngs: ImageRngs,
        n_frames: int,
        *,
        sampler: Sampler | None = None,
        guidance: NonNegFloat | None = None,
        guider: Guider | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `denoising`: the denoised images, (B, C, H, W), and how much each place looks at each token.

        That is the mean over the net's cross-attentions, and over the steps since the images before; (B, T, h, w).
        """
        with attention_maps(self.net) as found:
            for _, denoised in self.denoising(cond, rngs, n_frames, sampler=sampler, guidance=guidance, guider=guider):
                yield denoised, joined(found, len(rngs))
                found.clear()

    def noise_bins(self) -> list[int]:
        """Centres of the bins of log-SNR that training reaches."""
        return list(diagnostics.bins(self.diffusion_sampler.objective.schedule, self.device))

    def denoising_errors(self, z: Tensor, cond: Cond, rngs: ImageRngs) -> tuple[Tensor, Tensor]:
        """Squared error and log-SNR in each bin of what `encode` gave, (B, bins) each (`diffusion/diagnostics.py`)."""
        return diagnostics.errors(self.objective, self.net, z, self.embedder(cond, len(z)), rngs)

    def linear_errors(self, variance: Tensor, logsnr: Tensor) -> Tensor:
        """What those errors are for the best linear guess of each pixel from itself; as `logsnr`, of any shape.

        Args:
            variance: that of each number of a latent over images, (C, H, W).
        """
        return diagnostics.linear_error(variance, logsnr)

    def _shown(self, z: Tensor, t: Tensor) -> Tensor:
        """Images of z at time t, brought to the size of images where a schedule makes it larger."""
        level = self.diffusion_sampler.objective.schedule.level(t)
        return self.decode(z / (level.alpha**2 + level.sigma**2).sqrt().clamp(min=1).float())
