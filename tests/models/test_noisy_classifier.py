"""A classifier of noisy images: what it learns, what it says of test images, what it lends."""

from __future__ import annotations

TINY = [  # beside tests/tiny.py:COMMON
    "model=noisy_classifier",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[4]",
]
