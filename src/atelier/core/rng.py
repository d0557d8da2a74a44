"""Random numbers that belong to images, not to batches, ranks or workers."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

TOGETHER = 2**24  # normal numbers that are drawn at once at most: 64 MB
GROUP = 16  # torch draws normal numbers in groups of so many, and a shape that is no multiple of it ends with one anew


def hashed(*numbers: int) -> int:
    """A seed in [0, 2**63) that depends on every number and on their order, the same on every machine."""
    packed = struct.pack(f"<{len(numbers)}q", *(number & 0x7FFFFFFFFFFFFFFF for number in numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator of its own, seeded by `hashed(*numbers)`."""
    return torch.Generator().manual_seed(hashed(*numbers))


def reseed(seed: int, device: torch.device) -> None:
    """torch.manual_seed of the CPU and this kind of device, without a look for all others, which is a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


class ImageRngs:
    """One generator for each of the images first .. first + n - 1 of a request.

    Image k draws from (seed, k) on the CPU, so it is the same in any batch, on any number of ranks and devices.
    """

    def __init__(self, seed: int, first: int, n: int) -> None:
        self.images = [(seed, k) for k in range(first, first + n)]
        self.generators = [generator(*image) for image in self.images]

    @classmethod
    def of(cls, seed: int, numbers: list[int]) -> ImageRngs:
        """Of images in any order, some perhaps more than once."""
        chosen = cls(seed, 0, 0)
        chosen.images = [(seed, k) for k in numbers]
        return chosen.again()

    def __len__(self) -> int:
        return len(self.generators)

    def __getitem__(self, part: slice) -> ImageRngs:
        chosen = object.__new__(ImageRngs)
        chosen.images, chosen.generators = self.images[part], self.generators[part]
        return chosen

    def again(self) -> ImageRngs:
        """The same images, nothing drawn yet."""
        fresh = object.__new__(ImageRngs)
        fresh.images, fresh.generators = self.images, [generator(*image) for image in self.images]
        return fresh

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, (len(self), *shape) float32; they go to a GPU without its being waited for."""
        drawn = torch.empty(len(self), *shape, pin_memory=torch.device(device).type == "cuda")
        for row, g in zip(drawn, self.generators, strict=True):
            row.normal_(generator=g)  # what torch.randn gives
        return drawn.to(device, non_blocking=True)

    def randns(self, n: int, *shape: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """What n calls of `randn` would give, each drawn with as many of the next as fit where they are the same.

        Image by image a draw costs more than its numbers, if these are few.
        """
        size = math.prod(shape)
        most = max(1, TOGETHER // max(1, size * len(self))) if size % GROUP == 0 else 1
        while n > 0:
            drawn = self.randn(min(n, most), *shape, device=device)
            n -= drawn.shape[1]
            yield from drawn.unbind(1)

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), (len(self), *shape) float32."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(device)

    def randint(self, high: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Whole numbers in [0, high), (len(self), *shape) int64."""
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators]).to(device)
