"""A run that is told to stop saves what there is, leaves nothing else, and says how to go on."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from atelier.callbacks.clock import Clock
from atelier.cli.messages import user_error
from atelier.core import stopping
from atelier.runs import pretrained
from tests.programs import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stops")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    done = python("-m", "tests.stops", str(folder), folder=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize(
    ("case", "code"), [("opening the set", 143), ("checking, Ctrl-C twice", 130), ("the classifier", 138)]
)
def test_before_the_first_batch_nothing_is_left(told: dict[str, Any], case: str, code: int) -> None:
    assert told[case]["code"] == code
    assert told[case]["err"] == "" and told[case]["files"] == []
    assert told[case]["out"].endswith("stopped by a signal before there was anything to save\n")


@pytest.mark.parametrize(
    ("case", "code", "images"),
    [
        ("Ctrl-C", 130, 32),
        ("SIGTERM", 143, 32),
        ("SIGHUP", 129, 32),
        ("SIGUSR1", 138, 32),
        ("saving, twice", 143, 32),
        ("the last evaluation", 143, 96),
    ],
)
def test_a_signal_to_run_and_loaders_saves(told: dict[str, Any], case: str, code: int, images: int) -> None:
    assert told[case]["code"] == code
    assert told[case]["err"] == (stopping.AGAIN.decode() if case == "Ctrl-C" else "")
    assert f"outputs/run/checkpoints/images_{images:012d}.ckpt" in told[case]["files"]
    last = told[case]["out"].splitlines()[-2:]
    assert last[0] == f"stopped by a signal at {images} images, saved"
    assert last[1].startswith("go on with: python train.py ") and last[1].endswith(" run_dir=outputs/run")
    assert " model=vae " in last[1]


def test_a_second_ctrl_c_ends_at_once(told: dict[str, Any]) -> None:
    """It came before the batch that would have been the last: what was saved before is what there is."""
    case = told["Ctrl-C, and again"]
    assert (case["code"], case["err"]) == (130, stopping.AGAIN.decode())
    assert [name for name in case["files"] if name.endswith(".ckpt")] == [
        "outputs/run/checkpoints/images_000000000024.ckpt"
    ]
    assert "saved" not in case["out"] and case["out"].splitlines()[-1].startswith("go on with: python train.py ")
    assert case["seconds"] < 10


def test_a_loader_that_was_killed_is_one_line(told: dict[str, Any]) -> None:
    case = told["a loader is killed"]
    assert case["code"] == 2 and "outputs/run/checkpoints/images_000000000024.ckpt" in case["files"]
    assert re.fullmatch(r"error: data\.num_workers=: a loader process .* Fix: data\.num_workers=0\n", case["err"])


@pytest.mark.parametrize("end", [ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError])
def test_a_tensor_that_a_dead_loader_sent_is_one_line(end: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own function asks a process that is gone for the memory of a tensor."""

    class Gone:
        def detach(self) -> int:
            raise end(errno.ECONNRESET, "gone")

    with pytest.raises(end) as caught:
        reductions.rebuild_storage_fd(torch.UntypedStorage, Gone(), 8)
    assert "a loader process is gone; memory may have run out" in user_error(caught.value).line()
    assert user_error(end(errno.ECONNRESET, "elsewhere")) is None


def test_a_bug_in_a_loader_stays_a_bug() -> None:
    assert user_error(RuntimeError("Caught ValueError in DataLoader worker process 0.\nit exited unexpectedly")) is None


@pytest.mark.parametrize(("script", "number"), [("train", signal.SIGTERM), ("sample", signal.SIGINT)])
def test_from_the_first_line_on(tmp_path: Path, script: str, number: int) -> None:
    """While modules are imported: the signal comes as soon as the process listens."""
    command = [sys.executable, str(ROOT / f"{script}.py")]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status, mask = Path(f"/proc/{child.pid}/status"), 1 << (signal.SIGHUP - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text()).group(1), 16) & mask:
        time.sleep(0.005)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What this process does with the signals comes back afterwards."""
    monkeypatch.setattr(stopping, "_heard", -1e9)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_nohup_ignores_stays_ignored(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.listen()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(SystemExit) as leaving:
        signal.raise_signal(signal.SIGUSR1)
    assert leaving.value.code == 138


def test_ranks_beside_the_first_have_nothing_to_tidy_up(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stopping.listen()
    assert {signal.getsignal(number) for number in stopping.SIGNALS} == {signal.SIG_DFL}
    with pytest.raises(SystemExit) as leaving:
        stopping.leave(signal.SIGTERM)  # out of training
    assert leaving.value.code == 0


def test_a_launchers_echo_is_no_second_request(
    handlers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    clock = Clock(8, None, 0)
    stopping.listen(clock._flag)
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)
    assert clock.signal == signal.SIGINT
    assert capfd.readouterr() == ("", stopping.AGAIN.decode())  # once
    monkeypatch.setattr(stopping, "ECHO", 0.0)
    with pytest.raises(SystemExit) as leaving:
        signal.raise_signal(signal.SIGINT)  # a second Ctrl-C
    assert leaving.value.code == 130
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # twice is once
    assert clock.signal == signal.SIGTERM
    assert capfd.readouterr() == ("", "")  # nobody sits there


def test_impatience_is_no_echo(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times a second: the fourth comes a second after the one that counted."""
    clock, now = Clock(8, None, 0), [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stopping.listen(clock._flag)
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.34
    with pytest.raises(SystemExit) as leaving:
        signal.raise_signal(signal.SIGINT)
    assert leaving.value.code == 130


def test_a_part_in_training_is_told_once_and_killed_by_a_second_ctrl_c(
    handlers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(stopping, "ECHO", 0.0)
    asked: list[str] = []
    process = SimpleNamespace(terminate=lambda: asked.append("save and end"), kill=lambda: asked.append("end"))
    with pretrained._handed_on() as (numbers, begun):
        begun.append(process)
        signal.raise_signal(signal.SIGINT)
        assert asked == ["save and end"] and capfd.readouterr() == ("", stopping.AGAIN.decode())
        signal.raise_signal(signal.SIGINT)
    assert asked == ["save and end", "end"] and numbers == [signal.SIGINT] * 2
    assert capfd.readouterr() == ("", "")


def test_tidying_up_is_not_disturbed(handlers: None) -> None:
    stopping.listen()
    with stopping.undisturbed():
        for number in stopping.SIGNALS:
            signal.raise_signal(number)
    assert all(signal.getsignal(number) is stopping.at_once for number in stopping.SIGNALS)


def test_nobody_reads_a_closed_terminal_or_pipe(tmp_path: Path) -> None:
    (leader, terminal), (reader, pipe) = os.openpty(), os.pipe()
    with (tmp_path / "file").open("w") as file:
        assert not any(map(stopping.unheard, (terminal, pipe, file.fileno())))
        os.close(leader)
        os.close(reader)
        assert stopping.unheard(terminal) and stopping.unheard(pipe)
    os.close(terminal)
    os.close(pipe)


def test_a_run_outlives_what_reads_its_lines(told: dict[str, Any]) -> None:
    """`python train.py | tee log` and Ctrl-C, which ends tee too; `python train.py -m ... | head` and its next job."""
    assert told["unheard"] == [0, 0, 0]
