"""The contract of every set: an endless, resumable stream of batches, and which n images stand for a split."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import Flag, auto
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from atelier.core import stopping
from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.names import SetNames
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.core.rng import generator
from atelier.images.pixels import looked_up, to_float

Split = Literal["train", "test"]
ConditionName = Literal["label", "attributes", "text"]
CHOICE_SEED = 0  # of `order`: the same for every run, so that what is kept of real images serves all of them
IN_ORDER, RANDOM, STRATIFIED = "the first", f"random, seed {CHOICE_SEED}", f"stratified by label, seed {CHOICE_SEED}"


HASHED_AS = {  # names of before, so that a run of before finds its set
    "image_channels": "channels",
    "scale_factor": "factor",
    "attribute_transfer": "recast",
}


class Role(Flag):
    """How far a field of a set matters; each field says so once, in its metadata, where it is declared."""

    NOT_PIXELS = auto()  # changes neither the images nor their number
    MAY_CHANGE = auto()  # may differ when a run resumes
    OWN = auto()  # a part keeps its own recipe's value unless one was typed
    NOT_PART = auto()  # ignored when a finished run is sought as a part
    DRAWN = auto()  # where it is on, training draws more of an image than whether it is mirrored
    READING = NOT_PIXELS | MAY_CHANGE | NOT_PART


class Images(Protocol):
    """One split of a set."""

    fingerprint: str  # what tells this set from another of the same class and options; "" where nothing does
    labels: Tensor | None  # (N,) int64, known without a look at the images; None where there are none

    def __len__(self) -> int: ...

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        """A whole batch; rngs[i] augments image i, None means no augmentation."""
        ...


@runtime_checkable
class OnlyMirrored(Protocol):
    """A split of which training draws no more of an image than whether it is mirrored."""

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        """All of a batch but pixels and masks, and which images are mirrored, (B,) bool, as `read` draws them."""
        ...


@runtime_checkable
class Levelled(Protocol):
    """A split that can leave its images in grey levels, a quarter of what crosses to a device."""

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        """What `read` gives, but images are uint8."""
        ...


def with_floats(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same with images in [-1, 1] in place of their grey levels, which alone are uint8 in a batch."""
    levels = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}
    return batch | {name: change(value) for name, value in levels.items()}


class MemoryImages:
    """Images kept as uint8 in memory.

    Args:
        images: (N, C, H, W) uint8.
        fields: further Batch fields, tensors (N, ...) or lists of N strings.
        flip: mirroring of half of the images, when generators are given.
    """

    def __init__(self, images: Tensor, fields: dict[str, Tensor | list[str]], flip: bool) -> None:
        self.images, self.fields, self.flip = images, fields, flip
        self.labels = fields.get("label")

    @cached_property
    def fingerprint(self) -> str:
        """Of all pixels and fields."""
        content = hashlib.sha256(self.images.contiguous().numpy())
        for name, values in sorted(self.fields.items()):
            content.update(name.encode())
            content.update(values.contiguous().numpy() if isinstance(values, Tensor) else json.dumps(values).encode())
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        where = torch.tensor(indices)
        batch: Batch = {"index": where}
        for name, values in self.fields.items():
            batch[name] = values[where] if isinstance(values, Tensor) else [values[i] for i in indices]
        return batch, turned(self.flip, indices, rngs)

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, chosen = self.beside(indices, rngs)
        batch["image"] = mirrored(self.images[batch["index"]], chosen)
        return batch

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return with_floats(self.levels(indices, rngs), to_float)


def tossed(rngs: list[torch.Generator]) -> Tensor:
    """A fair coin for each image, (B,) bool."""
    return torch.tensor([bool(torch.rand((), generator=rng) < 0.5) for rng in rngs])


def turned(flip: bool, indices: list[int], rngs: list[torch.Generator] | None) -> Tensor:
    """Which images of a batch are mirrored, (B,) bool: half of them in training, where the set flips."""
    return tossed(rngs) if flip and rngs is not None else torch.zeros(len(indices), dtype=torch.bool)


def mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """Those of the images (B, C, H, W) that are `chosen` (B,) turned left to right."""
    if not chosen.any():
        return images
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def with_role(data: DataModule | type[DataModule], role: Role) -> set[str]:
    """Names of the fields of a set that have a role."""
    return {f.name for f in fields(data) if role in f.metadata.get("role", Role(0))}


def random_order(n: int) -> list[int]:
    """0 .. n - 1, shuffled, the same every time."""
    return torch.randperm(n, generator=generator(CHOICE_SEED)).tolist()


def stratified(labels: Tensor) -> list[int]:
    """A random order of images whose first n have each label, for any n, about as often as all of them (N,) have it.

    It begins with one image of each label. Labels that are equally frequent are dealt in turn, each round in another
    order; else the j-th of m images with a label comes where a share of j / m of all has come.
    """
    shuffled = torch.tensor(random_order(len(labels)))
    given, place = labels[shuffled], torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        having = given == label
        place[having] = torch.arange(int(having.sum()), dtype=torch.float64) / having.sum()
    return shuffled[place.argsort(stable=True)].tolist()


class Stream(Sampler):
    """Positions kG .. (k+1)G of the epoch permutations laid end to end; a rank takes its slice of each batch.

    Where a batch has several shares, each is such a stream of its own, of its own images, and a batch has one share
    behind the other. Never ends, has no length, and asks for its position whenever it is iterated, so that a resumed or
    restarted loop goes on where images_seen says.

    Args:
        shares: number of images, and how many of them are in each batch over all ranks.
        seed: number that the order of each epoch comes from.
        rank, ranks: number of this process, and how many share a batch.
        position: images that training has seen of all shares.
    """

    def __init__(
        self, shares: list[tuple[int, int]], seed: int, rank: int, ranks: int, position: Callable[[], int]
    ) -> None:
        self.shares, self.seed, self.rank, self.ranks, self.position = shares, seed, rank, ranks, position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, before, streams = self.position(), 0, []
        whole = sum(each for _, each in self.shares)
        for k, (n, each) in enumerate(self.shares):
            seeds = (self.seed, 2, k) if k else (self.seed,)
            streams.append(self._dealt(before, n, each, seeds, start * each // whole))
            before += n
        for parts in zip(*streams, strict=True):
            yield [place for part in parts for place in part]

    def _dealt(
        self, before: int, n: int, each: int, seeds: tuple[int, ...], start: int
    ) -> Iterator[list[tuple[int, int]]]:
        """The (epoch, place) pairs of a share, whose n places come behind `before` others; `each` in a batch."""
        local = range(self.rank * (each // self.ranks), (self.rank + 1) * (each // self.ranks))
        epoch, order = -1, []
        while True:
            places = []
            for k in local:
                at, offset = divmod(start + k, n)
                if at != epoch:
                    epoch, order = at, torch.randperm(n, generator=generator(*seeds, at)).tolist()
                places.append((at, before + order[offset]))
            yield places
            start += each


class _Places(Dataset):
    """(epoch, place) pairs to a whole batch; the augmentation of an image depends on (seed, epoch, index) alone.

    Args:
        chosen: the index of the image at each place.
        seed: of the augmentation.
        levels: whether images stay uint8, where the set can leave them so.
    """

    def __init__(self, images: Images, chosen: Sequence[int], seed: int, levels: bool = False) -> None:
        self.chosen, self.seed = chosen, seed
        self.read = images.levels if levels and isinstance(images, Levelled) else images.read

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch:
        places = [(epoch, self.chosen[place]) for epoch, place in places]
        rngs = [generator(self.seed, 1, epoch, index) for epoch, index in places]
        return self.read([index for _, index in places], rngs)


class _Trigger(Dataset):
    """One empty item a rank: Lightning's validation loop runs once, and the evaluation callback does the work."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        return 0


def _as_is(batch: Batch) -> Batch:
    return batch


@dataclass(kw_only=True, eq=False)
class DataModule(LightningDataModule, ABC):
    """A set of images.

    Args:
        image_size: height and width in pixels.
        image_channels: 1 grey, 3 RGB.
        batch_size: images per optimizer step over all ranks.
        seed: seed of the order and of the augmentation.
        limit: number of training images that are used, the first in `order` (8 shows whether a model can overfit).
        num_workers: loader processes; 0 reads in the training process.
        flip: mirroring of half of the training images.
        n_classes: labels are 0 .. n_classes - 1; 0 where there are none.
        n_attributes: width of `attributes`; 0 where there are none.
        conditions: names of what a conditional model gets of each image.
        label_factors: numbers of each part where a label numbers combinations; [] where it does not.
        budget: images that a small net wants to be shown; the default of `budget.images`.
    """

    image_size: PositiveInt
    image_channels: Literal[1, 3]
    batch_size: PositiveInt = field(metadata={"role": Role.NOT_PIXELS | Role.OWN})
    seed: NonNegInt = field(metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART})
    limit: PositiveInt | None = field(metadata={"role": Role.NOT_PIXELS})
    num_workers: NonNegInt = field(metadata={"role": Role.READING | Role.OWN})
    flip: bool = field(metadata={"role": Role.NOT_PIXELS | Role.OWN})
    n_classes: NonNegInt
    n_attributes: NonNegInt
    conditions: list[ConditionName] = field(metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART})
    budget: PositiveInt = field(default=48_000, metadata={"role": Role.READING | Role.OWN})
    label_factors: list[PositiveInt] = field(
        default_factory=list, metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART}
    )

    provides: ClassVar[frozenset[str]] = frozenset()
    judged: ClassVar[bool] = False  # whether the analytic judge knows this world
    shuffled: ClassVar[bool] = False  # whether the images lie in random order already, which then is kept

    def __post_init__(self) -> None:
        super().__init__()
        self.position: Callable[[], int] = lambda: 0
        self.latents: Callable[[Trainer], Images] | None = None  # gives what training reads in place of its images
        self.beforehand: list[Callable[[Trainer], None]] = []  # what all ranks do together before training
        self._kept: Images | None = None
        self._splits: dict[str, Images] = {}
        self._orders: dict[str, list[int]] = {}

    @abstractmethod
    def images(self, split: Split) -> Images:
        """The images of a split, opened; called once a split."""

    @property
    def label_names(self) -> list[str]:
        """What each label is called; [] where labels are numbers alone."""
        return []

    @property
    def attribute_names(self) -> list[str]:
        """What each of `attributes` is called; [] where there are none."""
        return []

    @property
    def exclusive_attributes(self) -> list[list[str]]:
        """Groups of attributes of which an image has one at most."""
        return []

    @cached_property
    def names(self) -> SetNames:
        """All of these; of a run that is loaded as they were when it began."""
        return SetNames(self.label_names, self.attribute_names, self.exclusive_attributes)

    def split(self, split: Split) -> Images:
        """The images of a split; opened once and kept. Raises UserError where there are none."""
        if split not in self._splits:
            images = self.images(split)
            if len(images) == 0:
                problem = f"it has no {'training' if split == 'train' else 'test'} images"
                raise UserError("data", type(self).__name__, problem, "another data.root, or data=shapes")
            self._splits[split] = images
        return self._splits[split]

    def counted(self) -> dict[str, int]:
        """Split -> its images, known without decoding files. Raises UserError where these are not there."""
        return {split: len(self.split(split)) for split in ("train", "test")}

    def order(self, split: Split) -> list[int]:
        """Every index of a split, so that the first n stand for all of it: whoever takes n images takes these."""
        if split not in self._orders:
            images = self.split(split)
            if self.shuffled:
                self._orders[split] = list(range(len(images)))
            else:
                self._orders[split] = random_order(len(images)) if images.labels is None else stratified(images.labels)
        return self._orders[split]

    def choice(self, split: Split) -> str:
        """What `order` is, as a protocol tells it."""
        if self.shuffled:
            return IN_ORDER
        return RANDOM if self.split(split).labels is None else STRATIFIED

    def chosen(self, split: Split, numbers: Iterable[int]) -> Batch:
        """The images with these numbers in `order`, which begins anew at its end; without augmentation."""
        order = self.order(split)
        return self.split(split).read([order[k % len(order)] for k in numbers], None)

    def test_batch(self, first: int, n: int) -> Batch:
        """Of the test split, the images first .. first + n - 1 that are `chosen`."""
        return self.chosen("test", range(first, first + n))

    @property
    def n_train(self) -> int:
        return len(self.trained_on())

    def count(self, split: Split, field: str) -> int:
        """How many different images of a Batch field there are."""
        return self.n_train if split == "train" else len(self.split(split))

    def fingerprint(self, split: Split) -> str:
        """Changes when the pixels or their number would."""
        names = {f.name for f in fields(self)} - with_role(self, Role.NOT_PIXELS)
        values = {name: getattr(self, name) for name in names}
        content = {HASHED_AS.get(name, name): HASHED_AS.get(str(value), value) for name, value in values.items()}
        images = self.split(split)
        content |= {"set": type(self).__name__, "split": split, "n": len(images), "more": images.fingerprint}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def setup(self, stage: str) -> None:
        ranks = self.trainer.world_size
        if self.batch_size % ranks:
            fix = f"data.batch_size={-(-self.batch_size // ranks) * ranks}"
            raise UserError("data.batch_size", self.batch_size, f"it does not divide by {ranks} ranks", fix)
        for _, each in self.shares():
            if each % ranks:
                problem = f"its share of {each} images does not divide by {ranks} ranks"
                fix = f"data.batch_size={self.batch_size * ranks}"
                raise UserError("data.batch_size", self.batch_size, problem, fix)
        for split in ("train", "test"):  # a split without images is refused before training
            self.split(split)
        if self.latents is not None:
            self._kept = self.latents(self.trainer)
        for work in self.beforehand:
            work(self.trainer)

    def train_dataloader(self) -> DataLoader:
        trainer, crosses = self.trainer, self.crosses
        stream = Stream(
            [(len(images), each) for images, each in self.shares()],
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            lambda: self.position(),
        )
        return DataLoader(
            _Places(self.split("train") if self._kept is None else self._kept, self.trained_on(), self.seed, crosses),
            batch_sampler=stream,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            generator=torch.Generator(),
            pin_memory=crosses,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=stopping.follow_parent,
        )

    @property
    def crosses(self) -> bool:
        """Whether batches are copied to a device with memory of its own."""
        return self.trainer.strategy.root_device.type == "cuda"

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Grey levels become numbers where they are needed."""
        return with_floats(batch, looked_up) if isinstance(batch, dict) else batch

    def trained_on(self) -> Sequence[int]:
        """The indices of the training images; all of them in their own order, since the stream draws another."""
        return self.limited(range(len(self.split("train"))))

    def limited(self, images: range) -> Sequence[int]:
        """Of training images those that are used: all, or the first `limit` of them in `order`."""
        if self.limit is None:
            return images
        return [index for index in self.order("train") if index in images][: self.limit]

    def shares(self) -> list[tuple[Sequence[int], int]]:
        """What a batch is made of: training images, and how many of these are in each batch; together `trained_on`."""
        return [(self.trained_on(), self.batch_size)]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Trigger())
