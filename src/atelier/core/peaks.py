"""What devices can do at most: peak dense TFLOP/s as their makers tell them, by name and precision."""

from __future__ import annotations

import re

# name: bfloat16, float16, TF32 (None where it has none), float32; without sparsity, float16 summed in float32
PEAKS: dict[str, tuple[float | None, float, float | None, float]] = {
    r"H200": (989, 989, 495, 67),
    r"H100 NVL": (835, 835, 418, 60),
    r"H100 PCIe": (756, 756, 378, 51),
    r"H100": (989, 989, 495, 67),
    r"A100": (312, 312, 156, 19.5),
    r"A10": (125, 125, 62.5, 31.2),
    r"L40S": (362, 362, 183, 91.6),
    r"L4": (121, 121, 60, 30.3),
    r"V100 PCIE": (None, 112, None, 14),
    r"V100": (None, 125, None, 15.7),
    r"T4": (None, 65, None, 8.1),
    r"RTX A6000": (155, 155, 77.4, 38.7),
    r"RTX 4090(?! (D|Laptop))": (165, 165, 82.6, 82.6),
    r"RTX 3090(?! Ti)": (71, 71, 35.6, 35.6),
}


def peak(device: str, precision: str) -> float | None:
    """TFLOP/s of one device; None where they are not known.

    32-true is told beside TF32 where the device has it, since PyTorch's convolutions use it unless told otherwise.

    Args:
        device: name as CUDA gives it, `NVIDIA H100 80GB HBM3`.
        precision: precision of a run, as Lightning names it, not `auto`.
    """
    words = device.replace("-", " ")
    found = next((numbers for name, numbers in PEAKS.items() if re.search(rf"\b{name}\b", words)), None)
    if found is None:
        return None
    bfloat16, float16, tf32, float32 = found
    return {"bf16-mixed": bfloat16, "16-mixed": float16, "32-true": tf32 or float32}[precision]
