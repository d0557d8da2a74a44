"""What families say of themselves, and what is kept beside a run."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from atelier.core.errors import UserError
from atelier.reporting import chosen, facts
from atelier.runs import folders

CONF = Path(__file__).parents[2] / "conf" / "model"
TARGET = re.compile(r"^_target_: (atelier\.models\.\w+)\.(\w+)", re.MULTILINE)


def models() -> dict[str, type]:
    """The class of each page of conf/model that names one."""
    found = {path.stem: TARGET.search(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
    return {page: getattr(importlib.import_module(hit[1]), hit[2]) for page, hit in found.items() if hit}


def test_every_family_says_its_idea_in_two_sentences_and_its_loss() -> None:
    """Its own, and no two the same; a formula is a line or two that begin with a name of a loss."""
    classes = set(models().values())
    assert len(classes) >= 20
    for kind in classes:
        assert {"idea", "formula"} <= set(vars(kind)), kind
        assert len(re.findall(r"[^.]+\.(?: |$)", kind.idea)) == 2 and kind.idea.endswith("."), kind.idea
        assert all(re.match(r"L(_[DG])? = \S", line) for line in kind.formula.splitlines()), kind.formula
    assert len({kind.idea for kind in classes}) == len(classes)


@pytest.fixture
def copied(finished: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    for family in ("gan", "ldm", "clip"):
        shutil.copytree(finished[family], tmp_path / "outputs" / family)
    return {path.name: path for path in (tmp_path / "outputs").iterdir()}


def test_facts_are_of_the_model_s_own_verbs_and_are_asked_once(
    copied: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gan, ldm, clip = (facts.kept(copied[family]) for family in ("gan", "ldm", "clip"))
    assert (gan.family, gan.kind, gan.likelihood, gan.losses) == ("GAN", "two players", False, "NonSaturating")
    assert "project" in gan.verbs and "reconstruct" not in gan.verbs and gan.ms > 0
    assert ldm.kind == "diffusion" and {"invert", "interpolate"} <= set(ldm.verbs)
    assert [Path(run).name for run in ldm.stands_on] == ["vae"]
    assert clip.sampling is None and clip.ms is None and clip.verbs == []
    names = {path.name for path in (copied["gan"] / facts.FOLDER).iterdir()}
    assert names == {facts.FACTS, facts.SAMPLES, facts.REAL, facts.WALK}
    monkeypatch.setattr(folders, "load", lambda *_, **__: pytest.fail("asked again"))
    (copied["clip"] / "summary.json").unlink()  # a run that was stopped has none
    assert facts.kept(copied["gan"]) == gan and facts.kept(copied["clip"]) == clip
    path = copied["gan"] / "checkpoints" / "manifest.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"files": [*told["files"], told["files"][-1] | {"images_seen": 960}]}))
    with pytest.raises(pytest.fail.Exception):
        facts.kept(copied["gan"])


def test_what_a_family_says_of_itself_is_that_of_today(
    copied: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.kept(copied["gan"])
    monkeypatch.setattr(models()["cgan"], "idea", "Another. One.")
    (told,) = facts.told([copied["gan"]], lambda _: None)
    assert told.idea == "Another. One." and told.formula == models()["cgan"].formula


def test_a_run_that_can_no_longer_be_asked_is_left_out(copied: dict[str, Path], tmp_path: Path) -> None:
    path, lines = copied["gan"] / "config.yaml", []
    path.write_text(path.read_text().replace("r2_gamma", "r3_gamma"))
    shutil.rmtree(copied["ldm"] / "frozen")
    (told,) = facts.told([copied["gan"], copied["ldm"], copied["clip"]], lines.append)
    left = [line for line in lines if "left out" in line]
    assert told.name == "clip" and [line.split(":")[0] for line in left] == ["gan", "ldm"]
    assert re.fullmatch(r"gan: left out, run=.*another version of the project.*", left[0]) and "error" not in left[0]
    with pytest.raises(UserError, match="another version"):
        facts.told([copied["gan"]], lines.append)


def test_a_set_may_have_fewer_images_than_a_drawn_step_takes(
    copied: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "TRACED", 10_000)
    assert facts.kept(copied["clip"]).training.parts


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("judge/valid", "judge/valid"), ("val/judge/valid", "judge/valid"), ("b2a/judge/valid", "judge/valid"),
        ("val/a2b/fd_classifier", "fd_classifier"), ("val/real/fid", "real/fid"),
    ],
)  # fmt: skip
def test_a_figure_is_known_by_its_name_in_each_case_of_a_model(key: str, name: str) -> None:
    assert facts.figure(key) == name


def test_runs_are_called_by_their_pages_or_by_their_folders(copied: dict[str, Path]) -> None:
    told = {one.name: one for one in facts.told([copied["gan"], copied["ldm"]], lambda _: None)}
    assert set(told) == {"cgan", "ldm"} and told["cgan"].tflop_below == 0
    below = folders.summary(Path(told["ldm"].facts.stands_on[0]))["tflop"]
    assert told["ldm"].tflop_below == below > 0
    again = shutil.copytree(copied["gan"], copied["gan"].with_name("other"))
    assert [one.name for one in facts.told([copied["gan"], again], lambda _: None)] == ["gan", "other"]


def test_runs_by_path_in_a_folder_or_the_newest_of_each_family(
    copied: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    outputs = copied["gan"].parent
    monkeypatch.chdir(outputs.parent)
    newer = shutil.copytree(copied["gan"], outputs / "newer")
    (newer / "config.yaml").touch()
    assert {run.name for run in chosen.runs([])} == {"newer", "ldm", "clip"}
    assert [run.name for run in chosen.runs(["outputs"])] == ["clip", "gan", "ldm", "newer"]
    shutil.rmtree(newer / "checkpoints")
    assert chosen.runs([str(newer), str(copied["ldm"])]) == [copied["ldm"]]
    assert "without a checkpoint: newer" in capsys.readouterr().err
    for words in ([str(newer)], ["nowhere"]):
        with pytest.raises(UserError):
            chosen.runs(words)
    shutil.rmtree(outputs)
    with pytest.raises(UserError, match="report.py=outputs/: no run with a checkpoint"):
        chosen.runs([])
