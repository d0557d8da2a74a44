"""PSNR and SSIM of whole images, each of its own size, as papers on super-resolution tell them.

    python studies/whole_images.py FOLDER --run RUN

FOLDER is any that data=superres reads: Set5, Set14, BSD100, Urban100 and DIV2K as they are published (its validation
part), or images. Sources are files where there are any, else MATLAB's bicubic reduction of each image, cut to a
multiple of the factor first. Prints a line for each image and the means, of bicubic enlargement and of the net: of
RGB and of luma, without a border of as many pixels as the factor, SSIM over windows inside of the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from atelier.data.reading import decode, pixels
from atelier.data.superres import SuperRes
from atelier.evaluation.paired import PAIR, distances
from atelier.images.bicubic import enlarged, reduced
from atelier.images.pixels import to_float, to_uint8
from atelier.requests.request import Request
from atelier.runs import build, folders

KINDS = ("psnr", "psnr_y", "ssim", "ssim_y")


def images_of(folder: str, scale_factor: int, channels: int) -> SuperRes:
    words = [
        "data=superres",
        f"data.root='{folder}'",
        f"data.scale_factor={scale_factor}",
        "data.holdout=0",
        f"data.image_channels={channels}",
        f"data.image_size={scale_factor}",
    ]
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        return build.data(compose("train", words))


def pairs(data: SuperRes) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, source and image, (1, C, h, w) and (1, C, factor h, factor w) uint8, of each test image."""
    _ = data.sides  # refuses pairs that do not fit
    for item in data.index["test"]:
        files = [pixels(data.reader(decode)(Path(data.root, name)))[None] for name in item.names]
        image = files[0]
        height, width = (side // data.scale_factor * data.scale_factor for side in image.shape[2:])
        image = image[:, :, :height, :width]
        source = files[1] if item.partner else to_uint8(reduced(to_float(image), data.scale_factor))
        yield item.name, source, image


def measured(made: Tensor, image: Tensor, scale_factor: int) -> list[float]:
    told = distances("", made, image, scale_factor)
    return [told[f"{PAIR}{kind}"].item() for kind in KINDS]


def row(name: str, values: list[float]) -> str:
    told = [f"{value:.2f} dB" if "psnr" in kind else f"{value:.4f}" for kind, value in zip(KINDS, values, strict=True)]
    return f"| {name} | {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--run", help="of srresnet, srgan, rrdbnet or esrgan; without: bicubic alone")
    parser.add_argument("--scale_factor", type=int, choices=(2, 3, 4), default=4, help="of bicubic; a run has its own")
    asked = parser.parse_args()
    run = folders.load(folders.find(asked.run), ema=True) if asked.run else None
    factor = run.model.scale_factor if run else asked.scale_factor
    request = Request(run.model, run.data) if run else None
    data = images_of(asked.folder, factor, run.data.image_channels if run else 3)
    found: dict[str, list[list[float]]] = {}
    print("| image | PSNR | PSNR of luma | SSIM | SSIM of luma |\n| --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        for k, (name, source, image) in enumerate(pairs(data)):
            made = {"bicubic": to_uint8(enlarged(to_float(source), factor))}
            if request is not None:
                made[type(run.model).__name__] = to_uint8(request.translated(to_float(source), k))
            for way, result in made.items():
                found.setdefault(way, []).append(measured(result, image, factor))
                print(row(f"{name}, {way}", found[way][-1]), flush=True)
    for way, rows in found.items():
        print(row(f"mean of {len(rows)}, {way}", torch.tensor(rows).mean(0).tolist()))


if __name__ == "__main__":
    main()
