"""The three scripts as a person starts them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from atelier.callbacks.table import read_rows
from atelier.cli import jobs
from tests.compose import composed
from tests.programs import python
from tests.tiny import COMMON, TINY

ROOT = Path(__file__).parents[1]


def environment(folder: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    return clean | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HOME": str(folder), "COLUMNS": "120"}


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=280)


def alone(folder: Path, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    done = start([sys.executable, str(ROOT / script), *words], folder)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def cli(folder: Path, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    done = python(str(ROOT / script), *words, folder=folder, environment=environment(folder))
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def run_folders(folder: Path) -> list[Path]:
    return sorted(path.parent.relative_to(folder) for path in folder.rglob("config.yaml"))


SELF = """
import json, multiprocessing, os, sys
print(json.dumps([__name__, sys.argv, os.getcwd(), dict(os.environ), multiprocessing.get_start_method()]))
print("loud", file=sys.stderr)
sys.exit(3)
"""


def test_a_fork_is_what_a_process_of_its_own_would_be(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SELF)
    words = [str(tmp_path / "program.py"), "seed=1"]
    fork = python(*words, folder=tmp_path, environment=environment(tmp_path))
    own = start([sys.executable, *words], tmp_path)
    assert (fork.returncode, fork.stdout, fork.stderr) == (own.returncode, own.stdout, own.stderr)


@pytest.mark.parametrize("words", [("--help",), ("--help", "model")])
def test_help_is_quick(tmp_path: Path, words: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        alone(tmp_path, "train.py", *words)
        seconds.append(time.monotonic() - started)
    assert statistics.median(seconds) <= 0.6


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "export.py", "demo.py"])
def test_help_imports_nothing_heavy(tmp_path: Path, script: str) -> None:
    program = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as leave:\n    assert not leave.code\n"
        "assert not {'torch', 'lightning', 'hydra'} & set(sys.modules)"
    )
    done = start([sys.executable, "-c", program, str(ROOT / script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: python {script}" in done.stdout


def test_every_key_is_shown(tmp_path: Path) -> None:
    told = OmegaConf.create(cli(tmp_path, "train.py", "--cfg", "job", "model=gan").stdout)
    assert told.model._target_ == "atelier.models.gan.GAN" and told.budget.minutes is None
    assert not list(tmp_path.iterdir())


def test_train_then_sample_then_evaluate(tmp_path: Path) -> None:
    """By the lines that training ends with; paths are told as they are seen from here."""
    told = alone(tmp_path, "train.py", *TINY["ddpm"]).stdout
    (folder,) = run_folders(tmp_path)
    assert folder.parts[:2] == ("outputs", "shapes_flow")
    assert str(tmp_path) not in told and str(tmp_path) not in (tmp_path / folder / "config.yaml").read_text()
    offered = [line.split() for line in told.splitlines() if line.startswith("  python ")]
    assert [words[1:3] for words in offered[:2]] == [["sample.py", f"run={folder}"], ["evaluate.py", f"run={folder}"]]

    told = cli(tmp_path, "sample.py", "run=last", "n=4", "out=pictures").stdout
    assert told == "4 images and grid.png in pictures\n"
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5

    told = cli(
        tmp_path, *offered[1][1:3], "eval.n_samples=8", "eval.batch_size=4", "eval.n_diagnosed=8", "metrics=none"
    ).stdout
    found, summary = json.loads(told), json.loads((tmp_path / folder / "summary.json").read_text())
    assert found["metrics"] == summary["metrics"] and found["run"] == str(folder)
    assert not list(tmp_path.glob("*.log")) and not list(tmp_path.rglob(".hydra"))


def test_a_latent_model_makes_its_first_stage_and_takes_it_again(tmp_path: Path) -> None:
    """From an empty folder to samples without another word; the next run finds what the first has trained."""
    words = [word for word in TINY["ldm"] if "first_stage" not in word]
    short = [*words, "model.first_stage.images=16", "budget.images=16", "callbacks.grids.every_images=16"]
    told = cli(tmp_path, "train.py", *short).stdout
    made = {folder.parts[1]: folder for folder in run_folders(tmp_path) if "frozen" not in folder.parts}
    assert set(made) == {"shapes_vae", "shapes_ldm"} and list((tmp_path / made["shapes_ldm"] / "samples").glob("*.png"))
    assert "experiment=shapes_vae is trained first, 16 images, about " in told
    assert f"first_stage: {made['shapes_vae']} (16 images, recon/psnr " in told
    below, above = (OmegaConf.load(tmp_path / made[f"shapes_{one}"] / "config.yaml") for one in ("vae", "ldm"))
    assert below.data == above.data and below.trainer.precision == above.trainer.precision == "32-true"
    again = cli(tmp_path, "train.py", *short, "seed=1", "run_dir=again").stdout
    assert f"first_stage: {made['shapes_vae']} (" in again and "trained first" not in again


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    assert (
        cli(tmp_path, "train.py", "check=true", *TINY["gan"]).stdout
        == "ok: every key, type and range fits; the set was not read\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    done = cli(tmp_path, "train.py", "-m", *TINY["gan"], "seed=0,-1,2", "logger=wandb", "budget.images=32", code=1)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert run_folders(sweep) == [Path("0"), Path("2")]
    table = (sweep / "table.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| 0", "seed=0"], ["| 1", "seed=-1"], ["| 2", "seed=2"]]
    assert "error: seed=-1" in table[3] and "error" not in table[2] + table[4]
    assert "\n".join(table) in done.stdout
    assert (done.stdout + done.stderr).count("error: seed=-1") == 2  # when it happens and in the table
    assert "error: seed=-1" in done.stderr and "Traceback" not in done.stderr
    assert {OmegaConf.load(sweep / job / "config.yaml").seed for job in "02"} == {0, 2}
    from tests.runs.test_loggers import of_kind

    logged = [of_kind(path.parent, "run")[0] for path in sorted(sweep.rglob("*.wandb"))]
    assert [run.run_group for run in logged] == [sweep.name] * 2


def test_a_sweep_of_several_ranks_in_one_process_is_refused(tmp_path: Path) -> None:
    done = cli(tmp_path, "train.py", "-m", *TINY["gan"], "seed=0,1", "trainer=ddp", code=2)
    assert done.stderr.startswith("error: trainer.devices=2: ") and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())


def two_ranks_are_one_run(tmp_path: Path, done: subprocess.CompletedProcess) -> None:
    (folder,) = run_folders(tmp_path)
    assert done.stdout.count("after 96 images") == 1
    rows = read_rows(tmp_path / folder / "metrics.csv")
    assert [row["images_seen"] for row in rows if "train/loss" in row] == list(range(8, 97, 8))
    summary = json.loads((tmp_path / folder / "summary.json").read_text())
    assert summary["protocol"]["precision"] == "bf16-mixed"
    assert len(list(tmp_path.rglob("summary.json"))) == 1


RANKS = [*TINY["ddpm"], "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "logger=tensorboard"]


def test_two_ranks_by_lightnings_launcher(tmp_path: Path) -> None:
    two_ranks_are_one_run(tmp_path, cli(tmp_path, "train.py", *RANKS, "trainer.devices=2"))


def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def stopped(cfg: DictConfig) -> None:
        sys.exit(143)

    folder = tmp_path / "outputs" / "run"
    cfg = composed("model=gan", "model.generator_optimizer.betas=[0.5,0.9]", run_dir=folder)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "images_8.ckpt").touch()
    with pytest.raises(SystemExit) as leaving:
        jobs.job(stopped, cfg)
    assert leaving.value.code == 143
    words = "model=gan 'model.generator_optimizer.betas=[0.5,0.9]' run_dir=outputs/run"
    assert capsys.readouterr().out == f"go on with: python train.py {words}\n"


@pytest.mark.slow
def test_two_ranks_by_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = start([*torchrun, str(ROOT / "train.py"), *RANKS, "trainer.devices=2"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two_ranks_are_one_run(tmp_path, done)


@pytest.mark.slow
def test_jobs_in_processes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY["gan"], "seed=0,-1"]
    done = alone(tmp_path, "train.py", *words, code=1)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert run_folders(sweep) == [Path("0")]
    assert "error: seed=-1" in (sweep / "table.md").read_text() and "error: seed=-1" in done.stderr


@pytest.mark.slow
def test_a_search_gets_its_objective(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    free = [word for word in TINY["vae"] if not word.startswith("model.net.width")]
    few = ["hydra.sweeper.n_trials=2", "objective=recon/psnr", *free, "budget.images=32"]
    cli(tmp_path, "train.py", "-m", "hparams_search=optuna", *few)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    best = OmegaConf.load(sweep / "optimization_results.yaml")
    reached = [json.loads((sweep / job / "summary.json").read_text())["metrics"]["recon/psnr"] for job in "01"]
    assert best.best_value == pytest.approx(max(reached))
    assert set(best.best_params) == {"model.optimizer.lr", "model.net.width"}


@pytest.mark.slow
def test_one_command_makes_the_project_that_a_newcomer_opens(tmp_path: Path) -> None:
    """docs/wandb.md: four families, one group, the same panels of what is judged."""
    from tests.runs.test_loggers import of_kind, rows

    cli(tmp_path, "train.py", "-m", "logger=wandb", "model=flow,ddpm,vae,gan", *COMMON)
    found = sorted(tmp_path.rglob("*.wandb"))
    runs = [of_kind(path.parent, "run")[0] for path in found]
    assert len({run.run_group for run in runs}) == 1
    assert [run.display_name for run in runs] == ["flow shapes 0", "ddpm shapes 1", "vae shapes 2", "gan shapes 3"]
    shared = set.intersection(*({name for row in rows(path.parent) for name in row} for path in found))
    judged = {f"val/judge/{name}" for name in ("valid", "loose", "coverage", "duplicates")}
    assert judged | {"sample/samples/path", "train/lr", "perf/images_per_second", "images_seen"} <= shared
