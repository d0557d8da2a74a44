"""Pixels folded into places: no place may pass through fewer numbers than it holds, those beside it counted."""

from __future__ import annotations

import pytest
import torch

from atelier.core.errors import UserError
from atelier.nets.resnet_translator import ResNetTranslator
from atelier.nets.unet import UNet
from atelier.nets.vae import VAENet, decoder
from tests.nets.test_unet import awake

TRANSLATOR = dict(
    in_channels=3,
    image_channels=3,
    width=8,
    n_downs=0,
    n_blocks=0,
    patch_size=8,
    norm="group",
    padding="zeros",
    residual=True,
)


def unet(size: int, width: int, patch_size: int | None) -> UNet:
    sizes = dict(image_size=size, width=width, patch_size=patch_size, multipliers=[1], n_blocks=1, attention=[])
    return UNet(image_channels=3, cond_dim=None, **sizes)


@pytest.mark.parametrize("size", [64, 128])
def test_white_noise_is_given_back(size: int) -> None:
    """At t = 1 a diffusion model sees noise alone and is asked for it: width 32 could hold 2/3 and 1/6 of these."""
    torch.manual_seed(0)
    net, time, losses = unet(size, 32, None), torch.full((1,), 999.0), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(20):
        x = torch.randn(1, 3, size, size)
        losses.append((net(x, time) - x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.9 and min(losses) < 0.05


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("net", ["unet", "decoder", "translator"])
def test_one_place_gives_every_picture_of_its_pixels(net: str, patch_size: int) -> None:
    """Outputs of one place, for random inputs, span all that its pixels can show; 8 maps alone span 8 pictures."""
    torch.manual_seed(0)
    numbers = 3 * patch_size**2
    inputs = 0.2 * torch.randn(2 * numbers + 8, 3, patch_size, patch_size, dtype=torch.float64)
    with torch.no_grad():
        if net == "unet":
            outputs = awake(unet(patch_size, 8, patch_size)).double()(inputs, torch.zeros(len(inputs)))
        elif net == "translator":
            outputs = awake(ResNetTranslator(**TRANSLATOR | {"patch_size": patch_size})).double()(inputs).atanh()
        else:
            outputs = awake(decoder(numbers, 8, patch_size, 0, 1, 3)).double()(inputs.flatten(1)[:, :, None, None])
    centred = (outputs - outputs.mean(0)).flatten(1)
    assert torch.linalg.matrix_rank(centred, rtol=100 * torch.finfo(centred.dtype).eps) == numbers


def test_folds_that_fit_are_what_they_were() -> None:
    """Runs of 16 and 32 px, where the width is enough, keep the names of their weights."""
    assert not [name for name, _ in unet(32, 32, None).named_parameters() if name.startswith("pixels")]
    net = VAENet(image_size=32, image_channels=3, width=32, n_downs=2, latent_channels=8, patch_size=None)
    assert net.decoder[-2].weight.shape == (12, 32, 3, 3)


def test_a_translator_without_its_source_refuses_a_fold_it_cannot_hold() -> None:
    bare = TRANSLATOR | {"residual": False}
    with pytest.raises(UserError, match="patch 8 makes 192 numbers of each place.* Fix: .width=192"):
        ResNetTranslator(**bare)
    assert ResNetTranslator(**bare | {"width": 192})(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)
