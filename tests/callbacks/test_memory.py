"""What a run is said to need of memory: tensors by hand, the line where there is too little, nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from atelier.callbacks.memory import Memory, _Live, gigabytes
from atelier.checkpoints.store import load, newest
from atelier.core import room
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import overrides


def test_what_lives_is_counted_once_and_goes() -> None:
    grown: list[int] = []
    given = torch.ones(10)
    with _Live("cpu", grown.append) as live:
        a = given + 1  # 40 bytes
        view, same = a[2:], a.mul_(2)
        b = torch.zeros(5, dtype=torch.float64)  # 40
        assert live.n == live.most == 80
        del b
        assert live.n == 40
        c = torch.cat([a, a])  # 80
    del a, view
    assert live.n == 120  # `same` is a
    del same
    assert (live.n, live.most, grown[-1]) == (80, 120, 120) and len(c) == 20


def test_backward_is_seen() -> None:
    x = torch.ones(1000, requires_grad=True)
    with _Live("cpu", lambda n: None) as live:
        y = x.exp()
        z = y.sin().sum()
        kept = live.n
        z.backward()
        del y, z
    assert kept == 4004 and live.most >= 8004  # exp's result is kept for sin and exp, sin's goes with the sum
    assert live.n == 4000  # the gradient


def told(tmp_path: Path, capsys: pytest.CaptureFixture, family: str, *words: str) -> tuple[str, dict]:
    train.train(composed(*overrides(family), "eval.every_images=1000", "eval.n_diagnosed=0", *words, run_dir=tmp_path))
    held = load(newest(tmp_path / "checkpoints"))
    states = flat({key: held[key] for key in ("state_dict", "optimizer_states")}, "")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert len(lines) <= 1
    return "".join(lines), states


def test_too_little_is_one_line_with_the_keys_and_changes_no_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, states = told(tmp_path / "enough", capsys, "ddpm")
    assert enough == ""
    monkeypatch.setattr(room, "there", lambda device: 1000)
    line, same = told(tmp_path / "little", capsys, "ddpm")
    assert differences(states, same) == []
    for key in ("accumulate=4", "data.batch_size=4", "model.net.checkpointing=true", "trainer.precision=bf16-mixed"):
        assert key in line
    assert "lora=attention, adapters alone, saves nearly" in line
    assert "callbacks.ema.half_lives=[] saves" in line and "frozen_precision" not in line
    line, _ = told(tmp_path / "gan", capsys, "gan")
    assert (
        "accumulate" not in line and "lora" not in line and "checkpointing" not in line and "data.batch_size=4" in line
    )


def test_it_is_told_within_the_batch_that_would_need_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights fit, what a step keeps does not: the line is there before the first batch has ended."""
    when: list[tuple[bool, int]] = []
    look = Memory._look

    def noted(self: Memory, *given: object) -> None:
        before = self._told
        look(self, *given)
        if self._told and not before:
            when.append((self._live.inside, self._batches))

    monkeypatch.setattr(Memory, "_look", noted)
    original = Memory.on_train_start

    def barely(self: Memory, *given: object) -> None:
        original(self, *given)
        self._there = self._before + self._taken(given[1], sum(self._parts.values()) + 10_000)

    monkeypatch.setattr(Memory, "on_train_start", barely)
    line, _ = told(tmp_path, capsys, "ddpm")
    assert when == [(True, 0)] and "are needed and" in line


def test_the_machine_says_what_there_is() -> None:
    device = torch.device("cpu")
    assert 10**7 < room.held(device) < room.there(device)
    assert gigabytes(314_000_000) == "0.31 GB" and gigabytes(14_400_000_000) == "14 GB"
