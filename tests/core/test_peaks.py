"""Devices by the names that CUDA gives them."""

from __future__ import annotations

import pytest

from atelier.core.peaks import PEAKS, peak


@pytest.mark.parametrize(
    ("device", "bfloat16", "float16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156),
        ("NVIDIA H100 80GB HBM3", 989, 989, 495),
        ("NVIDIA H100 PCIe", 756, 756, 378),
        ("NVIDIA H200", 989, 989, 495),
        ("NVIDIA L4", 121, 121, 60),
        ("NVIDIA L40S", 362, 362, 183),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, 14),
        ("Tesla T4", None, 65, 8.1),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165, 165, 82.6),
        ("NVIDIA GeForce RTX 3090 Ti", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("AMD EPYC 9R14, 2 threads", None, None, None),
    ],
)
def test_a_device_and_its_peak(
    device: str, bfloat16: float | None, float16: float | None, float32: float | None
) -> None:
    found = [peak(device, precision) for precision in ("bf16-mixed", "16-mixed", "32-true")]
    assert found == [bfloat16, float16, float32]


def test_no_precision_is_slower_than_a_wider_one() -> None:
    for bfloat16, float16, tf32, float32 in PEAKS.values():
        known = [number for number in (float16, tf32, float32) if number is not None]
        assert known == sorted(known, reverse=True) and bfloat16 in (None, float16)
