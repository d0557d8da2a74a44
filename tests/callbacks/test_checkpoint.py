"""Checkpoints outlive kills, full disks, damage and malice; what lies in them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import train
from atelier.callbacks.checkpoint import Checkpoints, lower_is_better
from atelier.callbacks.clock import Clock
from atelier.callbacks.table import read_rows
from atelier.checkpoints import store
from atelier.checkpoints.safe_io import SafeIO
from atelier.checkpoints.store import Manifest, load, newest, sha256
from atelier.core.errors import UserError
from tests import stock
from tests.compose import composed
from tests.conftest import faults, overrides

FAMILIES = ["vae", "ddpm", "gan", "ldm"]
MOMENTS = 12
TMPFS = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=8m t "$0" && exec "$@"']


def saved(folder: Path, *images_seen: int) -> list[Path]:
    paths = [folder / f"images_{n:012d}.ckpt" for n in images_seen]
    for n, path in zip(images_seen, paths, strict=True):
        SafeIO().save_checkpoint({"callbacks": {"Clock": {"images_seen": n}}, "w": torch.arange(5_000) + n}, path)
    return paths


def test_a_runaway_that_no_look_met_is_not_saved(tmp_path: Path) -> None:
    """On a GPU what is reported is looked at now and then, and before each save."""
    clock, kept = Clock(100, None, 0), []
    clock.images_seen = 24
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(
        strategy=strategy, datamodule=SimpleNamespace(batch_size=8), save_checkpoint=lambda *_, **__: kept.append(1)
    )
    model = SimpleNamespace(
        reported={"fake_logit": torch.tensor(9e3)}, divergence_limits={"fake_logit": 1e4}, state_dict=dict
    )
    checkpoints = Checkpoints(
        8,
        None,
        str(tmp_path),
        clock,
        SimpleNamespace(broadcast_buffers=lambda model: None, update_statistics=lambda model: None),
    )
    checkpoints.save(trainer, model)
    model.reported["fake_logit"] *= 2
    with pytest.raises(UserError, match="fake_logit is 1.8e.04 in step 3; the last good checkpoint stays"):
        checkpoints.save(trainer, model)
    assert kept == [1]


# ---- kills


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(provoked: dict) -> None:
    told = provoked["writing"]
    assert len(told) == MOMENTS
    for moment, seen in told.items():
        assert seen["code"] == -9 and seen["whole"], moment
        listed = "dropped" in moment
        assert seen["seen"] == (24 if listed else 16), moment
        assert seen["left"] == ([24, 32] if listed else [16, 24]), moment


def test_lightnings_save_loses_the_old_checkpoint_to_a_kill(provoked: dict) -> None:
    """Where the temporary folder is another disk; why SafeIO is there."""
    assert provoked["stock"] == {"code": -9, "bytes": 1000}


@pytest.mark.parametrize("moment", ["first", "rotation", "best"])
def test_a_run_killed_between_save_and_rotation_ends_as_if_it_was_not(provoked: dict, moment: str) -> None:
    told = provoked["going_on"]
    assert told[moment]["codes"] == [-9, 0]
    assert told[moment]["differ"] == []
    assert told[moment]["files"] == told["straight"]


def test_lightnings_checkpoints_count_the_steps_of_all_optimizers(tmp_path: Path) -> None:
    """`every 4 steps` is every 2 batches of a gan; why Checkpoints goes by images."""
    stock.fit(tmp_path, 4, ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1))
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


# ---- damage


@pytest.mark.parametrize("cut", range(20))
def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture, cut: int) -> None:
    older, newer = saved(tmp_path, 8, 16)
    whole = newer.read_bytes()
    newer.write_bytes(whole[: len(whole) * cut // 20])
    assert newest(tmp_path) == older
    assert damaged_lines(capsys) == 1


def damaged_lines(capsys: pytest.CaptureFixture) -> int:
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") and "the one before is taken" in line for line in lines)
    return len(lines)


@pytest.mark.parametrize("kind", ["flip", "html", "missing"])
def test_other_damage_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    older, newer = saved(tmp_path, 8, 16)
    whole = bytearray(newer.read_bytes())
    whole[len(whole) // 2] ^= 1
    newer.write_bytes(whole if kind == "flip" else b"<html><body>Quota exceeded</body></html>")
    if kind == "missing":
        newer.unlink()
    assert newest(tmp_path) == older
    assert damaged_lines(capsys) == 1


@pytest.mark.parametrize("manifest", ["kept", "lost", "broken"])
def test_no_whole_checkpoint_is_an_error_and_no_fresh_start(tmp_path: Path, manifest: str) -> None:
    for path in saved(tmp_path, 8, 16):
        path.write_bytes(path.read_bytes()[:1000])
    if manifest != "kept":
        (tmp_path / "manifest.json").write_text("[]") if manifest == "broken" else (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        newest(tmp_path)


def test_nothing_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None


def test_a_lost_manifest_loses_no_run(tmp_path: Path) -> None:
    _, newer = saved(tmp_path, 8, 16)
    (tmp_path / "manifest.json").unlink()
    assert newest(tmp_path) == newer


def test_looking_at_a_run_that_goes_on_changes_nothing(tmp_path: Path) -> None:
    """evaluate.py during training; the temporary file is that of the next save."""
    saved(tmp_path, 8)
    (tmp_path / "images_000000000016.ckpt.tmp").write_bytes(b"half")
    newest(tmp_path)
    assert (tmp_path / "images_000000000016.ckpt.tmp").exists()


def test_the_order_is_that_of_images_and_not_of_the_file_times(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 8, 16)
    os.utime(older, (2e9, 2e9))
    assert newest(tmp_path) == newer


def test_a_damaged_newest_is_made_again(
    tmp_path: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    """The run goes back to the one before, drops what lies after it and stray files, and ends with the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(finished["gan"], folder)
    last = folder / "checkpoints/images_000000000096.ckpt"
    last.write_bytes(last.read_bytes()[:-10])
    stray = folder / "checkpoints/images_000000000080.ckpt.tmp"
    stray.write_bytes(b"half")
    words = [*overrides("gan"), "callbacks.grids.every_images=32"]
    train.train(composed(*words, "budget.minutes=1e-9", run_dir=folder))
    assert damaged_lines(capsys) == 1
    assert not stray.exists() and not last.exists()
    assert [f["images_seen"] for f in Manifest(folder / "checkpoints").read()["files"]] == [72, 80]
    train.train(composed(*words, run_dir=folder))
    assert damaged_lines(capsys) == 0
    assert [f["images_seen"] for f in Manifest(folder / "checkpoints").read()["files"]] == [80, 96]
    again, before = (load(newest(f / "checkpoints"))["state_dict"] for f in (folder, finished["gan"]))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_what_lies_after_the_checkpoint_gone_on_from_is_cut(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16)
    manifest = Manifest(tmp_path)
    manifest.mark_best("images_000000000016.ckpt", "fid", 1.0)
    manifest.cut(8)
    assert [f["images_seen"] for f in manifest.read()["files"]] == [8] and manifest.read()["best"] is None


# ---- disks


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second of four saves finds the disk full."""
    torch_save, calls = torch.save, []

    def full(data: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"some")
            raise OSError(28, "No space left on device")
        torch_save(data, file)

    monkeypatch.setattr(torch, "save", full)
    train.train(composed(*overrides("vae"), run_dir=tmp_path))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no checkpoint written" in line]
    assert len(warnings) == 1
    assert "No space left on device; 0 MB needed, " in warnings[0] and "MB free" in warnings[0]
    assert len(calls) == 4
    assert [f["images_seen"] for f in Manifest(tmp_path / "checkpoints").read()["files"]] == [72, 96]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("disk")
    refused = subprocess.run([*TMPFS, str(folder), "true"], capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"no tmpfs here: {refused.stderr.strip()}")
    return faults("full_disk,full_at_the_end", folder, *TMPFS, str(folder))


def test_a_disk_of_8_mb(small_disk: dict[str, Any]) -> None:
    told = small_disk["full_disk"]
    assert len(told["warned"]) == 2
    assert all("No space left on device; 3 MB needed, " in line for line in told["warned"])
    assert told["left"] == ["images_000000000024.ckpt", "images_000000000096.ckpt", "manifest.json"]
    assert told["newest"] == "images_000000000096.ckpt"


def test_a_disk_that_is_full_when_the_weights_are_exported(small_disk: dict[str, Any]) -> None:
    """Their writer tells it in words of its own."""
    told = small_disk["full_at_the_end"]
    assert len(told["warned"]) == 1 and "No space left on device" in told["warned"][0]
    assert told["images_seen"] == 16 and told["left"] == []


def test_a_file_that_reads_back_differently_never_replaces_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (older,) = saved(tmp_path, 8)
    fsync = os.fsync

    def lying(handle: int) -> None:
        fsync(handle)
        for path in tmp_path.glob("*.ckpt.tmp"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(os, "fsync", lying)
    saved(tmp_path, 16)
    assert "reads back differently" in capsys.readouterr().err
    assert newest(tmp_path) == older and sorted(p.suffix for p in tmp_path.iterdir()) == [".ckpt", ".json"]


def test_an_error_that_is_not_the_disks_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        saved(tmp_path, 8)


# ---- rotation and manifest


def test_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    saved(tmp_path, 8)
    manifest.mark_best("images_000000000008.ckpt", "judge/valid", 0.9)
    saved(tmp_path, 16, 24, 32, 40)
    assert sorted(int(p.stem[7:]) for p in tmp_path.glob("*.ckpt")) == [8, 32, 40]
    manifest.mark_best("images_000000000032.ckpt", "judge/valid", 0.95)
    assert sorted(int(p.stem[7:]) for p in tmp_path.glob("*.ckpt")) == [32, 40]


def test_a_best_that_was_not_written_leaves_the_older_best(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    saved(tmp_path, 8, 16, 24)
    manifest.mark_best("images_000000000016.ckpt", "fid", 5.0)
    manifest.mark_best("images_000000000032.ckpt", "fid", 4.0)
    assert manifest.read()["best"]["value"] == 5.0


def test_a_run_marks_its_best(tmp_path: Path) -> None:
    train.train(composed(*overrides("vae"), "checkpoint.best=recon/psnr", run_dir=tmp_path))
    rows = read_rows(tmp_path / "metrics.csv")
    value, seen = max((row["val/recon/psnr"], row["images_seen"]) for row in rows if "val/recon/psnr" in row)
    told = Manifest(tmp_path / "checkpoints").read()["best"]
    assert told == {"name": f"images_{seen:012d}.ckpt", "metric": "recon/psnr", "value": pytest.approx(value)}


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("fid", 1), ("a2b/fid", 1), ("fd_classifier", 1), ("kid", 1), ("bpd", 1), ("nll", 1), ("recon/lpips", 1),
     ("recon/fid", 1), ("judge/duplicates", 1), ("is", 0), ("precision", 0), ("recon/psnr", 0), ("pair/psnr_y", 0),
     ("pair/ssim", 0), ("judge/valid", 0), ("judge/label", 0), ("judge/coverage", 0), ("clip_score", 0),
     ("heldout/loss", 1), ("heldout/logsnr_-8", 1), ("gap", 1), ("memorisation", 1), ("condition_gain", 0),
     ("judge/combinations", 0), ("judge/places", 0), ("judge/recall", 0), ("codes/used", 0), ("codes/perplexity", 0)],
)  # fmt: skip
def test_direction_of_metrics(metric: str, lower: int) -> None:
    assert lower_is_better(metric) == bool(lower)


@pytest.mark.parametrize("metric", ["fid", "judge/valid"])
def test_keep_best_follows_the_direction(tmp_path: Path, metric: str) -> None:
    """The best is 1 of fid and 3 of a share; what is no number never is."""
    told = kept(tmp_path, metric, [math.inf, 2.0, 3.0, 1.0, math.nan, math.inf, -math.inf])
    assert told == ([16, 32] if metric == "fid" else [16, 24])


def test_a_best_that_is_no_number_is_taken_over(tmp_path: Path) -> None:
    """Of a run from before a perfect image counted as 100 dB."""
    saved(tmp_path, 4)
    Manifest(tmp_path).mark_best("images_000000000004.ckpt", "recon/psnr", math.inf)
    assert kept(tmp_path, "recon/psnr", [30.0, 20.0]) == [8]


def kept(folder: Path, metric: str, values: list[float]) -> list[int]:
    """After which evaluations a checkpoint was saved as the best so far."""
    clock = SimpleNamespace(images_seen=0, longest_save=0.0, guard=lambda trainer, model: None)
    ema = SimpleNamespace(broadcast_buffers=lambda model: None, update_statistics=lambda model: None)
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(reduce_boolean_decision=lambda x, all: x))
    marked: list[int] = []

    def save(path: Path, weights_only: bool) -> None:
        marked.append(clock.images_seen)
        saved(folder, clock.images_seen)

    trainer.save_checkpoint = save
    callback = Checkpoints(1000, metric, str(folder), clock, ema)
    for value in values:
        clock.images_seen += 8
        callback.keep_best(trainer, torch.nn.Linear(1, 1), {metric: value})
    assert Manifest(folder).read()["best"]["name"] == f"images_{marked[-1]:012d}.ckpt"
    return marked


def test_manifest_names_hash_and_images(finished: dict[str, Path]) -> None:
    folder = finished["ddpm"] / "checkpoints"
    told = json.loads((folder / "manifest.json").read_text())
    assert [f["images_seen"] for f in told["files"]] == [72, 96] and told["best"] is None
    for entry in told["files"]:
        assert entry["sha256"] == sha256(folder / entry["name"])
        assert load(folder / entry["name"])["callbacks"]["Clock"]["images_seen"] == entry["images_seen"]


# ---- malice


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("EVIL", str(mark))
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (path,) = saved(tmp_path, 8)
    torch.save({"state_dict": Evil()}, path)
    manifest = Manifest(tmp_path)
    manifest.add(path.name, sha256(path), 8)  # a careful attacker
    with pytest.raises(UserError) as error:
        load(newest(tmp_path))
    assert "not a safe, whole checkpoint (UnpicklingError)" in error.value.line()
    manifest.path.unlink()  # a careless one
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        newest(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("address", ["https://example.org/a.ckpt", Path("https://example.org/a.ckpt"), "s3://b/a.ckpt"])
def test_addresses_are_refused(address: Any) -> None:
    with pytest.raises(UserError, match="checkpoints are read from disk only"):
        load(address)


# ---- content

PLAIN = (torch.Tensor, int, float, str, bool, type(None))


def leaves(node: Any) -> list[Any]:
    if type(node) is dict or type(node).__name__ == "OrderedDict":
        assert all(isinstance(key, (str, int)) for key in node)
        return [leaf for child in node.values() for leaf in leaves(child)]
    return [leaf for child in node for leaf in leaves(child)] if type(node) in (list, tuple) else [node]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_hold_plain_values(finished: dict[str, Path], family: str) -> None:
    checkpoint = torch.load(newest(finished[family] / "checkpoints"), weights_only=True)
    assert {type(leaf) for leaf in leaves(checkpoint)} <= set(PLAIN)
    assert set(checkpoint["callbacks"]) == {"Clock", "Work", "EMA", "Diagnostics"}  # and so no metric net
    assert not [name for name in checkpoint["state_dict"] if "autoencoder" in name or "inception" in name.lower()]
    assert not checkpoint["lr_schedulers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_in_a_checkpoint_is_accounted_for(finished: dict[str, Path], family: str) -> None:
    """Weights, two averages of the averaged nets, two moments and a step of each trained tensor.

    A gan leaves its vector for "no condition" untrained, 1 % of nothing.
    """
    from atelier.runs import folders

    checkpoint = load(newest(finished[family] / "checkpoints"))
    model = folders.load(finished[family], ema=False).model
    weights = sum(t.numel() for t in model.state_dict().values())
    averaged = [getattr(model, name) for name in model.ema_nets]
    averages = 2 * sum(t.numel() for net in averaged for t in net.state_dict().values())
    moments = sum(2 * p.numel() + 1 for p in model.parameters())
    held = sum(leaf.numel() for leaf in leaves(checkpoint) if isinstance(leaf, torch.Tensor))
    assert 0.99 * (weights + averages + moments) < held <= weights + averages + moments


def test_size_is_that_of_the_numbers(tmp_path: Path) -> None:
    """Within 5 % of weights + averages + moments, at a size where tensors and not their names count."""
    words = ["budget.images=8", "model.net.width=32", "model.net.n_downs=2"]
    train.train(composed(*overrides("vae"), *words, run_dir=tmp_path))
    path = newest(tmp_path / "checkpoints")
    numbers = sum(leaf.numel() * leaf.element_size() for leaf in leaves(load(path)) if isinstance(leaf, torch.Tensor))
    assert numbers > 5_000_000
    assert path.stat().st_size <= 1.05 * numbers


def test_the_store_has_no_other_way_of_reading() -> None:
    text = Path(store.__file__).read_text()
    assert text.count("torch.load(") == 1 and "weights_only=True" in text
