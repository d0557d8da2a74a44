"""The training loop of train.py on StyleGAN2, with logging and EMA, beside a bare loop over the same nets.

    python benchmarks/stylegan2.py                # the page at 64 px, batch 16, 3 rounds of 6 steps each

Rounds alternate; a loop's figure is the median step of all its rounds, the first two steps of each left out. A step is
one of the discriminator and one of the generator, with style mixing; the lazy penalties are switched off in both loops.
Memory is the peak of the whole process, imports and data included.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from rounds import ROOT, WARM, compare, output, whole

PAGE = ["model=stylegan2", "model.r1_gamma=0", "model.path_weight=0", "data=shapes", "data.n_train_scenes=512"]
SHORT = ["metrics=none", "eval.n_samples=1", "callbacks.grids.n=1", "trainer=cpu", "trainer.precision=32-true"]


def bare(steps: int, batch: int, size: int) -> None:
    """The shortest loop that trains the same nets. Prints each step's seconds and the peak memory in MiB."""
    import torch
    import torch.nn.functional as F
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from torch import Tensor

    from atelier import runs
    from atelier.nets.stylegan2 import mixed

    runs.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*PAGE, f"data.image_size={size}", "run_dir=unused"])
    node = cfg.model
    torch.manual_seed(0)
    G, D, ours, theirs = (
        instantiate(node[name], _convert_="all")
        for name in ("generator", "discriminator", "generator_embedder", "discriminator_embedder")
    )
    parts = [(G, ours, node.generator_optimizer), (D, theirs, node.discriminator_optimizer)]
    optimizers = [
        instantiate(o, _convert_="all")([*net.parameters(), *embedder.parameters()]) for net, embedder, o in parts
    ]
    data = torch.rand(512, 3, size, size) * 2 - 1
    told = {"label": torch.randint(36, (512,)), "attributes": torch.randint(2, (512, 14)).float()}

    def fake(cond: dict[str, Tensor]) -> Tensor:
        z, known = torch.randn(2, batch, G.noise_dim), ours(cond, batch)
        styles = mixed(G.mapping(z[0], known), G.mapping(z[1], known), G.synthesis.n_styles, node.mixing)
        G.mapping.mean.lerp_(styles.detach()[:, 0].mean(0), 1 - node.mean_memory)
        return G.synthesis(styles, [torch.randn(batch, 1, n, n) for n in G.synthesis.noise_sizes])

    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        rows = torch.arange(step * batch, (step + 1) * batch) % len(data)
        x, cond = data[rows], {name: values[rows] for name, values in told.items()}
        with torch.no_grad():
            made = fake(cond)
        known = theirs(cond, batch)
        loss = F.softplus(-D(x, known)).mean() + F.softplus(D(made, known)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        made, known = fake(cond), theirs(cond, batch).detach()
        D.requires_grad_(False)
        loss = F.softplus(-D(made, known)).mean()
        D.requires_grad_(True)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare is not None:
        bare(args.bare, args.batch, args.size)
        return
    again = [__file__, "--bare", str(args.steps + WARM), "--batch", str(args.batch), "--size", str(args.size)]
    words = [*PAGE, *SHORT, f"data.image_size={args.size}"]
    loops = {
        "bare": lambda: json.loads(output(again)),
        "train.py": lambda: whole(words, args.steps + WARM, args.batch),
        "train.py channels_last=true": lambda: whole([*words, "channels_last=true"], args.steps + WARM, args.batch),
    }
    compare(loops, args.rounds, args.batch)


if __name__ == "__main__":
    main()
