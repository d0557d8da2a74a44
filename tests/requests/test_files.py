"""sample.py source=...: any size, tiles that do not show, names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sample as entry
from atelier.core.errors import UserError
from atelier.core.names import SetNames
from atelier.core.rng import ImageRngs
from atelier.images.pixels import to_float, to_uint8
from atelier.models.base import Cond, Translator
from atelier.requests import files
from atelier.requests.files import sources
from atelier.requests.request import Request
from tests.compose import composed

TILE = 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TILE", TILE)


class Blurs(Translator):
    """Twice as wide, each pixel the mean of 5 x 5 around its place; sides divide by 4."""

    ema_nets = ()
    receptive_radius, scale_factor, size_divisor = 3, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.AvgPool2d(5, 1, 2, count_include_pad=False)

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        assert all(side % 4 == 0 for side in cond["source"].shape[2:])
        return self.net(cond["source"]).repeat_interleave(2, 2).repeat_interleave(2, 3)


class One:
    """A set whose sources are RGB."""

    names = SetNames([], ["red", "striped"])
    channels = 3

    def test_batch(self, first: int, n: int) -> dict[str, Tensor]:
        return {"source": torch.zeros(n, 3, 8, 8)}


def translated(model: Translator, x: Tensor) -> Tensor:
    return Request(model, One()).translated(x, 0)


@pytest.mark.parametrize(("height", "width"), [(TILE + 17, 2 * TILE + 5), (20, TILE + 1), (TILE + 4, 8)])
def test_tiles_do_not_show(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.rand(1, 3, height, width), Blurs()
    sizes: list[int] = []
    kept = model.sample
    monkeypatch.setattr(model, "sample", lambda cond, rngs: sizes.append(cond["source"].shape[3]) or kept(cond, rngs))
    tiled = translated(model, x)
    assert tiled.shape == (1, 3, 2 * height, 2 * width) and len(sizes) > 1 and max(sizes) <= TILE + 2 * 4
    monkeypatch.setattr(model, "receptive_radius", None)
    torch.testing.assert_close(tiled, translated(model, x), rtol=0, atol=1e-6)


def test_a_net_that_sees_everything_gets_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = Blurs(), []
    monkeypatch.setattr(model, "receptive_radius", None)
    kept = model.sample
    monkeypatch.setattr(model, "sample", lambda cond, rngs: sizes.append(cond["source"].shape) or kept(cond, rngs))
    translated(model, torch.zeros(1, 3, 9, TILE + 10))
    assert [tuple(size) for size in sizes] == [(1, 3, 12, TILE + 12)]  # continued to what divides


def save(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def test_names_and_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a.png", "a.jpg"):
        save(tmp_path / name, 8, 8)
    found = sources(str(tmp_path), tmp_path.parent)
    assert [name for name, _ in found] == ["a.jpg.png", "a.png.png", "b/2.png", "b/10.png"]
    assert sources(str(tmp_path / "a.jpg"), tmp_path.parent) == [("a.png", tmp_path / "a.jpg")]


def test_a_folder_of_sizes_through_the_entry_point(finished: dict[str, Path], tmp_path: Path) -> None:
    for name, (height, width) in {"one": (10, 14), "two": (8, 8), "sub/three": (21, 9)}.items():
        save(tmp_path / "in" / f"{name}.png", height, width)
    words = f"run={finished['cyclegan']}", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "direction=b2a"
    entry.sample(composed(*words, config="sample"))
    for name, (height, width) in {"one": (10, 14), "two": (8, 8), "sub/three": (21, 9)}.items():
        assert Image.open(tmp_path / "out" / f"{name}.png").size == (width, height)
    assert (tmp_path / "out" / "grid.png").exists()
    from atelier.runs import folders

    model = folders.load(finished["cyclegan"], ema=True).model
    image = torch.from_numpy(np.array(Image.open(tmp_path / "in" / "two.png"))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = to_uint8(model.generator_b2a(to_float(image)))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "two.png")), expected)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["direction=a2c"], "CycleGAN goes a2b, b2a. Fix: direction=a2b"),
        (["source=/nowhere/x"], "there is no such file or folder. Fix: source=FILE_OR_FOLDER"),
        (["scale_factor=4"], "CycleGAN of this run makes images 1 times as wide. Fix: scale_factor=1, or another run"),
        (["attributes=[red]"], "CycleGAN takes none. Fix: leave attributes out"),
    ],
)
def test_what_is_refused(finished: dict[str, Path], tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        entry.sample(composed(f"run={finished['cyclegan']}", f"out={tmp_path}", *words, config="sample"))
    assert told in error.value.line()


def test_other_families_take_no_source(finished: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path / "x.png", 8, 8)
    for word, told in ((f"source={tmp_path / 'x.png'}", "takes no source images"), ("direction=a2b", "no directions")):
        with pytest.raises(UserError) as error:
            entry.sample(composed(f"run={finished['gan']}", f"out={tmp_path / 'out'}", word, config="sample"))
        assert told in error.value.line()


WORDS = dict.fromkeys(
    ("label", "direction", "source", "strength", "mask", "resamplings", "prompt", "prompts", "negative", "instruction")
) | {"do": "sample", "seed": 0}


def test_attributes_by_name() -> None:
    model = Blurs()
    model.needs = frozenset({"target"})

    def given(names: list[str] | str, scale: int | None = None) -> list | None:
        return Request.of(model, One(), {}, WORDS | {"attributes": names, "scale_factor": scale}).signs

    assert given(["striped"]) == [-1, 1] and given(["+striped"]) == [0, 1]
    assert given("red", 2) == [1, -1]
    with pytest.raises(UserError, match="attributes"):
        given(["rad"])
    with pytest.raises(UserError, match="scale"):
        given("red", 3)
    with pytest.raises(UserError) as error:
        next(Request(model, One()).translate([("a.png", Path("a.png"))]))
    assert "attributes=+red" in error.value.line()


def test_results_never_come_among_the_sources(tmp_path: Path) -> None:
    for name in ("in/grid.png", "in/x.png"):
        save(tmp_path / name, 8, 8)
    for out in (tmp_path / "in", tmp_path / "in" / "results"):
        with pytest.raises(UserError, match="out"):
            sources(str(tmp_path / "in"), out)
    found = sources(str(tmp_path / "in"), tmp_path / "out")
    assert [name for name, _ in found] == ["grid.png.png", "x.png"]
    with pytest.raises(UserError, match="out"):
        sources(str(tmp_path / "in" / "x.png"), tmp_path / "in")
    assert sources(str(tmp_path / "in" / "x.png"), tmp_path / "in" / "results")  # beside a lone file


@pytest.mark.parametrize("family", ["cyclegan", "stargan", "pix2pix", "srgan"])
def test_a_source_of_a_few_pixels(finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    save(tmp_path / "in.png", 3, 1)
    asked = ["attributes=red"] if family == "stargan" else []
    words = f"run={finished[family]}", f"source={tmp_path / 'in.png'}", f"out={tmp_path / 'out'}", *asked
    entry.sample(composed(*words, config="sample"))
    times = 4 if family == "srgan" else 1
    assert Image.open(tmp_path / "out" / "in.png").size == (times, 3 * times)
