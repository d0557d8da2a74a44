"""The shapes world as a set: made on the spot, nothing to download. What a scene is: `atelier.shapes.world`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import MinLen
from torch import Tensor

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.data.base import DataModule, Role, Split, mirrored, turned, with_floats
from atelier.images.pixels import to_float, to_uint8
from atelier.shapes import world

Task = Literal["image", "label_map", "fill", "attribute_transfer", "inpaint", "low_resolution", "edit"]
Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]
EXTRA: dict[str, frozenset[str]] = {
    "image": frozenset(),
    "label_map": frozenset({"source"}),
    "fill": frozenset({"image_a", "image_b"}),
    "attribute_transfer": frozenset({"target"}),
    "inpaint": frozenset({"mask", "mask_kind"}),
    "low_resolution": frozenset({"source"}),
    "edit": frozenset({"source", "instruction"}),
}
WORLD_SEED = 0  # scene i is the same in every run; `seed` is of the order alone
FACTOR = 4  # of the low resolution
KEPT_BYTES = 1 << 31  # a split that would be larger than this is drawn anew whenever it is read


@dataclass(kw_only=True, eq=False)
class Shapes(DataModule):
    """Scenes of the shapes world, with label, attributes and caption.

    Args:
        n_train_scenes: scenes of the training split, the first ones.
        n_test_scenes: number of scenes of the test split.
        test_split: "unseen" tests on the combinations of attributes that no training scene has.
        task: field that comes beside the image. "label_map": `source`, flat planes that determine the image. "fill":
            `image_a` solid and `image_b` striped, unpaired, and of test images what each is in the other fill.
            "attribute_transfer": `target`, the attributes with one of colour, fill and ground changed, and of test
            images the `answer`. "inpaint": `mask`, the object's box or strokes
            that cover 30 to 70 % of it, and `mask_kind`, which of the two (`world.MASK_KINDS`).
            "low_resolution": `source`, a quarter as wide. "edit": `instruction` and `source`, the scene before it.
        shapes: shapes that the scenes of both splits show; None: all six.

    Raises:
        UserError: some shapes alone are asked of a task that draws further scenes.
    """

    judged: ClassVar[bool] = True
    shuffled: ClassVar[bool] = True  # each scene is drawn by itself
    tasks: ClassVar[dict[str, frozenset[str]]] = EXTRA

    image_channels: Literal[3]
    n_classes: Literal[36]
    n_attributes: Literal[14]
    n_train_scenes: PositiveInt = 50_000
    n_test_scenes: PositiveInt = field(default=10_000, metadata={"role": Role.NOT_PART})
    test_split: Literal["test", "unseen"] = field(default="test", metadata={"role": Role.NOT_PART})
    task: Task = "image"
    shapes: Annotated[list[Shape], MinLen(1)] | None = field(
        default=None, metadata={"role": Role.NOT_PIXELS | Role.OWN | Role.NOT_PART}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapes is not None and self.task in ("fill", "edit"):
            problem = f"task={self.task} draws further scenes, of all shapes"
            raise UserError("data.shapes", self.shapes, problem, "data.shapes=null")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"label", "attributes", "text"}) | EXTRA[self.task]

    @property
    def label_names(self) -> list[str]:
        return [f"{colour} {shape}" for shape in world.SHAPES for colour in world.COLOURS]

    @property
    def attribute_names(self) -> list[str]:
        return [name for group in self.exclusive_attributes for name in group]

    @property
    def exclusive_attributes(self) -> list[list[str]]:
        return [list(group) for group in (world.COLOURS, world.SIZES, world.FILLS, world.GROUNDS)]

    def images(self, split: Split) -> SceneImages:
        if split == "train":
            return SceneImages("train", self.n_train_scenes, self.task, self.image_size, self.flip, self.shapes)
        n, split = self.n_test_scenes, self.test_split
        return SceneImages(split, n, self.task, self.image_size, self.flip, self.shapes)


def _showing(shapes: list[Shape], n: int, split: world.Split) -> Tensor:
    """Numbers of the first n scenes of a split that show one of these shapes, (n,) int64."""
    wanted, numbers = torch.tensor([world.SHAPES.index(shape) for shape in shapes]), torch.arange(2 * n)
    while True:
        found = numbers[torch.isin(world.scenes(WORLD_SEED, numbers, split).shape, wanted)]
        if len(found) >= n:
            return found[:n]
        numbers = torch.arange(2 * len(numbers))


class SceneImages:
    """Scenes of one split, drawn whole batches at once when first read, then kept as uint8.

    Args:
        split: split of the world.
        n: scenes.
        task: the task of `Shapes`.
        image_size: side in pixels.
        flip: mirroring of half of the scenes, with all that belongs to them, when generators are given.
        shapes: shapes that they show; None: all.
    """

    def __init__(
        self, split: world.Split, n: int, task: Task, image_size: int, flip: bool, shapes: list[Shape] | None
    ) -> None:
        self.split, self.n, self.task, self.image_size, self.flip = split, n, task, image_size, flip
        self.fingerprint = "" if shapes is None else ",".join(sorted(shapes))
        self.numbers = torch.arange(n) if shapes is None else _showing(shapes, n, split)  # of the scenes, in the split
        if task == "edit":
            self.before, self.instructions, self.scenes = world.edits(WORLD_SEED, self.numbers, split)
        else:
            self.scenes = world.scenes(WORLD_SEED, self.numbers, split)
        self.labels = world.label(self.scenes)
        if task == "attribute_transfer":
            self.attribute_transfer = world.attribute_transfer(WORLD_SEED, self.numbers, split)
        self.drawn = torch.zeros(n, dtype=torch.bool)
        self.kept: dict[str, Tensor] = {}  # name to (n, C, H, W) uint8, of which the rows `drawn` are filled

    def __len__(self) -> int:
        return self.n

    def beside(self, indices: list[int], rngs: list[torch.Generator] | None) -> tuple[Batch, Tensor]:
        return self._told(torch.tensor(indices)), turned(self.flip, indices, rngs)

    def read(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        return with_floats(self.levels(indices, rngs), to_float)

    def levels(self, indices: list[int], rngs: list[torch.Generator] | None) -> Batch:
        batch, chosen = self.beside(indices, rngs)
        for name, p in self._pixels(batch["index"]).items():
            p = mirrored(p, chosen)
            batch[name] = p.float() / 255 if name == "mask" else p
        return batch

    def _told(self, where: Tensor) -> Batch:
        """All that is not pixels."""
        scenes = self.scenes[where]
        batch: Batch = {"index": where, "text": world.captions(scenes)}
        batch["label"], batch["attributes"] = self.labels[where], world.attributes(scenes)
        if self.task == "attribute_transfer":
            batch["target"] = world.attributes(self.attribute_transfer[where])
        if self.task == "inpaint":
            batch["mask_kind"] = world.mask_kinds(WORLD_SEED, self.numbers[where], self.split)
        if self.task == "edit":
            batch["instruction"] = [self.instructions[i] for i in where.tolist()]
        return batch

    def _pixels(self, where: Tensor) -> dict[str, Tensor]:
        """Name to (B, C, H, W) uint8; drawn where they have not been."""
        new = where[~self.drawn[where]].unique()
        if len(new):
            drawn = {name: to_uint8(picture) for name, picture in self._draw(new).items()}
            if self.n * sum(p[0].numel() for p in drawn.values()) > KEPT_BYTES:
                again = torch.searchsorted(new, where)
                return {name: p[again] for name, p in drawn.items()}
            for name, p in drawn.items():
                self.kept.setdefault(name, p.new_empty(self.n, *p.shape[1:]))[new] = p
            self.drawn[new] = True
        return {name: p[where] for name, p in self.kept.items()}

    def _draw(self, where: Tensor) -> dict[str, Tensor]:
        """Name to (B, C, H, W) in [-1, 1]."""
        scenes, numbers, size = self.scenes[where], self.numbers[where], self.image_size
        image = world.render(scenes, size)
        match self.task:
            case "label_map":
                return {"image": image, "source": world.label_map(scenes, size)}
            case "fill":
                solid, striped = (world.scenes(WORLD_SEED, numbers, self.split, fill) for fill in world.FILLS)
                drawn = {"image": image, "image_a": world.render(solid, size), "image_b": world.render(striped, size)}
                if self.split != "train":
                    other = [replace(scenes, fill=1 - scenes.fill) for scenes in (solid, striped)]
                    drawn |= {f"answer_{side}": world.render(o, size) for side, o in zip("ab", other, strict=True)}
                return drawn
            case "attribute_transfer" if self.split != "train":
                return {"image": image, "answer": world.render(self.attribute_transfer[where], size)}
            case "inpaint":
                return {"image": image, "mask": 2 * world.masks(WORLD_SEED, numbers, self.split, size) - 1}
            case "low_resolution":
                return {"image": image, "source": world.low_resolution(image, FACTOR)}
            case "edit":
                return {"image": image, "source": world.render(self.before[where], size)}
        return {"image": image}
