"""What a person finds in W&B and TensorBoard, without an account and without a trace of anything private."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

import train
from atelier.callbacks.table import read_rows
from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from tests.compose import composed
from tests.conftest import overrides

BLOCK = 32 * 1024
CANARY = "sk-canary-7351"
PANELS = {"train", "val", "sample", "perf"}


def records(run: Path) -> list[Record]:
    """What an offline run wrote: a LevelDB log of 32 KiB blocks behind a header of 7 bytes."""
    raw, at, whole, found = next(run.glob("*.wandb")).read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            found.append(Record.FromString(whole))
            whole = b""
    return found


def of_kind(run: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(run) if record.WhichOneof("record_type") == kind]


def rows(run: Path) -> list[dict[str, Any]]:
    found = of_kind(run, "history")
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in found]


def config(run: Path) -> dict[str, Any]:
    return {item.key: json.loads(item.value_json) for item in of_kind(run, "run")[0].config.update}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four jobs of one process, in a repository with secrets, the third of them fails in its middle."""
    root = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(root))
        patch.setenv("OPENAI_API_KEY", CANARY)
        (root / "repository").mkdir()
        patch.chdir(root / "repository")
        notes = root / "repository" / "notes.txt"
        notes.write_text("nothing yet\n")
        as_me = "-c user.name=me -c user.email=me@example.org"
        remote = f"remote add origin https://me:{CANARY}@example.org/x.git"
        for words in ("init", remote, "add notes.txt", f"{as_me} commit -m first"):
            subprocess.run(["git", *words.split()], check=True, capture_output=True)
        notes.write_text(f"{CANARY}\n")  # a change for diff.patch
        told = {"root": root / "repository"}
        for job, family in enumerate(("ddpm", "gan", "failing", "vae")):
            words = [*overrides("vae" if family == "failing" else family), "callbacks.grids.every_images=48"]
            cfg = composed(*words, "logger=wandb", "logger.group=together", run_dir=f"sweep/{job}")
            if family == "failing":
                with patch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
                    broken.setattr("atelier.models.vae.VAE.training_step", fail_at(3))
                    train.train(cfg)
            else:
                train.train(cfg)
            told[family] = next(Path.cwd().glob(f"sweep/{job}/wandb/offline-run-*"))
        told["environment"] = {name for name in os.environ if name.startswith("WANDB")}
    return told


def fail_at(count: int) -> Any:
    from atelier.models.vae import VAE

    original, left = VAE.training_step, [count]

    def training_step(self: VAE, batch: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("in the middle")
        return original(self, batch)

    return training_step


@pytest.mark.parametrize("family", ["ddpm", "gan", "vae"])
def test_panels_rows_and_config(jobs: dict[str, Any], family: str) -> None:
    found = rows(jobs[family])
    panels = {name.split("/")[0] for row in found for name in row if "/" in name}
    assert panels == PANELS
    assert [row["_step"] for row in found] == [row["images_seen"] for row in found] == list(range(8, 97, 8))
    kept = read_rows(jobs[family].parents[1] / "metrics.csv")
    logged = {(row["images_seen"], k): v for row in found for k, v in row.items() if k.startswith(("train/", "val/"))}
    for row in kept:
        for name, value in row.items():
            if name.startswith(("train/", "val/")):
                assert logged[row["images_seen"], name] == pytest.approx(value, nan_ok=True), name
    shown = config(jobs[family])
    page = {"ddpm": "flow", "gan": "cgan", "vae": "vae"}[family]
    expected = {"model": page, "data": "shapes", "experiment": None, "seed": 0}
    assert {name: shown[name] for name in expected} == expected
    assert shown["settings"]["data"]["image_size"] == 8 and shown["settings"]["budget"]["images"] == 96


def test_the_step_of_every_panel_is_images_seen(jobs: dict[str, Any]) -> None:
    metrics = of_kind(jobs["ddpm"], "metric")
    assert [m.name for m in metrics if m.name] == ["images_seen"]
    assert {(m.glob_name, m.step_metric) for m in metrics if m.glob_name} == {("*", "images_seen")}


@pytest.mark.parametrize("family", ["ddpm", "vae"])
def test_sample_grids_are_there(jobs: dict[str, Any], family: str) -> None:
    names = {"ddpm": ["samples"], "vae": ["samples", "reconstructions"]}[family]
    for name in names:
        paths = [row[f"sample/{name}/path"] for row in rows(jobs[family]) if f"sample/{name}/path" in row]
        assert len(paths) == 2  # at 48 and 96 images
        assert all((jobs[family] / "files" / path).stat().st_size > 100 for path in paths)


def test_each_job_is_a_run_of_its_own_in_one_group(jobs: dict[str, Any]) -> None:
    runs = [of_kind(jobs[family], "run")[0] for family in ("ddpm", "gan", "failing", "vae")]
    assert len({run.run_id for run in runs}) == 4
    assert {run.run_group for run in runs} == {"together"}
    assert [run.display_name for run in runs] == ["flow shapes 0", "cgan shapes 1", "vae shapes 2", "vae shapes 3"]
    assert len(rows(jobs["failing"])) == 2


def test_a_job_that_fails_ends_its_run_as_failed(jobs: dict[str, Any]) -> None:
    codes = {family: of_kind(jobs[family], "exit")[0].exit_code for family in ("ddpm", "gan", "failing", "vae")}
    assert codes == {"ddpm": 0, "gan": 0, "failing": 1, "vae": 0}
    assert "WANDB_MODE" not in jobs["environment"]


def test_nothing_private_is_written(jobs: dict[str, Any]) -> None:
    files = [path for path in (jobs["root"] / "sweep").rglob("*") if path.is_file()]
    assert len(files) > 40
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not [path for path in files if path.name == "diff.patch" or path.suffix == ".py"]


def test_says_that_it_is_offline_and_how_to_upload(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that is gone on with is the same W&B run, its steps following."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [*overrides("gan"), "logger=wandb"]
    train.train(composed(*words, "budget.images=48", run_dir=tmp_path))
    train.train(composed(*words, run_dir=tmp_path))
    told = capsys.readouterr()
    assert told.out.count("W&B: no credentials found, the run is logged offline") == 2
    folders = sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert [line.split()[-1] for line in told.out.splitlines() if "wandb sync" in line] == [str(f) for f in folders]
    assert len({of_kind(folder, "run")[0].run_id for folder in folders}) == 1
    assert [row["_step"] for row in rows(folders[1])][0] == 56
    assert "WARNING" not in told.err


def test_a_server_that_does_not_answer_costs_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With credentials; and a mode that was asked for is an error line."""
    import wandb

    from atelier.runs import loggers

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb.setup().settings, "base_url", "http://127.0.0.1:9")
    assert loggers._mode("auto", wandb) == "offline"
    assert "http://127.0.0.1:9 does not answer, the run is logged offline" in capsys.readouterr().out
    assert loggers._mode("online", wandb) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert loggers._mode("auto", wandb) == "disabled"


def test_a_refusal_of_wandb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("permission denied\nwith details")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(Exception, match="permission denied") as error:
        train.train(composed(*overrides("vae"), "logger=wandb", "logger.mode=online", run_dir=tmp_path))
    known = user_error(error.value)
    assert isinstance(known, UserError)
    assert known.line() == "error: logger.mode=online: permission denied. Fix: logger.mode=offline"


def test_tensorboard_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(composed(*overrides("vae"), "logger=tensorboard", run_dir=tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "val/judge/valid", "perf/images_per_second"} <= set(names)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8, 97, 8))
    csv = {row["images_seen"]: row["train/loss"] for row in read_rows(tmp_path / "metrics.csv") if "train/loss" in row}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(csv)
