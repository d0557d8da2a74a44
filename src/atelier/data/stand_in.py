"""Noise of the size and kind of a set's images: for a training step where the files need not be there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from atelier.data.base import DataModule, MemoryImages, Split

WORDS = "a small red circle on a navy ground"
IMAGES = ("source", "image_a", "image_b", "answer_a", "answer_b", "answer")
FLAGS = ("attributes", "target")


@dataclass(kw_only=True, eq=False)
class StandIn(DataModule):
    """A batch of noise for a set, with all Batch fields that the set says it has; one text for all.

    Args:
        of: set that it stands for.
    """

    of: DataModule

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(self.of.provides)

    def images(self, split: Split) -> MemoryImages:
        return MemoryImages(self._noise(1), {name: self._made(name) for name in sorted(self.provides)}, self.flip)

    def _made(self, name: str) -> Tensor | list[str]:
        """Values of a Batch field for all images."""
        n = self.batch_size
        if name in IMAGES:
            return self._noise(getattr(self.of, "scale_factor", 1) if name == "source" else 1)
        if name in FLAGS:
            return torch.randint(2, (n, self.n_attributes)).float()
        if name == "label":
            return torch.arange(n) % max(1, self.n_classes)
        if name == "mask":
            return (torch.arange(self.image_size) % 2).float().expand(n, 1, self.image_size, -1).contiguous()
        return torch.zeros(n, dtype=torch.int64) if name == "mask_kind" else [WORDS] * n

    def _noise(self, divisor: int) -> Tensor:
        """Images (N, C, S / divisor, S / divisor) uint8."""
        side = self.image_size // divisor
        return torch.randint(256, (self.batch_size, self.image_channels, side, side), dtype=torch.uint8)


def stand_in(data: DataModule) -> StandIn:
    """A batch of noise for a set, read in this process."""
    own = {f.name: getattr(data, f.name) for f in fields(DataModule)}
    return StandIn(**own | {"limit": None, "num_workers": 0}, of=data)
