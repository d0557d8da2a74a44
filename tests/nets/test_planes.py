"""Planes beside latents: what they hold, and that nothing of a hole is ever looked at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.codec import LatentCodec
from atelier.nets.frozen import Frozen
from atelier.nets.planes import FoldedSource, LatentPlanes, MaskedImage, SourceLatents, latent_mask

SIZE, FACTOR = 16, 4


class Means(nn.Module):
    """A first stage whose latents are the means of blocks of pixels and their neighbours'."""

    latent_shape = (3, SIZE // FACTOR, SIZE // FACTOR)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), FACTOR + 2, FACTOR)
        return seen, torch.zeros_like(seen)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=FACTOR)


def codec(scale: float = 2.0) -> LatentCodec:
    return LatentCodec(Frozen(Means()), scale, 0.5, "sample")


@pytest.mark.parametrize(
    "planes", [FoldedSource(source_size=SIZE, source_channels=3, n_frequencies=0), SourceLatents(), MaskedImage()]
)
def test_planes_are_as_many_as_they_say_and_as_large_as_latents(planes: LatentPlanes) -> None:
    cond = {name: torch.rand(2, 1 if name == "mask" else 3, SIZE, SIZE) for name in planes.fields}
    made = planes(cond, codec())
    assert made.shape == (2, planes.channels(Means.latent_shape), 4, 4)
    assert isinstance(planes, LatentPlanes)


def test_a_folded_source_keeps_every_pixel() -> None:
    x = torch.rand(2, 3, SIZE, SIZE)
    planes = FoldedSource(source_size=SIZE, source_channels=3, n_frequencies=0)({"source": x}, codec())
    assert torch.equal(F.pixel_shuffle(planes, FACTOR), x)
    with pytest.raises(UserError, match="does not divide"):
        FoldedSource(source_size=SIZE + 2, source_channels=3, n_frequencies=0).channels(Means.latent_shape)


def test_numbers_of_classes_that_are_close_have_waves_that_are_not() -> None:
    x = torch.rand(2, 3, SIZE, SIZE)
    planes = F.pixel_shuffle(
        FoldedSource(source_size=SIZE, source_channels=3, n_frequencies=2)({"source": x}, codec()), 4
    )
    torch.testing.assert_close(planes[:, 9:12], (2 * torch.pi * x).sin())
    torch.testing.assert_close(planes[:, 12:], (2 * torch.pi * x).cos())
    assert torch.equal(planes[:, :3], x)


def test_latents_of_a_source_are_neither_shifted_nor_scaled_nor_drawn() -> None:
    x = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(SourceLatents()({"source": x}, codec()), Means().encode(x)[0])


def test_what_lies_below_the_mask_changes_nothing() -> None:
    x, mask = torch.rand(1, 3, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    mask[:, :, 5:8, 5:6] = 1
    other = torch.where(mask > 0, torch.randn_like(x), x)
    made = [MaskedImage()({"image": image, "mask": mask}, codec()) for image in (x, other)]
    assert torch.equal(*made)
    grey = (Means().encode(x * (1 - mask))[0] - 0.5) * 2.0
    torch.testing.assert_close(made[0][:, 1:], grey, msg="latents of the image with the hole grey, scaled")


def test_thin_masks_are_not_missed_and_every_latent_that_saw_the_hole_is_in_it() -> None:
    """A pixel is one latent and its neighbours: all that an encoder which sees one pixel further looks with."""
    x = torch.rand(1, 3, SIZE, SIZE)
    for row in range(SIZE):
        mask = torch.zeros(1, 1, SIZE, SIZE)
        mask[:, :, row, 9] = 1
        hole = latent_mask(mask > 0, torch.Size([4, 4]))
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[max(0, row // FACTOR - 1) : row // FACTOR + 2, 1:4] = True
        assert torch.equal(hole[0, 0], expected)
        changed = (Means().encode(x)[0] != Means().encode(x + mask)[0]).any(1)
        assert not (changed & ~hole[0]).any()


def test_the_result_is_pasted() -> None:
    x, made = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 3, SIZE, SIZE)
    mask = (torch.rand(2, 1, SIZE, SIZE) < 0.5).float()
    pasted = MaskedImage().finished(made, {"image": x, "mask": mask})
    assert torch.equal(pasted, made * mask + x * (1 - mask))
