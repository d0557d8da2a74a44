"""What the folders of a set are called: splits, and the two sides of pairs.

Names count in any case and spacing (trainA, train_A, Train-a), with a year or a word like "set" or "images" beside them
(train2017, test_set, images_val). A folder of one name where none of another name is expected is left alone.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

from atelier.core.errors import UserError
from atelier.data.base import Split
from atelier.data.finding import (
    Listing,
    files_of,
    found_under,
    identity,
    image_files,
    is_image,
    must_be_folder,
    natural,
    passed_over,
    printable,
    root_word,
    subfolders,
)

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "validation", "valid", "dev", "eval", "evaluation")  # the first that is there
WEAK = ("valid", "dev", "eval", "evaluation")  # words that name other things too
SMALL = ("lr", "lq", "low", "lowres", "lrbicubic", "input", "inputs", "source", "sources", "src")
LARGE = ("hr", "hq", "high", "highres", "gt", "groundtruth", "target", "targets", "output", "outputs")
BESIDE = ("set", "data", "images", "imgs")
ALIKE = 0.9  # share of file names from which on two folders hold the same ones
N_TOLD = 4  # folders that a line names

Sides = tuple[str, str]  # folders: of the sources, A, and of what is to be made of them, B
Words = tuple[tuple[str, ...], tuple[str, ...]]  # what each may be called
PAIRS: Words = (("a", "x", *SMALL), ("b", "y", *LARGE))


class FolderRole(NamedTuple):
    """What a folder is by its name: of which split (None: of none), how far down the list of its names, which side."""

    split: Split | None
    rank: int
    side: int | None


def role(name: str, words: Words = PAIRS) -> FolderRole | None:
    """None where the name says nothing."""
    return _roles(words).get(_plain(name))


def split_folders(root: str, within: str = "") -> tuple[str, str | None]:
    """The folders of the training and the test split in root/within, as paths from `root`.

    (within, None) where no folder is called like a training split.
    """
    must_be_folder(root)
    folders = subfolders(Path(root, within))
    roles = {name: found for name in folders if (found := role(name)) and found.split and found.side is None}
    train, test = (_first(roles, split, None) for split in ("train", "test"))
    if train is None and test is None:
        train, test = _parted(root, [name for name in folders if role(name) is None])
    if train is not None:
        return _inner(root, within, train), None if test is None else _inner(root, within, test)
    strong = any(found.rank < TEST.index(WEAK[0]) for found in roles.values())
    if test is not None and (strong or len(folders) == 1):
        problem = f"there is a {printable(test)}/ but no train/"
        fix = f"put the training images into {printable(Path(root, within))}/train"
        raise UserError("data.root", printable(root), problem, fix)
    return within, None


def side_folders(root: str, words: Words = PAIRS) -> dict[Split, Sides] | None:
    """The folders of the two sides in each split that is there, as paths from `root`; None where there are none.

    trainA and trainB, with testA and testB; or A and B, with train/ and test/ in both; or train/A and train/B, with
    test/A and test/B.

    Raises:
        UserError: one side is there and the other is not.
    """
    must_be_folder(root)
    roles = {name: found for name in subfolders(Path(root)) if (found := role(name, words))}
    if any(found.split and found.side is not None for found in roles.values()):
        found = {split: sides for split in ("train", "test") if (sides := _both(root, roles, split))}
        if "train" in found:
            return found
        problem = f"there is a {printable(found['test'][0])}/ but no trainA/"
        raise UserError("data.root", printable(root), problem, f"put the training images into {printable(root)}/trainA")
    if both := _both(root, roles, None):
        splits = [split_folders(root, side) for side in both]
        missing = [k for k, (_, test) in enumerate(splits) if test is None]
        if len(missing) == 1:
            there = splits[1 - missing[0]][1]
            problem = f"there is a {printable(there)}/ but no {printable(both[missing[0]])}/test/"
            raise UserError("data.root", printable(root), problem, "the same folders on both sides")
        train, test = zip(*splits, strict=True)
        return {"train": train} if missing else {"train": train, "test": test}
    train, test = split_folders(root)
    if not train:
        return None
    found = {split: _within(root, name, words) for split, name in (("train", train), ("test", test)) if name}
    if found["train"] and None in found.values():
        problem = f"{printable(found['train'][0])}/ and {printable(found['train'][1])}/ have no like in {test}/"
        raise UserError("data.root", printable(root), problem, "the same folders in both splits")
    return found if found["train"] else None


def matched(root: str, a: str, b: str, ending: str = "") -> list[tuple[str | None, str | None]]:
    """The files of root/a and root/b of the same name, as paths from `root`, in natural order; None: it has none.

    Args:
        ending: suffix that names in root/a may have and those in root/b do not.

    The suffix counts only where a folder has two files that differ in nothing else.
    """
    whole = [{os.path.relpath(name, side): name for name in files_of(root, side)} for side in (a, b)]
    bare = [{os.path.splitext(name)[0]: path for name, path in side.items()} for side in whole]
    sides = bare if all(len(x) == len(y) for x, y in zip(whole, bare, strict=True)) else whole
    sources = {key if key in sides[1] else key.removesuffix(ending): path for key, path in sides[0].items()}
    return [(sources.get(key), sides[1].get(key)) for key in sorted(sources | sides[1], key=natural)]


def refuse_deeper(root: str, within: str, folders: list[str]) -> None:
    """Raises UserError where one of the folders in root/within holds both splits, or both sides of one."""
    for name in folders:
        place = Path(root, within, name)
        if {"train", "test"} <= {found.split for one in subfolders(place) if (found := role(one)) and _is_split(one)}:
            problem = f"training and test images lie deeper, in {printable(name)}/"
            raise UserError("data.root", printable(root), problem, root_word(place))
        sides = {(found.split, found.side) for one in subfolders(place) if (found := role(one)) and found.split}
        if {("train", 0), ("train", 1)} <= sides:
            raise UserError(
                "data.root", printable(root), f"its sides lie deeper, in {printable(name)}/", root_word(place)
            )


def refuse_pairs(root: str, within: str, fix: str, any_two: bool = False) -> None:
    """Refuse a folder of single images whose folders are the sides of pairs, or hold splits.

    Args:
        fix: advice for pairs.
        any_two: whether any two of many folders that hold the same file names are sides; else only those called so, as
            classes often number their files alike.

    Raises:
        UserError: they are, or do.
    """
    here = Path(root, within)
    folders = [name for name in subfolders(here) if not _is_split(name)]
    refuse_deeper(root, within, folders)
    named = [name for name in folders if (found := role(name)) and found.split and found.side is not None]
    if twins := named[:2] if len(named) > 1 else _twins(here, folders, any_two):
        what = "are two sides or domains" if named else "hold the same file names"
        problem = f"{printable(twins[0])}/ and {printable(twins[1])}/ {what}"
        raise UserError("data.root", printable(root), problem, f"{fix}, or {root_word(here / twins[0])}")


def left_out(root: str, used: set[str]) -> str:
    """How much of what lies under `root` is not `used`, and why; "" where nothing is. Of a file, not of a name: one
    that is read by another name of it is used."""
    found = found_under(Path(root))
    files = [name for name in found.files if name not in used]
    if any(map(is_image, files)):
        known = {identity(Path(root, name)) for name in used if os.path.exists(os.path.join(root, name))}
        files = [name for name in files if identity(Path(root, name)) not in known]
    entered = {parent for name in used for parent in _parents(name)}
    places = {os.path.dirname(name) for name in used}
    aside = Counter(_why_unused(name, entered, places) for name in files if is_image(name))
    notes = passed_over(Listing(files, found.others)) + [f"{n} images {why}" for why, n in aside.most_common(N_TOLD)]
    if rest := aside.total() - sum(n for _, n in aside.most_common(N_TOLD)):
        notes.append(f"{rest} images in {len(aside) - N_TOLD} other places")
    return ", ".join(notes)


def _plain(name: str) -> str:
    return re.sub(r"(19|20)\d\d$", "", re.sub(r"[\W_]+", "", name.lower()))


@functools.cache
def _roles(words: Words) -> dict[str, FolderRole]:
    splits = {"": (None, 0)} | {word: ("train", k) for k, word in enumerate(TRAIN)}
    splits |= {word: ("test", k) for k, word in enumerate(TEST)}
    sides = {"": None} | {word: side for side in (0, 1) for word in words[side]}
    roles: dict[str, FolderRole] = {}
    for (one, (split, rank)), (other, side) in product(splits.items(), sides.items()):
        for core in (one + other, other + one) if one or other else ():
            for name in (core, *(core + word for word in BESIDE), *(word + core for word in BESIDE)):
                roles.setdefault(name, FolderRole(split, rank, side))
    return roles


def _first(roles: dict[str, FolderRole], split: Split | None, side: int | None) -> str | None:
    """The folder of this split and side with the most usual name."""
    named = [name for name, found in roles.items() if (found.split, found.side) == (split, side)]
    return min(named, key=lambda name: (roles[name].rank, len(name)), default=None)


def _parted(root: str, folders: list[str]) -> Sides | tuple[None, None]:
    """The two folders whose names differ in the word of their split alone: seg_train and seg_test.

    Raises:
        UserError: there are several such twos.
    """
    splits: dict[str, dict[Split, str]] = {}
    for name in folders:
        words = re.split(r"[\W_]+", name.lower())
        for k, word in enumerate(words):
            if word in TRAIN + TEST:
                rest = " ".join(words[:k] + words[k + 1 :])
                splits.setdefault(rest, {}).setdefault("train" if word in TRAIN else "test", name)
    both = [found for found in splits.values() if len(found) == 2]
    if len(both) > 1:
        problem = f"{printable(both[0]['train'])}/ and {printable(both[1]['train'])}/ are training splits both"
        raise UserError("data.root", printable(root), problem, "a folder of each set, with train/ and test/ in it")
    return (both[0]["train"], both[0]["test"]) if both else (None, None)


def _inner(root: str, within: str, name: str) -> str:
    """The folder, or what lies in it where that is one folder of its own name alone, as unpacked archives have it."""
    folder = os.path.join(within, name)
    return os.path.join(folder, name) if subfolders(Path(root, folder)) == [name] else folder


def _both(root: str, roles: dict[str, FolderRole], split: Split | None) -> Sides | None:
    """Both sides of a split by their names; one alone is refused where its name can mean nothing else."""
    found = [_first(roles, split, side) for side in (0, 1)]
    if None not in found:
        return found[0], found[1]
    there = found[0] or found[1]
    if there is None or not (split or _plain(there) in ("a", "b")):
        return None
    other = (split or "") + "AB"[found.index(None)]
    fix = f"put the other side of each pair into {printable(root)}/{other}"
    raise UserError("data.root", printable(root), f"there is a {printable(there)}/ but no {other}/", fix)


def _within(root: str, folder: str, words: Words) -> Sides | None:
    """Both sides in root/folder, as paths from `root`."""
    roles = {name: found for name in subfolders(Path(root, folder)) if (found := role(name, words))}
    both = _both(os.path.join(root, folder), roles, None)
    return None if both is None else tuple(os.path.join(folder, side) for side in both)


def _is_split(name: str) -> bool:
    found = role(name)
    return found is not None and found.split is not None and found.side is None


def _twins(here: Path, folders: list[str], any_two: bool) -> list[str]:
    """Two of the folders that hold the same file names, suffixes aside; [] where there are none."""
    if len(folders) > 2 and not any_two:
        folders = [name for name in folders if (found := role(name)) and found.side is not None]
    stems = {name: {os.path.splitext(file)[0] for file in image_files(here / name)} for name in folders}
    for one, other in combinations([name for name in folders if stems[name]], 2):
        if len(stems[one] & stems[other]) >= ALIKE * max(len(stems[one]), len(stems[other])):
            return [one, other]
    return []


def _parents(name: str) -> list[str]:
    """The folders that a path lies in, from "" on."""
    parts = name.split(os.sep)[:-1]
    return [os.sep.join(parts[:k]) for k in range(len(parts) + 1)]


def _why_unused(name: str, entered: set[str], places: set[str]) -> str:
    """Where an image lies of which no use is made: in a folder that no used file lies in, beside those, or among them.

    Args:
        entered: folders that used files lie in, at any depth.
        places: folders that they lie in directly.
    """
    outside = next((folder for folder in _parents(name) if folder not in entered), None)
    if outside is not None:
        found = role(os.path.basename(outside))
        return f"in {printable(outside)}/ ({'a further split' if found and found.split else 'of no split or side'})"
    here = os.path.dirname(name)
    within = f" in {printable(here)}/" if here else ""
    return f"that belong to no other{within}" if here in places else f"beside the folders{within}"
