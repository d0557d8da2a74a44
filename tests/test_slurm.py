"""examples/slurm.sh on a real SLURM: it goes on bit for bit, and errors end it.

Skipped where there is none: ../shared/cluster/slurm-up.sh brings one up on one machine, as root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atelier.callbacks.table import read_rows
from tests.campaign import differences
from tests.test_entry_points import environment
from tests.tiny import TINY
from tests.two_ranks import states

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT.parent / "shared" / "cluster"
SCRIPT = ROOT / "examples" / "slurm.sh"
LONG = ["budget.images=1600", "eval.every_images=1600", "checkpoint.every_images=200", "trainer.accelerator=cpu"]
WORDS = [*TINY["ddpm"], *LONG]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="there is no SLURM here"),
]


def said(*command: str, **more: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | more).stdout.strip()


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """SLURM's commands reach a controller; one that was not there before is ended."""
    before = os.environ.copy()
    up = CLUSTER / "slurm-up.sh"
    if up.exists() and os.geteuid() == 0:
        running = (Path(tempfile.gettempdir()) / "slurm/run/slurmctld.pid").exists()
        last = said("bash", str(up)).splitlines()[-1]
        os.environ |= {"SLURM_CONF": last.split()[1].partition("=")[2]}
        os.environ["PATH"] = f"{last.rpartition('PATH=')[2].partition(':')[0]}:{os.environ['PATH']}"
    else:
        running = True
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode:
        pytest.skip("no controller answers")
    yield
    if not running:
        said("bash", str(CLUSTER / "slurm-down.sh"))
    os.environ.clear()
    os.environ.update(before)


def submitted(folder: Path, *words: str, options: tuple[str, ...] = ()) -> str:
    """The number of a job of the script."""
    own = {"PYTHON": sys.executable, "TRAIN": str(ROOT / "train.py")} | environment(folder)
    clean = [f"--chdir={folder}", "--time=10", "--parsable", "--cpus-per-task=1", *options]
    command = ["sbatch", *clean, str(SCRIPT), *words]
    keep = {name: os.environ[name] for name in ("PATH", "SLURM_CONF")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=own | keep).stdout.strip()


def told(job: str) -> dict[str, str]:
    """What the controller knows of a job."""
    return dict(word.split("=", 1) for word in said("scontrol", "-o", "show", "job", job).split() if "=" in word)


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, said("squeue")
        time.sleep(1)


def ended(job: str, seconds: float = 600) -> dict[str, str]:
    until(lambda: told(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), seconds)
    return told(job)


def at_once(job: str) -> None:
    """SLURM holds a requeued job back for two minutes."""
    until(lambda: told(job)["JobState"] == "PENDING", 120)
    said("scontrol", "update", f"JobId={job}", "StartTime=now")


def run_of(folder: Path, job: str) -> Path:
    (found,) = folder.glob(f"outputs/*/job_{job}_*")
    return found


def seen(folder: Path, job: str) -> int:
    """Images that the run of a job has written a row of."""
    tables = list(folder.glob(f"outputs/*/job_{job}_*/metrics.csv"))
    rows = [row["images_seen"] for table in tables for row in read_rows(table)]
    return int(max(rows, default=0))


def test_two_ranks_requeued_are_the_run_that_was_not(slurm: None, tmp_path: Path) -> None:
    """Stopped once by a signal to the step and once by preemption, on two nodes of one task each."""
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = submitted(tmp_path, *WORDS, options=options)
    until(lambda: seen(tmp_path, job) >= 100, 300)
    said("scancel", "--signal=USR1", job)
    at_once(job)
    begun = seen(tmp_path, job)
    until(lambda: seen(tmp_path, job) >= begun + 100, 300)
    urgent = said("sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive", "-o/dev/null", "--wrap=sleep 1")
    until(lambda: told(job).get("Restarts") == "2", 120)
    ended(urgent)
    at_once(job)
    assert ended(job)["ExitCode"] == "0:0"
    log = (tmp_path / f"atelier-{job}.log").read_text()
    assert log.count("1,600 images in batches of 8; in ") == 3 and log.count("after 1,600 images") == 1
    assert re.findall(r"turn (\d) ended with (\d+)", log)[0] == ("1", "138")
    assert re.findall(r"turn (\d) ended with (\d+)", log)[-1] == ("3", "0")

    whole = submitted(tmp_path, *WORDS, options=options)
    assert ended(whole)["Restarts"] == "0"
    assert differences(states(run_of(tmp_path, job)), states(run_of(tmp_path, whole))) == []
    rows = [row["images_seen"] for row in read_rows(run_of(tmp_path, job) / "metrics.csv") if "train/loss" in row]
    assert rows == list(range(8, 1601, 8))


def test_an_error_ends_the_job(slurm: None, tmp_path: Path) -> None:
    """Of one of two ranks, too: its line is the only one, and SLURM does not start it again."""
    job = submitted(tmp_path, *WORDS, "start_from=/nowhere", options=("--ntasks-per-node=2",))
    state = ended(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    log = (tmp_path / f"atelier-{job}.log").read_text()
    (line,) = re.findall(r"^(?:rank \d+: )?error: .*", log, re.MULTILINE)
    assert line.startswith("error: start_from=/nowhere: no finished run lies there")
    assert f"== job {job}, turn 1 ended with 2" in log


def test_an_array_ends_before_its_time(slurm: None, tmp_path: Path) -> None:
    """Each task has a run of its own, with which it goes on when its first turn is over."""
    words = [*WORDS, "budget.images=1_000_000", "eval.every_images=1_000_000"]
    job = submitted(tmp_path, *words, options=("--array=1-2", "--time=2"))
    for task in "12":
        until(lambda task=task: told(f"{job}_{task}").get("Restarts") == "1", 400)
        at_once(f"{job}_{task}")
        until(lambda task=task: told(f"{job}_{task}")["JobState"] == "RUNNING", 120)
    logs = [path.read_text() for path in sorted(tmp_path.glob("atelier-*.log"))]
    stops = [int(re.search(r"the SLURM job ends: stopped at (\d+) images, saved", log).group(1)) for log in logs]
    folders = [run_of(tmp_path, f"{job}_{task}") for task in "12"]
    until(lambda: min(seen(tmp_path, f"{job}_{task}") for task in "12") > max(stops), 200)
    said("scancel", job)
    assert len(logs) == 2 and all(log.count("ended with 138") == 1 for log in logs)
    assert [re.search(r"^seed: (\d)", (f / "config.yaml").read_text(), re.M).group(1) for f in folders] == ["1", "2"]


def test_wrong_tasks_are_one_line_with_the_command(slurm: None, tmp_path: Path) -> None:
    """The command of the line runs in the same job."""
    words = [*TINY["vae"], "trainer.accelerator=cpu", "trainer.precision=32-true"]
    train = f"{sys.executable} {ROOT / 'train.py'} {' '.join(words)}"
    script = f"srun --nodes=2 --ntasks=3 {train} trainer=ddp trainer.devices=2 trainer.num_nodes=2 2>&1\n"
    script += f"{train} trainer=ddp trainer.devices=1 trainer.num_nodes=2 2>&1\n"
    script += f"srun -N2 -n2 --ntasks-per-node=1 {train} trainer=ddp trainer.devices=1 trainer.num_nodes=2"
    options = ["--nodes=2", "--ntasks=3", "--time=10", "--parsable", f"--chdir={tmp_path}", "-olog"]
    keep = {name: os.environ[name] for name in ("PATH", "SLURM_CONF")}
    command = ["sbatch", *options, f"--wrap={script}"]
    own = environment(tmp_path) | keep
    job = subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout.strip()
    assert ended(job)["ExitCode"] == "0:0"
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "error: trainer" in line]
    fix = "Fix: srun -N2 -n2 --ntasks-per-node=1 python train.py"
    assert lines[0].startswith("error: trainer.devices=2: srun put 3 processes on 2 nodes")
    assert lines[1].startswith("error: trainer.num_nodes=2: nobody has started the processes of the other 1 nodes")
    assert len(lines) == 2 and all(fix in line for line in lines)
    assert len(list(tmp_path.glob("outputs/*/*/summary.json"))) == 1


def test_a_killed_job_of_a_sweep_leaves_the_table(slurm: None, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.mem_gb=null"]
    words = [*TINY["vae"], "budget.images=10_000_000", "seed=0,1"]
    keep = {name: os.environ[name] for name in ("PATH", "SLURM_CONF")}
    command = [sys.executable, str(ROOT / "train.py"), "-m", *launcher, *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path) | keep, **streams)
    until(lambda: len(list(tmp_path.glob("outputs/sweeps/*/?/checkpoints/*.ckpt"))) >= 2, 400)
    (folder,) = tmp_path.glob("outputs/sweeps/*")
    jobs = said("squeue", "--noheader", "--format=%A %K", "--states=RUNNING").splitlines()
    first, second = (next(line.split()[0] for line in jobs if line.split()[1] == task) for task in "01")
    said("scancel", "--signal=KILL", "--full", first)
    said("scancel", "--signal=USR1", second)
    out, err = sweep.communicate(timeout=400)
    assert sweep.returncode == 1, err[-2000:]
    table = (folder / "table.md").read_text()
    assert table in out and "| 0 | seed=0 |" in table and "was ended from outside" in table
