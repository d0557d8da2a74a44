"""What data hands to models: one dictionary, the same words for every set."""

from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

Cond = dict[str, Tensor | list[str]]  # what is asked of B images, by the names of Batch fields


class Batch(TypedDict, total=False):
    """Images are float32 in [-1, 1]; `image` and `index` are always there, the rest where a set has them.

    Where latents are kept on disk, `moments` stands in training in place of `image`.
    """

    image: Tensor  # (B, C, H, W)
    moments: Tensor  # (B, 2 Z, h, w) float32, mean and log-variance of the latents of `image`
    index: Tensor  # (B,) int64, number of the image in its split
    label: Tensor  # (B,) int64
    attributes: Tensor  # (B, A) float32, 0 or 1
    text: list[str]
    source: Tensor  # (B, C', H', W') what `image` is to be made from
    image_a: Tensor  # (B, C, H, W) the two unpaired domains
    image_b: Tensor  # (B, C, H, W)
    answer_a: Tensor  # (B, C, H, W) what `image_a` is in the other domain, of test images and where the set knows it
    answer_b: Tensor  # (B, C, H, W) the same of `image_b`
    target: Tensor  # (B, A) float32, 0 or 1: the attributes that `image` is to get
    answer: Tensor  # (B, C, H, W) `image` with them, of test images and where the set knows it
    mask: Tensor  # (B, 1, H, W), 1 = to fill
    mask_kind: Tensor  # (B,) int64, of shapes: 0 the object's box, 1 strokes that cover a part of it
    instruction: list[str]
    negative: list[str]  # what guidance leads away from in place of nothing; no set has it


def each(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    """The same with a change of every tensor; texts stay as they are."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in cond.items()}


def rows_of(cond: Cond, index: Tensor | slice) -> Cond:
    """The images with these numbers, in this order; a number (int64) that is there twice comes twice."""
    return {name: _rows(value, index) for name, value in cond.items()}


def _rows(value: Tensor | list[str], index: Tensor | slice) -> Tensor | list[str]:
    if isinstance(index, slice):
        return value[index]
    return value[index.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]
