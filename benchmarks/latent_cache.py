"""Training steps of a latent diffusion model with its latents read from a cache, and with images encoded, in turns.

    python benchmarks/latent_cache.py                        # autoencoder_kl, f = 8, width 32, 64 px, batch 32
    python benchmarks/latent_cache.py --stage vae --size 32  # any page whose net is a first stage
    python benchmarks/latent_cache.py model.net.width=32     # KEY=VALUE of train.py

A step is a batch of shapes read, loss, gradients and optimizer; the same net takes both in turns, so that a noisy
minute is both's. Images are in memory before. The ratio is that of the work: operations of both are counted too. Then
what latents would lose if they were kept in float16: the rms error of the mean, and of a draw of the same noise, in
deviations of the latents. The first stage has random weights; `--first DIR` takes a finished run's, of its own size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atelier.core.batch import Batch
from atelier.core.rng import generator
from atelier.data.base import DataModule, Images
from atelier.data.latent_cache import KeptLatents, LatentCache
from atelier.models.ldm import LDM

WARM = 2  # steps of each that are left out
N = 256  # images
F8 = [
    "model.net.multipliers=[1,2,4,4]",
    "model.net.latent_channels=4",
    "model.net.width=32",
]  # of conf/experiment/shapes_kl_f8


def composed(words: list[str]) -> DictConfig:
    from atelier.runs import build, folders

    folders.register()
    return build.composed(words)


def built(args: argparse.Namespace) -> tuple[LDM, DataModule]:
    """A fresh model on a first stage, random or that of a finished run, and its set."""
    from atelier.runs import build, folders

    size = args.size
    if args.first:
        run = folders.load(Path(args.first), ema=True)
        first, size = run.model.part(), run.data.image_size
    else:
        stage = [f"model={args.stage}", f"data.image_size={size}", *(F8 if args.stage == "autoencoder_kl" else [])]
        stage += [] if args.width is None else [f"model.net.width={args.width}"]
        first = build.on_parts(composed(stage), {}).part()
    words = ["model=ldm", f"data.image_size={size}", f"data.n_train_scenes={N}", "data.flip=true", *args.words]
    cfg = composed(words)
    return build.on_parts(cfg, {"first_stage": first}), build.data(cfg)


def batches(images: Images, batch: int) -> Iterator[Callable[[], Batch]]:
    """What reads one batch after the other, as training does."""
    epoch = 0
    while True:
        order = torch.randperm(N, generator=generator(epoch)).tolist()
        for first in range(0, N - batch + 1, batch):
            chosen = order[first : first + batch]
            yield lambda chosen=chosen, epoch=epoch: images.read(chosen, [generator(epoch, k) for k in chosen])
        epoch += 1


def step(model: LDM, optimizer: torch.optim.Optimizer, read: Callable[[], Batch], device: torch.device) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in read().items()}
    model.training_step(batch).backward()
    torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept(model: LDM, data: DataModule, folder: Path, device: torch.device) -> KeptLatents:
    """The training split by its latents."""
    channels, *sides = model.first_stage.latent_shape
    cache = LatentCache(folder, {}, data.trained_on(), (2 * channels, *sides), flip=True)
    cache.begin()
    start = time.perf_counter()
    cache.fill(data.split("train"), lambda x: model.moments(x.to(device)), 32)
    print(f"made in {time.perf_counter() - start:.1f} s: {cache.describe()}")
    cache.finish()
    return KeptLatents(data.split("train"), cache)


def float16(split: KeptLatents) -> None:
    """What half the disk would cost."""
    moments = split.cache.read([*range(N)], torch.zeros(N, dtype=torch.bool))
    noise = torch.randn_like(moments[:, ::2])
    whole, half = ((m.chunk(2, 1)) for m in (moments, moments.half().float()))
    drawn = [mean + (logvar / 2).exp() * noise for mean, logvar in (whole, half)]
    for name, a, b in (("mean", whole[0], half[0]), ("draw", *drawn)):
        print(f"float16, {name}: rms error {float((a - b).square().mean().sqrt() / a.std()):.2e} of the deviation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="autoencoder_kl", help="page of conf/model")
    parser.add_argument("--width", type=int, help="of the first stage")
    parser.add_argument("--first", help="finished run to take it from")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of train.py, as model.net.width=32")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, data = built(args)
    model.to(device).train()
    optimizer = model.optimizer(list(model.trained().values()))
    with tempfile.TemporaryDirectory() as folder:
        cached = kept(model, data, Path(folder) / "cache", device)
        ways = {"encoded": batches(data.split("train"), args.batch), "from the cache": batches(cached, args.batch)}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.steps + WARM):
            for name, way in ways.items():
                taken[name].append(step(model, optimizer, next(way), device))
        for name, seconds in taken.items():
            with FlopCounterMode(display=False) as counter:
                step(model, optimizer, next(ways[name]), device)
            gflop = counter.get_total_flops() / 1e9 / args.batch
            print(f"{name}: {args.batch / statistics.median(seconds[WARM:]):.1f} images/s, {gflop:.3f} GFLOP an image")
        ratios = [a / b for a, b in zip(*(seconds[WARM:] for seconds in taken.values()), strict=True)]
        around = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        print(f"{statistics.median(ratios):.2f}x ({around}) over {args.steps} pairs of steps")
        float16(cached)


if __name__ == "__main__":
    main()
