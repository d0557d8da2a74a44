"""What the latent space buys: a training step and a sample of a diffusion model of pixels beside one of latents.

    python benchmarks/latent_space.py                        # 64 and 128 px
    python benchmarks/latent_space.py --bf16 --rounds 9
    python benchmarks/latent_space.py --device cuda --batch 64

The net of shapes_ddpm, which folds its pixels down to maps of 16x16 unless it is told otherwise, and that of shapes_ldm
on a first stage of f = 8 with random weights. A step is a batch of shapes encoded (of latents), loss, gradients and
optimizer; images are in memory before. All take turns in one process, so that a noisy minute is everyone's. A sample is
18 steps of Euler without guidance and, of latents, decoding. Memory is the peak of a process of its own in three
steps, above its imports.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

WARM, ALONE = 2, 3  # steps that are left out; steps for a look at the memory
WAYS = {  # name -> words of train.py
    "pixels": ["experiment=shapes_ddpm", "model.net.patch_size=2", "model.net.attention=null"],
    "pixels, folded to 16x16": ["experiment=shapes_ddpm"],
    "latents": ["experiment=shapes_ldm", "model.net.attention=null"],
}
STAGE = ["experiment=shapes_vae_f4", "model.net.patch_size=4", "model.net.latent_channels=8"]  # which makes it f = 8


class Model:
    """A fresh model of one of the WAYS at a size, with a batch of its own set."""

    def __init__(self, way: str, size: int, args: argparse.Namespace) -> None:
        import torch
        from latent_cache import composed

        from atelier.runs import build

        batch, device = args.batch, args.device
        same = [f"data.image_size={size}", f"data.n_train_scenes={batch}", f"data.batch_size={batch}"]
        parts = {}
        if way == "latents":
            parts["first_stage"] = build.on_parts(composed([*STAGE, *same]), {}).part()
        cfg = composed([*WAYS[way], *same])
        self.model = build.on_parts(cfg, parts).to(device).train()
        read = build.data(cfg).split("train").read([*range(batch)], None)
        self.batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in read.items()}
        self.optimizer = self.model.optimizer(list(self.model.trained().values()))
        self.device, self.bf16 = device, args.bf16

    def step(self) -> None:
        """One training step."""
        self.model.training_step(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def sample(self) -> None:
        """A batch of samples."""
        from atelier.core.rng import ImageRngs
        from atelier.models.base import sampling_mode

        rngs = ImageRngs(0, 0, len(self.batch["image"]))
        with sampling_mode(self.model, {}):
            self.model.sample(self.model.condition(self.batch, ""), rngs, guidance=1.0)

    def seconds(self, what: str) -> float:
        """Of one step or one batch of samples."""
        import torch

        start = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            getattr(self, what)()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def gflop(model: Model, what: str, batch: int) -> float:
    """Operations of an image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        getattr(model, what)()
    return counter.get_total_flops() / 1e9 / batch


def memory(way: str, size: int) -> int:
    """MiB that a process of its own needs for training."""
    command = [sys.executable, *sys.argv, "--alone", way, "--sizes", str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(args: argparse.Namespace) -> None:
    """Print what `memory` reads."""
    import torch

    import atelier.models.ldm  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Model(args.alone, args.sizes[0], args)
    for _ in range(ALONE):
        model.seconds("step")
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(round(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--alone", choices=[*WAYS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args)
        return
    print("| | GFLOP a training image | images/s | of pixels | GFLOP a sample | samples/s | of pixels | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    peaks = {(way, size): memory(way, size) for size in args.sizes for way in WAYS}  # before torch takes memory here
    for size in args.sizes:
        models = {way: Model(way, size, args) for way in WAYS}
        taken = {(way, what): [] for what in ("step", "sample") for way in WAYS}
        for k in range(args.rounds + WARM):
            for (way, what), seconds in taken.items():
                if what == "step" or k >= WARM:
                    seconds.append(models[way].seconds(what))
        median = {key: statistics.median(seconds[-args.rounds :]) for key, seconds in taken.items()}
        for way, model in models.items():
            cells = [f"{size} px, {way}"]
            for what in ("step", "sample"):
                pairs = zip(taken["pixels", what][-args.rounds :], taken[way, what][-args.rounds :], strict=True)
                times = statistics.median(a / b for a, b in pairs)
                per_second = args.batch / median[way, what]
                cells += [f"{gflop(model, what, args.batch):.3g}", f"{per_second:.3g}", f"{times:.2f}x"]
            print(f"| {' | '.join([*cells, str(peaks[way, size])])} |", flush=True)


if __name__ == "__main__":
    main()
