"""What a cache of latents keeps beside a closed form, and that nothing cut, stale or not finite is ever read."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data import kept_rows
from atelier.data.attribute_transfer import AttributeTransfer, another
from atelier.data.base import Images, MemoryImages, OnlyMirrored
from atelier.data.file_images import FileImages
from atelier.data.kept_rows import MANIFEST
from atelier.data.latent_cache import KeptLatents, LatentCache, check_only_mirrored
from atelier.data.shapes import SceneImages
from atelier.images.pixels import to_float

N, ROWS, SHAPE = 10, 3, (6, 4, 4)
OF = {"model.first_stage": "0123456789abcdef01", "data.image_size": 4, "content of the images": "a"}
PIXELS = torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8, generator=generator(0))


def images(flip: bool = True) -> MemoryImages:
    return MemoryImages(PIXELS, {"label": torch.arange(N), "text": [f"image {k}" for k in range(N)]}, flip)


def encode(x: Tensor) -> Tensor:
    """Each number depends on its own pixel and its place, so that the latent of a mirror image is none mirrored."""
    place = torch.arange(x[0].numel()).view(x.shape[1:])
    return torch.cat([3 * x + place, x - 2 * place], 1)


def truth(indices: list[int], turned: list[bool]) -> Tensor:
    x = to_float(PIXELS[indices])
    return encode(torch.stack([one.flip(-1) if flip else one for one, flip in zip(x, turned, strict=True)]))


def cache(folder: Path, flip: bool = True, of: dict = OF, indices: range | list[int] = range(N)) -> LatentCache:
    return LatentCache(folder, of, indices, SHAPE, flip, rows=ROWS)


def made(folder: Path, flip: bool = True, encoder: Callable[[Tensor], Tensor] = encode, **more) -> LatentCache:
    """As one rank makes it, or goes on with it."""
    kept = cache(folder, flip, **more)
    if not kept.check():
        kept.begin()
        kept.fill(images(flip), encoder, 2)
        kept.finish()
    assert kept.check()
    return kept


def line_of(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        work()
    assert len(error.value.line()) <= 200
    return error.value.line()


# ---- what it keeps


def test_moments_of_an_image_and_of_its_mirror_image(tmp_path: Path) -> None:
    kept = made(tmp_path / "cache")
    order, turned = [7, 0, 9, 3, 3], [True, False, True, True, False]
    assert torch.equal(kept.read(order, torch.tensor(turned)), truth(order, turned))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bin")) == kept.n_bytes == N * 2 * 96 * 4
    assert "10 images and of as many mirror images, 0.0 MB" in kept.describe()


def test_images_that_are_trained_on_alone_are_kept(tmp_path: Path) -> None:
    kept = made(tmp_path / "cache", indices=[8, 2, 5, 1])
    assert torch.equal(kept.read([5, 8], torch.tensor([False, True])), truth([5, 8], [False, True]))
    assert kept.n_bytes == 4 * 2 * 96 * 4


def test_training_reads_moments_with_all_else_of_the_same_draws(tmp_path: Path) -> None:
    plain = images()
    kept, indices = KeptLatents(plain, made(tmp_path / "cache")), list(range(N))
    seen = set()
    for epoch in range(3):
        rngs = [[generator(epoch, k) for k in indices] for _ in range(2)]
        ours, theirs = kept.read(indices, rngs[0]), plain.read(indices, rngs[1])
        torch.testing.assert_close(ours.pop("moments"), encode(theirs.pop("image")), atol=0, rtol=0)
        assert alike(ours, theirs)
        seen |= {tuple(plain.beside(indices, [generator(epoch, k) for k in indices])[1].tolist())}
    assert len(seen) == 3  # which are mirrored changes with the epoch


def test_a_cache_with_mirror_images_serves_a_set_that_does_not_flip(tmp_path: Path) -> None:
    made(tmp_path / "cache", flip=True)
    kept = cache(tmp_path / "cache", flip=False)
    assert kept.check()
    assert torch.equal(kept.read([4], torch.tensor([False])), truth([4], [False]))


def test_two_ranks_write_what_one_does(tmp_path: Path) -> None:
    made(tmp_path / "one")
    ranks = [cache(tmp_path / "two") for _ in range(2)]
    ranks[0].begin()
    for rank, kept in enumerate(ranks):
        assert not kept.check()
        kept.fill(images(), encode, 2, rank, 2)
        assert len(list((tmp_path / "two").glob("*.bin"))) == (2, 4)[rank]
    ranks[0].finish()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- killed


class Killed(BaseException):
    """Nothing tidies up after it."""


def killed_at(
    monkeypatch: pytest.MonkeyPatch, point: int | None, encode: Callable[[Any], Any]
) -> tuple[list[str], Callable[[Any], Any]]:
    """The moments of what follows with this encoder; it ends at that one of them, and leaves half of an open file."""
    seen: list[str] = []

    def at(name: str) -> None:
        seen.append(name)
        if len(seen) - 1 == point:
            raise Killed

    def fsync(handle: int) -> None:
        if len(seen) == point:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        at("half a file")

    replace = Path.replace

    def renamed(self: Path, target: Path) -> None:
        at("before a name")
        replace(self, target)
        at("after a name")

    def told(x: Any) -> Any:
        at("encoding")
        return encode(x)

    monkeypatch.setattr(kept_rows.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    return seen, told


def test_killed_anywhere_it_goes_on_and_nothing_is_lost_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of 32 moments; the last is after the manifest has called it finished."""
    whole = contents(made(tmp_path / "whole").folder)
    with monkeypatch.context() as patch:
        moments, told = killed_at(patch, None, encode)
        made(tmp_path / "counted", encoder=told)
    assert set(moments) == {"half a file", "before a name", "after a name", "encoding"} and len(moments) == 32
    for point in range(len(moments)):
        folder = tmp_path / f"killed_{point}"
        with monkeypatch.context() as patch:
            _, told = killed_at(patch, point, encode)
            with pytest.raises(Killed):
                made(folder, encoder=told)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
        finished = point == len(moments) - 1
        assert cache(folder).check() is finished
        made(folder)
        assert contents(folder) == whole, moments[point]
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}.items()


def test_a_cache_is_finished_by_its_manifest_alone(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.begin()
    kept.fill(images(), encode, 4)
    assert not cache(tmp_path).check()
    (tmp_path / "moments_000002.bin").unlink()
    assert "moments_000002.bin is not there" in line_of(kept.finish) and not cache(tmp_path).check()


BEFORE = """{
 "format": 1,
 "dtype": "float32",
 "shape": [
  6,
  4,
  4
 ],
 "images": 10,
 "flips": true,
 "rows": 3,
 "shards": 4,
 "finished": true,
 "of": {
  "model.first_stage": "0123456789abcdef01",
  "data.image_size": 4,
  "content of the images": "a"
 }
}"""  # as it was written before rows had a page of their own


def test_a_cache_of_before_is_read(tmp_path: Path) -> None:
    assert (made(tmp_path / "now").folder / MANIFEST).read_text() == BEFORE
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / MANIFEST).write_text(BEFORE)
    sides = truth([*range(N)], [False] * N), truth([*range(N)], [True] * N)
    for k, rows in enumerate(torch.stack(sides, 1).split(ROWS)):
        (tmp_path / "before" / f"moments_{k:06d}.bin").write_bytes(rows.contiguous().numpy().tobytes())
    kept = cache(tmp_path / "before")
    assert kept.check() and torch.equal(kept.read([9, 4], torch.tensor([True, False])), truth([9, 4], [True, False]))


# ---- refused


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.first_stage", "fedcba9876543210"), ("data.image_size", 8), ("content of the images", "b")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_stale_cache_is_refused_by_the_field_that_differs(
    tmp_path: Path, name: str, value: object, finished: bool
) -> None:
    made(tmp_path)
    if not finished:
        (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text().replace('true,\n "of"', 'false,\n "of"'))
    before = contents(tmp_path)
    line = line_of(cache(tmp_path, of=OF | {name: value}).check)
    assert line.startswith("error: latent_cache=") and "Fix: latent_cache=auto" in line
    assert f"it was made with {name}=" in line and f"this run has {str(value)[:12]}" in line
    assert contents(tmp_path) == before


def test_a_cache_of_another_format_or_without_mirror_images_is_refused(tmp_path: Path) -> None:
    made(tmp_path, flip=False)
    assert "no mirror images, which data.flip=true needs" in line_of(cache(tmp_path, flip=True).check)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    assert "format=2, this run has 1" in line_of(cache(tmp_path, flip=False).check)


@pytest.mark.parametrize("damage", ["cut", "lost", "manifest", "others"])
def test_what_is_damaged_or_no_cache_is_refused(tmp_path: Path, damage: str) -> None:
    made(tmp_path)
    shard = tmp_path / "moments_000001.bin"
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-4])
        case "lost":
            shard.unlink()
        case "manifest":
            (tmp_path / MANIFEST).write_text("{")
        case "others":
            (tmp_path / MANIFEST).unlink()
    told = {"manifest": "manifest.json cannot be read", "others": "it holds other files"}
    assert told.get(damage, "1 of 4 shards are cut or missing, first moments_000001") in line_of(cache(tmp_path).check)


def test_a_latent_that_is_not_finite_is_refused_with_its_image(tmp_path: Path) -> None:
    bad = to_float(PIXELS[7]).flip(-1)  # the mirror image of one

    def broken(x: Tensor) -> Tensor:
        hit = (x == bad).flatten(1).all(1)
        return encode(x).masked_fill(hit[:, None, None, None], torch.inf)

    line = line_of(lambda: made(tmp_path, encoder=broken))
    assert "training image 7 a latent that is not finite" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "moments_000000.bin", "moments_000001.bin"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 7_679))
    assert "it takes 0.0 MB, 0.0 MB are free" in line_of(lambda: made(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 7_680))
    made(tmp_path / "cache")


def test_time_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = itertools.count(0, 10)  # 10 s for each look: at the start, after each batch of 2 or 1
    monkeypatch.setattr(kept_rows.time, "monotonic", lambda: float(next(clock)))
    made(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "latents: 3 of 10 images, 0/s, 47 s left"  # 20 s for 3, 7 are left
    assert len(lines) == 3


# ---- sets


class Brighter:
    """A set that draws a brightness, and says nothing of it."""

    def __init__(self) -> None:
        self.plain = images()

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        return self.plain.beside(indices, rngs)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch = self.plain.read(indices, rngs)
        if rngs is not None:
            batch["image"] = batch["image"] * torch.stack([torch.rand(1, 1, 1, generator=rng) for rng in rngs])
        return batch


def test_a_set_that_draws_more_than_flips_is_seen() -> None:
    check_only_mirrored(images(), range(N), flip=True)
    check_only_mirrored(images(flip=False), range(N), flip=False)
    for changing, flip in ((Brighter(), True), (images(flip=True), False)):
        assert "changes the pixels" in line_of(lambda one=changing, flip=flip: check_only_mirrored(one, range(N), flip))


def file_images(_: Path) -> FileImages:
    paths = [Path(str(k)) for k in range(N)]
    return FileImages(paths, lambda path: PIXELS[int(path.name)], {"attributes": torch.eye(N)}, True, False, "")


def captioned_images(_: Path) -> FileImages:
    texts = [[f"{k} {word}" for word in "abc"[: 1 + k % 3]] for k in range(N)]
    return FileImages([Path(str(k)) for k in range(N)], lambda p: PIXELS[int(p.name)], {"text": texts}, True, False, "")


SETS: dict[str, Callable[[Path], Images]] = {
    "memory": lambda _: images(),
    "files": file_images,
    "captions": captioned_images,
    "attribute transfer": lambda path: AttributeTransfer(file_images(path), another),
    "scenes": lambda _: SceneImages("train", N, "image", 16, True, None),
    "scenes to change": lambda _: SceneImages("train", N, "attribute_transfer", 16, True, None),
}


@pytest.mark.parametrize("name", SETS)
def test_what_a_set_has_beside_pixels_is_what_it_reads(name: str, tmp_path: Path) -> None:
    made_of = SETS[name](tmp_path)
    assert isinstance(made_of, OnlyMirrored)
    check_only_mirrored(made_of, range(N), flip=True)
    for drawn in (True, False):
        rngs = [[generator(1, k) for k in range(N)] if drawn else None for _ in range(2)]
        whole, (beside, turned) = made_of.read([*range(N)], rngs[0]), made_of.beside([*range(N)], rngs[1])
        assert {"image"} == whole.keys() - beside.keys()
        assert bool(turned.any()) is drawn and not turned.all()
        del whole["image"]
        assert alike(whole, beside)


def alike(a: Batch, b: Batch) -> bool:
    same = (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)
    return a.keys() == b.keys() and all(same)
