"""What a line offers can be typed: keys that exist, values that are taken, quotes for the shell and for Hydra."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from atelier.cli import messages
from atelier.core.errors import UserError
from atelier.core.words import word
from atelier.runs import build, preflight
from atelier.runs.pages import known_keys
from tests import fixes
from tests.compose import composed

SOURCE = Path(__file__).parents[2] / "src" / "atelier"
KEY = re.compile(r"(?<![\w.{}@'\"/-])(\.?[a-z]\w*(?:\.\w+)*)=(?=\S)")
LIBRARY = ("checkpoints",)  # whose functions are called by hand too


def offered(path: Path) -> Iterator[tuple[str, int]]:
    """The fix of each UserError that a module raises, `{}` for what is filled in, with its line."""
    tree = ast.parse(path.read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        named: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named.setdefault(node.targets[0].id, []).append(node.value)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and len(node.args) == 4:
                fix = node.args[3]
                for one in named.get(fix.id, []) if isinstance(fix, ast.Name) else [fix]:
                    yield from ((text, node.lineno) for text in texts(one))


def argument_names(tree: ast.Module) -> Iterator[str]:
    """`.name` of each argument of a function and each field of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield f".{node.arg}"
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield f".{node.target.id}"


def texts(node: ast.expr) -> Iterator[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.IfExp | ast.BoolOp):
        for part in node.values if isinstance(node, ast.BoolOp) else (node.body, node.orelse):
            yield from texts(part)


def test_a_fix_names_keys_that_exist() -> None:
    known = {*known_keys(), *preflight.options(), *preflight.TYPES, "hydra.sweeper.direction", "hydra.sweep.dir"}
    sources = sorted(SOURCE.rglob("*.py"))
    arguments = {name for path in sources for name in argument_names(ast.parse(path.read_text()))}
    seen, unknown = 0, []
    for path in sources:
        for fix, line in offered(path):
            for key in KEY.findall(fix):
                seen += 1
                own = f".{key.rpartition('.')[2]}"
                if key not in known and not (own in arguments and (key[0] == "." or path.parent.name in LIBRARY)):
                    unknown.append(f"{path.name}:{line}: {key} in {fix!r}")
    assert seen > 150
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize(
    "value", ["a b", "it's", 'say "x"', "a,b.jpg", "(1) [x] {y} = &;", "2026_11_28", "007", "größe", "null", "back\\"]
)
def test_a_word_is_what_it_was_behind_a_shell_and_hydra(value: str) -> None:
    (typed,) = shlex.split(word("run_dir", value))
    (override,) = OverridesParser.create().parse_overrides([typed])
    assert override.value() == value or override.value().text == value


@pytest.mark.parametrize(("given", "fix"), {
    "train.py model=gan,vae": "python train.py -m model=gan,vae",
    "train.py run_dir=a,b": "'run_dir=\"a,b\"'",
    "train.py metrics=[fid,kid]": "metrics.names=[fid,kid]",
    "train.py device=cpu": "trainer=cpu",
    "train.py trainer.device=cuda": "trainer=gpu",
    "train.py trainer.strategy=fsdp": "trainer=ddp",
    "train.py budget.image=many": "budget.images=VALUE",
    "train.py 'latent_cache=my (1)'": "'latent_cache=\"my (1)\"'",
    "train.py data=classes data.batch_size=(8": "data.batch_size=VALUE",
    "sample.py source=a,b.jpg": "'source=\"a,b.jpg\"'",
    "sample.py sampler.steps=5": "sampler=euler sampler.steps=5",
    "sample.py max_epochs=5": "",
    "evaluate.py guider.guidance=2": "guider=classifier_free guider.guidance=2",
}.items())  # fmt: skip
def test_what_is_offered_passes(given: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    script, *words = shlex.split(given)
    monkeypatch.setattr("sys.argv", [script, *words])
    config = script.removesuffix(".py")
    with pytest.raises(Exception) as caught:
        preflight.check(composed(*words, config=config))
    error = messages.user_error(caught.value)
    assert fix in error.fix
    fixes.typed(error, *words, config=config)


@pytest.mark.parametrize(("page", "fix"), {
    "cyclegan": "data=unpaired data.root=FOLDER, or data=shapes data.task=fill",
    "pix2pix": "data=edges data.root=FOLDER",
    "srgan": "data=superres data.root=FOLDER, or data=shapes data.task=low_resolution",
    "stargan": "data=celeba",
    "clip": "data=captioned",
}.items())  # fmt: skip
def test_a_set_that_has_what_a_family_needs_is_offered(page: str, fix: str) -> None:
    """Before its nets are built, which would speak of channels."""
    family = build.family(composed(f"model={page}"))
    data = build.data(composed("data=fashion_mnist"))
    with pytest.raises(UserError) as caught:
        preflight.provided(family.needs, family, data)
    assert fix in caught.value.fix
    assert fixes.typed(caught.value, f"model={page}", "data=fashion_mnist") >= 2
