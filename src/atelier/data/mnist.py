"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): grey, 28 x 28, 10 classes."""

from __future__ import annotations

import gzip
import struct
import zlib
from abc import ABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets

from atelier.core.errors import UserError
from atelier.core.ranges import Name
from atelier.data.base import DataModule, MemoryImages, Role, Split
from atelier.data.published import absent, fetch, resized, with_channels

FILES = {"train": "train", "test": "t10k"}


@dataclass(kw_only=True, eq=False)
class Idx(DataModule, ABC):
    """Four idx files, plain or .gz, in torchvision's layout `<root>/<set>/raw/`; 60,000 train, 10,000 test.

    `image_size` 28: as published; 32: two black pixels added on each side; any other: those 32 resized
    (antialiased bicubic). Three channels repeat the grey one.

    Args:
        root: the folder that has `<set>/raw/`.
        download: fetching of the files (12 to 31 MB) if they are not there.
    """

    root: Name = field(metadata={"role": Role.READING})
    download: bool = field(metadata={"role": Role.READING})

    published: ClassVar[type[datasets.MNIST]]
    source: ClassVar[str]
    provides: ClassVar[frozenset[str]] = frozenset({"label"})

    @property
    def folder(self) -> Path:
        return Path(self.root, self.published.__name__, "raw")

    def prepare_data(self) -> None:
        names = _names("train") + _names("test")
        if self.download and any(_file(self.folder, name) is None for name in names):
            fetch(self.root, lambda: self.published(self.root, download=True))

    def images(self, split: Split) -> MemoryImages:
        if self.n_classes != 10:
            problem = f"{self.published.__name__} has 10 classes"
            raise UserError("data.n_classes", self.n_classes, problem, "data.n_classes=10")
        pixels, labels = (self._read(name) for name in _names(split))
        images = with_channels(fitted(pixels[:, None], self.image_size), self.image_channels)
        return MemoryImages(images, {"label": labels.long()}, self.flip)

    def _read(self, name: str) -> Tensor:
        file = _file(self.folder, name)
        if file is None:
            raise absent(self.root, f"no {self.folder / name}[.gz]", self.source, self.download)
        try:
            return read_idx(file)
        except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
            problem = f"{file} is damaged: {error}"
            raise UserError("data.root", self.root, problem, f"rm {file}, then data.download=true") from error


@dataclass(kw_only=True, eq=False)
class MNIST(Idx):
    """Handwritten digits; the label is the digit. The first half of the test split is the easier one (LeCun et al.)."""

    published: ClassVar[type[datasets.MNIST]] = datasets.MNIST
    source: ClassVar[str] = "yann.lecun.org/exdb/mnist"


@dataclass(kw_only=True, eq=False)
class FashionMNIST(Idx):
    """Clothing: T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot."""

    shuffled: ClassVar[bool] = True  # as published
    published: ClassVar[type[datasets.MNIST]] = datasets.FashionMNIST
    source: ClassVar[str] = "github.com/zalandoresearch/fashion-mnist"

    @property
    def label_names(self) -> list[str]:
        return list(datasets.FashionMNIST.classes)


def read_idx(file: Path) -> Tensor:
    """The uint8 array of an idx file, plain or .gz. Raises ValueError where it is cut or is none."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    zero, kind, dimensions = struct.unpack(">HBB", data[:4])
    if (zero, kind) != (0, 8):
        raise ValueError("not an idx file of bytes")
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


def fitted(images: Tensor, size: int) -> Tensor:
    """(N, 1, 28, 28) uint8 to size x size: 28 as it is, else padded to 32 and, if need be, resized."""
    return images if images.shape[-1] == size else resized(pad(images, (2, 2, 2, 2)), size)


def _names(split: Split) -> list[str]:
    return [f"{FILES[split]}-images-idx3-ubyte", f"{FILES[split]}-labels-idx1-ubyte"]


def _file(folder: Path, name: str) -> Path | None:
    """The archive before the plain file: it has a checksum, and an interrupted extraction leaves it whole."""
    return next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)
