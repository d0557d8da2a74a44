"""Random numbers that belong to images, not to batches, ranks or workers."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor


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
        """Standard normal numbers, (len(self), *shape) float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(device)

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), (len(self), *shape) float32."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(device)

    def randint(self, high: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Whole numbers in [0, high), (len(self), *shape) int64."""
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators]).to(device)
