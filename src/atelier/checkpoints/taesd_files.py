"""The published files of the tiny autoencoder taef2: two pickled state dicts, an encoder's and a decoder's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.taesd import TAESD

FILES = "taef2_encoder.pth", "taef2_decoder.pth"
LATENTS = "1.weight"  # of the decoder: the convolution that takes them, (W, Z, 3, 3)


def read(folder: Path | str, image_size: int, channels: int) -> TAESD:
    """The net of a folder, float32 and in eval mode.

    Args:
        folder: folder with taef2_encoder.pth and taef2_decoder.pth.
        image_size: height and width of the images.
        channels: channels of the images.

    Raises:
        UserError: a file is none of these, or the images do not fit.
    """
    folder = Path(folder)
    encoder, decoder = (_state(folder, name) for name in FILES)
    if channels != 3:
        raise _refused(folder, f"it is of images of 3 channels, these have {channels}")
    if LATENTS not in decoder or decoder[LATENTS].ndim != 4:
        raise _refused(folder, f"{FILES[1]} lacks {LATENTS}")
    width, latent_channels = decoder[LATENTS].shape[:2]
    net = TAESD(image_size, width, latent_channels)
    for part, name, state in ((net.encoder, FILES[0], encoder), (net.decoder, FILES[1], decoder)):
        _fill(part, state, folder, name)
    return net.eval()


def _state(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        found = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes of the reader
        raise _refused(folder, f"{name} cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _refused(folder, f"{name} is no state dict")
    return found


def _fill(part: nn.Module, state: dict[str, Tensor], folder: Path, name: str) -> None:
    """Load the weights of a half, all of them and no others, into its own float32."""
    own = part.state_dict()
    odd = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if odd or (odd := sorted(set(state) - set(own))):
        raise _refused(folder, f"{name} is of another layout at {odd[0]}")
    part.load_state_dict(state)


def _refused(folder: Path, problem: str) -> UserError:
    return UserError(
        "model.first_stage.run", folder, problem, f"model.first_stage.run=FOLDER with {' and '.join(FILES)}"
    )
