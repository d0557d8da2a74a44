"""Every command of the README works as it stands there, on settings small enough for a test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import sample
import train
from atelier.checkpoints import adapters
from atelier.nets import lora
from atelier.runs import folders, preflight
from tests.compose import a_finished_run, composed
from tests.tiny import COMMON, UNET

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = [*(word for word in COMMON if word != "data=shapes"), *UNET, "model.sampler.steps=2"]
FASHION = ROOT.parent / "shared" / "data" / "fashion_mnist"


def commands(script: str) -> list[list[str]]:
    """The arguments of each call of a script in the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(f"python {script}")]


def test_the_readme_has_all_verbs() -> None:
    assert len(commands("train.py")) >= 5 and all(map(commands, ("sample.py", "evaluate.py", "export.py", "demo.py")))


@pytest.mark.parametrize("words", commands("train.py"), ids=" ".join)
def test_training_commands_compose_and_fit(words: list[str]) -> None:
    for job in ([w for w in words if w != "-m"], [w.split(",")[0] for w in words if w != "-m"]):
        if not any("," in word for word in job):
            preflight.check(composed(*[word.replace("=RUN", f"={a_finished_run()}") for word in job]))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python train.py` itself, small."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    train.train(composed(*SMALL, run_dir=folder))
    return folder


@pytest.fixture(scope="module")
def run_of_texts(tmp_path_factory: pytest.TempPathFactory, finished: dict[str, Path]) -> Path:
    """`python train.py model=text_to_image`, small."""
    folder = tmp_path_factory.mktemp("readme") / "texts"
    stands_on = [
        f"model.first_stage.run={finished['vae']}",
        f"model.embedder.sources.text.encoder.run={finished['clip']}",
    ]
    small = [word for word in SMALL if not word.startswith(("model.embedder.dim", "model.net.cond_dim"))]
    words = ["model=text_to_image", "data=shapes", "model.net.attention=[2]", *stands_on]
    train.train(composed(*[word for word in small if "attention" not in word], *words, run_dir=folder))
    return folder


def test_sampling_commands(default_run: Path, run_of_texts: Path, tmp_path: Path) -> None:
    files = tmp_path / "lora.safetensors"
    adapters_of(run_of_texts, files)
    for number, words in enumerate(commands("sample.py")):
        of_texts = any(word.startswith(("prompt=", "do=attention")) for word in words)
        run = run_of_texts if of_texts else default_run
        words = [f"run={run}" if word in ("run=last", "run=RUN") else word for word in words]
        words = [f"adapters=[{files},{files}]" if word.startswith("adapters=") else word for word in words]
        out = tmp_path / str(number)
        sample.sample(composed(*words, "n=6", f"out={out}", config="sample"))
        assert len(list(out.glob("0*.png"))) == 6 and (out / "grid.png").exists()


def test_python_in_three_lines(default_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "OUTPUTS", default_run)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found: dict = {}
    exec(block, found)
    assert found["images"].shape == (16, 3, 8, 8) and sum(len(part.images) for part in found["parts"]) == 16


def adapters_of(run: Path, file: Path) -> None:
    """A file of adapters that fits a run."""
    model = folders.load(run, True).model
    model.adapt(lora.Recipe(1, 1.0, ["out"], []))
    adapters.write(model.net, model.embedder, file, "kohya")


@pytest.mark.parametrize("words", commands("export.py"), ids=" ".join)
def test_exporting_commands_compose_and_fit(words: list[str]) -> None:
    """What they write is looked at in tests/checkpoints/test_diffusers_export.py."""
    preflight.check(composed(*words, config="export"))


@pytest.mark.parametrize("words", commands("demo.py"), ids=" ".join)
def test_the_page_composes_and_fits(words: list[str]) -> None:
    """What it shows is looked at in tests/demo."""
    preflight.check(composed(*words, config="demo"))


def test_evaluating_commands(default_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands("evaluate.py"):
        words = [f"run={default_run}" if word == "run=last" else word for word in words]
        evaluate.evaluate(composed(*words, "eval.n_samples=6", "metrics=none", config="evaluate"))
        assert '"judge/valid"' in capsys.readouterr().out


@pytest.mark.skipif(not FASHION.exists(), reason="../shared/data/fashion_mnist is not there")
def test_the_fashion_command_trains(tmp_path: Path) -> None:
    (words,) = [w for w in commands("train.py") if "data=fashion_mnist" in w]
    words = [f"data.root={FASHION}" if word.startswith("data.root=") else word for word in words]
    small = [w for w in SMALL if not w.startswith(("data.n_", "data.image_size", "model.net.patch_size"))]
    train.train(composed(*words, *small, "budget.images=8", "data.limit=16", run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_pages_named_in_the_tables_exist() -> None:
    for group, pages in {
        "model": ["flow", "ddpm", "vae", "gan", "ldm"],
        "data": ["shapes", "celeba", "images"],
    }.items():
        for page in pages:
            assert f"`{page}`" in README and (ROOT / "conf" / group / f"{page}.yaml").exists()
