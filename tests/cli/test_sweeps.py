"""What a sweep or a search is told of its jobs, and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atelier.cli import jobs, sweeps
from atelier.core.errors import UserError
from tests.compose import composed


@pytest.fixture(autouse=True)
def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.stopping, "listen", lambda: None)


def job(folder: Path, work: Any, direction: str | None) -> float | None:
    """One job of a sweep, or of a search that goes somewhere."""
    cfg = composed("model=vae", run_dir=folder)
    hydra = HydraConfig.instance().cfg.hydra
    with read_write(hydra), open_dict(hydra):
        hydra.mode, hydra.job.num = RunMode.MULTIRUN, 0
        if direction:
            hydra.sweeper = OmegaConf.create({"_target_": "optuna", "direction": direction})
    return jobs.job(work, cfg)


def fails(cfg: DictConfig) -> float:
    raise UserError("model", "VAE", "training has diverged", "a lower lr")


@pytest.mark.parametrize(("direction", "told"), [("maximize", -math.inf), ("minimize", math.inf), (None, math.nan)])
@pytest.mark.parametrize("work", [fails, lambda cfg: 1 / 0, lambda cfg: math.nan])
def test_a_job_without_a_figure_is_the_worst_of_a_search(
    tmp_path: Path, work: Any, direction: str | None, told: float
) -> None:
    assert job(tmp_path / "0", work, direction) == pytest.approx(told, nan_ok=True)


def test_an_earlier_failure_is_forgotten(tmp_path: Path) -> None:
    job(tmp_path / "0", fails, None)
    assert sweeps.job_summary(tmp_path / "0")["error"] == "error: model=VAE: training has diverged. Fix: a lower lr"
    assert job(tmp_path / "0", lambda cfg: 0.5, None) == 0.5
    assert sweeps.job_summary(tmp_path / "0")["error"] == ""
    job(tmp_path / "0", fails, None)
    assert not (tmp_path / "0" / "done").exists()


def searched(folder: Path, values: list[float], direction: str) -> DictConfig:
    """The end of Optuna's search over jobs that gave these values."""
    sweeper = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl")
    left = iter(values)

    def launch(overrides: Any, initial_job_idx: int) -> list[JobReturn]:
        done = JobReturn(status=JobStatus.COMPLETED)
        done.return_value = next(left)
        return [done]

    search = sweeper.OptunaSweeperImpl(None, direction, None, None, len(values), 1, 0.0, None, None, None)
    search.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    search.launcher, search.hydra_context = SimpleNamespace(launch=launch), SimpleNamespace()
    search.sweep(["model.optimizer.lr=tag(log, interval(1e-4, 1e-2))", "model.net.width=choice(24, 32)"])
    return OmegaConf.load(folder / "optimization_results.yaml")


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_search_goes_on_over_failed_jobs(tmp_path: Path, direction: str) -> None:
    """Beyond the ten that Optuna draws at random; with nan, which a sweep is told, it ends."""
    way = -1 if direction == "maximize" else 1
    values = [way * math.inf, 0.5, way * math.inf, *(0.5 - way * k / 100 for k in range(10)), way * math.inf]
    assert searched(tmp_path, values, direction).best_value == pytest.approx(0.5 - way * 0.09)
    with pytest.raises(ValueError, match="Values were told"):
        searched(tmp_path, [0.5, math.nan, 0.6], direction)


def started(objective: str | None, sweeper: dict[str, Any]) -> None:
    hydra = {"sweeper": sweeper, "launcher": {"_target_": "basic"}, "overrides": {"task": []}}
    cfg = OmegaConf.create({"objective": objective, "hydra": hydra, "trainer": {"devices": 1}})
    sweeps.Summary().on_multirun_start(cfg, "train")


@pytest.mark.parametrize(
    ("objective", "direction", "line"),
    [
        ("judge/loose", "minimize", "error: objective=judge/loose: higher is better, and hydra.sweeper.direction="
         "minimize. Fix: hydra.sweeper.direction=maximize"),
        ("recon/fd_classifier", "maximize", "error: objective=recon/fd_classifier: lower is better, and "
         "hydra.sweeper.direction=maximize. Fix: hydra.sweeper.direction=minimize"),
        (None, "maximize", "error: objective=None: a search needs a metric. Fix: objective=judge/valid"),
    ],
)  # fmt: skip
def test_a_search_goes_where_its_metric_is_better(
    capsys: pytest.CaptureFixture, objective: str | None, direction: str, line: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        started(objective, {"direction": direction})
    assert leaving.value.code == 2 and capsys.readouterr().err == f"{line}\n"


def test_what_is_right_starts() -> None:
    started("judge/loose", {"direction": "maximize"})
    started("fid", {"direction": "minimize"})
    started(None, {"max_batch_size": None})


def test_a_table_of_three_with_one_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Cells stand under their names, and a line of several choices stays one cell."""
    for number, (metrics, note, text) in enumerate(
        [
            ({"judge/valid": 0.5, "bpd": 3.25, "real/fid": 1.0}, "done", ""),
            ({"judge/valid": 0.25}, "error.txt", "error: metrics=x: no such page. Fix: metrics=auto|none\n"),
            ({"bpd": None}, "done", ""),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        summary = {"metrics": metrics, "protocol": {}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "overrides.txt").write_text(f"model=vae\nseed={number}\n")
        (folder / note).write_text(text)
    cfg = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit) as leaving:
        sweeps.Summary().on_multirun_end(cfg, "train")
    assert leaving.value.code == 1
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines() == [
        "| job | overrides | judge/valid | bpd | error |",
        "| --- | --- | --- | --- | --- |",
        "| 0 | seed=0 | 0.5 | 3.25 |  |",
        r"| 1 | seed=1 | 0.25 |  | error: metrics=x: no such page. Fix: metrics=auto\|none |",
        "| 2 | seed=2 |  | nan |  |",
    ]
    assert table in capsys.readouterr().out


class Killed:
    """What submitit knows of a job that left no result."""

    job_id, state = "17_1", "TIMEOUT"

    def submission(self) -> SimpleNamespace:
        return SimpleNamespace(args=(["model=vae", "seed=1", "hydra.job.name=x"], "hydra.sweep.dir", 1, "id", {}))


def test_a_job_that_was_killed_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    from submitit.core.utils import UncompletedJobError

    def results(job: Any) -> list[str]:
        if isinstance(job, Killed):
            raise UncompletedJobError("has not produced any output")
        return ["figures"]

    monkeypatch.setattr(submitit.Job, "results", results)
    sweeps.outlive_killed_jobs(tmp_path, -math.inf)
    assert submitit.Job.results(None) == ["figures"]
    (returned,) = submitit.Job.results(Killed())
    assert returned.return_value == -math.inf
    row = sweeps.job_summary(tmp_path / "1")
    assert row["overrides"] == ["model=vae", "seed=1"]
    assert row["error"] == "its job 17_1 was ended from outside: TIMEOUT"
