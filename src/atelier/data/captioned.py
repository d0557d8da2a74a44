"""Folders of images with captions: `captioned`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.ranges import Name, PositiveFloat
from atelier.data.base import Role, Split
from atelier.data.captions import Captions, captions_under
from atelier.data.checking import fingerprint
from atelier.data.file_images import FileImages, Sourced
from atelier.data.finding import Item, printable, tell
from atelier.data.folders import SingleFiles, any_images
from atelier.data.pairs import SIGMA, THRESHOLD, with_edges

N_NAMED = 3  # files that a line names first
MOST_TRIED = 100  # batch sizes, to name one that a prior's weight divides


@dataclass(kw_only=True, eq=False)
class Captioned(SingleFiles):
    """A folder of images with captions, `text`; of a file with several captions one is drawn each time in training,
    and the first is taken at test.

    Where captions stand: data/captions.py. Images and splits are those of `ImageFolder`; the images without a caption
    are left out, and one line says how many.

    Prior preservation (Ruiz et al. 2023, DreamBooth): a few images of one thing are trained on together with images of
    its class, the prior, which the model that is trained further has made itself. Of each batch of G images the last
    G w / (1 + w) are of the prior, w = `prior_weight`, and both have an epoch order of their own. The loss of a batch,
    the mean over its images, is (mean over those of the thing + w * mean over those of the prior) / (1 + w). That is
    the paper's but for the factor 1 / (1 + w), which Adam does not see; the paper's w = 1 makes two halves. The prior
    is in no test split, and `limit` leaves all of it.

    Args:
        source: "edges", black lines on white where the image changes, as `Edges` draws them; "none", there is none.
        text: the one caption of all images, in place of those that stand beside them; None: those.
        prior: folder of images of the class, with captions, as sample.py writes it; None: there is none.
        prior_text: the one caption of all of them, in place of those; None: those.
        prior_weight: weight of their loss beside that of the others.
    """

    source: Literal["none", "edges"] = field(
        default="none", metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART}
    )
    text: Name | None = field(default=None, metadata={"role": Role.NOT_PIXELS | Role.NOT_PART})
    prior: Name | None = field(default=None, metadata={"role": Role.READING})
    prior_text: Name | None = field(default=None, metadata={"role": Role.NOT_PIXELS | Role.NOT_PART})
    prior_weight: PositiveFloat = field(default=1.0, metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior is None and self.prior_text is not None:
            raise UserError("data.prior_text", self.prior_text, "there is no prior", "data.prior=FOLDER of its images")
        if self.prior is not None and self._n_prior(self.batch_size) is None:
            problem = f"no whole number of its images is of the prior, of weight {self.prior_weight:g}"
            larger = range(self.batch_size + 1, self.batch_size + MOST_TRIED)
            fits = next((size for size in larger if self._n_prior(size) is not None), None)
            fix = "data.prior_weight=1" if fits is None else f"data.batch_size={fits}"
            raise UserError("data.batch_size", self.batch_size, problem, fix)

    @property
    def provides(self) -> frozenset[str]:
        return super().provides | {"text"} | ({"source"} if self.source == "edges" else set())

    def prepare_data(self) -> None:
        super().prepare_data()
        _ = self.class_images

    @cached_property
    def class_images(self) -> Captioned | None:
        """The set of the prior, checked."""
        if self.prior is None:
            return None
        own = {"text": self.prior_text, "prior": None, "prior_text": None, "holdout": 0.0, "limit": None}
        made = replace(self, root=self.prior, **own)
        try:
            _ = made.index
        except UserError as error:
            raise _of_prior(error) from error
        return made

    def n_read(self, split: Split) -> int:
        trains = split == "train" and self.class_images is not None  # else the prior need not be there
        return super().n_read(split) + (len(self.class_images.index["train"]) if trains else 0)

    def trained_on(self) -> Sequence[int]:
        parts = [images for images, _ in self.shares()]
        return parts[0] if len(parts) == 1 else [index for images in parts for index in images]

    def shares(self) -> list[tuple[Sequence[int], int]]:
        own, n = len(self.index["train"]), len(self.split("train"))
        of_prior = 0 if self.prior is None else self._n_prior(self.batch_size) or 0
        shares = [(self.limited(range(own)), self.batch_size - of_prior)]
        return shares + ([(range(own, n), of_prior)] if of_prior else [])

    def _n_prior(self, batch_size: int) -> int | None:
        """Images of the prior in a batch; None where there is no whole number of them, or of the others."""
        exact = batch_size * self.prior_weight / (1 + self.prior_weight)
        n = round(exact)
        return n if 0 < n < batch_size and abs(exact - n) < 1e-6 * batch_size else None

    def images(self, split: Split) -> FileImages | Sourced:
        images = super().images(split)
        if split == "train" and self.class_images is not None:
            images = images.followed_by(SingleFiles.images(self.class_images, "train"))
        drawn = partial(with_edges, sigma=SIGMA, threshold=THRESHOLD)
        return Sourced(images, drawn) if self.source == "edges" else images

    @cached_property
    def captions(self) -> Captions:
        """What is said of the images under the root."""
        if self.text is None:
            return captions_under(self.root)
        return Captions({item.name: [self.text] for items in self.found.values() for item in items}, set(), [])

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
            tell(self.root, f"{len(bare)} of {n} images have no caption and are left out, {_first(bare)}")
        if nameless:
            tell(self.root, f"captions of {len(nameless)} files that are not there, {_first(nameless)}")
        return {split: [item for item in items if item.name in texts] for split, items in self.found.items()}

    def told_of(self) -> set[str]:
        return self.captions.files | {item.name for items in self.found.values() for item in items}

    def told(self, items: list[Item]) -> dict[str, Tensor | list[list[str]]]:
        return {"text": [self.captions.texts[item.name] for item in items]}

    def files_fingerprint(self, split: Split) -> str:
        """The fingerprint of the files of a split: names, captions and contents."""
        return fingerprint([(item.name, self.captions.texts[item.name]) for item in self.index[split]], self.checked)


def _of_prior(error: UserError) -> UserError:
    """The same mistake, told of the prior's keys."""
    fix = re.sub(r"(, or )?data=.*$", "", error.fix)
    for own, its in (("data.root", "data.prior"), ("data.text", "data.prior_text")):
        fix = fix.replace(own, its)
    fix = fix or "data.prior=FOLDER of images with captions"
    return UserError(error.key.replace("data.root", "data.prior"), error.value, error.problem, fix)


def _first(names: list[str]) -> str:
    """The first few of some files, as a line tells them."""
    return f"first {', '.join(map(printable, names[:N_NAMED]))}"
