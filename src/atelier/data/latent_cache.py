"""What a frozen first stage says of training images, kept on disk and read in place of encoding them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import Images, OnlyMirrored, mirrored

FORMAT = 1
DTYPE = torch.float32
ROWS = 256  # images of a shard: what is lost, at most, where a rank is killed
MANIFEST = "manifest.json"
SECONDS = 15.0  # between lines of progress
PROBED = 8  # images that are looked at, whether training changes them by more than mirroring
KEY = "latent_cache"


class LatentCache:
    """Mean and log-variance of the latents of training images, and of their mirror images where the set flips.

    Of each both are kept, since the latents of a mirror image are not those of the image, mirrored. Shard k of the
    folder, moments_00000k.bin, has ROWS images, (ROWS, 2 or 1, 2 Z, h, w) in the order of `indices`; manifest.json says
    what they are of. A shard is written beside and renamed, and the manifest calls the cache finished after the last
    one. So what was killed goes on with what is missing, and nothing unfinished is ever read.

    They are float32, in which a run with the cache is the run without it, to rounding. In float16 they would take half
    the disk, with an rms error of 2e-4 of the latents' deviation (benchmarks/latent_cache.py).

    Args:
        folder: place of the files, which all ranks see.
        identity: name to plain value of all that decides the moments: where one is another, the cache is stale.
        indices: numbers in their split of the images that are trained on.
        shape: (2 Z, h, w).
        flip: whether mirror images are needed.
        rows: images of a shard.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        indices: Sequence[int],
        shape: tuple[int, int, int],
        flip: bool,
        rows: int = ROWS,
    ) -> None:
        self.folder, self.indices, self.shape, self.flip, self.rows = folder, indices, shape, flip, rows
        self.identity = json.loads(json.dumps(identity))  # as a manifest gives it back
        self.n_shards = math.ceil(len(indices) / rows)
        self._row = None if isinstance(indices, range) else {index: row for row, index in enumerate(indices)}
        self._open: dict[int, Tensor] = {}

    @property
    def n_bytes(self) -> int:
        """Size on disk once it is finished."""
        return len(self.indices) * self._numel * DTYPE.itemsize

    @property
    def _numel(self) -> int:
        """Numbers of an image, and of its mirror image."""
        return (2 if self.flip else 1) * math.prod(self.shape)

    def describe(self) -> str:
        """What it holds, in a few words."""
        mirror = " and of as many mirror images" if self.flip else ""
        return f"latents of {len(self.indices):,} images{mirror}, {_size(self.n_bytes)} in {self.folder}"

    # ---- what lies there

    def check(self) -> bool:
        """Whether it is finished. Where one lies there that has mirror images too, they are read and written as well.

        Raises:
            UserError: something else lies there, or what lies there is of something else, or has lost a shard.
        """
        stored = self._stored()
        if stored is None:
            return False
        self._refuse_stale(stored)
        self.flip = stored["flips"]
        lost = [k for k in range(self.n_shards) if not self._whole(k)]
        if stored["finished"] and lost:
            first = self._shard(lost[0]).name
            raise self._refused(f"{len(lost)} of {self.n_shards} shards are cut or missing, first {first}")
        return stored["finished"]

    def _stored(self) -> dict[str, Any] | None:
        """The manifest; None where nothing was begun."""
        path = self.folder / MANIFEST
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                stored = json.loads(path.read_text())
                return {**self._manifest(False), "format": 0} | stored
            except (ValueError, TypeError) as error:
                raise self._refused(f"its {MANIFEST} cannot be read") from error
        if self._foreign():
            raise UserError(KEY, self.folder, "it holds other files", f"{KEY}=NEW_FOLDER")
        return None

    def _foreign(self) -> bool:
        """Whether the folder holds more than what writers that were killed at once have left."""
        if not self.folder.is_dir():
            return self.folder.exists()
        return any(path.suffix != ".tmp" for path in self.folder.iterdir())

    def _manifest(self, finished: bool) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dtype": str(DTYPE).removeprefix("torch."),
            "shape": list(self.shape),
            "images": len(self.indices),
            "flips": self.flip,
            "rows": self.rows,
            "shards": self.n_shards,
            "finished": finished,
            "of": self.identity,
        }

    def _refuse_stale(self, stored: dict[str, Any]) -> None:
        was, now = _told(stored), _told(self._manifest(False))
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                problem = f"it was made with {name}={_short(was.get(name))}, this run has {_short(now.get(name))}"
                raise self._refused(problem)
        if self.flip and not stored["flips"]:
            raise self._refused("it has no mirror images, which data.flip=true needs")

    def _refused(self, problem: str) -> UserError:
        return UserError(KEY, self.folder, problem, f"{KEY}=auto, {KEY}=NEW_FOLDER, or remove that one")

    def _shard(self, k: int) -> Path:
        return self.folder / f"moments_{k:06d}.bin"

    def _images_of(self, k: int) -> Sequence[int]:
        return self.indices[k * self.rows : (k + 1) * self.rows]

    def _whole(self, k: int) -> bool:
        try:
            return self._shard(k).stat().st_size == len(self._images_of(k)) * self._numel * DTYPE.itemsize
        except OSError:
            return False

    # ---- writing

    def begin(self) -> None:
        """Make the folder and its manifest; one rank's work, before any `fill`.

        Raises:
            UserError: it cannot be written, or has no room.
        """
        missing = sum(len(self._images_of(k)) for k in range(self.n_shards) if not self._whole(k))
        needed = missing * self._numel * DTYPE.itemsize
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                problem = f"it takes {_size(needed)}, {_size(free)} are free"
                raise UserError(KEY, self.folder, problem, f"{KEY}=FOLDER_ON_ANOTHER_DISK, or {KEY}=null")
            if not (self.folder / MANIFEST).exists():
                _write(self.folder / MANIFEST, json.dumps(self._manifest(False), indent=1).encode())

    def fill(
        self, images: Images, encode: Callable[[Tensor], Tensor], batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Write those shards of this rank that are missing; the first rank tells how far it is.

        Args:
            images: training split.
            encode: images (B, C, H, W) to moments (B, 2 Z, h, w), on any device.
            batch_size: images that are encoded at once.
            rank, ranks: number of this process, and how many share the work.

        Raises:
            UserError: a latent is not finite, or the disk is full.
        """
        missing = [k for k in range(self.n_shards)[rank::ranks] if not self._whole(k)]
        pace = _Pace(sum(len(self._images_of(k)) for k in missing), ranks if rank == 0 else 0)
        for k in missing:
            rows, parts = self._images_of(k), []
            for first in range(0, len(rows), batch_size):
                chosen = list(rows[first : first + batch_size])
                parts.append(self._moments(images, chosen, encode))
                pace.tell(len(chosen))
            with self._written():
                _write(self._shard(k), torch.cat(parts).contiguous().numpy().tobytes())

    def _moments(self, images: Images, chosen: list[int], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Of some images, (B, 2 or 1, 2 Z, h, w)."""
        x = images.read(chosen, None)["image"]
        sides = [x, x.flip(-1)] if self.flip else [x]
        moments = torch.stack([encode(side).to("cpu", DTYPE) for side in sides], 1)
        bad = ~moments.flatten(1).isfinite().all(1)
        if bad.any():
            index = chosen[int(bad.nonzero()[0])]
            problem = f"the first stage gives training image {index} a latent that is not finite"
            raise UserError(KEY, self.folder, problem, "another first stage, or leave that image out")
        return moments

    def finish(self) -> None:
        """Call it finished; one rank's work, after every `fill`.

        Raises:
            UserError: a shard is missing, as where the ranks do not see one folder.
        """
        lost = [self._shard(k).name for k in range(self.n_shards) if not self._whole(k)]
        if lost:
            fix = f"{KEY}=FOLDER that all ranks see"
            raise UserError(KEY, self.folder, f"{lost[0]} is not there though every rank has written its part", fix)
        with self._written():
            _write(self.folder / MANIFEST, json.dumps(self._manifest(True), indent=1).encode())
            for left in self.folder.glob("*.tmp"):  # of writers that were killed
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"it cannot be written ({error.strerror})"
            raise UserError(KEY, self.folder, problem, f"{KEY}=ANOTHER_FOLDER, or {KEY}=null") from error

    # ---- reading

    def read(self, indices: list[int], chosen: Tensor) -> Tensor:
        """Moments (B, 2 Z, h, w) of images with these numbers in their split, mirrored where `chosen` (B,) is true."""
        rows = indices if self._row is None else [self._row[index] for index in indices]
        sides = chosen.long().tolist()
        found = [self._opened(row // self.rows)[row % self.rows, side] for row, side in zip(rows, sides, strict=True)]
        return torch.stack(found)

    def _opened(self, k: int) -> Tensor:
        """A shard as it lies on disk, of which the system reads what is asked for, and keeps it while there is room."""
        if k not in self._open:
            shape = (len(self._images_of(k)), 2 if self.flip else 1, *self.shape)
            kept = torch.from_file(str(self._shard(k)), shared=False, size=math.prod(shape), dtype=DTYPE)
            self._open[k] = kept.view(shape)
        return self._open[k]


class KeptLatents:
    """A training split whose `moments` come from a finished cache, in place of its images.

    Args:
        images: split that all else comes from.
        cache: latents of it.
    """

    def __init__(self, images: OnlyMirrored, cache: LatentCache) -> None:
        self.images, self.cache = images, cache
        self.fingerprint, self.labels = images.fingerprint, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, chosen = self.images.beside(indices, rngs)
        batch["moments"] = self.cache.read(indices, chosen)
        return batch


def check_only_mirrored(images: OnlyMirrored, indices: Sequence[int], flip: bool) -> None:
    """Look at some images whether training shows them, or their mirror images, and nothing else.

    Args:
        images: training split.
        indices: numbers of the images that are trained on; the first few are looked at.
        flip: whether there are to be mirror images.

    Raises:
        UserError: it shows something else.
    """
    chosen = list(indices[:PROBED])
    plain = images.read(chosen, None)["image"]
    for epoch in range(2):
        seen = images.read(chosen, [generator(epoch, index) for index in chosen])["image"]
        _, turned = images.beside(chosen, [generator(epoch, index) for index in chosen])
        if (turned.any() and not flip) or not torch.equal(seen, mirrored(plain, turned)):
            problem = "training changes the pixels of this set by more than mirroring, anew each epoch"
            raise UserError(KEY, type(images).__name__, problem, f"{KEY}=null")


class _Pace:
    """Lines about how much is done and how long the rest takes, for `ranks` that work alike; 0: none."""

    def __init__(self, n: int, ranks: int) -> None:
        self.n, self.ranks, self.done = n, ranks, 0
        self.begun = self.spoke = time.monotonic()

    def tell(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if self.ranks and now - self.spoke > SECONDS and self.done < self.n:
            self.spoke, speed = now, self.done / (now - self.begun)
            done, n = self.done * self.ranks, self.n * self.ranks
            left = (self.n - self.done) / speed
            print(f"latents: {done:,} of {n:,} images, {speed * self.ranks:,.0f}/s, {_time(left)} left", flush=True)


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in two manifests."""
    layout = {name: value for name, value in manifest.items() if name not in ("of", "flips", "finished")}
    return manifest["of"] | layout


def _write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all; several may write the same."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        part.replace(path)
    except FileNotFoundError:  # another has finished the same cache, and removed what it took for leavings
        if not path.exists():
            raise


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
