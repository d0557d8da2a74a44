"""Rows of numbers that are dear to make, kept on disk: in shards, with a manifest that says what they are of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.lines import say, time_left

FORMAT = 1
DTYPE = torch.float32
ROWS = 256  # rows of a shard: what is lost, at most, where a rank is killed
MANIFEST = "manifest.json"
SECONDS = 15.0  # between lines of progress


@dataclass(frozen=True)
class Wording:
    """How a user knows some rows.

    Args:
        key: option that asks for them.
        stem: beginning of the names of their files.
        rows: word for all of them, "latents".
        row: word for one of them, "a latent".
        of: word for what one of them is of, "image".
        maker: word for the net that gives them, "first stage".
    """

    key: str
    stem: str
    rows: str
    row: str
    of: str
    maker: str


class KeptRows:
    """N rows of float32 numbers, all of one shape, which several processes write together and any number read.

    Shard k of the folder, STEM_00000k.bin, has `rows` of them in their order; manifest.json says what they are of. A
    shard is written beside and renamed, and the manifest calls all finished after the last one. So what was killed goes
    on with what is missing, and nothing unfinished is ever read.

    Args:
        folder: place of the files, which all ranks see.
        wording: words of errors and of progress.
        identity: name to plain value of all that decides the numbers: where one is another, what lies there is stale.
        layout: name to plain value of how they lie, which the manifest tells beside its own.
        n: number of rows N.
        shape: shape of a row.
        rows: rows of a shard.
    """

    def __init__(
        self,
        folder: Path,
        wording: Wording,
        identity: dict[str, Any],
        layout: dict[str, Any],
        n: int,
        shape: tuple[int, ...],
        rows: int = ROWS,
    ) -> None:
        self.folder, self.wording, self.layout, self.n, self.shape, self.rows = folder, wording, layout, n, shape, rows
        self.identity = json.loads(json.dumps(identity))  # as a manifest gives it back
        self.n_shards = math.ceil(n / rows)
        self._open: dict[int, Tensor] = {}

    @property
    def n_bytes(self) -> int:
        """Size on disk once it is finished."""
        return self.n * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE.itemsize

    def describe(self, of: str) -> str:
        """What it holds, in a few words, `of` how many of what."""
        return f"{self.wording.rows} of {of}, {_size(self.n_bytes)} in {self.folder}"

    # ---- what lies there

    def check(self) -> bool:
        """Whether it is finished.

        Raises:
            UserError: something else lies there, or what lies there is of something else, or has lost a shard.
        """
        stored = self.stored()
        if stored is None:
            return False
        self.refuse_stale(stored)
        lost = [k for k in range(self.n_shards) if not self._whole(k)]
        if stored["finished"] and lost:
            first = self._shard(lost[0]).name
            raise self.refused(f"{len(lost)} of {self.n_shards} shards are cut or missing, first {first}")
        return stored["finished"]

    def stored(self) -> dict[str, Any] | None:
        """The manifest that lies there; None where nothing was begun. Raises UserError where something else lies."""
        path = self.folder / MANIFEST
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                stored = json.loads(path.read_text())
                return {**self._manifest(False), "format": 0} | stored
            except (ValueError, TypeError) as error:
                raise self.refused(f"its {MANIFEST} cannot be read") from error
        if self._foreign():
            key = self.wording.key
            raise UserError(key, self.folder, "it holds other files", f"{key}=NEW_FOLDER")
        return None

    def _foreign(self) -> bool:
        """Whether the folder holds more than what writers that were killed at once have left."""
        if not self.folder.is_dir():
            return self.folder.exists()
        return any(path.suffix != ".tmp" for path in self.folder.iterdir())

    def _manifest(self, finished: bool) -> dict[str, Any]:
        own = {"format": FORMAT, "dtype": str(DTYPE).removeprefix("torch.")}
        shards = {"rows": self.rows, "shards": self.n_shards, "finished": finished}
        return own | self.layout | shards | {"of": self.identity}

    def refuse_stale(self, stored: dict[str, Any]) -> None:
        """Raises UserError by the first field in which a manifest is another."""
        was, now = _told(stored), _told(self._manifest(False))
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                problem = f"it was made with {name}={_short(was.get(name))}, this run has {_short(now.get(name))}"
                raise self.refused(problem)

    def refused(self, problem: str) -> UserError:
        """What a user reads where what lies there will not do."""
        key = self.wording.key
        return UserError(key, self.folder, problem, f"{key}=auto, {key}=NEW_FOLDER, or remove that one")

    def _shard(self, k: int) -> Path:
        return self.folder / f"{self.wording.stem}_{k:06d}.bin"

    def _rows_of(self, k: int) -> range:
        return range(self.n)[k * self.rows : (k + 1) * self.rows]

    def _whole(self, k: int) -> bool:
        try:
            return self._shard(k).stat().st_size == len(self._rows_of(k)) * self._row_bytes
        except OSError:
            return False

    # ---- writing

    def begin(self) -> None:
        """Make the folder and its manifest; one rank's work, before any `fill`.

        Raises:
            UserError: it cannot be written, or has no room.
        """
        missing = sum(len(self._rows_of(k)) for k in range(self.n_shards) if not self._whole(k))
        needed, key = missing * self._row_bytes, self.wording.key
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                problem = f"it takes {_size(needed)}, {_size(free)} are free"
                raise UserError(key, self.folder, problem, f"{key}=FOLDER_ON_ANOTHER_DISK, or {key}=null")
            if not (self.folder / MANIFEST).exists():
                _write(self.folder / MANIFEST, json.dumps(self._manifest(False), indent=1).encode())

    def fill(
        self,
        make: Callable[[list[int]], Tensor],
        named: Callable[[int], str],
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Write those shards of this rank that are missing; the first rank tells how far it is.

        Args:
            make: numbers of B rows to the rows, (B, *shape), on any device.
            named: number of a row to what it is of, as a user knows it.
            batch_size: rows that are made at once.
            rank, ranks: number of this process, and how many share the work.

        Raises:
            UserError: a number is not finite, or the disk is full.
        """
        missing = [k for k in range(self.n_shards)[rank::ranks] if not self._whole(k)]
        pace = _Pace(sum(len(self._rows_of(k)) for k in missing), ranks if rank == 0 else 0, self.wording)
        for k in missing:
            parts = []
            for first in range(0, len(self._rows_of(k)), batch_size):
                chosen = list(self._rows_of(k)[first : first + batch_size])
                parts.append(make(chosen).to("cpu", DTYPE))
                self._refuse_not_finite(parts[-1], chosen, named)
                pace.tell(len(chosen))
            with self._written():
                _write(self._shard(k), torch.cat(parts).contiguous().numpy().tobytes())

    def _refuse_not_finite(self, made: Tensor, chosen: list[int], named: Callable[[int], str]) -> None:
        bad = ~made.flatten(1).isfinite().all(1)
        if bad.any():
            words, name = self.wording, named(chosen[int(bad.nonzero()[0])])
            problem = f"the {words.maker} gives {name} {words.row} that is not finite"
            raise UserError(words.key, self.folder, problem, f"another {words.maker}, or leave that {words.of} out")

    def finish(self) -> None:
        """Call it finished; one rank's work, after every `fill`.

        Raises:
            UserError: a shard is missing, as where the ranks do not see one folder.
        """
        lost = [self._shard(k).name for k in range(self.n_shards) if not self._whole(k)]
        if lost:
            problem = f"{lost[0]} is not there though every rank has written its part"
            raise UserError(self.wording.key, self.folder, problem, f"{self.wording.key}=FOLDER that all ranks see")
        with self._written():
            _write(self.folder / MANIFEST, json.dumps(self._manifest(True), indent=1).encode())
            for left in self.folder.glob("*.tmp"):  # of writers that were killed
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem, key = f"it cannot be written ({error.strerror})", self.wording.key
            raise UserError(key, self.folder, problem, f"{key}=ANOTHER_FOLDER, or {key}=null") from error

    # ---- reading

    def row(self, number: int) -> Tensor:
        """A row of what is finished, of this shape, as it lies on disk; to be copied, not changed."""
        return self._opened(number // self.rows)[number % self.rows]

    def _opened(self, k: int) -> Tensor:
        """A shard as it lies on disk, of which the system reads what is asked for, and keeps it while there is room."""
        if k not in self._open:
            shape = (len(self._rows_of(k)), *self.shape)
            kept = torch.from_file(str(self._shard(k)), shared=False, size=math.prod(shape), dtype=DTYPE)
            self._open[k] = kept.view(shape)
        return self._open[k]


class _Pace:
    """Lines about how much is done and how long the rest takes, for `ranks` that work alike; 0: none."""

    def __init__(self, n: int, ranks: int, wording: Wording) -> None:
        self.n, self.ranks, self.wording, self.done = n, ranks, wording, 0
        self.begun = self.spoke = time.monotonic()

    def tell(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if self.ranks and now - self.spoke > SECONDS and self.done < self.n:
            self.spoke, seconds = now, now - self.begun
            done, n = self.done * self.ranks, self.n * self.ranks
            told = f"{done:,} of {n:,} {self.wording.of}s, {done / seconds:,.0f}/s"
            say(f"{self.wording.rows}: {told}, {time_left(seconds, self.done, self.n)}")


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in two manifests."""
    return manifest["of"] | {name: value for name, value in manifest.items() if name not in ("of", "finished")}


def _write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all; several may write the same."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        part.replace(path)
    except FileNotFoundError:  # another has finished the same, and removed what it took for leavings
        if not path.exists():
            raise


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
