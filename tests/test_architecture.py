"""The rules of the house, read from the source: who imports whom, what is never called, how long it gets."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "atelier"
ENTRY_POINTS = ("train", "sample", "evaluate", "export", "report", "demo")

LEAVES = {"core", "images"}  # on every floor
BASES = {
    "models.base",
    "models.diffusion_model",
    "models.two_players",
    "models.growing",
}  # abstract: what families may share and no family is
ARROWS = {  # a room -> what it may import beside itself and the leaves
    "core": set(),
    "images": set(),
    "shapes": set(),
    "optim": set(),
    "nets": set(),
    "diffusion": set(),
    "losses": {"nets"},
    "metrics": {"nets", "shapes"},
    "data": {"shapes"},
    "models": {"nets", "diffusion", "losses"},
    "checkpoints": {"nets", "diffusion"},
    "evaluation": {"models.base", "models.diffusion_model", "data.base", "metrics", "shapes"},
    "callbacks": {"models.base", "models.diffusion_model", "data.base", "evaluation", "checkpoints"},
    "requests": {
        "models.base",
        "models.diffusion_model",
        "data.base",
        "data.finding",
        "data.reading",
        "evaluation",
        "checkpoints",
        "losses",
    },
    "runs": {
        "models.base",
        "data",
        "callbacks",
        "evaluation",
        "checkpoints",
        "metrics",
        "nets.contracts",
        "requests",
    },
    "": {"runs.asking", "runs.build", "cli.start_up"},  # `from atelier import load`
    "cli": {"runs", "callbacks.checkpoint", "checkpoints.renamed"},
    "demo": {"runs", "requests", "models.diffusion_model", "diffusion.guidance", "data.reading", "cli.messages"},
    "reporting": {
        "models.base",
        "models.diffusion_model",
        "models.two_players",
        "nets.frozen",
        "evaluation",
        "callbacks.table",
        "checkpoints.store",
        "requests",
        "runs",
    },
}
TORCH_ONLY = {  # a room -> what it may use beside torch and the standard library
    "core": {"annotated_types"},
    "images": {"PIL", "einops", "torchvision"},
    "shapes": set(),
    "diffusion": set(),
    "losses": set(),
    "optim": set(),
    "nets": {"einops"},
}
WITHOUT_LIGHTNING = {*TORCH_ONLY, "metrics"}
HYDRA = {"runs", "cli"}  # and the entry points
LOOSE = 8  # modules beside the rooms, at most
SAVES_UNSAFE = {("atelier.callbacks.checkpoint", "save_checkpoint")}  # an argument about writing, not reading
LONGEST_FUNCTION, MOST_ARGUMENTS = 50, 10
LONGEST_ENTRY_POINT = 80

ALWAYS_THERE = {"torch", "atelier"} | sys.stdlib_module_names
Rule = Callable[[str, ast.Module], Iterator[str]]


def module_name(path: Path) -> str:
    """`atelier.nets.unet` for src/atelier/nets/unet.py, `train` for train.py."""
    base = SRC.parent if path.is_relative_to(SRC) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Each module of the package and each script by its name, as a tree."""
    scripts = [ROOT / f"{name}.py" for name in ENTRY_POINTS]
    paths = sorted(SRC.rglob("*.py")) + [path for path in scripts if path.exists()]
    return {module_name(path): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every dotted name imported anywhere in the tree, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """`nets` of atelier.nets.unet."""
    return name.split(".")[1] if "." in name else ""


def within(target: str, allowed: set[str]) -> bool:
    """Whether an imported dotted name lies in one of the allowed rooms or modules."""
    inside = target.removeprefix("atelier.")
    return any(inside == place or inside.startswith(f"{place}.") for place in allowed)


def arrows_point_down(name: str, tree: ast.Module) -> Iterator[str]:
    own = room(name)
    for target in imports(tree):
        if target.startswith("."):
            yield f"relative import {target}"
        if not target.startswith("atelier.") or name in ENTRY_POINTS:
            continue
        mine = BASES if own == "models" else {own}
        if not within(target, ARROWS.get(own, set()) | LEAVES | mine):
            yield f"{name} imports {target}"


def nothing_imports_an_entry_point(name: str, tree: ast.Module) -> Iterator[str]:
    return (f"{name} imports {t}" for t in imports(tree) if t.split(".")[0] in ENTRY_POINTS)


def hydra_stays_at_the_door(name: str, tree: ast.Module) -> Iterator[str]:
    for target in imports(tree):
        if target.split(".")[0] in ("hydra", "omegaconf") and name not in ENTRY_POINTS and room(name) not in HYDRA:
            yield f"{name} imports {target}"


def pure_rooms_stay_pure(name: str, tree: ast.Module) -> Iterator[str]:
    own = room(name)
    for target in imports(tree):
        top = target.split(".")[0]
        if top in ("lightning", "pytorch_lightning") and own in WITHOUT_LIGHTNING:
            yield f"{name} imports {target}"
        elif own in TORCH_ONLY and top not in ALWAYS_THERE | TORCH_ONLY[own]:
            yield f"{name} imports {target}"


def checkpoints_never_run_code(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        safety = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only")
        if safety not in (None, "True") and (name, called.split(".")[-1]) not in SAVES_UNSAFE:
            yield f"{name}:{node.lineno} {called}(weights_only={safety})"
        if called == "torch.load" and safety is None:
            yield f"{name}:{node.lineno} torch.load without weights_only=True"


def nothing_runs_what_was_read(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            used = node.attr if isinstance(node, ast.Attribute) else node.id
            builtin = isinstance(node, ast.Name) and used in {"eval", "exec"}  # net.eval() is another thing
            if builtin or used in {"load_from_checkpoint", "save_hyperparameters"}:
                yield f"{name}:{node.lineno} {used}"
    picklers = {"pickle", "dill", "marshal"}
    yield from (f"{name} imports {t}" for t in imports(tree) if t.split(".")[0] in picklers)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def signatures_name_their_arguments(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg:
            yield f"{name}:{node.lineno} **{node.args.kwarg.arg}"


def functions_stay_short(name: str, tree: ast.Module) -> Iterator[str]:
    for node in functions(tree):
        docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        prose = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
        lines = node.end_lineno - node.lineno + 1 - prose
        if lines > LONGEST_FUNCTION:
            yield f"{name}:{node.lineno} {node.name} has {lines} lines"


def functions_take_few_arguments(name: str, tree: ast.Module) -> Iterator[str]:
    """Constructors take what a page says."""
    for node in functions(tree):
        if node.name != "__init__" and len(node.args.args) + len(node.args.kwonlyargs) > MOST_ARGUMENTS:
            yield f"{name}:{node.lineno} {node.name} takes more than {MOST_ARGUMENTS}"


RELATIVE = {"nets", "losses", "diffusion", "models"}  # they name a key relative to themselves: `.heads`
OTHERS = (".", "data.", "callbacks.ema.")  # keys that may stand there: an own one, of the set, of the averages
ABSOLUTE = re.compile(r"(model|sampler|metrics|eval|trainer|budget|checkpoint)\.\w+(\.\w+)*=?|\w+@(model|metrics)\.")


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """String literals, those that an f-string begins with too; no docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node


def arguments(tree: ast.AST) -> set[str]:
    """What the constructors, dataclasses and functions of a module take."""
    taken = {arg.arg for node in functions(tree) for arg in node.args.args + node.args.kwonlyargs}
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    fields = (node.target for body in bodies for node in body if isinstance(node, ast.AnnAssign))
    return taken | {field.id for field in fields if isinstance(field, ast.Name)}


def parts_name_their_own_keys(name: str, tree: ast.Module) -> Iterator[str]:
    """Keys in errors of nets, losses, diffusion and models: of `OTHERS`, or of an argument that is there."""
    if room(name) not in RELATIVE:
        return
    raised = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "UserError"]
    if not raised:
        return
    known = arguments(tree)
    for text in strings(tree):
        if ABSOLUTE.match(text.value):
            yield f"{name}:{text.lineno} {text.value}"
        relative = re.match(r"\.([a-z]\w*)(=|$)", text.value)
        if relative and relative[1] not in known:
            yield f"{name}:{text.lineno} {text.value} is no argument"
    for key in (call.args[0] for call in raised):
        first = key.values[0] if isinstance(key, ast.JoinedStr) else key
        if isinstance(first, ast.Constant) and not str(first.value).startswith(OTHERS):
            yield f"{name}:{key.lineno} {first.value}"


NO_NOUN = (  # a preposition, a verb or a pronoun
    *("of ", "as in", "see ", "in ", "on ", "with ", "inside ", "between ", "behind ", "under ", "off ", "from "),
    *("used ", "made ", "makes ", "doubles ", "draw ", "mirror ", "keep ", "fetch ", "use ", "gives ", "refuse "),
    *("where ", "what ", "how ", "its ", "their ", "the same "),
)


def documented(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and docstring of all that is public in a tree, itself first."""
    prose = ast.get_docstring(node)
    if prose:
        yield name, prose
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
            yield from documented(inner, f"{name}.{inner.name}")


def docstrings_stand_alone(name: str, tree: ast.Module) -> Iterator[str]:
    """A first paragraph that a tooltip can show, arguments that begin with a noun."""
    for place, prose in documented(tree, name):
        first = prose.split("\n\n")[0]
        if not first.endswith((".", ":")) or len(first.splitlines()) > 2:
            yield f"{place}: {first}"
        listed = prose.partition("Args:\n")[2].partition("\n\n")[0]
        for entry in re.findall(r"^    (\w[\w, ]*: .*)$", listed, re.MULTILINE):
            if entry.partition(": ")[2].startswith(NO_NOUN):
                yield f"{place}: {entry}"


RULES: list[Rule] = [
    arrows_point_down,
    nothing_imports_an_entry_point,
    hydra_stays_at_the_door,
    pure_rooms_stay_pure,
    checkpoints_never_run_code,
    nothing_runs_what_was_read,
    signatures_name_their_arguments,
    functions_stay_short,
    functions_take_few_arguments,
    parts_name_their_own_keys,
    docstrings_stand_alone,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    offences = [o for name, tree in sources().items() for o in rule(name, tree)]
    assert not offences, "\n".join(offences)


BAD = [  # (rule, module, source): each rule bites
    (arrows_point_down, "atelier.nets.unet", "from atelier.diffusion.schedules import Linear"),
    (arrows_point_down, "atelier.diffusion.objective", "from atelier.nets import unet"),
    (arrows_point_down, "atelier.models.ldm", "from atelier.models.vae import Vae"),
    (arrows_point_down, "atelier.models.ldm", "from atelier.models import vae"),
    (arrows_point_down, "atelier.models.stylegan", "from atelier.models.progan import ProGAN"),
    (arrows_point_down, "atelier.callbacks.ema", "from atelier.models.two_players import TwoPlayers"),
    (arrows_point_down, "atelier.models.ddpm", "def f():\n    import atelier.callbacks.ema"),
    (arrows_point_down, "atelier.data.shapes", "from atelier.models.base import Generator"),
    (arrows_point_down, "atelier.core.rng", "from atelier.shapes.world import Scene"),
    (arrows_point_down, "atelier.nets.unet", "from .layers import Attention"),
    (arrows_point_down, "atelier.brandnew", "import atelier.nets.unet"),
    (nothing_imports_an_entry_point, "atelier.runs.folders", "from train import main"),
    (hydra_stays_at_the_door, "atelier.models.ddpm", "from omegaconf import DictConfig"),
    (hydra_stays_at_the_door, "atelier.requests.request", "import hydra.utils"),
    (pure_rooms_stay_pure, "atelier.diffusion.samplers", "import numpy as np"),
    (pure_rooms_stay_pure, "atelier.nets.unet", "from torchvision import models"),
    (pure_rooms_stay_pure, "atelier.metrics.fid", "from lightning.pytorch import Callback"),
    (checkpoints_never_run_code, "atelier.runs.folders", "torch.load(path)"),
    (checkpoints_never_run_code, "train", "trainer.fit(model, data, weights_only=False)"),
    (checkpoints_never_run_code, "atelier.runs.folders", "load(path, weights_only=flag)"),
    (checkpoints_never_run_code, "atelier.runs.folders", "trainer.save_checkpoint(path, weights_only=False)"),
    (nothing_runs_what_was_read, "sample", "model = Ddpm.load_from_checkpoint(path)"),
    (nothing_runs_what_was_read, "atelier.models.ddpm", "self.save_hyperparameters()"),
    (nothing_runs_what_was_read, "atelier.runs.folders", "eval(text)"),
    (nothing_runs_what_was_read, "atelier.runs.folders", "import pickle"),
    (signatures_name_their_arguments, "atelier.models.ddpm", "def sample(self, cond, **options): ..."),
    (signatures_name_their_arguments, "atelier.models.ddpm", "f = lambda **options: 0"),
    (
        parts_name_their_own_keys,
        "atelier.models.gan",
        "def f(all_codes):\n    UserError('.codes', 3, 'few', '.all_codes=1')",
    ),
    (parts_name_their_own_keys, "atelier.nets.vae", "UserError('model.net.width', 3, 'few', fix)"),
    (parts_name_their_own_keys, "atelier.nets.vae", "raise UserError('.width', 3, 'few', '.width=4')"),
    (
        parts_name_their_own_keys,
        "atelier.losses.kl",
        "def f(a):\n    raise UserError('.a', a, 'few', f'.b={a}')",
    ),
    (
        parts_name_their_own_keys,
        "atelier.nets.vae",
        "fix = f'model.net.width={3}'\nUserError(key, 3, 'few', fix)",
    ),
    (docstrings_stand_alone, "atelier.nets.vae", "def f():\n    '''The norm of x\n\n    (Somebody 2020).\n    '''"),
    (docstrings_stand_alone, "atelier.nets.vae", "class A:\n    '''One.\n    Two.\n    Three.'''"),
    (docstrings_stand_alone, "atelier.nets.vae", "'''A.\n\nArgs:\n    x: of the image.\n'''"),
    (docstrings_stand_alone, "atelier.runs.trainer", "'''A.\n\nArgs:\n    x: used for images.\n'''"),
    (functions_stay_short, "atelier.nets.unet", "def f():\n" + "    x = 1\n" * 50),
    (functions_take_few_arguments, "atelier.nets.unet", "def f(a, b, c, d, e, f, g, h, *, i, j, k): ..."),
]
GOOD = (
    """
from lightning.pytorch import LightningModule
from atelier.core import rng
from atelier.models.base import Generator
from atelier.models.two_players import TwoPlayers
from atelier.nets.unet import UNet
from atelier.core.ranges import PositiveInt
net.eval()
torch.load(path, weights_only=True)
trainer.fit(model, weights_only=True)
def f(*parts, n: int):
    '''Does it.

"""
    + "    prose\n" * 80
    + "    '''\n"
)


@pytest.mark.parametrize(("rule", "name", "source"), BAD)
def test_each_rule_sees_what_breaks_it(rule: Rule, name: str, source: str) -> None:
    assert list(rule(name, ast.parse(source)))


def test_keys_of_the_set_and_of_an_argument_are_no_absolute_keys() -> None:
    plain = (
        "def f(n):\n    UserError('.n', n, 'odd', f'.n={n + 1}')\n    UserError('data.root', n, 'odd', 'data.root=4')"
    )
    assert not list(parts_name_their_own_keys("atelier.nets.vae", ast.parse(plain)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_minds_plain_work(rule: Rule) -> None:
    assert not list(rule("atelier.models.ldm", ast.parse(GOOD)))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_stay_thin(name: str) -> None:
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= LONGEST_ENTRY_POINT


def test_few_modules_stand_beside_the_rooms() -> None:
    assert len(list(SRC.glob("*.py"))) - 1 <= LOOSE  # __init__.py
    assert {path.name for path in SRC.iterdir() if path.is_dir()} - {"__pycache__"} <= set(ARROWS)


def test_packages_are_empty_folders() -> None:
    """But for the package itself, whose `load` is what a user imports."""
    full = [str(path.relative_to(SRC)) for path in SRC.rglob("__init__.py") if path.read_text().strip()]
    assert full == ["__init__.py"]


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    shared = {name: rooms for name, rooms in places.items() if len(rooms) > 1 and not name.startswith("_")}
    assert not shared


def families() -> set[str]:
    modules = {path.stem for path in (SRC / "models").glob("[!_]*.py")}
    return modules - {base.removeprefix("models.") for base in BASES}


def test_every_family_has_its_test() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "models").glob("test_*.py")}
    assert families() <= tested


def test_the_data_folders_are_not_ignored() -> None:
    """`data/` without its slash in front would hide src/atelier/data and conf/data from git."""
    ignored = {line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert "/data/" in ignored and not ignored & {"data", "data/", "models/", "outputs/", "wandb/"}
