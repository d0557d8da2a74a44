"""Python in three lines: the pictures of `atelier.load` are those of sample.py, and so are the mistakes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import sample as entry
from atelier import load
from atelier.core.errors import UserError
from atelier.requests.folder import Made
from atelier.runs import asking, build, folders
from atelier.runs.asking import ReadyRun
from atelier.runs.pages import CONF
from tests.compose import composed
from tests.programs import ROOT, python
from tests.test_sample import drawn, opened

EVERY = ["ddpm", "gan", "vae", "stargan", "normalizing_flow"]


def two_files(folder: Path) -> Path:
    """A folder with images of two sizes."""
    folder.mkdir(exist_ok=True)
    for name, size in (("a", 8), ("b", 12)):
        Image.new("RGB", (size, size), "red").save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("family", EVERY)
def test_samples_are_those_of_sample_py_to_the_bit(finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    typed = drawn(finished[family], tmp_path, "n=7", "seed=3", "do=sample", "batch_size=4")
    images = load(finished[family]).sample(n=7, seed=3, options={"batch_size": 4})
    assert images.dtype == torch.uint8 and torch.equal(images.short(), typed)


def test_a_run_says_which_it_is(finished: dict[str, Path]) -> None:
    assert repr(load(finished["vae"])).startswith(f"VAE in {finished['vae']}, 96 images seen: sample, interpolate, ")


def test_a_label_and_a_sampler(finished: dict[str, Path], tmp_path: Path) -> None:
    typed = drawn(
        finished["ddpm"], tmp_path, "n=6", "seed=1", "label=25", "sampler=heun", "sampler.steps=2", "guidance=2.5"
    )
    more = {"sampler": "heun", "sampler.steps": 2, "guidance": 2.5}
    run = load(str(finished["ddpm"]))
    assert torch.equal(run.sample(n=6, seed=1, label=25, options=more).short(), typed)
    assert not torch.equal(run.sample(n=6, seed=1, options=more).short(), typed)  # nothing is left of the last one


def test_any_other_verb(finished: dict[str, Path], tmp_path: Path) -> None:
    typed = drawn(finished["ddpm"], tmp_path / "a", "n=9", "do=interpolate")
    run = load(finished["ddpm"])
    assert torch.equal(torch.cat([made.images for made in run.ask("interpolate", n=9)]).short(), typed)
    files = two_files(tmp_path / "files")
    words = ["do=edit", "strength=0.3", f"source={files}", f"out={tmp_path / 'edited'}"]
    entry.sample(composed(f"run={finished['ddpm']}", *words, config="sample"))
    made = run.ask("edit", options={"strength": 0.3, "source": files})
    for part in made:
        assert torch.equal(part.images[0].short(), opened(tmp_path / "edited" / part.names[0]))
    assert [part.names for part in made] == [["a.png"], ["b.png"]]


def test_last_is_the_newest(finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "OUTPUTS", finished["gan"])
    assert load("last").loaded.folder == load().loaded.folder == finished["gan"]


def test_what_is_asked_for_is_kept_as_sample_py_keeps_it(finished: dict[str, Path], tmp_path: Path) -> None:
    """All that a picture has within it, so that like=PICTURE can be made from either."""
    drawn(finished["ddpm"], tmp_path, "n=2", "label=25", "guidance=2")
    kept = OmegaConf.to_container(OmegaConf.load(tmp_path / "request.yaml"))
    given = {"run": str(finished["ddpm"]), "n": 2, "label": 25, "guidance": 2, "out": str(tmp_path)}
    words = load(finished["ddpm"]).asked(asking.config(given)).words
    assert words == kept and "label" in words


@pytest.mark.parametrize(
    ("key", "value", "exact"),
    [
        ("smapler", "ddim", True),
        ("sampler", "ddmi", True),
        ("sampler.steps", 3, False),  # what is offered depends on the run there
        ("label", "red", True),
        ("do", "reconstruct", True),
        ("guider", "dual", True),
    ],
)
def test_mistakes_are_those_of_the_command_line(
    finished: dict[str, Path], tmp_path: Path, key: str, value: Any, exact: bool
) -> None:
    run = finished["gan" if key == "guider" else "ddpm"]
    typed = python("sample.py", f"run={run}", f"{key}={value}", f"out={tmp_path}", folder=ROOT, environment=dict(PLAIN))
    assert typed.returncode == 2
    with pytest.raises(UserError) as error:
        load(run).ask(options={key: value})
    line = error.value.line()
    if exact:
        assert line == typed.stderr.strip()
    assert line.partition("Fix: ")[0] == typed.stderr.strip().partition("Fix: ")[0]


def test_what_a_run_is_loaded_with_is_asked_for_there(finished: dict[str, Path], tmp_path: Path) -> None:
    run = load(finished["ddpm"], ema=False)
    typed = drawn(finished["ddpm"], tmp_path, "n=2", "ema=false")
    assert torch.equal(run.sample(n=2).short(), typed)
    for key, fix in (("ema", "load(RUN, ema=...)"), ("out", "leave out out"), ("like", "leave like out")):
        with pytest.raises(UserError, match=key) as error:
            run.sample(options={key: "x"})
        assert fix in error.value.fix
    with pytest.raises(UserError, match="no run folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="there are 0 adapters"):
        load(finished["ddpm"], adapter_weights=[1.0])


def test_pictures_of_several_sizes_are_not_one_tensor(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(finished["srgan"])
    with pytest.raises(UserError, match="several sizes"):
        run.sample(options={"source": two_files(tmp_path)})
    monkeypatch.setattr(run, "ask", lambda *_: [Made(torch.zeros(1, 3, side, side)) for side in (8, 12)])
    for options in (None, {"do": "sample"}):
        with pytest.raises(UserError, match="source=None: its pictures are of several sizes"):
            run.sample(options=options)


def test_text_is_never_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of somebody else's must not read this process's environment."""
    monkeypatch.setenv("SECRET", "canary")
    for text in ("${oc.env:SECRET}", r"\${oc.env:SECRET}", r"\\${oc.env:SECRET} ${seed}", "plain $5 {a}"):
        words = build.plain(asking.config({"prompt": text, "label": [text, "b"]}))
        assert (words["prompt"], words["label"]) == (text, [text, "b"])


def test_arrays_and_paths_are_plain_values() -> None:
    cfg = asking.config({"label": torch.arange(3), "source": Path("a"), "n": torch.tensor(4)})
    assert (cfg.label, cfg.source, cfg.n) == ([0, 1, 2], "a", 4)


def test_defaults_are_those_of_sample_py() -> None:
    page = OmegaConf.load(CONF / "sample.yaml")
    for function in (load, ReadyRun.ask, ReadyRun.sample):
        for name, parameter in inspect.signature(function).parameters.items():
            assert name in ("self", "options") or parameter.default == page[name]


def test_the_import_is_light() -> None:
    script = "import sys; from atelier import load; print(sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(PLAIN), timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


PLAIN = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
