"""The house by numbers: rooms and arrows, and the ways of a batch, of a config and of a request through them.

python studies/house.py [--src FOLDER_THAT_HOLDS_ATELIER], of any commit; CONTRIBUTING.md says how to read it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import statistics
import sys
import tempfile
from inspect import CO_OPTIMIZED
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

WORDS = (  # of a run of six batches
    "data=shapes data.image_size=16 data.batch_size=4 data.n_train_scenes=24 data.n_test_scenes=8 budget.images=24"
    " model=flow_tiny eval.n_samples=4 eval.n_real=4 metrics=none trainer=cpu trainer.precision=32-true"
    " callbacks.grids.n=4"
).split()
Arrows = set[tuple[str, str]]  # (a, b): a module of room a imports something of room b


def room(path: Path) -> str:
    """A folder of the package, or a module beside the folders, of a path inside the package."""
    return path.parts[0].removesuffix(".py")


def modules(package: Path) -> dict[Path, ast.Module]:
    paths = [path for path in sorted(package.rglob("*.py")) if path.name != "__init__.py"]
    return {path.relative_to(package): ast.parse(path.read_text()) for path in paths}


def arrows(trees: dict[Path, ast.Module]) -> Arrows:
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found |= {(room(path), name.split(".")[1]) for name in names if name.startswith("atelier.")}
    return {(a, b) for a, b in found if a != b and b in set(map(room, trees))}


def floors(rooms: set[str], arrows: Arrows) -> dict[str, int]:
    """1 for a room that imports no other, else one more than the highest that it imports; circles are passed over."""
    below = {a: {b for x, b in arrows if x == a} for a in rooms}
    reached, floor = below, dict.fromkeys(rooms, 1)
    for _ in rooms:
        reached = {a: to.union(*(reached[b] for b in to)) for a, to in reached.items()}
    for _ in rooms:
        floor = {a: 1 + max((floor[b] for b in below[a] if a not in reached[b]), default=0) for a in rooms}
    return floor


def functions(trees: dict[Path, ast.Module]) -> list[tuple[int, str, int]]:
    """Lines without the docstring, name, and arguments without self of every function."""
    found = []
    for node in [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        first = node.body[0]
        prose = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
        taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        found.append((node.end_lineno - node.lineno + 1 - prose, node.name, len(set(taken) - {"self", "cls"})))
    return found


class Way:
    """The named functions that run inside, by the rooms of `package`; only those that are given a `carried` count.

    `climbs`: calls of a room into one that stands on a higher floor; what a library calls is called by who called it.
    `turns`: how often the next function that is new on the way stands on a higher floor than the one before.
    """

    def __init__(self, package: Path, floor: dict[str, int], carried: type = object) -> None:
        self.package, self.floor, self.carried = package, floor, carried
        self.trip: dict[CodeType, str] = {}  # function -> its room, in the order of their first calls
        self.climbs: set[tuple[CodeType, CodeType]] = set()
        self.open: list[FrameType] = []

    @property
    def turns(self) -> int:
        return sum(self.floor[a] < self.floor[b] for a, b in pairwise(self.trip.values()))

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "return" and self.open and self.open[-1] is frame:
            self.open.pop()
        named = frame.f_code.co_flags & CO_OPTIMIZED and not frame.f_code.co_name.startswith("<")
        if event != "call" or not named or not frame.f_code.co_filename.startswith(f"{self.package}/"):
            return
        if self.carried is not object and not any(isinstance(v, self.carried) for v in frame.f_locals.values()):
            return
        code, caller = frame.f_code, (self.open[-1] if self.open else frame).f_code
        self.trip.setdefault(code, room(Path(code.co_filename).relative_to(self.package)))
        if self.floor[self.trip[code]] > self.floor[self.trip[caller]]:
            self.climbs.add((caller, code))
        self.open.append(frame)


def ways(src: Path, floor: dict[str, int]) -> dict[str, Way]:
    """Those of one run of train.py and of a request for four of its images."""
    sys.path[:0] = [str(src), str(src.parent)]
    from omegaconf import DictConfig

    import sample
    import train
    from atelier.callbacks.clock import Clock
    from tests.compose import composed

    batch, config, request = (Way(src / "atelier", floor, kind) for kind in (object, DictConfig, object))
    began, starts = Clock.on_train_batch_start, []

    def watched(self: Clock, *given: object) -> None:
        starts.append(given)
        if len(starts) == 6:  # from the beginning of the fifth batch, where all is warm, to that of the next
            batch.__exit__()
        began(self, *given)
        if len(starts) == 5:
            batch.__enter__()

    Clock.on_train_batch_start = watched
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with config:
            train.train(composed(*WORDS, run_dir=f"{folder}/run"))
        with request:
            sample.sample(composed(f"run={folder}/run", "n=4", f"out={folder}/out", config="sample"))
    Clock.on_train_batch_start = began
    return {"one training batch": batch, "train.py's config": config, "a request": request}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", type=Path, default=Path(__file__).parents[1] / "src", help="holds atelier/")
    src = parser.parse_args().src.resolve()
    sys.argv[1:] = []
    trees = modules(src / "atelier")
    rooms, between, defined = set(map(room, trees)), arrows(trees), functions(trees)
    floor = floors(rooms, between)
    many = [name for _, name, n in defined if n > 10 and name != "__init__"]
    rows = {
        "rooms": len(rooms),
        "loose modules": len([path for path in trees if len(path.parts) == 1]),
        "arrows between rooms": len(between),
        "arrows that run up": len([1 for a, b in between if floor[a] <= floor[b]]),
        "lines of the median function": f"{statistics.median(lines for lines, _, _ in defined):g}",
        "lines of the longest function": "{} ({})".format(*max(defined)),
        "functions of more than 10 arguments": f"{len(many)} {' '.join(many)}",
    }
    print("| what | how many |\n| --- | --- |")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()), flush=True)
    try:
        found = ways(src, floor)
    except Exception as error:  # whatever another commit lacks
        return print(f"| ways | not run: {type(error).__name__} {error} |")
    for name, way in found.items():
        told = f"{len(set(way.trip.values()))} rooms, {len(way.climbs)} climbs, {way.turns} turns back up"
        print(f"| the way of {name} | {told} |")


if __name__ == "__main__":
    main()
