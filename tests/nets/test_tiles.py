"""First stages by tiles: as diffusers does it, as the whole away from seams, in float32, with less memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from atelier.checkpoints import diffusers_folder
from atelier.core.errors import UserError
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.codec import LatentCodec
from atelier.nets.frozen import Frozen
from atelier.nets.tiles import by_tiles
from atelier.runs import build
from tests.compose import composed
from tests.programs import ROOT, python

LAYOUT = {"image_size": 80, "image_channels": 3, "width": 8, "multipliers": [1, 2, 2], "n_blocks": 1, "attention": []}
LAYOUT |= {"middle_attention": True, "norm_groups": 4, "dropout": 0.0, "latent_channels": 4}


def codec(tile: int | None, **changes: object) -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec(Frozen(KLNet(**LAYOUT | changes)), 0.5, 0.25, "mode", tile=tile)


@pytest.mark.parametrize("size", [(80, 80), (56, 96)])
def test_tiles_are_those_of_diffusers(size: tuple[int, int], tmp_path: Path) -> None:
    """20 x 20 and 14 x 24 latents by tiles of 8: full ones, and ends of 2 and 6."""
    diffusers = pytest.importorskip("diffusers")
    net = codec(8).autoencoder.net
    diffusers_folder.write(net, tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 32, 8
    x = 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        wanted = theirs.encode(x).latent_dist.mode()
        found = by_tiles(lambda part: torch.cat(net.encode(part), 1), x, 32).chunk(2, 1)[0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(by_tiles(net.decode, wanted, 8), theirs.decode(wanted).sample, atol=1e-4, rtol=0)
        assert (net.decode(wanted) - by_tiles(net.decode, wanted, 8)).abs().max() > 1e-3


def test_away_from_seams_convolutions_are_the_whole() -> None:
    """A net that sees 2 places around one: a seam's fade reaches as far, then nothing differs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, padding=1)
    )
    x = torch.randn(1, 1, 40, 40)
    with torch.no_grad():
        whole, tiled = net(x), by_tiles(net, x, 16)
    near = torch.zeros(40, dtype=torch.bool)
    for seam in (12, 24, 36):  # where tiles begin; the one before ends 4 later
        near[max(0, seam - 2) : seam + 6] = True
    near = near.repeat_interleave(2)
    far = ~(near[:, None] | near[None])
    difference = (whole - tiled).abs()[0, 0]
    assert difference[far].max() < 1e-6 < difference.max() and far.float().mean() > 0.1


def test_a_map_no_larger_than_a_tile_is_whole_to_the_bit() -> None:
    x = torch.rand(2, 3, 80, 80)
    for tile in (20, 24):
        one, other = codec(None), codec(tile)
        assert torch.equal(one.moments(x), other.moments(x)) and torch.equal(
            one.decode(one.encode(x)), other.decode(one.encode(x))
        )


def test_tiles_are_float32_under_autocast_and_close_to_the_whole() -> None:
    x, made = 2 * torch.rand(1, 3, 80, 80) - 1, codec(12)
    z = made.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = made.decode(made.encode(x))
    assert found.dtype == torch.float32 and torch.equal(found, made.decode(z))
    assert torch.equal(made.centre(x), z)
    assert z.shape == (1, 4, 20, 20) and (z - codec(None).encode(x)).norm() < 0.5 * z.norm()


def test_a_model_without_a_first_stage_is_one_line() -> None:
    with pytest.raises(UserError, match="tile=8: Linear decodes no latents by a first stage. Fix: leave tile out"):
        build.by_tiles(nn.Linear(1, 1), 8)


def test_sample_py_sets_the_tile() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = codec(None)

    model = Model()
    build.by_tiles(model, None)
    assert model.codec.tile is None
    build.by_tiles(model, 8)
    assert model.codec.tile == 8
    assert composed(config="sample").tile is None


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak is kept here")
def test_tiles_take_a_fraction_of_the_memory() -> None:
    """Decoding 512 px by tiles of 16 latents, each a sixteenth of the whole; peaks of two processes, in MB."""
    whole, tiled = peak(0), peak(16)
    assert tiled < 0.4 * whole


def peak(tile: int) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = python("-m", "tests.nets.tiles_peak", str(tile), folder=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    print(tile, done.stdout)
    return float(done.stdout)
