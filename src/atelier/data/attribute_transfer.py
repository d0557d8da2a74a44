"""Images that are to get other attributes: `target` beside `attributes`, for one translator of many domains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from atelier.core.batch import Batch
from atelier.data.file_images import FileImages


class AttributeTransfer:
    """Images with their attributes, and with those that each is to get: another image's, drawn anew, in training.

    Args:
        files: images of a split, with the field `attributes`.
        changed: rule of what test images are to get: attributes (B, A), index (B,) -> (B, A).
    """

    def __init__(self, files: FileImages, changed: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.files, self.changed = files, changed
        self.fingerprint, self.labels = files.fingerprint, files.labels

    def __len__(self) -> int:
        return len(self.files)

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        batch, chosen = self.files.beside(indices, rngs)
        return self._with_target(batch, rngs), chosen

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return self._with_target(self.files.read(indices, rngs), rngs)

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return self._with_target(self.files.levels(indices, rngs), rngs)

    def _with_target(self, batch: Batch, rngs: list[torch.Generator] | None) -> Batch:
        if rngs is None:
            batch["target"] = self.changed(batch["attributes"], batch["index"])
        else:
            others = [self._other(index, rng) for index, rng in zip(batch["index"].tolist(), rngs, strict=True)]
            batch["target"] = self.files.fields["attributes"][others]
        return batch

    def _other(self, index: int, rng: torch.Generator) -> int:
        """Another image, each as likely; the same one where there is only one."""
        step = 1 + torch.randint(max(1, len(self) - 1), (), generator=rng)
        return (index + int(step)) % len(self)


def changed(attributes: Tensor, index: Tensor, exclusive: list[int]) -> Tensor:
    """The attributes with number (index mod A) of each row turned over.

    Where one of the exclusive ones is set so, the others are cleared (the colours of hair; Choi et al. 2018 do so
    in their test, where a colour that is there already is left alone).

    Args:
        attributes: (B, A) of 0 and 1.
        index: (B,) int64.
        exclusive: numbers of attributes of which a row has one at most.
    """
    chosen = one_hot(index % attributes.shape[1], attributes.shape[1]).to(attributes.dtype)  # (B, A)
    target = (attributes - chosen).abs()
    group = torch.zeros_like(target)
    group[:, exclusive] = 1
    is_set = (chosen * group * target).sum(1, keepdim=True)  # (B, 1): one of the group has been set
    return target * (1 - is_set * group * (1 - chosen))


def another(attributes: Tensor, index: Tensor) -> Tensor:
    """In place of the one attribute that a row (B, A) has, another one: over the rows, each of them in turn."""
    step = 1 + index % (attributes.shape[1] - 1)
    return one_hot((attributes.argmax(1) + step) % attributes.shape[1], attributes.shape[1]).to(attributes.dtype)
