"""A run that reads latents from a cache is the run that encodes, and what cannot be kept is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

import train
from atelier.checkpoints.store import load, newest
from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import DataModule
from atelier.data.latent_cache import KeptLatents, LatentCache
from atelier.models.ldm import LDM
from atelier.nets import conditioning
from atelier.nets.codec import LatentCodec
from atelier.runs import build, keeping, latents
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import overrides, shared, train_once

FLIP = ["data.flip=true", "data.image_size=16", "metrics=none", "eval.n_diagnosed=0"]
STAGES = {  # and words that make it tiny
    **{name: overrides(family) for name, family in (("vae", "vae"), ("ae", "ae"), ("vqgan", "first_stage"))},
    "autoencoder_kl": ["model=autoencoder_kl", "model.net.width=4", "model.net.multipliers=[1,2]"],
}
CLIP = "model=clip model.net.width=4 model.net.token_dim=8 model.net.heads=2 model.net.max_tokens=14".split()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which ldm stands on."""
    root = shared(tmp_path_factory) / "finished"
    root.mkdir(exist_ok=True)
    train_once(root, "vae", True)
    return root / "vae"


def changed(words: list[str], *more: str) -> DictConfig:
    """A config with more words that are plain values, which Hydra need not see."""
    return OmegaConf.merge(composed(*words), OmegaConf.from_dotlist(list(more)))


def ldm_on(stage: str, *more: str) -> tuple[LDM, DataModule]:
    """A fresh model on an untrained first stage, and its set."""
    torch.manual_seed(1)
    first = build.on_parts(composed(*STAGES[stage], "data.image_size=16"), {}).part()
    cfg = changed([*overrides("ldm"), *FLIP], *more)
    return build.on_parts(cfg, {"first_stage": first}), build.data(cfg)


def kept(model: LDM, data: DataModule, folder: Path) -> KeptLatents:
    """The training split by its latents, made by one rank."""
    channels, *sides = model.first_stage.latent_shape
    of = latents.identity(model.first_stage, data)
    cache = LatentCache(folder, of, data.trained_on(), (2 * channels, *sides), data.flip, rows=8)
    cache.begin()
    cache.fill(data.split("train"), model.moments, 3)
    cache.finish()
    return KeptLatents(data.split("train"), cache)


def line_of(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        work()
    assert len(error.value.line()) <= 200
    return error.value.line()


# ---- the same


@pytest.mark.parametrize(("stage", "mode"), [*((stage, "sample") for stage in STAGES), ("vae", "mode")])
def test_a_loss_with_the_cache_is_that_without(stage: str, mode: str, tmp_path: Path) -> None:
    """The same noise, times and nulls, of any first stage; some images are mirrored, some are not."""
    model, data = ldm_on(stage, f"model.codec.mode={mode}")
    images, cached = data.split("train"), kept(model, data, tmp_path)
    losses: list[list[float]] = []
    model.calibrate(lambda _: [data.chosen("train", range(20))["image"]])
    for split in (images, cached):
        batches = [split.read(indices, [generator(k) for k in indices]) for indices in ([0, 3, 5, 7], [19, 2, 2, 8])]
        losses.append([])
        for k, batch in enumerate(batches):
            torch.manual_seed(k)
            losses[-1].append(float(model.training_step(batch).detach()))
    assert "image" not in batches[0] and 2 <= images.beside([*range(8)], [generator(k) for k in range(8)])[1].sum() <= 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] != losses[0][1]


def test_the_same_images_lose_their_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = ldm_on("vae", "model.cond_dropout=0.4")
    images, cached = data.split("train"), kept(model, data, tmp_path)
    told: list[Tensor] = []
    original = conditioning.dropped_rows

    def noted(n: int, drop: float, device: torch.device) -> Tensor:
        told.append(original(n, drop, device))
        return told[-1]

    monkeypatch.setattr(conditioning, "dropped_rows", noted)
    for split in (images, cached):
        torch.manual_seed(0)
        for k in range(15):
            model.training_step(split.read([(k + i) % 20 for i in range(8)], [generator(k, i) for i in range(8)]))
    without, with_cache = torch.cat(told[:15]), torch.cat(told[15:])
    assert torch.equal(without, with_cache) and 0.3 < with_cache.float().mean() < 0.5


# ---- runs


def trained(folder: Path, vae: Path, *more: str) -> dict:
    """Weights, averages and optimizers at the end of a tiny run of ldm."""
    words = ["data.flip=true", "eval.n_diagnosed=0", "eval.every_images=1000", "budget.images=48"]
    train.train(composed(*overrides("ldm", vae), *words, *more, run_dir=folder))
    checkpoint = load(newest(folder / "checkpoints"))
    told = {k: checkpoint[k] for k in ("state_dict", "callbacks", "optimizer_states")}
    told["callbacks"] = {
        k: v for k, v in told["callbacks"].items() if "Work" not in k
    }  # what encoding costs is its own
    return flat(told, "")


def test_a_run_with_the_cache_is_one_without_to_rounding_and_resumes_bit_for_bit(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    encoded: list[int] = []
    original = LatentCodec.moments

    def noted(self: LatentCodec, x: Tensor) -> Tensor:
        encoded.append(len(x))
        return original(self, x)

    monkeypatch.setattr(LatentCodec, "moments", noted)
    plain = trained(tmp_path / "plain", vae)
    assert sum(encoded) == 20 + 48  # the scale of latents is measured on all 20
    encoded.clear()
    cached = trained(tmp_path / "run", vae, f"latent_cache={tmp_path / 'cache'}")
    assert sum(encoded) == 20 + 2 * 20  # each image and its mirror image
    said = capsys.readouterr().out
    assert f"training reads latents of 20 images and of as many mirror images, 0.0 MB in {tmp_path / 'cache'}" in said
    assert cached.keys() == plain.keys()
    (scale,) = (name for name in plain if "state_dict" in name and name.endswith("codec.scale"))
    assert torch.equal(cached[scale], plain[scale]) and plain[scale] != 1
    tensors = [name for name, value in plain.items() if isinstance(value, Tensor)]
    assert len(tensors) > 100
    for name in tensors:
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-3, atol=1e-4)
    encoded.clear()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    newest(tmp_path / "again/checkpoints").unlink()  # as if it had ended after its last checkpoint but one
    moved = shutil.move(tmp_path / "cache", tmp_path / "moved")
    assert differences(cached, trained(tmp_path / "again", vae, f"latent_cache={moved}")) == [] and encoded == []


def used(model: LDM, cache: Path | str, *words: str) -> Path:
    """The folder that a run with these words uses."""
    cfg = changed([*overrides("ldm"), *FLIP], f"latent_cache={cache}", *words)
    data = build.data(cfg)
    latents.keep(cfg, model, data)
    return data.latents.keywords["cache"].folder


def test_auto_is_a_folder_for_each_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path))
    (model, _), (ae, _) = ldm_on("vae"), ldm_on("ae")
    folders = [used(model, "auto", *words) for words in ([], ["data.limit=8"], ["data.flip=false"], ["data.seed=3"])]
    folders.append(used(ae, "auto"))
    assert len(set(folders)) == 4 and folders[0] == folders[3]
    assert {folder.parent for folder in folders} == {tmp_path / "latents"}


def test_an_error_of_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    other = UserError("latent_cache", "x", "the other rank's", "y")
    monkeypatch.setattr(ranks, "everyones", lambda x: [x, other])
    assert "the other rank's" in line_of(lambda: keeping.everywhere(lambda: True))
    monkeypatch.setattr(ranks, "everyones", lambda x: [x, True])
    assert keeping.everywhere(lambda: False) == [False, True]


# ---- what makes it stale


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(12):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator(k)).numpy()
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def of_folder(root: Path, tmp_path: Path, *more: str) -> dict:
    words = [f"data.root={root}", f"data.cache={tmp_path}", "data.image_size=8", *more]
    data = build.data(changed(["data=images", "data.root=x"], *words))
    data.prepare_data()
    torch.manual_seed(0)
    return latents.identity(torch.nn.Conv2d(1, 1, 1), data)


def test_files_that_were_touched_copied_or_moved_are_the_same_images(pictures: Path, tmp_path: Path) -> None:
    before = of_folder(pictures, tmp_path)
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    assert of_folder(pictures, tmp_path) == before
    copied = shutil.copytree(pictures, tmp_path / "copied")
    assert of_folder(copied, tmp_path) == before
    moved = shutil.move(pictures, tmp_path / "moved")
    assert of_folder(moved, tmp_path, "data.num_workers=2", "data.batch_size=3", "data.seed=5") == before


def test_other_pixels_options_and_weights_are_others(pictures: Path, tmp_path: Path) -> None:
    before = of_folder(pictures, tmp_path)
    for name, word in (("data.background", "data.background=black"), ("data.image_size", "data.image_size=16")):
        now = of_folder(pictures, tmp_path, word)
        assert next(key for key in now if now[key] != before[key]) == name
    Image.new("RGB", (8, 8)).save(pictures / "3.png")
    now = of_folder(pictures, tmp_path)
    assert [key for key in now if now[key] != before[key]] == ["content of the images"]
    net = torch.nn.Conv2d(1, 1, 1)
    hashed = keeping.net_hash(net)
    assert keeping.net_hash(net.to(torch.float64)) != hashed
    with torch.no_grad():
        net.float().bias.add_(1e-6)
    assert keeping.net_hash(net) != hashed


def test_a_stale_cache_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    model, data = ldm_on("vae")
    kept(model, data, tmp_path / "cache")
    line = line_of(lambda: used(model, tmp_path / "cache", "data.n_train_scenes=21"))
    assert "it was made with data.n_train_scenes=20, this run has 21" in line


# ---- what cannot be kept


def refusal(model: object, words: list[str], *more: str) -> str:
    cfg = changed(words, "latent_cache=x", *more)
    data = build.data(cfg)
    data.prepare_data()
    return line_of(lambda: latents.keep(cfg, model, data))


def test_what_trains_on_pixels_is_refused_by_its_option(pictures: Path, tmp_path: Path) -> None:
    model, _ = ldm_on("vae")
    ddpm = build.on_parts(composed(*overrides("ddpm")), {})
    assert "DDPM trains on no latents" in refusal(ddpm, overrides("ddpm"))
    files = [f"data.root={pictures}", f"data.cache={tmp_path}", "data.image_size=8"]
    line = refusal(model, ["data=edges", "data.root=x"], *files, "data.jitter=30")
    assert line.startswith("error: data.jitter=30: ") and "Fix: data.jitter=0" in line
    superres = ["data=superres", "data.root=x"]
    assert "error: data.turn=True: " in refusal(model, superres, *files, "data.turn=true")
    assert "error: data=SuperRes: " in refusal(model, superres, *files, "data.turn=false")
    for masks, why in (("lama", "drawn anew each epoch"), ("alpha", "read with the pixels")):
        line = refusal(model, ["data=images", "data.root=x"], *files, f"data.masks={masks}")
        assert line.startswith(f"error: data.masks={masks}: masks are {why}") and "or latent_cache=null" in line


def conditioned(*words: str) -> LDM:
    """A fresh model on an untrained first stage and, where it takes one, an untrained encoder."""
    cfg = composed(*words)
    pages = {name: CLIP if name.endswith("encoder") else STAGES["vae"] for name in build.parts(cfg)}
    lent = {name: build.untrained_part(composed(*page, "data.image_size=16"), {}) for name, page in pages.items()}
    return build.on_parts(cfg, lent)


@pytest.mark.parametrize(
    ("page", "task", "needed"),
    [
        ("model=inpaint", "inpaint", "image, mask"),
        ("model=label_map_to_image", "label_map", "source"),
        ("model=instruct_pix2pix", "edit", "source"),
        ("model=ldm embedder@model.embedder=image", "image", "image"),
    ],
)
def test_a_condition_that_is_made_of_pixels_is_refused(page: str, task: str, needed: str) -> None:
    words = [*page.split(), "model.net.width=4", *FLIP, f"data.task={task}"]
    line = refusal(conditioned(*words), words)
    assert f"LDM needs {needed} in training: pixels, which a cache has not" in line


def test_a_page_that_sees_planes_is_refused_before_what_it_stands_on_is_trained(tmp_path: Path) -> None:
    cfg = composed("model=inpaint", "data.task=inpaint", "latent_cache=x", run_dir=tmp_path / "run")
    line = line_of(lambda: train.train(cfg))
    assert line.startswith("error: latent_cache=x: its planes (MaskedImage) are made of pixels in training")
    assert not (tmp_path / "run").exists()


def test_a_text_is_read_beside_the_latents(tmp_path: Path) -> None:
    words = ["model=text_to_image", "model.net.width=4", "data.n_train_scenes=20", *FLIP]
    model, data = conditioned(*words), build.data(composed(*words))
    latents._can_be_kept("x", model, data)
    losses = []
    for split in (data.split("train"), kept(model, data, tmp_path)):
        torch.manual_seed(0)
        losses.append(float(model.training_step(split.read([3, 1], [generator(k) for k in (3, 1)])).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
