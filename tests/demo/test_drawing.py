"""The page at work without a browser: uploads, masks, pictures with their requests within, Stop and mistakes."""

from __future__ import annotations

import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import atelier.demo
import demo
import sample as entry
from atelier.core.errors import UserError
from atelier.demo.drawing import LARGEST, Asking, Runs, painted, uploaded
from atelier.images.pictures import png_texts
from tests.compose import composed
from tests.test_sample import drawn, opened


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(99)),
        b"IEND": b"",
    }
    chunks = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def runs(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Two runs under outputs/."""
    monkeypatch.chdir(tmp_path)
    for family in ("vae", "ddpm"):
        shutil.copytree(finished[family], tmp_path / "outputs" / family)
    return Runs("outputs/ddpm")


def asked(
    runs: Runs,
    do: str = "sample",
    values: dict[str, Any] | None = None,
    names: tuple[str, ...] = ("outputs/ddpm",),
    source: Image.Image | None = None,
    layer: np.ndarray | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[tuple[str, list[list[tuple[Path, str, dict, torch.Tensor]]], np.ndarray | None]]:
    """Each thing that is shown: its line; path, caption, texts and pixels of each picture, by run; the way."""
    work = Asking(list(names), runs, do, values or {}, source, layer, lambda *_: None, stopped)
    return [(one.line, [[read(*pair) for pair in part] for part in one.pictures], one.way) for one in work.drawn()]


def read(path: str, caption: str) -> tuple[Path, str, dict, torch.Tensor]:
    return Path(path), caption, png_texts(path), opened(Path(path))


def test_pictures_are_those_of_sample_py_and_say_so(runs: Runs, tmp_path: Path) -> None:
    *_, (line, (made, other), way) = asked(runs, values={"n": 3, "seed": 2, "label": "cyan circle", "guidance": 2.0})
    assert line.startswith("3 pictures in ") and not other and way is None
    words = ["n=3", "seed=2", "label=cyan circle", "guidance=2.0", "batch_size=8"]
    typed = drawn(tmp_path / "outputs" / "ddpm", tmp_path / "typed", *words)
    assert all(torch.equal(pixels.short(), one) for (_, _, _, pixels), one in zip(made, typed, strict=True))
    path, caption, texts, _ = made[1]
    assert (
        caption == texts["asked"] == "cyan circle" and texts["seed"] == "2" and not path.exists()
    )  # nothing is left on the disk


def test_a_picture_of_the_page_is_made_again_by_sample_py(runs: Runs, tmp_path: Path) -> None:
    work = Asking(["outputs/ddpm"], runs, "sample", {"n": 3, "seed": 4}, None, None, lambda *_: None, lambda: False)
    for shown in work.drawn():
        kept = shutil.copy(shown.pictures[0][2][0], tmp_path)  # as the page does: they are gone in the end
    entry.sample(composed(f"like={kept}", f"out={tmp_path / 'again'}", config="sample"))
    assert (opened(tmp_path / "again" / "000002.png") - opened(Path(kept))).abs().max() <= 1


def test_two_runs_are_asked_for_the_same(runs: Runs) -> None:
    *_, (line, (one, other), _) = asked(runs, values={"n": 2}, names=("outputs/ddpm", "outputs/vae"))
    assert line.startswith("4 pictures in ") and len(one) == len(other) == 2
    assert [texts["run"] for _, _, texts, _ in (one[0], other[0])] == ["outputs/ddpm", "outputs/vae"]


def test_what_the_first_run_hides_is_asked_of_none(runs: Runs) -> None:
    """A hidden slider stands at 0, which nobody has asked for."""
    hidden = {"guidance": 0, "sampler": "euler", "sampler.steps": 1, "label": "cyan circle"}
    source, names = Image.new("RGB", (12, 8), "red"), ("outputs/vae", "outputs/ddpm")
    *_, (_, (_, beside), _) = asked(runs, values={"n": 2} | hidden, names=names, source=source)
    *_, (_, (alone, _), _) = asked(runs, values={"n": 2})
    assert all(torch.equal(one[3], other[3]) for one, other in zip(beside, alone, strict=True))


def test_the_way_is_shown_while_it_happens(runs: Runs) -> None:
    """Its last frame is what is drawn, which are the samples of the same seed."""
    found = asked(runs, "paths", {"n": 2, "sampler": "euler", "sampler.steps": 5})
    assert [len(pictures[0]) for _, pictures, _ in found] == [0] * 5 + [2, 2]
    frames = [way for _, _, way in found[:5]]
    assert len({frame.tobytes() for frame in frames}) == 5
    sampled = asked(runs, "sample", {"n": 2, "sampler": "euler", "sampler.steps": 5})[-1][1][0]
    for (_, _, _, a), (_, _, _, b) in zip(found[-1][1][0], sampled, strict=True):
        assert torch.equal(a, b)


def test_an_upload_is_edited_and_filled(runs: Runs) -> None:
    source, layer = Image.new("RGB", (12, 8), "red"), np.zeros((80, 120, 4), np.uint8)
    layer[:, 60:, 3] = 255
    for do, values in (("edit", {"strength": 0.5}), ("inpaint", {"mask": "drawn"}), ("inpaint", {"mask": "left"})):
        *_, (line, (made, _), _) = asked(runs, do, values, source=source, layer=layer)
        assert line.startswith("1 picture in ") and [caption for _, caption, _, _ in made] == ["source", "0"], line
        texts = made[1][2]
        assert '"source": "upload.png"' in texts["request"] and "/" not in texts["request"].partition('"mask"')[2][:20]
    shown, filled = made[0][3], made[1][3]
    assert (shown[:, :, :4] == 128).all()  # the left half is hidden, the right one is kept
    assert (filled[0, :, 4:] == 255).all() and (filled[1:, :, 4:] == 0).all() and not (filled[0, :, :4] == 255).all()
    *_, (line, _, _) = asked(runs, "inpaint", {"mask": "drawn"}, source=source)
    assert line.startswith("error: mask=drawn: nothing is painted")


def test_what_is_painted_is_the_mask() -> None:
    layer = np.zeros((30, 20, 4), np.uint8)
    layer[:15, :, 3] = 7
    mask = np.asarray(painted(layer, (4, 6)))
    assert mask.shape == (6, 4) and (mask[:3] == 255).all() and (mask[3:] == 0).all()


def test_stop_ends_it_in_the_midst(runs: Runs) -> None:
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        return calls > 50

    model = runs["outputs/ddpm"].model
    *_, (line, (made, _), _) = asked(runs, values={"n": 8, "sampler": "euler", "sampler.steps": 200}, stopped=stopped)
    assert line.startswith("stopped after ") and not made and calls == 51
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert asked(runs, values={"n": 1})[-1][0].startswith("1 picture in ")


def test_a_mistake_is_its_line(runs: Runs) -> None:
    for do, values, line in (
        ("sample", {"seed": -1}, "error: seed=-1: it must be greater than or equal to 0. Fix: seed=0"),
        ("sample", {"label": "yellow circle", "n": 1}, "error: label=yellow circle: none of 16 test images has it."),
        ("reconstruct", {}, "error: do=reconstruct: DDPM can sample"),
    ):
        assert asked(runs, do, values)[-1][0].startswith(line)
    *_, (line, _, _) = asked(runs, names=("outputs/../../elsewhere",))
    assert line == "error: run=outputs/../../elsewhere: it is none of the runs that were found. Fix: run=outputs/ddpm"


def test_only_runs_that_were_found_are_opened(runs: Runs, tmp_path: Path) -> None:
    assert set(runs.names) == {"outputs/ddpm", "outputs/vae"} and runs.names[0] == "outputs/ddpm"
    shutil.copytree(tmp_path / "outputs" / "vae", tmp_path / "vae")
    with pytest.raises(UserError, match="none of the runs"):
        runs["vae"]
    assert runs["outputs/ddpm"] is runs["outputs/ddpm"]


def test_without_gradio_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "atelier.demo.page", raising=False)
    monkeypatch.delattr(atelier.demo, "page", raising=False)
    with pytest.raises(UserError, match=r"gradio=: it is not installed. Fix: pip install .* -e \".\[demo\]\""):
        demo.demo(composed("run=last", config="demo"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"/etc/passwd", "not a PNG"),
        (b"", "0 bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (bytes(LARGEST + 1), "the most is 32"),
    ],
)
def test_a_hostile_upload_is_one_line(content: bytes, problem: str) -> None:
    with pytest.raises(UserError) as error:
        uploaded(content)
    assert problem in error.value.line() and error.value.line().startswith("error: source=upload: ")


def test_a_bomb_of_pixels_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)
    for side in (9_000, 30_000):  # Pillow itself minds the second
        with pytest.raises(UserError) as error:
            uploaded(bomb(side))
        assert "pixels" in error.value.line()


def test_an_upload_is_read_as_files_are() -> None:
    """Upright, alpha over white."""
    file = BytesIO()
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(file, format="PNG")
    assert uploaded(file.getvalue()).tobytes() == b"\xff" * 24
