"""What a finished model can lend to one that stands on it: eight contracts, and who keeps them.

    FirstStage   images to latents and back      KLNet, VQGANNet, VQNet, TAESD, LikelihoodAutoencoder (AE, VAE)
    CodeStage    images to codes and back        VQGANNet, VQNet
    Upscaler     images to larger ones           SRResNet, RRDBNet
    Denoiser     noisy images to clean ones      TrainedDenoiser (DDPM)
    DenoisingNet what a denoiser asks            UNet, DiT (published alone); see nets/denoising.py
    TextEncoder  texts to a vector and tokens    ClipNet (Clip), TransformersText
    ImageEncoder images to a vector and tokens   ClipNet (Clip)
    GuidingClassifier   noisy images to labels   TrainedClassifier (NoisyClassifier); see core/classifier.py

A page names a part by the argument of the model that takes it (`first_stage: {run: auto, experiment: shapes_vae}`), the
annotation of that argument names the contract, and `atelier.runs.pretrained` finds or trains the run, or takes what
somebody has published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.classifier import GuidingClassifier
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.denoising import DenoisingNet
from atelier.nets.quantizers import DETERMINISTIC_LOGVAR


@runtime_checkable
class FirstStage(Protocol):
    """An autoencoder. Images are in [-1, 1]; `latent_shape` is (Z, h, w)."""

    latent_shape: tuple[int, int, int]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, Z, h, w) of the latents of images (B, C, H, W)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, Z, h, w)."""
        ...


@runtime_checkable
class CodeStage(Protocol):
    """An autoencoder whose latents are entries of a codebook; `latent_shape` is (D, h, w)."""

    n_codes: int
    latent_shape: tuple[int, int, int]

    def codes(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 in [0, n_codes) of images (B, C, H, W)."""
        ...

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) of codes (B, h, w)."""
        ...


@runtime_checkable
class Upscaler(Protocol):
    """Enlarges images (B, C, H, W) `scale_factor` times.

    A pixel of the result depends on `receptive_radius` pixels of the source around its place.
    """

    scale_factor: int
    receptive_radius: int

    def forward(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Denoiser(Protocol):
    """A trained denoiser, as a teacher; images are in [-1, 1], `shape` is (C, H, W).

    `conditions` are the names of what it is conditioned on, `schedule` gives alpha and sigma of its times.
    """

    shape: tuple[int, int, int]
    conditions: tuple[str, ...]
    schedule: Any

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """E[x | x_t], (B, C, H, W) float32: x_t (B, C, H, W) float32, t (B,) in (0, 1]; cond None: nothing is known."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A trained encoder of texts: P numbers for each, and E for each of up to `max_tokens` tokens of it."""

    vector_dim: int
    token_dim: int
    max_tokens: int

    def n_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text is, marks of its start and end counted, however many are read."""
        ...

    def encode_texts(self, texts: list[str]) -> Condition:
        """Vectors (B, P), tokens (B, T, E) and their mask (B, T); of a longer text, the first `max_tokens`."""
        ...


Layer = Literal["last", "penultimate"]  # block of a text encoder whose states are the tokens


class KeptTexts(Protocol):
    """What `TextReader.encode` once gave of some texts."""

    def __contains__(self, text: str) -> bool: ...

    def read(self, texts: list[str]) -> Condition:
        """The same of some of them, on the CPU; tokens (B, 0, E) and mask (B, 0) where the vector alone was kept."""
        ...


@runtime_checkable
class TextReader(Protocol):
    """Reads a Batch field, its only one of `conditions`, by a frozen encoder, or looks its texts up in `kept`.

    `cond_sizes` are those of an `Embedder` (core/condition.py).
    """

    conditions: tuple[str, ...]
    cond_sizes: dict[str, int]
    encoder: TextEncoder
    kept: KeptTexts | None

    def encode(self, texts: list[str]) -> Condition:
        """What the encoder gives of B texts: vectors (B, P), tokens (B, `max_tokens`, E) and their mask."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """A trained encoder of images in [-1, 1]: P numbers for each, and E for each of its T places."""

    vector_dim: int
    token_dim: int
    n_places: int

    def encode_images(self, x: Tensor) -> Condition:
        """Vectors (B, P) and tokens (B, T, E) of images (B, C, H, W)."""
        ...


CONTRACTS: dict[type, tuple[str, str]] = {  # contract -> what is wrong with a part that breaks it, a run that keeps it
    DenoisingNet: ("it is no denoising net", ""),
    FirstStage: ("it is no autoencoder", "shapes_vae"),
    CodeStage: ("its latents are no codes", "shapes_vqvae"),
    Upscaler: ("it enlarges no images", "shapes_srresnet"),
    Denoiser: ("it does not denoise", "shapes_ddpm"),
    TextEncoder: ("it encodes no texts", "shapes_clip"),
    ImageEncoder: ("it encodes no images", "shapes_clip"),
    GuidingClassifier: ("it tells no labels of noisy images", "shapes_noisy_classifier"),
}

BUILT = (DenoisingNet,)  # contracts of arguments that a page may build in place of naming a run


def contract_of(annotation: Any) -> type | None:
    """The contract that an argument's annotation names, alone or with others, as `Contract | None`."""
    return next((kind for kind in (annotation, *get_args(annotation)) if kind in list(CONTRACTS)), None)


def keeps(part: Any, contract: type, key: str) -> None:
    """Raises UserError where the part that was given as `key` does not keep its contract."""
    if not isinstance(part, contract):
        problem, experiment = CONTRACTS[contract]
        fix = f"{key}.experiment={experiment}" if experiment else f"{key}.run=FOLDER"
        raise UserError(key, type(part).__name__, problem, fix)


class LikelihoodAutoencoder(nn.Module):
    """The net of an autoencoder, its decoder's output made an image as the likelihood says: logits are none.

    Args:
        net: net with encode(x) -> (mean, log-variance), decode(z) and latent_shape.
        image: the likelihood's map of the decoder's output to images.
        deterministic: whether the net was trained without noise: its log-variance says nothing: latents are certain.
    """

    def __init__(self, net: nn.Module, image: Callable[[Tensor], Tensor], deterministic: bool = False) -> None:
        super().__init__()
        self.net, self.image, self.deterministic = net, image, deterministic
        self.latent_shape = net.latent_shape

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.net.encode(x)
        return mean, torch.full_like(mean, DETERMINISTIC_LOGVAR) if self.deterministic else logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.image(self.net.decode(z))
