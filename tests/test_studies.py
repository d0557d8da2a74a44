"""The scripts of studies/ on small things: the mixture in closed form, shares as the judge's metric has them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier.callbacks.table import read_rows
from atelier.core.batch import Batch
from atelier.core.rng import ImageRngs
from atelier.diffusion.samplers import Ancestral
from atelier.evaluation.evaluator import Evaluator
from atelier.images.bicubic import enlarged, reduced
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.shapes import judge_values
from atelier.metrics.suite import Suite
from atelier.reporting import facts
from atelier.runs import build, folders
from atelier.shapes import world
from atelier.shapes.judge import judge
from studies import (
    adapters,
    families,
    inpainting,
    overfitting,
    pixel_mixture,
    samplers_by_nfe,
    temperatures,
    whole_images,
)
from tests.compose import composed
from tests.programs import python


def test_one_gaussian_has_the_mean_and_deviation_of_its_levels() -> None:
    """Levels of a number are bins of width 1, looked at in four places."""
    torch.manual_seed(0)
    counts = torch.randint(0, 50, (3, 256)).float()
    counts *= counts.sum(1).max() / counts.sum(1, keepdim=True)  # as many images for each number
    mixture = pixel_mixture.Mixture(counts, 1)
    mixture.step()
    at = (torch.arange(1024) + 0.5) / 4
    share = counts.repeat_interleave(4, 1) / (4 * counts[0].sum())
    mean = (share * at).sum(1)
    std = ((share * (at - mean[:, None]) ** 2).sum(1)).sqrt()
    torch.testing.assert_close(mixture.mean[:, 0], mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(mixture.std[:, 0], std, rtol=1e-3, atol=0)
    expected = torch.distributions.Normal(mean, std).log_prob(torch.tensor(100.0))
    torch.testing.assert_close(mixture.log_density(torch.full((3, 1), 100.0))[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_a_flat_histogram_costs_eight_bits() -> None:
    counts = torch.full((2, 256), 10.0)
    mixture = pixel_mixture.fitted(counts, 40, 30)[0]
    places = torch.linspace(20, 236, 500)[None]
    assert -mixture.log_density(places.expand(2, -1)).mean().item() / math.log(2) == pytest.approx(8, abs=0.05)


def test_shares_of_all_samples(finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temperatures, "N", 8)
    monkeypatch.setattr(temperatures, "BATCH", 4)
    run = folders.load(finished["normalizing_flow"], ema=True)
    with torch.inference_mode():
        told = temperatures.shares(run, 0.5, 3)
        cond = run.model.condition(run.data.test_batch(0, 8), "")
        images = to_float(to_uint8(run.model.sample(cond, ImageRngs(3, 0, 8), temperature=0.5)))
    expected = judge_values(judge(images), cond, images)
    assert told["valid"] == expected["judge/valid"] and told["loose"] == expected["judge/loose"]
    assert {"colour", "ground", "shape"} < set(told) and all(0 <= share <= 1 for share in told.values())


def test_budgets_are_of_calls_and_every_page_is_tried() -> None:
    """Heun's rule calls twice a step, but once in the last."""
    found = samplers_by_nfe.jobs([1, 5, 10])
    assert {job.name for job in found} == {path.stem for path in (samplers_by_nfe.CONF / "sampler").glob("*.yaml")}
    assert [(job.sampler.steps, job.sampler.nfe) for job in found if job.name == "heun"] == [(1, 1), (3, 5), (5, 9)]
    assert [job.sampler.steps for job in found if job.name == "ddim"] == [1, 5, 10]


def test_samplers_by_nfe_are_a_table_a_file_and_pictures(
    finished: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures as evaluate.py gives, with the same noise; a sampler that does not suit the run has a dash."""
    run = finished["ddpm"]
    chosen = [job for job in samplers_by_nfe.jobs([2, 3]) if job.name in ("ddim", "heun")]
    unfit = samplers_by_nfe.Job("learned", 2, Ancestral(steps=2, variance="learned"))
    monkeypatch.setattr(samplers_by_nfe, "jobs", lambda budgets: [*chosen, unfit])
    monkeypatch.setattr(samplers_by_nfe, "BATCH", 3)
    monkeypatch.setattr("sys.argv", ["samplers_by_nfe", str(run), "--n", "8", "--nfe", "2", "3", "--seed", "5"])
    capsys.readouterr()
    samplers_by_nfe.main()
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0] == "| valid, fd_classifier | NFE 2 | NFE 3 |" and lines[4] == "| learned | - | - |"
    assert "5 of 5, 0 s left" in told.err and "the net of this run has learned no variance" in told.err
    rows = list(csv.DictReader((run / "samplers_by_nfe.csv").open()))
    assert [(row["sampler"], row["nfe"]) for row in rows] == [
        ("ddim", "2"), ("ddim", "3"), ("heun", "1"), ("heun", "3"), ("learned", "2"),
    ]  # fmt: skip
    loaded = folders.load(run, ema=True)
    suite = samplers_by_nfe.Measure(loaded, cached_classifier(), 8, 5).suite
    evaluator = Evaluator(8, 16, 8, 5, suite)
    values, _ = evaluator(loaded.model, loaded.data, {"sampler": chosen[1].sampler}, nullcontext, lambda *_: None)
    assert float(rows[1]["valid"]) == values["judge/valid"]
    assert float(rows[1]["fd_classifier"]) == pytest.approx(values["fd_classifier"], rel=1e-3)
    for name in ("valid", "fd_classifier"):
        assert (run / f"samplers_by_nfe_{name}.svg").read_text().count("<polyline") == 2


def cached_classifier() -> Suite:
    return build.metrics(composed("metrics=classifier", config="evaluate"))


def test_whole_images_of_their_own_sizes(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bicubic beside the net, in the protocol of the literature: cut to a multiple of 4, a border of 4 px left out."""
    levels = {}
    for k, (width, height) in enumerate(((33, 26), (24, 41))):
        levels[k] = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels[k]).save(tmp_path / f"{k}.png")
    words = ["whole_images", str(tmp_path), "--run", str(finished["srgan"])]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.chdir(tmp_path)
    whole_images.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 + 2
    for k, line in ((0, lines[2]), (1, lines[4])):
        assert line.startswith(f"| {k}.png, bicubic | ") and f"| {k}.png, SRGAN | " in lines[3 + 2 * k]
        height, width = (side // 4 * 4 for side in levels[k].shape[:2])
        image = torch.from_numpy(levels[k][:height, :width]).permute(2, 0, 1)[None]
        made = to_uint8(enlarged(to_float(to_uint8(reduced(to_float(image), 4))), 4))
        wrong = (made[..., 4:-4, 4:-4].double() - image[..., 4:-4, 4:-4].double()).square().mean()
        assert f"| {10 * math.log10(255**2 / wrong):.2f} dB |" in line
    mean = sum(float(line.split(" | ")[2][:-3]) for line in (lines[3], lines[5])) / 2
    assert float(lines[7].split(" | ")[2][:-3]) == pytest.approx(mean, abs=0.011) and "mean of 2, SRGAN" in lines[7]


def test_without_a_run_whole_images_are_bicubic(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reduced and enlarged as often as asked, a flat image comes back as it was."""
    Image.new("RGB", (33, 26), (10, 120, 250)).save(tmp_path / "flat.png")
    monkeypatch.setattr("sys.argv", ["whole_images", str(tmp_path), "--scale_factor", "2"])
    monkeypatch.chdir(tmp_path)
    sizes, reduce = [], whole_images.reduced
    monkeypatch.setattr(whole_images, "reduced", lambda x, factor: sizes.append((x.shape, factor)) or reduce(x, factor))
    whole_images.main()
    assert sizes == [((1, 3, 26, 32), 2)]
    row = "| 100.00 dB | 100.00 dB | 1.0000 | 1.0000 |"
    assert capsys.readouterr().out.splitlines()[2:] == [f"| flat.png, bicubic {row}", f"| mean of 1, bicubic {row}"]


def test_shuffled_conditions_are_those_of_other_images(finished: dict[str, Path]) -> None:
    """Of training alone, the same each time, each one's once."""
    loaded = folders.load(finished["ddpm"], ema=True)
    plain, data = loaded.data.split("train"), folders.load(finished["ddpm"], ema=True).data
    mixed = overfitting.shuffle(data).split("train")
    whole, own = (images.read(list(range(20)), None) for images in (mixed, plain))
    assert torch.equal(whole["image"], own["image"]) and not torch.equal(whole["label"], own["label"])
    assert torch.equal(whole["label"].sort().values, own["label"].sort().values)
    assert torch.equal(mixed.read([7], None)["attributes"][0], whole["attributes"][7])
    assert torch.equal(data.test_batch(0, 8)["label"], loaded.data.test_batch(0, 8)["label"])


def test_a_study_trains_on_shuffled_conditions(tmp_path: Path) -> None:
    """By its own command: from the same weights, losses become others once the net listens to its condition."""
    words = [
        "model=flow_tiny",
        "budget.images=64",
        "data.batch_size=8",
        "metrics=none",
        "eval.n_samples=1",
        "eval.n_diagnosed=0",
    ]
    losses = []
    for name, script in (("plain", ["train.py"]), ("shuffled", ["studies/overfitting.py", "train"])):
        folder, root = tmp_path / name, Path(overfitting.__file__).parents[1]
        command = [*script, *words, f"run_dir={folder}", "callbacks.grids.every_images=1000"]
        done = python(*command, folder=root, environment=os.environ | {"PYTHONPATH": "src"})
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([row["train/loss"] for row in read_rows(folder / "metrics.csv") if "train/loss" in row])
    assert losses[0] != losses[1]


def test_curves_of_a_run_with_their_intervals(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = overfitting.curve(finished["ddpm"], "val/gap")
    assert [images_seen for images_seen, _ in gap.points] == [32, 64, 96] and all(w > 0 for w in gap.half_widths)
    losses = overfitting.curve(finished["ddpm"], "train/loss")
    assert [images_seen for images_seen, _ in losses.points] == [96] and not losses.half_widths
    words = [str(tmp_path / "a.svg"), str(finished["ddpm"]), str(finished["ldm"]), "--column", "val/gap"]
    monkeypatch.setattr("sys.argv", ["overfitting", "plot", *words])
    overfitting.main()
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("<polygon") == 2 and ">ldm</text>" in drawn


def test_how_far_pixels_lie_from_a_hole_and_the_figure_of_it() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 5:7, 5:7] = 1
    distance = inpainting.rings(mask)[0, 0]
    rows, columns = torch.arange(12)[:, None], torch.arange(12)
    off = torch.stack([5 - rows, rows - 6, torch.zeros_like(rows)]).amax(0)
    beside = torch.stack([5 - columns, columns - 6, torch.zeros_like(columns)]).amax(0)
    assert torch.equal(distance.long(), torch.maximum(off, beside).clamp(max=inpainting.FURTHEST))
    drawn = inpainting.figure({"model": [9.0, 3.0, 1.0], "first stage alone": [5.0, 2.0, 1.0]})
    assert drawn.startswith("<svg") and drawn.count("<polyline") == 2 and "first stage alone" in drawn


class Rendered:
    """In place of a model: draws the scenes that captions are of, with their shapes moved on by so many."""

    def __init__(self, by: int) -> None:
        self.by = by

    def condition(self, batch: Batch, case: str) -> Batch:
        return batch

    def sample(self, cond: Batch, rngs: ImageRngs) -> Tensor:
        scenes = TAUGHT.split("test").scenes[cond["index"]]
        return world.render(replace(scenes, shape=(scenes.shape + self.by) % len(world.SHAPES)), 32)


TAUGHT = replace(adapters.taught(["star", "ring"], 4, 32), n_test_scenes=300, test_split="unseen")


def test_what_adapters_are_taught_by_is_a_set_with_captions(tmp_path: Path) -> None:
    adapters.write(tmp_path / "stars", ["star"], 4, 32)
    adapters.prompts(tmp_path / "prompts.txt", ["circle", "square"], 5)
    asked = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(asked) == 5 and all("circle" in text or "square" in text for text in asked)
    words = ["data=captioned", f"data.root={tmp_path / 'stars'}", f"data.cache={tmp_path / 'cache'}"]
    data = build.data(composed(*words, "data.image_size=32", "data.holdout=0", "data.flip=false"))
    data.prepare_data()
    batch, scenes = data.split("train").read([0, 1, 2, 3], None), adapters.taught(["star"], 4, 32).split("train").scenes
    assert batch["text"] == world.captions(scenes)
    assert (batch["image"] - world.render(scenes, 32)).abs().max() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize(("by", "asked"), [(0, 1.0), (1, 0.0)])
def test_samples_are_as_asked_where_every_attribute_is_the_caption_s(by: int, asked: float) -> None:
    assert adapters.shares(Rendered(by), TAUGHT, 260, 0) == (asked, 1.0)


def test_short_runs_stand_on_those_before_them_and_name_every_generating_page() -> None:
    chosen = list(families.jobs(Path("runs"), "FASHION"))
    names = [job.folder.name for job in chosen]
    assert len(set(names)) == len(names)
    for k, job in enumerate(chosen):
        if job.short.first:
            assert job.beside(job.short.first) in [before.folder for before in chosen[:k]]
            assert f"model.first_stage.run={job.beside(job.short.first)}" in job.words
        composed(*job.of(3_200))
    left = set(re.findall(r"\w+", " ".join(families.LEFT_OUT)))
    pages = {path.stem for path in (families.ROOT / "conf" / "model").glob("*.yaml")}
    of_sdxl = {"sdxl_turbo", "stable_diffusion_inpaint", "stable_diffusion_edit"}
    assert pages - {job.short.page for job in chosen} == (left & pages) - {job.short.page for job in chosen} | of_sdxl


def test_the_document_says_what_short_runs_set_otherwise_than_their_pages() -> None:
    told, text = families.settings(), families.DOCUMENT.read_text()
    for short in (*families.FAMILIES, *families.TRANSLATED, *families.MEMBERS):
        own = [part for part in told.split("; ") if part.startswith(f"`{short.page}: ")]
        assert all(word in own[0] for word in (*short.words.split(), *short.shares))
    assert told in text and " ".join(families.COMMON) in text


def test_a_short_run_takes_its_work_and_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are as many as the work allows, at the work of an image that a few batches told."""
    small = (
        "data.n_train_scenes=40 data.n_test_scenes=16 data.batch_size=32 metrics=none eval.n_samples=4 eval.n_real=8"
    )
    monkeypatch.setattr(families, "COMMON", [*small.split(), "trainer=cpu", "callbacks.grids.n=1"])
    monkeypatch.setattr(families, "PROBED", 2)
    monkeypatch.setattr("sys.argv", ["families"])
    (job,) = (job for job in families.jobs(tmp_path, None) if job.short.page == "cgan")
    families.run(job, 0.012)
    told = folders.summary(job.folder)
    assert told["tflop"] == pytest.approx(0.012, rel=0.35) and told["images_seen"] % 32 == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("probe")] == []
    monkeypatch.setattr(families, "trained", lambda *_: pytest.fail("trained again"))
    families.run(job, 0.012)
    (found,) = facts.told([job.folder], lambda _: None)
    row = families.row(found)
    assert row["tflop"] == told["tflop"] and row["experiment"] == "cgan" and "model=cgan" in row["overrides"]
    assert json.dumps(row, allow_nan=False)
