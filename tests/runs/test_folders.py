"""Run folders: locked, described, found again, gone on with, and what they stand on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train
from atelier.checkpoints.store import load, newest
from atelier.cli import jobs, messages
from atelier.core import stopping
from atelier.core.errors import UserError
from atelier.core.words import typed_value
from atelier.runs import build, folders, ground, pretrained, resume
from tests.callbacks.test_checkpoint import TMPFS
from tests.compose import composed
from tests.conftest import SECRETS, overrides


def line_of(*words: str, run_dir: Path | str) -> str:
    with pytest.raises(Exception) as error:
        train.train(composed(*words, run_dir=run_dir))
    known = messages.user_error(error.value)
    assert known is not None, repr(error.value)
    return known.line()


@pytest.fixture
def copied(tmp_path: Path, finished: dict[str, Path]) -> Path:
    """The finished vae, to go on with."""
    shutil.copytree(finished["vae"], tmp_path / "run")
    return tmp_path / "run"


VAE = [*overrides("vae"), "callbacks.grids.every_images=32", "checkpoint.best=recon/psnr"]


# ---- the lock


def test_a_second_run_in_a_folder_is_told_whose_it_is(provoked: dict) -> None:
    locks = provoked["locks"]
    owner = f"pid {locks['pid']} on {os.uname().nodename}"
    assert f"in use by {owner}. Fix: run_dir=ANOTHER_FOLDER, or wait" in locks["second"]


def test_a_lock_ends_with_its_run_and_leaves_nothing(provoked: dict) -> None:
    locks = provoked["locks"]
    assert locks["after"] == "held" and locks["empty"]


def test_the_lock_of_a_killed_run_is_no_obstacle(provoked: dict) -> None:
    """Also with loader processes that outlive it for a moment."""
    locks = provoked["locks"]
    assert locks["killed"] == -9 and locks["left"] and locks["stale"] == "held"


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lockf = fcntl.lockf

    def late(file: Any, how: int) -> None:
        lockf(file, how)
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").touch()

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(UserError, match="in use by another process"), folders.locked(tmp_path):
        pass


# ---- folders


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_file_where_the_folder_should_be_is_refused_at_once(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    started = time.monotonic()
    line = line_of(*overrides("vae"), run_dir=tmp_path / "file" / inside)
    assert line.startswith("error: run_dir=") and "the folder cannot be written (" in line
    assert time.monotonic() - started < 3
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_disk_is_refused_at_once(tmp_path: Path) -> None:
    """Root writes where mode bits forbid, so the disk itself is read-only."""
    mount = [*TMPFS[:4], TMPFS[4].replace("size=8m", "ro"), str(tmp_path)]
    refused = subprocess.run([*mount, "true"], capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"no tmpfs here: {refused.stderr.strip()}")
    program = (
        "from pathlib import Path; import sys, time; from atelier.runs import preflight\n"
        "started = time.monotonic()\n"
        "try: preflight.writable(Path(sys.argv[1]) / 'run')\n"
        "except preflight.UserError as error: print(time.monotonic() - started < 3, error.line())"
    )
    done = subprocess.run([*mount, sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith("True error: run_dir="), done.stderr
    assert "the folder cannot be written (Read-only file system)" in done.stdout


@pytest.mark.parametrize("name", ["a=b", "100%", "with  spaces", "\U0001f3a8 gemälde", "a,b", "[x]", "{n}"])
def test_folders_with_odd_names_work(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    words = [*overrides("gan"), "budget.images=8"]
    train.train(composed(*words, run_dir=folder))
    train.train(composed(*words, "budget.images=16", run_dir=folder))
    loaded = folders.load(folders.find(str(folder)), ema=True)
    assert loaded.images_seen == 16 and loaded.cfg.run_dir == str(folder)


def test_a_folder_that_may_not_hold_a_run_yet(copied: Path) -> None:
    line = line_of(*VAE, "resume=never", run_dir=copied)
    assert "error: resume=never: " in line and "holds a run. Fix: run_dir=ANOTHER_FOLDER" in line


def test_found_by_path_or_as_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run with a checkpoint under outputs/"):
        folders.find("last")
    for i, name in enumerate(("older", "newer", "empty", "newer/frozen/first_stage")):
        folder = tmp_path / "outputs" / name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(finished["vae"] / "config.yaml", folder)
        os.utime(folder / "config.yaml", (i, i))
        if name != "empty":
            (folder / "checkpoints" / "images_000000000008.ckpt").touch()
    assert folders.find("last") == Path("outputs/newer")
    assert folders.find(str(finished["vae"])) == finished["vae"]
    with pytest.raises(UserError, match="error: run=nowhere: no run folder"):
        folders.find("nowhere")


# ---- going on


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.net.width=8", "model.net.width"),
        ("model.optimizer.lr=1", "model.optimizer.lr"),
        ("data.batch_size=16", "data.batch_size"),
        ("data.n_train_scenes=30", "data.n_train_scenes"),
        ("data.flip=true", "data.flip"),
        ("callbacks.ema.ramp=0.5", "callbacks.ema.ramp"),
        ("seed=1", "seed"),
        ("channels_last=true", "channels_last"),
    ],
)
def test_what_makes_another_run_is_refused_by_its_key(copied: Path, word: str, key: str) -> None:
    before = newest(copied / "checkpoints").read_bytes()
    line = line_of(*VAE, word, run_dir=copied)
    assert line.lower().startswith(f"error: {word}: ")
    assert "was started with " in line and f"Fix: {key}=" in line
    assert newest(copied / "checkpoints").read_bytes() == before


def test_another_family_is_refused(copied: Path) -> None:
    assert line_of(*overrides("gan"), run_dir=copied).startswith("error: model=cgan: ")


@pytest.mark.parametrize(
    "word",
    ["budget.images=112", "budget.minutes=5", "data.num_workers=2", "logger=tensorboard", "eval.n_samples=4",
     "eval.every_images=64", "checkpoint.every_images=8", "checkpoint.best=null", "trainer=auto", "data.budget=7"],
)  # fmt: skip
def test_what_does_not_is_free(copied: Path, word: str) -> None:
    cfg = composed(*VAE, word, run_dir=copied)
    assert resume.reconcile_config(cfg, copied) is cfg


def test_a_run_from_before_a_key_goes_on_with_its_default(copied: Path) -> None:
    stored = OmegaConf.load(copied / "config.yaml")
    del stored["channels_last"]
    OmegaConf.save(stored, copied / "config.yaml")
    cfg = composed(*VAE, run_dir=copied)
    assert resume.reconcile_config(cfg, copied) is cfg
    assert line_of(*VAE, "channels_last=true", run_dir=copied).startswith("error: channels_last=True: ")


def test_a_folder_that_was_moved_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    cfg = composed(*VAE, run_dir="run")
    assert resume.reconcile_config(cfg, Path("run")).callbacks.table.path == "run/metrics.csv"


def test_a_finished_run_says_so_and_how_to_extend_it(copied: Path, capsys: pytest.CaptureFixture) -> None:
    before = newest(copied / "checkpoints").read_bytes()
    train.train(composed(*VAE, run_dir=copied))
    said = " ".join(capsys.readouterr().out.split())
    assert f"this run was finished; budget.images=192 run_dir={copied} extends it" in said
    assert newest(copied / "checkpoints").read_bytes() == before
    train.train(composed(*VAE, "budget.images=112", run_dir=copied))
    assert re.search(r"took .* from 96 images on, ", " ".join(capsys.readouterr().out.split()))
    assert load(newest(copied / "checkpoints"))["callbacks"]["Clock"]["images_seen"] == 112
    assert OmegaConf.load(copied / "config.yaml").budget.images == 96  # written once


def test_a_run_that_is_not_at_its_end_says_how_far_it_is(copied: Path, capsys: pytest.CaptureFixture) -> None:
    folders.load_generator(copied, True, None)
    assert "so far" not in capsys.readouterr().err
    stored = OmegaConf.load(copied / "config.yaml")
    stored.budget.images = 2000
    OmegaConf.save(stored, copied / "config.yaml")
    folders.load_generator(copied, True, None)
    assert capsys.readouterr().err.endswith(f"{copied}: 96 of 2,000 images so far\n")


def test_config_is_plain_and_resolved(finished: dict[str, Path]) -> None:
    text = (finished["ddpm"] / "config.yaml").read_text()
    assert "${" not in text and "!!" not in text
    stored = OmegaConf.load(finished["ddpm"] / "config.yaml")
    assert stored.callbacks.clock.images == 96 and stored.model.net.image_size == 8 and "hydra" not in stored


# ---- what a run stands on


def test_the_first_stage_is_linked_and_named_by_its_hash(finished: dict[str, Path]) -> None:
    own, linked = finished["vae"] / "weights.safetensors", finished["ldm"] / "frozen/first_stage/weights.safetensors"
    assert own.stat().st_ino == linked.stat().st_ino
    first = OmegaConf.load(finished["ldm"] / "config.yaml").model.first_stage
    assert first.run == str(finished["vae"]) and len(first.sha256) == 64


@pytest.mark.parametrize("damage", ["replaced", "missing"])
def test_a_replaced_first_stage_is_refused_by_its_hash(tmp_path: Path, finished: dict[str, Path], damage: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished["ldm"], folder)
    path = folder / "frozen/first_stage/weights.safetensors"
    weights = load_file(path)
    path.unlink()
    if damage == "replaced":
        name = next(iter(weights))
        save_file(weights | {name: weights[name] + 1e-6}, path)
    words = [*overrides("ldm", finished["vae"]), "callbacks.grids.every_images=32"]
    assert "these are not the weights that this run stands on" in line_of(*words, run_dir=folder)
    with pytest.raises(UserError, match="these are not the weights"):
        folders.load(folder, ema=True)


def test_a_run_outlives_the_one_it_stands_on(tmp_path: Path, finished: dict[str, Path]) -> None:
    first, folder = tmp_path / "first", tmp_path / "run"
    shutil.copytree(finished["vae"], first)
    words = [*overrides("ldm", first), "budget.images=8"]
    train.train(composed(*words, run_dir=folder))
    shutil.rmtree(first)
    train.train(composed(*words, "budget.images=16", run_dir=folder))
    assert folders.load(folder, ema=True).images_seen == 16


@pytest.mark.parametrize("written", ["{}/", "./vae", "vae/"])
def test_the_folder_of_a_first_stage_is_the_same_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path], written: str
) -> None:
    """Else the command that began a run could not go on with it."""
    monkeypatch.chdir(finished["vae"].parent)
    words = [*overrides("ldm", written.format(finished["vae"])), "callbacks.grids.every_images=32"]
    first = resume.reconcile_config(composed(*words, run_dir=finished["ldm"]), finished["ldm"]).model.first_stage
    assert (first.run, len(first.sha256)) == (str(finished["vae"]), 64)


def test_a_folder_of_diffusers_is_a_first_stage_too(tmp_path: Path, finished: dict[str, Path]) -> None:
    """A finished first stage leaves one beside its weights; a run that stands on it has a copy."""
    given = shutil.copytree(finished["first_stage"] / "diffusers", tmp_path / "given")
    train.train(composed(*overrides("ldm", given), "budget.images=16", run_dir=tmp_path / "run"))
    shutil.rmtree(given)
    ours = folders.load(finished["first_stage"], ema=True).model.net
    theirs = folders.load(tmp_path / "run", ema=True).model.codec.autoencoder.net
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(theirs.encode(x), ours.encode(x))
    torch.testing.assert_close(theirs.decode(ours.encode(x)[0]), ours.decode(ours.encode(x)[0]))


def test_an_unfinished_first_stage_is_refused(tmp_path: Path, finished: dict[str, Path]) -> None:
    (tmp_path / "first").mkdir()
    shutil.copy(finished["vae"] / "config.yaml", tmp_path / "first")
    line = line_of(*overrides("ldm", tmp_path / "first"), run_dir=tmp_path / "run")
    assert "no finished run lies there. Fix: model.first_stage.run=auto" in line


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pretrained.Plan]:
    """What the first stage of `model=ldm` and these words would be, in a folder without runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "OUTPUTS", Path("outputs"))
    return lambda *words: pretrained.plan("first_stage", composed("model=ldm", *words))


def kept(name: str, cfg: DictConfig, age: int, done: bool = True, images: str | None = None) -> Path:
    """A run folder of this config under outputs/."""
    folder = Path("outputs", name)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    os.utime(folder / "config.yaml", (age, age))
    images = images or build.data(cfg).fingerprint("train")
    (folder / "ground.json").write_text(json.dumps({"images": images}))
    (folder / ("weights.safetensors" if done else "checkpoints/images_000000000008.ckpt")).touch()
    return folder


DATA = ["data.n_train_scenes=20", "data.n_test_scenes=16"]


def test_auto_takes_the_newest_finished_run_that_would_be_trained_now(plan: Callable) -> None:
    cfg = plan(*DATA).cfg
    kept("older", cfg, 1)
    good = kept("newer", OmegaConf.merge(cfg, {"seed": 5, "data": {"seed": 5}, "eval": {"n_samples": 9}}), 2)
    kept("unfinished", cfg, 3, done=False)
    others = ({"data": {"image_size": 32}}, {"budget": {"images": 7}}, {"model": {"net": {"width": 8}}})
    others += ({"data": {"batch_size": 7}}, {"data": {"limit": 8}}, {"model": {"beta": 2.0}})
    for k, other in enumerate(others):
        kept(f"other{k}", OmegaConf.merge(cfg, other), 10 + k, images="the same")
    kept("other_pixels", cfg, 20, images="others under the same names")
    assert pretrained.finished(plan(*DATA)) == good
    assert pretrained._unfinished(plan(*DATA)) == Path("outputs/unfinished")
    assert pretrained._unfinished(plan(*DATA, "seed=1")) is None  # it would refuse to go on with another seed
    assert pretrained.finished(plan(*DATA, "model.first_stage.images=64")) is None


def test_a_longer_run_in_the_same_folder_is_another(plan: Callable) -> None:
    """config.yaml is written once: a run that was extended has its first budget there."""
    folder = kept("extended", plan(*DATA).cfg, 1)
    (folder / "summary.json").write_text(json.dumps({"metrics": {}, "images_seen": 400_000}))
    assert pretrained.finished(plan(*DATA)) is None


@pytest.mark.parametrize("done", [True, False])
def test_the_images_are_read_once_to_find_a_part(plan: Callable, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    made, told = build.data, plan(*DATA)
    kept("one", told.cfg, 1, done)
    opened: list[DictConfig] = []
    monkeypatch.setattr(build, "data", lambda cfg: opened.append(cfg) or made(cfg))
    found = [pretrained.finished(told), pretrained._unfinished(told)]
    assert found[not done] == Path("outputs/one") and len(opened) == 1


def test_two_parts_of_one_second_have_a_folder_each(plan: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "stamp", lambda: "now")
    given = []
    for _ in range(3):
        given.append(pretrained._new_folder(Path("outputs/shapes_vae")))
        given[-1].mkdir(parents=True)
    assert [folder.as_posix() for folder in given] == [f"outputs/shapes_vae/now{end}" for end in ("", "_2", "_3")]


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1\n", "model: {x: 1}\n", "\x00\xff", "data: 3\nmodel: 4\nchoices: 5\n"]
)
def test_a_config_that_is_none_of_ours_is_passed_over(plan: Callable, text: str) -> None:
    foreign = Path("outputs/foreign")
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "config.yaml").write_bytes(text.encode("latin1"))
    (foreign / "checkpoints/x.ckpt").touch()
    good = kept("good", plan(*DATA).cfg, 1)
    (good / "checkpoints/y.ckpt").touch()
    assert folders.all_runs() == [good] == [pretrained.finished(plan(*DATA))] == [folders.find("last")]


def test_a_part_is_trained_on_the_images_of_the_run_above(plan: Callable) -> None:
    """Every key that says which images there are, and what was typed of the others."""
    words = ["data=classes", "data.root='my pics (1), a=b'", "data.n_classes=3", "data.holdout=0.3", "data.limit=50"]
    words += ["data.background=grey", "data.on_bad_image=skip", "data.image_size=32", "data.flip=false"]
    words += ["trainer=cpu", "trainer.precision=32-true", "metrics=none", "logger=csv", "debug=overfit", "seed=7"]
    told = plan(*words)
    above = build.plain(composed("model=ldm", *words).data)
    assert build.plain(told.cfg.data) == above and (above["limit"], above["batch_size"]) == (50, 8)
    assert told.cfg.trainer.accelerator == "cpu" and told.cfg.metrics.net == "none" and told.cfg.seed == 7
    assert told.cfg.choices.model == "vae" and told.cfg.budget.images == 200_000


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        (["data=mnist"], "model=vae"),
        (["data=fashion_mnist", "model=vqprior"], "experiment=fashion_vqvae"),
        (["data=shapes"], "experiment=shapes_vae"),
        (["data=superres", "data.scale_factor=2", "model=srgan"], "experiment=clothing_srresnet"),
    ],
)
def test_a_recipe_of_another_set_gives_way(plan: Callable, words: list[str], recipe: str) -> None:
    told = plan(*words)
    assert told.name == recipe and f"data={told.cfg.choices.data}" in told.words
    if "data.scale_factor=2" in words:
        assert told.cfg.model.net.scale_factor == told.cfg.data.scale_factor == 2


@pytest.mark.parametrize(
    "above", [["experiment=shapes_srgan"], ["model=srgan", "data.task=low_resolution", "data.image_size=64"]]
)
def test_the_recipes_own_feeding_stays(plan: Callable, above: list[str]) -> None:
    """The batches of an experiment above are not those of the run below, which is short: that leaves work to do."""
    told = pretrained.plan("first_stage", composed(*above))
    below = composed("experiment=shapes_srresnet_short")
    assert told.name == "experiment=shapes_srresnet_short"
    assert told.cfg.data.batch_size == below.data.batch_size and told.cfg.budget.images == below.budget.images
    assert told.cfg.data.task == "low_resolution" and told.cfg.data.image_size == 64


@pytest.mark.parametrize(
    "value", ["a b", "it's", "a,b", "[x]", "{n}", "a=b", "2026_11_28", "007", "jürgen", "null", "back\\", ""]
)
def test_what_is_passed_on_is_read_as_it_was(value: str) -> None:
    typed = typed_value(value)
    assert composed("data=images", f"data.root={typed}").data.root == value


def test_a_dictionary_is_passed_on_as_it_was() -> None:
    columns = {"image": "a b", "source": None, "text": "it's", "instruction": None, "label": "{n}"}
    cfg = composed("data=hugging_face", f"data.columns={typed_value(columns)}")
    assert dict(cfg.data.columns) == columns


@pytest.mark.parametrize("devices", [1, 2])
def test_one_node_trains_a_part_also_for_a_run_of_many(plan: Callable, devices: int) -> None:
    """It knows nothing of the other nodes, and would wait for them."""
    planned = plan("trainer=ddp", "trainer.num_nodes=4", f"trainer.devices={devices}").cfg.trainer
    assert (planned.devices, planned.num_nodes) == (devices, 1)


def test_a_part_may_stand_on_a_part(finished: dict[str, Path], tmp_path: Path) -> None:
    """What it stands on is linked with it, and has its hash in the part's own config."""
    whole, below = finished["ldm"], "frozen/first_stage/weights.safetensors"
    cfg = composed(*overrides("ldm", whole), run_dir=tmp_path)
    pretrained._take("first_stage", whole, cfg, tmp_path, "model.first_stage.run=auto")
    copy, sha = tmp_path / "frozen" / "first_stage", cfg.model.first_stage.sha256
    assert (copy / below).stat().st_ino == (finished["vae"] / "weights.safetensors").stat().st_ino
    expected = load_file(whole / "weights.safetensors")
    for name, weight in build.part(copy, sha, cfg).state_dict().items():
        assert torch.equal(weight, expected[f"net.{name}"])
    (copy / below).unlink()
    with pytest.raises(UserError, match="these are not the weights that this run stands on"):
        build.part(copy, sha, cfg)


def test_auto_trains_a_part_that_stands_on_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be trained is tried untrained first, with what is below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_run", lambda command, lock: 1)
    words = ["model=srgan", "data.task=low_resolution", "model.first_stage.experiment=shapes_srgan"]
    assert "led, see above. Fix: python train.py experiment=shapes_srgan " in line_of(*words, run_dir="run")
    words = ["model=ldm", "model.first_stage.experiment=shapes_vqprior"]
    assert "it is no autoencoder. Fix: model.first_stage.experiment=shapes_vae" in line_of(*words, run_dir="run")


def test_auto_knows_a_run_by_what_it_stands_on(plan: Callable) -> None:
    """Of the latent models on two autoencoders, the one on that which would be trained now."""
    small = ["data.n_train_scenes=20", "data.n_test_scenes=16"]
    upper = pretrained.Plan([], composed("model=ldm", *small))
    lower = pretrained.plan("first_stage", upper.cfg).cfg
    others = OmegaConf.merge(lower, {"model": {"beta": 2.0}})
    for k, (name, below) in enumerate({"right": lower, "other": others, "bare": None, "fed": lower}.items()):
        folder = kept(name, OmegaConf.merge(upper.cfg, {"model": {"first_stage": {"run": name}}}), k)
        if below is not None:
            copy = kept(f"{name}/frozen/first_stage", below, k, images="others" if name == "fed" else None)
            assert copy.is_relative_to(folder)
    assert pretrained.finished(upper) == Path("outputs/right")


def test_what_cannot_fit_is_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_run", lambda *_: pytest.fail("trained"))
    words = (["model=ldm", "model.net.attention=[3]"], ["model=ldm", "data=unpaired", "data.conditions=[label]"])
    words += (["model=ldm", "model.first_stage.experiment=shapes_srresnet"],)
    words += (["model=vqprior", "model.first_stage.experiment=shapes_vae"], ["model=srgan", "data=shapes"])
    told = [line_of(*one, run_dir=tmp_path / "run") for one in words]
    assert "model.net.attention=[3]: no map has size 3" in told[0] and "data.conditions" in told[1]
    assert "it is no autoencoder. Fix: model.first_stage.experiment=shapes_vae" in told[2]
    assert "its latents are no codes" in told[3] and "SRGAN needs source" in told[4]


def test_auto_trains_it_in_a_process_without_this_ones_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Callable, capsys: pytest.CaptureFixture
) -> None:
    seen: dict[str, Any] = {}

    def started(command: list[str], env: dict[str, str], start_new_session: bool) -> subprocess.Popen:
        seen.update(command=command, env=env)
        return popen(["sh", "-c", "sleep 0.3; [ ${fail-0} = killed ] && kill -9 $$; exit ${fail-0}"])

    popen, lock = subprocess.Popen, tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(pretrained, "SIGN_EVERY", 0.1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "0")
    folder = pretrained._train("first_stage", plan(*DATA), lock)
    assert time.time() - lock.stat().st_mtime < 60  # the ranks that wait see that it goes on
    assert seen["command"][-1] == f"run_dir={folder}" and folder.parts[:2] == ("outputs", "shapes_vae")
    assert "PATH" in seen["env"]
    assert not [k for k in seen["env"] if k in pretrained.RANKS or k.startswith("TORCHELASTIC")]
    told = capsys.readouterr().out
    assert "experiment=shapes_vae is trained first, 200,000 images" in told and "model.first_stage.run=DIR" in told
    begun = kept("begun", plan(*DATA).cfg, 1, done=False)
    assert pretrained._train("first_stage", plan(*DATA), lock) == begun
    assert "going on with outputs/begun" in capsys.readouterr().out
    for code, problem in (("1", "failed, see above"), ("143", "was stopped"), ("killed", "was killed; memory")):
        monkeypatch.setenv("fail", code)
        with pytest.raises(UserError, match=problem):
            pretrained._train("first_stage", plan(*DATA), lock)
    with pytest.raises(UserError, match="no such page in conf/experiment"):
        plan("model.first_stage.experiment=shapes_vea")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_part_is_trained_ends_both(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part gets one SIGTERM, which it saves at, and this process waits for it."""
    monkeypatch.setattr(stopping, "_heard", 0.0)
    script = (
        "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.2), print('saved'), sys.exit(143)))\n"
    )
    script += f"import os; os.kill(os.getppid(), {int(number)}); time.sleep(30)"
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        pretrained._run([sys.executable, "-c", script], tmp_path / "lock")
    assert left.value.code == 128 + number and signal.getsignal(number) == before


@pytest.mark.parametrize("saves", [True, False])
def test_a_stop_while_a_part_is_trained_is_told_by_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, saves: bool
) -> None:
    def stopped(command: list[str], lock: Path) -> int:
        if saves:
            Path(command[-1].removeprefix("run_dir="), "checkpoints").mkdir(parents=True)
            Path(command[-1].removeprefix("run_dir="), "checkpoints/images_000000000008.ckpt").touch()
        stopping.leave(signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_run", stopped)
    with pytest.raises(SystemExit):
        jobs.job(train.train, composed("model=ldm", *DATA, run_dir=tmp_path / "run"))
    last = [line for line in capsys.readouterr().out.splitlines() if "save" in line]
    assert len(last) == 1 and ("before there was anything to save" in last[0]) == (not saves)
    assert not saves or last[0].endswith(" has learnt is saved, the same command goes on with it")


def test_of_two_experiments_on_another_set_the_first_by_name_is_taken() -> None:
    page = pretrained.ROOT / "conf" / "experiment" / "clothing_srresnet.yaml"
    assert pretrained._recipe(page, "shapes")[1] == "experiment=shapes_srresnet"


# ---- ranks


def test_torchruns_ranks_agree_on_one_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank asks at another second; the first answer is everyone's."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    stamps = []
    for second in ("01", "02"):
        now = SimpleNamespace(strftime=lambda _, second=second: f"2030-01-01_00-00-{second}")
        clock = SimpleNamespace(now=lambda now=now: now)
        monkeypatch.setattr(folders, "datetime", clock)
        stamps.append(folders.time_stamp())
    assert stamps == ["2030-01-01_00-00-01"] * 2
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert folders.time_stamp() == "2030-01-01_00-00-02_2"  # the second rank had asked for the first of this second


def test_another_rank_takes_no_lock_and_waits_for_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Path]
) -> None:
    cfg = composed(*VAE, run_dir=tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(resume.time, "sleep", lambda _: shutil.copy(finished["vae"] / "config.yaml", tmp_path))
    with folders.open_run(cfg) as folder:
        assert not (folder / "lock").exists()
        assert resume.reconcile_config(cfg, folder) is cfg


@pytest.mark.parametrize("alive", [True, False])
def test_another_rank_waits_as_long_as_the_first_shows_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, alive: bool
) -> None:
    """Rank 0 takes five times as long as the patience with it, training what the run stands on."""
    monkeypatch.setenv("RANK", "1")
    now = iter(range(0, 3000, 20))
    config, lock = tmp_path / "config.yaml", tmp_path / "lock"
    lock.touch()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if alive:
            os.utime(lock, (len(naps), len(naps)))
        if len(naps) == 15:
            config.write_text("model: {}")

    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=sleep))
    if alive:
        resume._wait(config, lock, 60.0)
        assert len(naps) == 15
        return
    cfg = composed(*VAE, "trainer.timeout_minutes=1", run_dir=tmp_path)
    with pytest.raises(UserError, match="rank 1 saw no sign of rank 0 there for 1 minutes") as error:
        resume.reconcile_config(cfg, tmp_path)
    assert len(naps) == 3
    messages.report(error.value)
    told = capsys.readouterr().err
    assert told.startswith("rank 1: error: run_dir=") and told.count("\n") == 1 and ". Fix: see its output; " in told


# ---- secrets


def test_a_secret_in_the_environment_is_in_no_file(provoked: dict) -> None:
    """Also with W&B's offline files, which hold a good deal of the process."""
    told = provoked["secret"]
    assert told["code"] == 0 and told["in"] == []
    assert told["files"] > 8 and told["wandb"] == 1
    assert told["environment"] == len(SECRETS)


def test_other_images_are_refused_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(*overrides("vae"), run_dir=tmp_path)
    data = build.data(cfg)
    resume.check_same_data(cfg, tmp_path, data)
    resume.check_same_data(cfg, tmp_path, data)
    assert ground.names(tmp_path) == data.names and data.names.labels[25] == "green ring"
    kept = json.loads((tmp_path / "ground.json").read_text())
    (tmp_path / "ground.json").write_text(json.dumps({"images": kept["images"], "ranks": 1}))  # a run of before
    assert ground.names(tmp_path) is None
    resume.check_same_data(cfg, tmp_path, data)
    assert json.loads((tmp_path / "ground.json").read_text()) == kept
    cfg.trainer.devices = 2
    resume.check_same_data(cfg, tmp_path, data)
    assert "other noise" in capsys.readouterr().out
    data.fingerprint = lambda split: "another"
    with pytest.raises(UserError, match="other images"):
        resume.check_same_data(cfg, tmp_path, data)


def test_a_run_finds_its_set_in_another_place(
    tmp_path: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    for part, n in (("train", 6), ("test", 4)):
        (tmp_path / "here" / part).mkdir(parents=True)
        for k in range(n):
            Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(tmp_path / "here" / part / f"{k}.png")
    words = ["data=images", f"data.root={tmp_path / 'here'}", f"data.cache={tmp_path / 'cache'}"]
    words += [word for word in overrides("vae") if word != "data=shapes" and "scenes" not in word]
    train.train(composed(*words, "budget.images=8", run_dir=tmp_path / "run"))
    (tmp_path / "here").rename(tmp_path / "there")
    words = ["metrics=none", "eval.n_samples=4", "eval.n_real=4"]
    with pytest.raises(UserError, match="no such folder"):
        evaluate.evaluate(composed(f"run={tmp_path / 'run'}", *words, config="evaluate"))
    evaluate.evaluate(composed(f"run={tmp_path / 'run'}", f"root={tmp_path / 'there'}", *words, config="evaluate"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["protocol"]["data"] == json.loads((tmp_path / "run/summary.json").read_text())["protocol"]["data"]
    with pytest.raises(UserError, match="root=x: the set of this run has no files. Fix: leave root out"):
        folders.load(finished["vae"], ema=True, root="x")


@pytest.mark.parametrize("change", ["argument", "weights"])
def test_a_run_of_another_version_is_one_line(tmp_path: Path, finished: dict[str, Path], change: str) -> None:
    folder = shutil.copytree(finished["gan"], tmp_path / "run")
    cfg = OmegaConf.load(folder / "config.yaml")
    if change == "argument":
        cfg.model.n_signs = 0
    else:
        cfg.model.generator.conditioning = "norm"
    OmegaConf.save(cfg, folder / "config.yaml")
    with pytest.raises(UserError) as error:
        folders.load(folder, ema=True)
    reason = {"argument": "unexpected keyword argument", "weights": "loading state_dict for GAN"}[change]
    line = error.value.line()
    assert line.startswith("error: run=") and reason in line and line.endswith("Fix: train it anew, or that version")
