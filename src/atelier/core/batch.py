"""What data hands to models: one dictionary, the same words for every set."""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Images are float32 in [-1, 1]; `image` and `index` are always there, the rest where a set has them."""

    image: Tensor  # (B, C, H, W)
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
    instruction: list[str]
