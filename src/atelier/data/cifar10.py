"""CIFAR-10 (Krizhevsky 2009): 32 x 32 colour photographs in 10 classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torchvision import datasets

from atelier.core.errors import UserError
from atelier.core.ranges import Name
from atelier.data.base import DataModule, MemoryImages, Role, Split
from atelier.data.published import absent, fetch, resized, with_channels

SOURCE = "www.cs.toronto.edu/~kriz/cifar.html"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@dataclass(kw_only=True, eq=False)
class CIFAR10(DataModule):
    """50,000 train, 10,000 test, in torchvision's layout `<root>/cifar-10-batches-py/`, checksums compared.

    Sizes other than 32 by an antialiased bicubic resize; one channel by luma.

    Args:
        root: the folder that has `cifar-10-batches-py/`.
        download: fetching of the files (170 MB) if they are not there.
    """

    root: Name = field(metadata={"role": Role.READING})
    download: bool = field(metadata={"role": Role.READING})

    provides: ClassVar[frozenset[str]] = frozenset({"label"})
    shuffled: ClassVar[bool] = True  # as published

    @property
    def label_names(self) -> list[str]:
        return CLASSES

    def prepare_data(self) -> None:
        if self.download and not self._present():
            fetch(self.root, lambda: datasets.CIFAR10(self.root, download=True))

    def images(self, split: Split) -> MemoryImages:
        if self.n_classes != 10:
            raise UserError("data.n_classes", self.n_classes, "CIFAR-10 has 10 classes", "data.n_classes=10")
        try:
            found = datasets.CIFAR10(self.root, train=split == "train", download=False)
        except RuntimeError as error:  # also for a file with a wrong checksum, before it is unpickled
            folder = datasets.CIFAR10.base_folder
            missing = f"no complete {self.root}/{folder}/ (data_batch_1..5, test_batch)"
            raise absent(self.root, missing, SOURCE, self.download) from error
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        images = with_channels(resized(pixels, self.image_size), self.image_channels)
        return MemoryImages(images, {"label": torch.tensor(found.targets)}, self.flip)

    def _present(self) -> bool:
        try:
            datasets.CIFAR10(self.root, download=False)
        except RuntimeError:
            return False
        return True
