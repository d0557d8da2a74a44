"""What a net takes and an embedder gives: one line for each way in which they do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from atelier.core.errors import UserError
from atelier.nets.denoising import cond_sizes, conditioned_by, denoises
from atelier.nets.dit import DiT
from atelier.nets.unet import UNet


def unet(**changes: Any) -> UNet:
    return UNet(image_size=8, image_channels=3, width=4, multipliers=[1], n_blocks=1, attention=[], **changes)


def dit(**changes: Any) -> DiT:
    return DiT(image_size=8, image_channels=3, patch_size=2, width=8, n_layers=1, heads=2, **changes)


class Foreign:
    """A net of one's own, whose sizes are no arguments."""

    def __init__(self, **sizes: int) -> None:
        self.shape, self.cond_sizes = (3, 8, 8), sizes


def gives(*conditions: str, **sizes: int) -> SimpleNamespace:
    return SimpleNamespace(conditions=conditions, cond_sizes=sizes)


ONLY = "_target_=atelier.nets.unet.UNet"
WRONG = [  # net, embedder, line
    (unet(), gives("label", vector=6), "n=UNet: it takes no vector and would ignore label. Fix: n.cond_dim=6"),
    (unet(), gives("text", tokens=6), "n=UNet: it takes no tokens and would ignore text. Fix: n.token_dim=6"),
    (dit(), gives("mask", planes=5), "n=DiT: it takes no planes and would ignore mask. Fix: n.plane_channels=5"),
    (
        dit(cond_dim=4),
        gives("text", "label", vector=4, tokens=6),
        "n=DiT: it takes no tokens and would ignore text, label. Fix: n.token_dim=6",
    ),
    (
        unet(cond_dim=5),
        gives(vector=6),
        "n.cond_dim=5: the embedder gives vector of size 6, the net takes 5. Fix: n.cond_dim=6",
    ),
    (
        dit(token_dim=5),
        gives(tokens=6),
        "n.token_dim=5: the embedder gives tokens of size 6, the net takes 5. Fix: n.token_dim=6",
    ),
    (
        unet(plane_channels=5),
        gives(planes=6),
        "n.plane_channels=5: the embedder gives planes of size 6, the net takes 5. Fix: n.plane_channels=6",
    ),
    (
        unet(cond_dim=5),
        gives(),
        ".embedder=SimpleNamespace: UNet takes vector, SimpleNamespace gives none. Fix: n.cond_dim=null",
    ),
    (
        dit(token_dim=5),
        gives(),
        ".embedder=SimpleNamespace: DiT takes tokens, SimpleNamespace gives none. Fix: n.token_dim=null",
    ),
    (
        unet(cond_dim=5, plane_channels=5),
        gives(vector=5),
        ".embedder=SimpleNamespace: UNet takes planes, SimpleNamespace gives none. Fix: n.plane_channels=0",
    ),
    (
        Foreign(),
        gives("text", tokens=6),
        "n=Foreign: it takes no tokens and would ignore text. Fix: data.conditions=[]",
    ),
    (
        Foreign(tokens=5),
        gives(tokens=6),
        f"n=Foreign: the embedder gives tokens of size 6, the net takes 5. Fix: n.{ONLY}",
    ),
    (
        Foreign(planes=5),
        gives(),
        f".embedder=SimpleNamespace: Foreign takes planes, SimpleNamespace gives none. Fix: n.{ONLY}",
    ),
]


@pytest.mark.parametrize(("net", "embedder", "line"), WRONG, ids=[line.partition(".")[0] for _, _, line in WRONG])
def test_each_misfit_is_a_line_whose_fix_is_an_argument(net: Any, embedder: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        conditioned_by(net, embedder, "n")
    assert caught.value.line() == f"error: {line}"


@pytest.mark.parametrize(("net", "embedder"), [
    (unet(cond_dim=5, token_dim=6, plane_channels=7), gives("text", vector=5, tokens=6, planes=7)),
    (dit(token_dim=6), gives(vector=5, tokens=6)),  # a vector of an embedder without conditions says nothing
    (unet(), gives(vector=0)),
    (Foreign(planes=7), gives("mask", planes=7)),
])  # fmt: skip
def test_what_fits_is_taken(net: Any, embedder: Any) -> None:
    conditioned_by(net, embedder, "n")
    denoises(net, "n") if not isinstance(net, Foreign) else None


def test_sizes_are_those_that_are_there() -> None:
    assert cond_sizes(None, None, 0) == {} and cond_sizes(3, None, 0) == {"vector": 3}
    assert list(cond_sizes(3, 4, 5).items()) == [("vector", 3), ("tokens", 4), ("planes", 5)]
