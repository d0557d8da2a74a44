"""The numbers of studies/house.py: arrows as the architecture's test sees them, floors and ways in small houses."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from studies.house import Way, arrows, floors, functions, modules, room
from tests.test_architecture import ARROWS, LEAVES, SRC, imports, module_name
from tests.test_architecture import room as room_of


def test_its_arrows_are_those_that_the_architecture_allows() -> None:
    found = arrows(modules(SRC))
    paths = [path for path in SRC.rglob("*.py") if path.name != "__init__.py"]
    seen = {
        (room_of(module_name(path)), room_of(target))
        for path in paths
        for target in imports(ast.parse(path.read_text()))
        if target.startswith("atelier.")
    }
    assert len(found) == len({(a, b) for a, b in seen if a != b}) and found <= seen
    allowed = {(a, b.split(".")[0]) for a, targets in ARROWS.items() for b in targets | LEAVES}
    assert found <= allowed


def test_a_floor_is_one_more_than_the_highest_below() -> None:
    between = {("top", "middle"), ("top", "ground"), ("middle", "ground"), ("a", "b"), ("b", "a"), ("a", "middle")}
    rooms = {name for arrow in between for name in arrow}
    assert floors(rooms, between) == {"ground": 1, "middle": 2, "top": 3, "a": 3, "b": 1}


def test_lines_and_arguments_of_a_function() -> None:
    text = 'class A:\n    def f(self, x, *, y):\n        """One.\n\n        Two.\n        """\n        return x\n'
    assert functions({Path("nets/a.py"): ast.parse(text)}) == [(2, "f", 2)]


def test_a_climb_is_a_call_from_below(tmp_path: Path) -> None:
    """The ground is handed a function of the top, and calls it through a library."""
    texts = {
        "ground/g.py": "def twice(call):\n    return [*map(call, [1, 2])]\n",
        "top/t.py": "def number(x):\n    return x\n\ndef way(twice):\n    return twice(number)\n",
    }
    named = {}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        named[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(named[path.stem])
    seen, strings = (Way(tmp_path, {"ground": 1, "top": 2}, kind) for kind in (object, str))
    with seen:
        assert named["t"].way(named["g"].twice) == [1, 2]
    assert list(seen.trip.values()) == ["top", "ground", "top"]
    assert [(a.co_name, b.co_name) for a, b in seen.climbs] == [("twice", "number")] and seen.turns == 1
    with strings:
        named["t"].number("a")
        named["t"].number(1)
        named["g"].twice(str)
    assert [code.co_name for code in strings.trip] == ["number"] and room(Path("optim.py")) == "optim"
