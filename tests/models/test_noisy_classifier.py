"""A classifier of noisy images: what it learns, what is told of it, and models that are guided by it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import evaluate
import sample as entry
import train
from atelier import load
from atelier.cli import messages
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.schedules import EDM, Cosine, Flow
from atelier.diffusion.times import LogitNormal, Uniform
from atelier.models.base import Generator
from atelier.models.noisy_classifier import LEVELS, NoisyClassifier
from atelier.nets.noisy_classifier import HalfUNet
from atelier.optim import adamw
from atelier.runs import build, folders, pretrained
from tests.compose import composed
from tests.conftest import overrides

TINY = [  # beside tests/tiny.py:COMMON
    "model=noisy_classifier",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[4]",
]
CONSTANT = {"betas": [0.9, 0.99], "weight_decay": 0.0, "warmup_images": 0, "decay": "constant"}


def net(n_classes: int = 6, factors: tuple[int, ...] = (2, 3), **options: object) -> HalfUNet:
    sizes = {"image_size": 8, "image_channels": 3, "width": 4, "multipliers": [1, 2], "n_blocks": 1, "heads": 1}
    rest = {"attention": [4], "dropout": 0.0, "scale_shift": True, "patch_size": 1}
    return HalfUNet(**(sizes | rest | options), n_classes=n_classes, label_factors=list(factors))


def model_of(schedule: object, times: object | None = None, lr: float = 1e-3, width: int = 4) -> NoisyClassifier:
    torch.manual_seed(0)
    optimizer = partial(adamw, lr=lr, decay_from=0, decay_to=1, **CONSTANT)
    return NoisyClassifier(schedule, times or Uniform(), net(width=width), optimizer, None)


# ---- labels of several factors


def test_the_probability_of_a_label_is_the_product_of_its_factors() -> None:
    """The last counts fastest, as in the embedder; all labels together have probability 1."""
    made, logits = net(24, (2, 3, 4)), torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    first, second, third = (part.softmax(1) for part in logits.split([2, 3, 4], dim=1))
    table = torch.einsum("bi,bj,bk->bijk", first, second, third).flatten(1)  # (5, 24)
    told = torch.stack([made.log_probability(logits, torch.full((5,), label)) for label in range(24)], dim=1)
    torch.testing.assert_close(told.exp(), table)
    assert torch.equal(made.likeliest(logits), table.argmax(1))


def test_without_factors_there_is_one_table() -> None:
    made, logits = net(6, ()), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 5, 3, 3, 1])
    torch.testing.assert_close(
        -made.log_probability(logits, label).mean(), torch.nn.functional.cross_entropy(logits, label)
    )
    assert torch.equal(made.likeliest(logits), logits.argmax(1))


@pytest.mark.parametrize(("options", "line"), [
    ({"n_classes": 0, "factors": ()}, "data.n_classes=0: this set has no labels to tell apart"),
    ({"n_classes": 7}, "data.label_factors=[2, 3]: their product is not the 7 classes"),
    ({"image_size": 9}, "data.image_size=9: 2 levels and patch 1 need a multiple of 2. Fix: data.image_size=10"),
    ({"attention": [3]}, ".attention=[3]: no map has size 3; the levels have [8, 4]. Fix: .attention=[4]"),
    ({"heads": 3}, ".heads=3: attention over 8 channels needs a divisor of that. Fix: .heads=1"),
], ids=lambda part: "" if isinstance(part, str) else next(iter(part)))  # fmt: skip
def test_what_does_not_divide_is_refused(options: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        net(**options)
    assert line in caught.value.line()


@pytest.mark.parametrize(("attention", "heads", "patch"), [([8, 4], 2, 1), ([], 4, 2), ([4], 1, None)])
def test_a_net_sees_every_pixel_and_the_time(attention: list[int], heads: int, patch: int | None) -> None:
    torch.manual_seed(0)
    made = net(attention=attention, heads=heads, patch_size=patch, multipliers=[1, 2]).eval()
    for weight in made.parameters():  # of layers that begin as 0
        weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    logits = made(x, torch.tensor([10.0, 500.0]))
    logits[0].square().sum().backward()
    assert logits.shape == (2, 5) and (x.grad[0] != 0).all() and not x.grad[1].any()
    assert (made(x, torch.tensor([900.0, 500.0]))[0] - logits[0]).abs().max() > 1e-3


# ---- training


@pytest.mark.parametrize(
    ("schedule", "times"), [(Cosine(n_steps=10), Uniform()), (EDM(), LogitNormal())], ids=["Cosine", "EDM"]
)
def test_the_loss_is_the_cross_entropy_of_x_t(schedule: object, times: object) -> None:
    model, x, label = model_of(schedule, times), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 5, 3])
    torch.manual_seed(7)
    loss = model.training_step({"image": x, "label": label})
    torch.manual_seed(7)
    t = schedule.snap(times(4, schedule, x.device, 0))
    x_t = schedule.alpha(t).view(-1, 1, 1, 1) * x + schedule.sigma(t).view(-1, 1, 1, 1) * torch.randn_like(x)
    logits = model.net((schedule.input_scale(t).view(-1, 1, 1, 1) * x_t).float(), schedule.net_time(t))
    two, three = logits[:, :2].log_softmax(1), logits[:, 2:].log_softmax(1)
    expected = -(two[range(4), label // 3] + three[range(4), label % 3])
    torch.testing.assert_close(loss, expected.mean())
    lent = model.part().log_probability(x_t.float(), t, label)
    torch.testing.assert_close(-lent, expected)
    assert set(model.reported) == {"loss", "accuracy"}


def test_it_learns_colours_under_little_noise_and_can_not_under_much() -> None:
    """Six colours: under little noise they are told apart, at sigma / alpha = 10 hardly more often than by chance."""
    model = model_of(Flow(), lr=3e-3, width=16)
    optimizer = model.configure_optimizers()
    colours = torch.cat([torch.eye(3), -torch.eye(3)]).view(6, 3, 1, 1).expand(-1, -1, 8, 8)
    for _ in range(60):
        label = torch.arange(36) % 6
        loss = model.training_step({"image": colours[label], "label": label})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label = torch.arange(60) % 6
    batch = {"image": colours[label], "label": label}
    with torch.no_grad():
        found = {name: value.mean().item() for name, value in model.eval().examined(batch, ImageRngs(0, 0, 60)).items()}
    assert found["accuracy/0.1"] > 0.8 > 0.5 > found["accuracy/10"]
    assert found["accuracy"] == pytest.approx(sum(found[f"accuracy/{noise:g}"] for noise in LEVELS) / len(LEVELS))


def test_figures_are_of_each_image_whatever_the_batch() -> None:
    model, label = model_of(EDM()), torch.arange(6)
    x = torch.randn(6, 3, 8, 8)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    with torch.no_grad():
        whole = model.examined({"image": x, "label": label}, ImageRngs(0, 0, 6))
        part = model.examined({"image": x[2:5], "label": label[2:5]}, ImageRngs(0, 2, 3))
    assert tuple(whole) == model.figures
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][2:5], rtol=1e-4, atol=1e-5)
    logits = model.logits(x, torch.zeros_like(x), EDM().time(torch.full((6,), 20.0).double()))
    assert whole["nll"].std() > 0 and logits.shape == (6, 5)


# ---- finished runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny runs: a classifier, a model that knows no labels, one that does, an autoencoder."""
    root = tmp_path_factory.mktemp("runs")
    brief = ["budget.images=16", "eval.every_images=16"]
    for name, words in {
        "classifier": overrides("noisy_classifier"),
        "free": [*overrides("ddpm"), "data.conditions=[]"],
        "conditional": overrides("ddpm"),
        "vae": overrides("vae"),
    }.items():
        train.train(composed(*words, *brief, run_dir=root / name))
    return {path.name: path for path in root.iterdir()}


def drawn(run: Path, out: Path, *words: str) -> Tensor:
    """The pictures of a request, (n, H, W, C) int16."""
    entry.sample(composed(f"run={run}", f"out={out}", "n=3", *words, config="sample"))
    return torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(out.glob("[0-9]*.png"))]).short()


def by(classifier: Path, *words: str) -> list[str]:
    return ["guider=classifier", f"guider.classifier.run={classifier}", *words]


def test_a_run_tells_how_often_it_is_right_at_each_noise_level(runs: dict[str, Path]) -> None:
    told = json.loads((runs["classifier"] / "summary.json").read_text())
    assert list(told["metrics"]) == [*NoisyClassifier.figures] and told["protocol"]["n_test"] == 8
    assert "val/accuracy/0.3" in (runs["classifier"] / "metrics.csv").read_text()
    loaded = folders.load(runs["classifier"], ema=True)
    assert not isinstance(loaded.model, Generator)
    with torch.no_grad():
        found = loaded.model.examined(loaded.data.test_batch(0, 8), ImageRngs(0, 0, 8))
    assert told["metrics"]["nll"] == pytest.approx(found["nll"].mean().item(), rel=1e-5)


@pytest.mark.parametrize("run", ["free", "conditional"])
def test_pictures_go_where_a_classifier_leads(runs: dict[str, Path], tmp_path: Path, run: str) -> None:
    """Also of a model that knows no labels; guidance 0 is off, another label is another way, any batch the same."""
    lead = partial(by, runs["classifier"], "label=green ring")  # 25
    own = drawn(runs[run], tmp_path / "a", *(["guidance=1", "label=25"] if run == "conditional" else []))
    off = drawn(runs[run], tmp_path / "b", *lead("guidance=0"))
    assert torch.equal(own, off)
    led, one = (drawn(runs[run], tmp_path / f"c{k}", *lead("guidance=2000", f"batch_size={k}")) for k in (3, 1))
    assert (led - off).abs().max() > 1 and (led - one).abs().max() <= 1
    other = int(folders.load(runs[run], True).data.test_batch(0, 16)["label"].unique()[0])
    assert other != 25 and not torch.equal(
        led, drawn(runs[run], tmp_path / "d", *by(runs["classifier"], "guidance=2000"), f"label={other}")
    )
    assert "ByClassifier" in (tmp_path / "c1" / "request.yaml").read_text()


def test_what_a_guider_needs_is_not_needed_by_the_next_request(runs: dict[str, Path]) -> None:
    run = load(runs["free"])
    before = run.sample(n=2)
    led = {"guider": "classifier", "guider.classifier.run": str(runs["classifier"]), "guidance": 2000}
    assert not torch.equal(run.sample(n=2, label="green ring", options=led), before) and "label" in run.model.needs
    assert torch.equal(run.sample(n=2), before) and not run.model.needs
    with pytest.raises(UserError, match="DDPM was trained without labels"):
        run.sample(n=2, label="green ring")


def test_samples_of_a_model_without_labels_are_judged_by_those_that_were_asked(
    runs: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    words = [f"run={runs['free']}", "eval.n_samples=6", "eval.n_real=6", "metrics=none"]
    told = []
    for more in ([], by(runs["classifier"]), by(runs["classifier"], "guidance=3")):
        evaluate.evaluate(composed(*words, *more, config="evaluate"))
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [("judge/label" in one["metrics"]) for one in told] == [False, True, True]
    assert [one["protocol"]["guidance"] for one in told] == [1.0, 1.0, 3.0]
    assert "guider" not in told[0]["protocol"]
    assert told[1]["protocol"]["guider"] == told[2]["protocol"]["guider"]
    assert told[1]["protocol"]["guider"].startswith("ByClassifier(classifier=TrainedClassifier(")


def test_classifier_free_guidance_takes_an_interval_at_a_request(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = drawn(runs["conditional"], tmp_path / "a", "guidance=1")
    words = ["guider=classifier_free", "guidance=50"]
    never = drawn(runs["conditional"], tmp_path / "b", *words, "guider.interval=[0,1e-9]")
    ever = drawn(runs["conditional"], tmp_path / "c", *words)
    assert torch.equal(plain, never) and not torch.equal(plain, ever)
    assert not torch.equal(ever, drawn(runs["conditional"], tmp_path / "d", *words, "guider.rescale=1.0"))


@pytest.fixture
def changed(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the classifier's run whose config can be changed."""
    return shutil.copytree(runs["classifier"], tmp_path / "changed")


def line_of(*words: str) -> str:
    with pytest.raises(Exception) as caught:
        entry.sample(composed(*words, config="sample"))
    error = messages.user_error(caught.value)
    assert error is not None, repr(caught.value)
    return error.line()


def test_a_classifier_that_cannot_serve_is_one_line(runs: dict[str, Path], changed: Path) -> None:
    run, fix = f"run={runs['free']}", ". Fix: guider.classifier.run=DIR of a run of experiment=shapes_noisy_classifier"
    line = line_of(run, "guider=classifier")
    assert line.startswith("error: guider.classifier.run=auto: a request trains nothing, name a run. Fix: guider.clas")
    line = line_of(run, *by(Path("nowhere")))
    assert line.startswith(f"error: guider.classifier.run=nowhere: no finished run lies there{fix}")
    line = line_of(run, *by(runs["vae"]))
    assert "LikelihoodAutoencoder: it tells no labels of noisy images. Fix: guider.classifier.run=DIR of a run" in line
    for key, value, other in (("n_classes", 10, 36), ("image_size", 16, 8)):
        cfg = OmegaConf.load(runs["classifier"] / "config.yaml")
        cfg.data[key] = value
        OmegaConf.save(cfg, changed / "config.yaml")
        line = line_of(run, *by(changed))
        assert f"it was trained on data.{key}={value}, this is data.{key}={other}{fix}" in line
    line = line_of(f"run={runs['vae']}", "do=sample", *by(runs["classifier"]))
    assert line == "error: guider=classifier: VAE takes no guider here. Fix: leave guider out"
    line = line_of(f"run={runs['classifier']}")
    assert "NoisyClassifier makes no images" in line


def test_a_model_of_latents_refuses_a_classifier_of_pixels(runs: dict[str, Path], tmp_path: Path) -> None:
    """Before anything is trained."""
    words = [*overrides("ldm", runs["vae"].parent / "vae"), "guider@model.guider=classifier"]
    words += [f"model.guider.classifier.run={runs['classifier']}"]
    with pytest.raises(Exception) as caught:
        train.train(composed(*words, run_dir=tmp_path / "run"))
    line = messages.user_error(caught.value).line()
    assert line.startswith("error: model.guider.classifier=3x8x8: it was trained on images 3x8x8, the model denoises")


# ---- in training


def test_a_run_that_is_guided_in_training_keeps_its_classifier(
    runs: dict[str, Path], changed: Path, tmp_path: Path
) -> None:
    """It is linked, found again though the folder it came from is gone, and stays out of the weights."""
    words = [*overrides("ddpm"), "data.conditions=[]", "budget.images=16", "guider@model.guider=classifier"]
    run = tmp_path / "run"
    train.train(composed(*words, f"model.guider.classifier.run={changed}", run_dir=run))
    shutil.rmtree(changed)
    loaded = folders.load(run, ema=True)
    assert loaded.model.needs == {"label"} and loaded.model.needs_grad
    assert not any("classifier" in name for name in loaded.model.state_dict())
    summary = json.loads((run / "summary.json").read_text())
    assert "judge/label" in summary["metrics"] and summary["protocol"]["guider"].startswith("ByClassifier(")
    assert (drawn(run, tmp_path / "a", "guidance=2000") - drawn(run, tmp_path / "b", "guidance=0")).abs().max() > 1
    again = composed(*words, f"model.guider.classifier.run={changed}", "budget.images=24", run_dir=run)
    train.train(again)
    assert folders.load(run, ema=True).images_seen == 24


def test_a_classifier_that_is_to_be_found_or_trained_is_planned(tmp_path: Path) -> None:
    """`auto` is the newest finished run of the experiment on these images; what that is decides what a run is."""
    words = [*overrides("ddpm"), "guider@model.guider=classifier"]
    cfg = composed(*words, run_dir=tmp_path)
    assert build.parts(cfg) == ["guider.classifier"]
    plan = pretrained.plan("guider.classifier", cfg)
    assert plan.name == "experiment=shapes_noisy_classifier" and plan.cfg.data.image_size == 8
    identity = pretrained.Plan([], cfg).identity(set())
    assert identity["model"]["guider"]["classifier"]["model"]["_target_"].endswith("NoisyClassifier")
