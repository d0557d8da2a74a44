"""The pool of past images: filled first, then half of the time an older image comes back and gives up its place."""

from __future__ import annotations

import pytest
import torch

from atelier.nets.pool import ImagePool
from tests.counting import Counting


def numbered(first: int, n: int) -> torch.Tensor:
    return torch.arange(first, first + n).float().view(n, 1, 1, 1).expand(n, 1, 2, 2)


def pool(size: int) -> ImagePool:
    return ImagePool(size=size, image_size=2, image_channels=1)


def test_an_empty_pool_gives_back_what_it_is_shown_and_keeps_it() -> None:
    kept = pool(5)
    assert torch.equal(kept.swapped(numbered(1, 3), 0), numbered(1, 3))
    assert kept.images[:, 0, 0, 0].tolist() == [1, 2, 3, 0, 0]


def test_a_full_pool_swaps_half_of_the_images_and_loses_none() -> None:
    torch.manual_seed(0)
    kept, given = pool(50), []
    for k in range(0, 4000, 4):
        given += kept.swapped(numbered(k, 4), k)[:, 0, 0, 0].tolist()
    late = torch.tensor(given[50:])
    older = (late != torch.arange(50, 4000)).float()
    assert abs(older.mean() - 0.5) < 0.03
    assert sorted(given[50:] + kept.images[:, 0, 0, 0].tolist()) == list(range(4000))
    ages = torch.arange(50, 4000)[older.bool()] - late[older.bool()]
    assert 80 < ages.mean() < 120  # an image waits for 50 places / half of the images on average


def test_no_pool_gives_everything_back_and_gradients_end_there() -> None:
    x = numbered(0, 4).clone().requires_grad_()
    assert torch.equal(pool(0).swapped(x, 10), x) and not pool(0).swapped(x, 10).requires_grad
    assert not pool(2).swapped(x, 10).requires_grad


def test_the_pool_is_in_the_state_and_shares_no_memory_with_what_it_was_shown() -> None:
    kept, x = pool(2), numbered(1, 2).clone()
    kept.swapped(x, 0)
    x += 10
    assert kept.state_dict()["images"][:, 0, 0, 0].tolist() == [1, 2]


def by_hand(kept: ImagePool, new: torch.Tensor, seen: int) -> torch.Tensor:
    """What numbers that are read off the device would do."""
    luck, given = torch.rand(2, len(new)).tolist(), []
    for k, image in enumerate(new):
        if seen + k < kept.size:
            kept.images[seen + k] = image
        elif luck[0][k] < 0.5:
            place = int(luck[1][k] * kept.size)
            image, kept.images[place] = kept.images[place].clone(), image
        given.append(image)
    return torch.stack(given)


def test_swaps_are_those_by_hand_and_no_number_is_read_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pool(7), pool(7)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("the device was asked"))
    with Counting() as counted:
        found = []
        for k in range(0, 400, 4):
            torch.manual_seed(k)
            found.append(ours.swapped(numbered(k, 4), k))
    monkeypatch.undo()
    assert counted.waits == 0
    for k, x in zip(range(0, 400, 4), found, strict=True):
        torch.manual_seed(k)
        assert torch.equal(x, by_hand(theirs, numbered(k, 4), k))
    assert torch.equal(ours.images, theirs.images)
