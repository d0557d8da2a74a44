"""One training step of the paper's CIFAR-10 U-Net beside diffusers' UNet2DModel of the same size.

    python benchmarks/unet.py                     # CPU, batch 8, median of 7
    python benchmarks/unet.py --device cuda --batch 128 --compile

A step is forward, mean squared error in float32, backward, and a fused AdamW step, the same for both nets.
All steps of a table run in one process, interleaved (ours, theirs, ours, theirs ...), so that a busy machine
slows both alike. Peak memory comes from one fresh process per net and row: what it needed above its imports.

The nets: Ho et al. 2020, appendix B (128 channels times 1, 2, 2, 2, two blocks, one-head attention at 16 px,
dropout 0.1) and the configuration of google/ddpm-cifar10-32 with that dropout.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported late: a child's peak memory is never below what its parent had when it forked
    from torch import nn
    from torch.optim import Optimizer

NETS = ("atelier", "diffusers")
SIZE = 32


@dataclass(frozen=True)
class Row:
    """One line of the table: how both nets are run."""

    name: str
    channels_last: bool = False
    bf16: bool = False
    compiled: bool = False
    checkpointing: bool = False


ROWS = (
    Row("float32"),
    Row("channels_last", channels_last=True),
    Row("bf16", bf16=True),
    Row("bf16 channels_last", channels_last=True, bf16=True),
    Row("float32 checkpointing", checkpointing=True),
)
COMPILED_ROWS = (
    Row("float32 compiled", compiled=True),
    Row("bf16 channels_last compiled", channels_last=True, bf16=True, compiled=True),
)


def ours(checkpointing: bool = False) -> nn.Module:
    from atelier.nets.unet import UNet

    return UNet(
        image_size=SIZE,
        image_channels=3,
        width=128,
        multipliers=[1, 2, 2, 2],
        n_blocks=2,
        attention=[16],
        heads=1,
        dropout=0.1,
        checkpointing=checkpointing,
    )


def theirs(checkpointing: bool = False) -> nn.Module:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        dropout=0.1,
    )
    if checkpointing:
        net.enable_gradient_checkpointing()
    return net


def build(net: str, row: Row, device: str) -> tuple[nn.Module, Optimizer]:
    """The net in training mode and in the row's memory format, and its optimizer."""
    import torch

    torch.manual_seed(0)
    module = {"atelier": ours, "diffusers": theirs}[net](row.checkpointing).to(device).train()
    if row.channels_last:
        module.to(memory_format=torch.channels_last)
    if row.compiled:
        module.compile()
    return module, torch.optim.AdamW(module.parameters(), lr=2e-4, fused=True)


def stepper(module: nn.Module, optimizer: Optimizer, row: Row, batch: int, device: str) -> Callable[[], None]:
    """A function that does one training step, finished when it returns."""
    import torch

    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    noise = torch.randn_like(x)
    if row.channels_last:
        x = x.to(memory_format=torch.channels_last)
    t = 999 * torch.rand(batch, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=row.bf16):
            out = module(x, t)
        out = out if torch.is_tensor(out) else out.sample
        torch.nn.functional.mse_loss(out.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(rows: tuple[Row, ...], batch: int, rounds: int, warmup: int, device: str) -> dict[str, float]:
    """Median seconds of a step for each net and row, interleaved. Rows with the same net share it."""
    built, steps = {}, {}
    for row in rows:
        for net in NETS:
            key = (net, row.channels_last, row.compiled, row.checkpointing)
            built[key] = built.get(key) or build(net, row, device)
            steps[f"{net} {row.name}"] = stepper(*built[key], row, batch, device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warmup:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_here(net: str, row: Row, batch: int, device: str) -> float:
    """MiB that three steps need above the imports. Call it in a fresh process."""
    import torch
    from diffusers import UNet2DModel  # noqa: F401  both nets pay for the same imports

    from atelier.nets.unet import UNet  # noqa: F401

    def high_water() -> int:
        scale = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

    before = high_water()
    step = stepper(*build(net, row, device), row, batch, device)
    for _ in range(3):
        step()
    used = torch.cuda.max_memory_allocated() if device == "cuda" else high_water() - before
    return used / 2**20


def peaks(rows: tuple[Row, ...], batch: int, device: str) -> dict[str, float]:
    """MiB for each net and row, each from a process of its own."""
    result = {}
    for row in rows:
        for net in NETS:
            options = ["--device", device, "--batch", str(batch), "--peak", net, row.name]
            done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
            result[f"{net} {row.name}"] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: tuple[Row, ...], batch: int, taken: dict[str, float], memory: dict[str, float]) -> str:
    """Markdown. Ratios above 1 mean that atelier is faster."""
    default = taken["diffusers float32"]
    lines = [
        "| both run as | atelier images/s | diffusers images/s | ratio | to diffusers float32 "
        "| atelier peak MiB | diffusers peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, d = (taken[f"{net} {row.name}"] for net in NETS)
        cells = [row.name, f"{batch / a:.2f}", f"{batch / d:.2f}", f"{d / a:.2f}x", f"{default / a:.2f}x"]
        cells += [f"{memory[f'{net} {row.name}']:.0f}" if memory else "-" for net in NETS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """Where the numbers were taken."""
    import diffusers
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    flags = [f for f in ("avx512_bf16", "amx") if device == "cpu" and has_cpu_flag(f)]
    return ", ".join([where, *flags, f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"])


def has_cpu_flag(flag: str) -> bool:
    """Whether /proc/cpuinfo names an instruction set; False where there is no such file."""
    try:
        with open("/proc/cpuinfo") as file:
            return flag in file.read()
    except OSError:
        return False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="the median is taken over so many steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="adds the compiled rows")
    parser.add_argument("--no-memory", action="store_true", help="leaves peak memory out")
    parser.add_argument("--peak", nargs=2, metavar=("NET", "ROW"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.peak:
        net, name = args.peak
        row = next(row for row in ROWS + COMPILED_ROWS if row.name == name)
        print(json.dumps(peak_here(net, row, args.batch, args.device)))
        return
    rows = ROWS + COMPILED_ROWS if args.compile else ROWS
    memory = {} if args.no_memory else peaks(rows, args.batch, args.device)  # before torch is imported here
    taken = seconds(rows, args.batch, args.rounds, args.warmup, args.device)
    n_ours, n_theirs = (sum(p.numel() for p in build(net, ROWS[0], "cpu")[0].parameters()) for net in NETS)
    print(f"{machine(args.device)}; batch {args.batch}, median of {args.rounds}")
    print(f"parameters: atelier {n_ours:,}, diffusers {n_theirs:,} ({n_ours / n_theirs - 1:+.3%})\n")
    print(table(rows, args.batch, taken, memory))


if __name__ == "__main__":
    main()
