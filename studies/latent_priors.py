"""Why a VAE's latent space generates and an AE's does not, and what priors fitted after training are worth.

    python studies/latent_priors.py --vae RUN --ae RUN --flow RUN --out docs/latent_priors.png

Prints shares of valid scenes among 1,000 decoded latents: of each autoencoder's own prior (for the AE, which has none,
a Gaussian with its latents' means and deviations), of a Gaussian and of a Gaussian mixture fitted to the codes of
10,000 training images, of a latent flow (a run of model=ldm on the VAE), and of points half way between the codes of
two test images. The picture has a row of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from atelier.core.rng import ImageRngs
from atelier.images.pictures import grid, save_png
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.shapes import judge_values, wilson
from atelier.runs import folders
from atelier.shapes.judge import judge

N, FITTED, COMPONENTS, COLUMNS = 1_000, 10_000, 64, 12


def codes(loaded: folders.LoadedRun, split: str, n: int) -> Tensor:
    """Posterior means of n images of a split, (n, ...)."""
    parts = [loaded.data.chosen(split, range(k, min(k + 250, n)))["image"] for k in range(0, n, 250)]
    return torch.cat([loaded.model.encode(x) for x in parts])


def mixture(z: Tensor, components: int, n: int) -> Tensor:
    """Draws of a Gaussian mixture with full covariances fitted to latents, (n, ...)."""
    from sklearn.mixture import GaussianMixture

    fitted = GaussianMixture(components, reg_covar=1e-4, max_iter=50, random_state=0).fit(z.flatten(1).numpy())
    drawn = torch.from_numpy(fitted.sample(n)[0]).float()
    return drawn[torch.randperm(n, generator=torch.Generator().manual_seed(0))].unflatten(1, z.shape[1:])


def half_way(z: Tensor) -> Tensor:
    return (z + z.roll(1, 0)) / 2


def decoded(loaded: folders.LoadedRun, z: Tensor) -> Tensor:
    return torch.cat([to_uint8(loaded.model.decode(part)) for part in z.split(250)])


def print_row(name: str, images: Tensor) -> None:
    verdict = judge(to_float(images))
    values = judge_values(verdict, {}, to_float(images))
    low, high = wilson(int(verdict.valid.sum()), len(images))
    share, coverage = values["judge/valid"], values["judge/coverage"]
    print(f"| {name} | {share:.3f} ({low:.3f} .. {high:.3f}) | {values['judge/loose']:.3f} | {coverage:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, help in (("vae", "a VAE"), ("ae", "an AE on the same data"), ("flow", "an LDM on the VAE")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"run folder of {help}")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    ae, vae, flow = (folders.load(folders.find(str(folder)), ema=True) for folder in (args.ae, args.vae, args.flow))
    rngs = ImageRngs(1, 0, N)
    print("| latents | valid | loosely valid | coverage |\n|---|---|---|---|")
    rows = []
    with torch.inference_mode():
        for name, loaded in (("AE", ae), ("VAE", vae)):
            z = codes(loaded, "train", FITTED)
            pictures = {
                "codes of test images": decoded(loaded, codes(loaded, "test", N)),
                "half way between two": decoded(loaded, half_way(codes(loaded, "test", N))),
                "prior" if name == "VAE" else "noise of the codes' moments": decoded(
                    loaded, loaded.model.sample_latents(rngs, {})
                ),
                "Gaussian fitted to codes": decoded(loaded, mixture(z, 1, N)),
                f"mixture of {COMPONENTS} fitted to codes": decoded(loaded, mixture(z, COMPONENTS, N)),
            }
            if name == "VAE":
                batch = flow.data.test_batch(0, N)
                drawn = [
                    to_uint8(flow.model.sample({k: v[s] for k, v in flow.model.condition(batch, "").items()}, rngs[s]))
                    for s in (slice(k, k + 250) for k in range(0, N, 250))
                ]
                pictures["latent flow fitted to codes"] = torch.cat(drawn)
            for what, images in pictures.items():
                print_row(f"{name}: {what}", images)
                rows.append(images[:COLUMNS])
    save_png(grid(torch.cat(rows), COLUMNS), args.out)


if __name__ == "__main__":
    main()
