"""What a run is said to cost, by hand; and that looking changes nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from atelier.callbacks import work
from atelier.callbacks.clock import Clock
from atelier.callbacks.table import read_rows
from atelier.callbacks.work import Work
from atelier.checkpoints.store import load, newest
from tests.compose import composed
from tests.conftest import overrides

BATCH = 8
PLAIN = 4 * 3 * 5  # a matrix of 3 x 5: 2 operations a weight and image forward, 2 backward


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def made(images: int = 100_000, minutes: float | None = None) -> Work:
    counted = Work(Clock(images, minutes, 0), Told(), SimpleNamespace(words=lambda: ""))
    counted.on_train_start(None, nn.Linear(3, 5))
    return counted


def trained(counted: Work, first: int, last: int, twice_every: int = 0, cast: bool = False) -> None:
    """Batches first .. last - 1, each `twice_every`-th of them with a second step."""
    trainer = SimpleNamespace(world_size=1, datamodule=SimpleNamespace(batch_size=BATCH))
    net = nn.Linear(3, 5)
    for number in range(first, last):
        counted.clock.images_seen = number * BATCH
        counted.on_train_batch_start(trainer, net, None, 0)
        for _ in range(2 if twice_every and number % twice_every == 0 else 1):
            with torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext():
                net(torch.ones(BATCH, 3)).sum().backward()
        counted.clock.images_seen += BATCH
        counted.on_train_batch_end(trainer, SimpleNamespace(device=torch.device("cpu")), None, None, 0)


@pytest.mark.parametrize("cast", [False, True])
def test_operations_by_hand(cast: bool) -> None:
    counted = made()
    trained(counted, 0, 6, cast=cast)
    assert counted.gflop_per_image == PLAIN / 1e9 and counted.tflop(1_000_000) == pytest.approx(PLAIN / 1e6)
    assert counted.words(10**13 // 3) == "200 TFLOP, 6e-08 GFLOP an image"


def step(net: nn.Module, x: torch.Tensor) -> None:
    """A gradient is asked of a leaf, and gone back through, as R1 does."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()


def test_gradients_of_gradients_are_counted_where_the_stock_counter_fails() -> None:
    """Each convolution: forward, for its input, back through that for both sides; the first also for x and weight."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3)), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="leaf node"), FlopCounterMode(display=False):
        step(net, x)
    with work._Operations() as counted:
        step(net, x)
    first, second = 2 * 2 * 27 * 4 * 64, 2 * 2 * 36 * 36  # forward, of both convolutions
    assert counted.n == 6 * first + 4 * second


def test_a_penalty_weighs_as_it_comes() -> None:
    """Every other batch is twice as dear: 0 to 3 are looked at, 61 stands for 58, 122 for 61, dear as it is."""
    counted = made()
    trained(counted, 0, 123, twice_every=2)
    assert counted.flop == PLAIN * BATCH * (2 + 1 + 2 + 1 + 58 + 2 * 61)
    assert counted.counted == 123 * BATCH


def test_a_run_goes_on_counting() -> None:
    counted, again = made(), made()
    trained(counted, 0, 30, twice_every=2)
    again.load_state_dict(counted.state_dict())
    trained(again, 30, 200, twice_every=2)
    straight = made()
    trained(straight, 0, 200, twice_every=2)
    assert again.state_dict() == straight.state_dict() and again.flop > counted.flop


def test_a_compiled_net_is_not_looked_into() -> None:
    counted, net = made(), nn.Linear(3, 5)
    net.compile(backend="eager")
    counted.on_train_start(None, net)
    trained(counted, 0, 6)
    assert counted.gflop_per_image is None and counted.tflop(100) is None and counted.words(100) == ""


def test_an_error_in_a_batch_ends_the_count() -> None:
    counted = made()
    counted.on_train_batch_start(SimpleNamespace(datamodule=SimpleNamespace(batch_size=BATCH)), None, None, 0)
    counted.on_exception(None, None, ValueError("no"))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize(("images", "minutes", "line"), [
    (100_000, None, "about 21 min on this device without judging (6 TFLOP, 0.06 GFLOP an image);"
     " budget.images=14_400 fits 3 min"),
    (10_000, None, "about 2 min on this device without judging (0.59 TFLOP, 0.06 GFLOP an image)"),
    (100_000, 5, "about 5 min on this device without judging (1.4 TFLOP, 0.06 GFLOP an image)"),
])  # fmt: skip
def test_how_long_it_will_take(images: int, minutes: float | None, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s a batch of 8: 14,400 images in 180 s; of 100,000 there are 99,840 left. Said once."""
    counted = made(images, minutes)
    monkeypatch.setattr(work.time, "monotonic", lambda: counted.clock.images_seen / BATCH / 10)
    counted.flop = PLAIN * 10**6 * 4 * BATCH  # of a larger net
    counted.counted = 4 * BATCH
    trained(counted, 4, 60)
    assert counted.progress.lines == [line]


@pytest.mark.parametrize("images", [20 * BATCH, 20 * BATCH - 3])
def test_nothing_is_foretold_after_the_last_batch(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end beyond the budget, from where the time to go would be below 0."""
    counted = made(images)
    monkeypatch.setattr(work.time, "monotonic", lambda: float(counted.clock.images_seen))
    trained(counted, 0, 20)
    assert counted.progress.lines == []


def test_a_run_that_goes_on_is_told_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its budget is no longer to be chosen."""
    counted = made()
    counted.clock.load_state_dict({"images_seen": 60_000})
    counted.load_state_dict({"flop": PLAIN * 10**6 * 60_000, "counted": 60_000})
    monkeypatch.setattr(work.time, "monotonic", lambda: counted.clock.images_seen / BATCH / 10)
    trained(counted, 7_500, 7_530)
    (line,) = counted.progress.lines
    assert line.startswith("about 8 min on this device without judging (2.4 TFLOP, 0.06 GFLOP") and "fits" not in line


def test_a_run_judged_at_once_is_told_nothing() -> None:
    counted = made()
    trained(counted, 0, 10)
    counted.on_validation_start(None, None)
    trained(counted, 10, 60)
    assert counted.progress.lines == []


@pytest.mark.parametrize("family", ["ddpm", "gan", "ldm"])
def test_weights_are_the_same_without_a_look(
    family: str, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One optimizer; two, with gradients of gradients; a frozen first stage. Four batches of 12 were looked at."""
    monkeypatch.setattr(Work, "on_train_batch_start", lambda *given: None)
    train.train(composed(*overrides(family, finished["vae"]), run_dir=tmp_path))
    looked, unseen = (load(newest(folder / "checkpoints")) for folder in (finished[family], tmp_path))
    assert looked["callbacks"]["Work"]["flop"] > 0 == unseen["callbacks"]["Work"]["flop"]
    for name, value in looked["state_dict"].items():
        assert torch.equal(value, unseen["state_dict"][name]), name


def test_the_share_of_the_peak_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 A100s in bf16: 624 TFLOP/s; 100 GFLOP an image at 1,560 images a second are a quarter of them."""
    counted = made()
    monkeypatch.setattr(work, "_on_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    trainer = SimpleNamespace(precision="bf16-mixed", world_size=2)
    model = SimpleNamespace(device=torch.device("cuda"), modules=list)
    counted.on_train_start(trainer, model)
    assert counted.utilisation(1560.0) is None  # nothing was counted yet
    counted.flop, counted.counted = 100 * 10**9 * 8, 8
    assert counted.utilisation(1560.0) == pytest.approx(0.25)


def test_of_a_device_that_is_not_known_there_is_no_share() -> None:
    counted = made()
    counted.flop, counted.counted = 10**12, 8
    assert counted.peak is None and counted.utilisation(100.0) is None


def test_it_stands_in_the_table_and_in_the_closing_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of a CPU that is taken for a device of 1 TFLOP/s."""
    monkeypatch.setattr(work, "_on_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "any")
    monkeypatch.setattr(work, "peak", lambda device, precision: 1.0)
    train.train(composed(*overrides("gan"), "metrics=none", run_dir=tmp_path))
    rows = [row for row in read_rows(tmp_path / "metrics.csv") if "perf/mfu" in row]
    assert len(rows) == 12  # a row every 8 images
    each = load(newest(tmp_path / "checkpoints"))["callbacks"]["Work"]
    speed = rows[-1]["perf/images_per_second"]
    assert rows[-1]["perf/mfu"] == pytest.approx(each["flop"] / each["counted"] * speed / 1e12)
    assert "% of the device's peak while training (MFU)" in capsys.readouterr().out
