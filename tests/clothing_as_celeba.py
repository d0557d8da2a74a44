"""Photographs in class folders laid out as CelebA, attributes made from their classes, to try its recipes on.

python -m tests.clothing_as_celeba ../shared/data/clothing128 FOLDER && python train.py data=celeba data.root=FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

SIZE = (178, 218)
SPLITS = {"train": 0, "validation": 1, "test": 2}


def lay_out(source: Path, target: Path) -> list[str]:
    """Write <target>/celeba/ with the photographs and the two lists; gives the attributes."""
    found = [(path, part) for split, part in SPLITS.items() for path in sorted((source / split).glob("*/*.jpg"))]
    classes = sorted({path.parent.name for path, _ in found})
    folder = target / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    rows, parts = [], []
    for number, (path, part) in enumerate(found, 1):
        name = f"{number:06d}.jpg"
        with Image.open(path) as image:
            image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(folder / name, quality=90)
        rows.append(" ".join([name, *("1" if path.parent.name == one else "-1" for one in classes)]))
        parts.append(f"{name} {part}")
    (target / "celeba" / "list_attr_celeba.txt").write_text(
        "\n".join([str(len(rows)), " ".join(classes), *rows]) + "\n"
    )
    (target / "celeba" / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return classes


if __name__ == "__main__":
    print("attributes:", *lay_out(Path(sys.argv[1]), Path(sys.argv[2])))
