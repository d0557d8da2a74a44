"""The training loop of train.py on StyleGAN2, with logging and EMA, beside a bare loop over the same nets.

    python benchmarks/stylegan2.py                       # the page at 64 px, batch 16, 120 steps of each in turns
    python benchmarks/stylegan2.py channels_last=true    # both loops in that memory format

A step is one of the discriminator and one of the generator, with style mixing; the lazy penalties are off in both.
"""

from __future__ import annotations

import beside
from omegaconf import DictConfig

WORDS = ["model=stylegan2", "model.r1_gamma=0", "model.path_weight=0", "data=shapes", "data.image_size=64"]
WORDS += ["data.n_train_scenes=512", "metrics=none", "eval.n_samples=1", "callbacks.grids.n=1"]
WORDS += ["trainer=cpu", "trainer.precision=32-true"]


def make(cfg: DictConfig) -> beside.Step:
    """The shortest step that trains the same nets."""
    import torch
    import torch.nn.functional as F
    from hydra.utils import instantiate
    from torch import Tensor

    from atelier.nets.stylegan import mixed

    node, size, batch = cfg.model, cfg.data.image_size, cfg.data.batch_size
    form = torch.channels_last if cfg.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    G, D, ours, theirs = (
        instantiate(node[name], _convert_="all").to(memory_format=form)
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
        styles = mixed(G.mapping(z[0], known), G.mapping(z[1], known), G.synthesis.n_styles, node.style_mixing_prob)
        G.mapping.mean.lerp_(styles.detach()[:, 0].mean(0), 1 - node.style_ema_decay)
        return G.synthesis(styles, [torch.randn(batch, 1, n, n) for n in G.synthesis.noise_sizes])

    def step(i: int) -> None:
        rows = torch.arange(i * batch, (i + 1) * batch) % len(data)
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

    return step


if __name__ == "__main__":
    beside.main(__doc__.splitlines()[0], WORDS, make, batch=16, steps=120)
