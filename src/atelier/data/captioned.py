"""Folders of images with captions: `captioned`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from torch import Tensor

from atelier.core.errors import UserError
from atelier.data.base import Role, Split
from atelier.data.captions import Captions, captions_under
from atelier.data.checking import fingerprint
from atelier.data.file_images import FileImages, Sourced
from atelier.data.finding import Item, printable
from atelier.data.folders import SingleFiles, any_images
from atelier.data.pairs import SIGMA, THRESHOLD, with_edges

N_NAMED = 3  # files that a line names first


@dataclass(kw_only=True, eq=False)
class Captioned(SingleFiles):
    """A folder of images with captions, `text`; of a file with several captions one is drawn each time in training,
    and the first is taken at test.

    Where captions stand: data/captions.py. Images and splits are those of `ImageFolder`; the images without a caption
    are left out, and one line says how many.

    Args:
        source: "edges", black lines on white where the image changes, as `Edges` draws them; "none", there is none.
    """

    source: Literal["none", "edges"] = field(
        default="none", metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART}
    )

    @property
    def provides(self) -> frozenset[str]:
        return super().provides | {"text"} | ({"source"} if self.source == "edges" else set())

    def images(self, split: Split) -> FileImages | Sourced:
        images = super().images(split)
        drawn = partial(with_edges, sigma=SIGMA, threshold=THRESHOLD)
        return Sourced(images, drawn) if self.source == "edges" else images

    @cached_property
    def captions(self) -> Captions:
        """What is said of the images under the root."""
        return captions_under(self.root)

    @cached_property
    def found(self) -> dict[Split, list[Item]]:
        """All images of both splits, those without a caption too."""
        return any_images(self.root)

    def layout(self) -> dict[Split, list[Item]]:
        names = [item.name for items in self.found.values() for item in items]  # which refuses a folder without images
        texts, nameless, n = self.captions.texts, self.captions.nameless, len(names)
        bare = [name for name in names if name not in texts]
        if len(bare) == n:
            problem = f"none of {n} images has a caption, the first is {printable(bare[0])}"
            said = f", the captions are of {printable(nameless[0])}" if nameless else ""
            raise UserError("data.root", printable(self.root), problem + said, "captions of files that are there")
        if bare:
            self.tell(f"{len(bare)} of {n} images have no caption and are left out, {_first(bare)}")
        if nameless:
            self.tell(f"captions of {len(nameless)} files that are not there, {_first(nameless)}")
        return {split: [item for item in items if item.name in texts] for split, items in self.found.items()}

    def told_of(self) -> set[str]:
        return self.captions.files | {item.name for items in self.found.values() for item in items}

    def told(self, items: list[Item]) -> dict[str, Tensor | list[list[str]]]:
        return {"text": [self.captions.texts[item.name] for item in items]}

    def files_fingerprint(self, split: Split) -> str:
        """The fingerprint of the files of a split: names, captions and contents."""
        return fingerprint([(item.name, self.captions.texts[item.name]) for item in self.index[split]], self.checked)


def _first(names: list[str]) -> str:
    """The first few of some files, as a line tells them."""
    return f"first {', '.join(map(printable, names[:N_NAMED]))}"
