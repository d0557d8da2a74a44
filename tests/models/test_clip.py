"""Texts and images in one space: what is learned, what decays, how the search is counted, what a run lends."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import train
from atelier.cli import messages
from atelier.core.batch import Cond
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import Evaluator
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.clip_score import clip_score
from atelier.metrics.suite import Suite
from atelier.models.base import Generator
from atelier.models.clip import SEARCHES, Clip
from atelier.nets.clip import ClipNet
from atelier.nets.contracts import ImageEncoder, TextEncoder, keeps
from atelier.optim import adamw
from atelier.runs import build, folders, preflight
from tests.compose import composed
from tests.conftest import overrides

TINY = [  # beside tests/tiny.py:COMMON
    "model=clip",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.token_dim=8",
    "model.net.n_layers=1",
    "model.net.heads=2",
    "model.net.max_tokens=12",
    "model.net.vector_dim=8",
    "model.net.n_rows=64",
]
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SENTENCES = [f"a {colour} picture" for colour in COLOURS]


def model_of(lr: float = 1e-2, weight_decay: float = 0.0, grad_clip: float | None = None) -> Clip:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "image_channels": 3, "width": 8, "multipliers": [1, 2], "n_blocks": 1, "patch_size": 1}
    sizes |= {"token_dim": 8, "n_layers": 1, "heads": 2, "max_tokens": 8, "vector_dim": 8, "n_rows": 500}
    constant = {"betas": [0.9, 0.99], "warmup_images": 0, "decay": "constant", "decay_from": 0, "decay_to": 1}
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay, **constant)
    return Clip(ClipNet(**sizes, vocabulary=None), optimizer, grad_clip)


def pictures(which: Tensor) -> dict:
    colours = torch.tensor(list(COLOURS.values())).float()[which]
    noise = 0.1 * torch.randn(len(which), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"image": colours[:, :, None, None] + noise, "text": [SENTENCES[k] for k in which]}


def test_the_loss_is_of_cosines_by_a_factor() -> None:
    """Of different texts, by torch's cross-entropy; it starts at about ln(B). Equal ones are right together."""
    model, batch = model_of(), pictures(torch.arange(4))
    loss = model.training_step(batch)
    image, text = (
        part.vector.double()
        for part in (model.net.encode_images(batch["image"]), model.net.encode_texts(batch["text"]))
    )
    logits = F.cosine_similarity(image[:, None], text[None], dim=2) / 0.07
    both = F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))
    assert loss.item() == pytest.approx(both.item() / 2, rel=1e-4)
    assert set(model.reported) == {"loss", "scale"} and model.reported["scale"].item() == pytest.approx(1 / 0.07)
    twice = model.training_step({"image": batch["image"].repeat(2, 1, 1, 1), "text": batch["text"] * 2})
    assert twice.item() == pytest.approx(loss.item(), rel=1e-4)  # two of eight, as one of four


def test_a_page_starts_at_the_logarithm_of_its_batch() -> None:
    cfg = composed("experiment=shapes_clip")
    model, data = build.on_parts(cfg, {}), build.data(cfg)
    batch = data.test_batch(0, 100)
    first = {text: k for k, text in reversed(list(enumerate(batch["text"])))}
    rows = sorted(first.values())[:64]
    loss = model.training_step({"image": batch["image"][rows], "text": [batch["text"][k] for k in rows]})
    assert loss.item() == pytest.approx(math.log(64), abs=0.25)


def test_matrices_alone_decay_and_the_factor_stays_within_its_limits() -> None:
    model = model_of(lr=0.1, weight_decay=0.5)
    optimizer = model.configure_optimizers()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert len(before) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, weight in model.named_parameters():
        kept = 1.0 if weight.ndim < 2 else 1 - 0.1 * 0.5
        torch.testing.assert_close(weight.detach(), kept * before[name], msg=name)
    for value, limit in ((9.0, math.log(100)), (-3.0, 0.0)):
        model.net.log_scale.data.fill_(value)
        optimizer.step()
        assert model.net.log_scale.item() == pytest.approx(limit)


def test_it_learns_which_sentence_is_of_which_picture() -> None:
    model = model_of(grad_clip=1.0)
    optimizer = model.configure_optimizers()
    for _ in range(80):
        loss = model.training_step(pictures(torch.arange(16) % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        image, text = model.net(pictures(torch.arange(4))["image"], SENTENCES)
    assert loss < 0.1 and (image @ text.T).argmax(1).tolist() == [0, 1, 2, 3]


# ---- the search


def facts_of(n: int, n_texts: int, noise: float) -> dict[str, Tensor]:
    """Images near the vectors of their texts, of which some are the same."""
    rng = torch.Generator().manual_seed(0)
    vectors, name = F.normalize(torch.randn(n_texts, 16, generator=rng), dim=1), torch.arange(n) % n_texts
    image = F.normalize(vectors[name] + noise * torch.randn(n, 16, generator=rng), dim=1)
    seed = torch.randint(1 << 31, (n,), generator=rng)
    return {"image": image, "text": vectors[name], "name": 7 * name - 20, "seed": seed}


def test_chance_finds_one_of_64_and_five_of_100() -> None:
    """Images that have nothing to do with their texts: 3000 of them, four standard errors."""
    facts = facts_of(3000, 150, 0.0)
    facts["image"] = F.normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(5)), dim=1)
    for name, value in model_of().concluded(facts).items():
        chance = SEARCHES[name][0] / SEARCHES[name][1]
        assert abs(value - chance) < 4 * (chance * (1 - chance) / 3000) ** 0.5, name


def test_a_search_is_among_so_many_different_texts() -> None:
    """With as many texts as are searched, all are candidates; counted by sorting."""
    for name, (k, n) in SEARCHES.items():
        facts = facts_of(2 * n, n, 0.5)
        likeness = facts["image"] @ facts["text"][:n].T
        best = likeness.argsort(1, descending=True)[:, :k]
        expected = (best == (torch.arange(2 * n) % n)[:, None]).any(1).double().mean().item()
        assert 0.3 < expected < 0.98 and model_of().concluded(facts)[name] == pytest.approx(expected)
    assert model_of().concluded(facts_of(300, 200, 0.0)) == {"accuracy/1_of_64": 1.0, "accuracy/5_of_100": 1.0}


def test_as_many_are_drawn_as_the_name_says() -> None:
    """Of 200 texts n - 1 beside the own one, by the seed of the image: looked up one by one."""
    facts = facts_of(1000, 200, 0.6)
    drawn = [torch.randperm(200, generator=torch.Generator().manual_seed(int(seed))).tolist() for seed in facts["seed"]]
    likeness = (facts["image"] @ facts["text"][:200].T).tolist()

    def searched(k: int, n: int) -> float:
        right = 0
        for i, order in enumerate(drawn):
            candidates = [j for j in order if j != i % 200][: n - 1]
            right += sum(likeness[i][j] >= likeness[i][i % 200] for j in candidates) < k
        return right / 1000

    found = model_of().concluded(facts)
    assert found == {name: pytest.approx(searched(k, n)) for name, (k, n) in SEARCHES.items()}
    assert searched(1, 65) != searched(1, 64)


def test_too_few_different_texts_tell_nothing() -> None:
    found = model_of().concluded(facts_of(640, 64, 0.0))
    assert found["accuracy/1_of_64"] == 1.0 and math.isnan(found["accuracy/5_of_100"])


def test_an_image_has_the_same_facts_in_any_batch() -> None:
    model, batch = model_of().eval(), pictures(torch.arange(8) % 4)
    with torch.no_grad():
        whole = model.examined(batch, ImageRngs(3, 0, 8))
        part = model.examined({"image": batch["image"][2:5], "text": batch["text"][2:5]}, ImageRngs(3, 2, 3))
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][2:5], rtol=1e-4, atol=1e-5)
    assert whole["name"].tolist()[:4] == whole["name"].tolist()[4:] and len(set(whole["name"].tolist())) == 4
    assert len(set(whole["seed"].tolist())) == 8


# ---- a finished run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "clip"
    brief = ["budget.images=16", "eval.every_images=16", "data.n_test_scenes=120", "eval.n_samples=120"]
    train.train(composed(*overrides("clip"), *brief, "eval.batch_size=50", run_dir=folder))
    return folder


def test_a_run_tells_how_often_a_text_is_found(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())
    assert list(told["metrics"]) == list(SEARCHES) and told["protocol"]["n_test"] == 120
    loaded = folders.load(run, ema=True)
    with torch.no_grad():
        found = loaded.model.concluded(loaded.model.examined(loaded.data.test_batch(0, 120), ImageRngs(0, 0, 120)))
    assert told["metrics"] == pytest.approx(found, abs=0.01)
    low, high = told["intervals"]["accuracy/1_of_64"]
    assert low < told["metrics"]["accuracy/1_of_64"] < high


def test_a_run_lends_two_encoders(run: Path) -> None:
    model = folders.load(run, ema=True).model
    assert not isinstance(model, Generator)
    keeps(model.part(), TextEncoder, "text")
    keeps(model.part(), ImageEncoder, "image")
    assert model.part().encode_texts(["a red star"]).tokens.shape == (1, 12, 8)


# ---- clip_score of other models by it


class Painter(Generator):
    """Draws grey pictures, lighter for longer texts."""

    ema_nets = ()
    needs = frozenset({"text"})

    def training_step(self, batch: dict) -> Tensor: ...

    def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
        lengths = torch.tensor([len(text) / 60 - 0.5 for text in cond["text"]])
        return lengths[:, None, None, None] + 0.3 * rngs.randn(3, 8, 8)


def test_samples_are_scored_by_the_texts_they_were_asked_for(run: Path) -> None:
    loaded = folders.load(run, ema=True)
    net, model = loaded.model.part(), Painter().eval()
    suite = Suite(net="none", weights=None, names=["fid"], antialias=False, fetch=False, cache="", clip=net)
    judges = Evaluator(n_samples=10, n_real=10, batch_size=4, seed=3, suite=suite)
    values, protocol = judges(model, loaded.data, {}, nullcontext, lambda *_: None)
    batch = loaded.data.test_batch(0, 10)
    with torch.inference_mode():
        drawn = to_float(to_uint8(model.sample({"text": batch["text"]}, ImageRngs(3, 0, 10))))
        expected = clip_score(drawn, batch["text"], net).mean().item()
        real = clip_score(batch["image"], batch["text"], net).mean().item()
    assert values["clip_score"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert values["real/clip_score"] == pytest.approx(real, rel=1e-3) and real != pytest.approx(expected, rel=0.01)
    assert protocol["clip"].startswith("ClipNet ") and "n_real" not in protocol


def evaluator_of(*words: str, data: Path) -> Evaluator:
    cfg = composed("metrics=clip", *words, config="evaluate")
    preflight.check(cfg)
    return build.evaluator(cfg, build.stored_config(data))


def test_metrics_stand_on_a_run_by_its_folder(run: Path) -> None:
    lent = evaluator_of(f"metrics.clip.run={run}", data=run).suite.clip
    own = folders.load(run, ema=True).model.net
    assert isinstance(lent, ClipNet)
    torch.testing.assert_close(lent.encode_texts(SENTENCES).vector, own.encode_texts(SENTENCES).vector)


def test_a_model_without_texts_has_no_score(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In training and after it; and an autoencoder is no judge of texts."""
    words = ["metrics=clip", f"metrics.clip.run={run}"]
    own = [word for word in overrides("vae") if word != "metrics=none"]
    train.train(composed(*own, *words, "budget.images=16", "eval.every_images=16", run_dir=tmp_path))
    capsys.readouterr()
    evaluate.evaluate(composed(f"run={tmp_path}", *words, "eval.n_samples=4", config="evaluate"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "judge/valid" in told["metrics"] and not any("clip" in name for name in told["metrics"])
    fix = "Fix: metrics.clip.run=DIR of a run of experiment=shapes_clip"
    for given, problem in {
        "auto": f"auto: a request trains nothing, name a run. {fix}",
        "nowhere": f"nowhere: no finished run lies there. {fix}",
        str(tmp_path): f"{tmp_path}: LikelihoodAutoencoder does not encode images and texts. {fix}",
    }.items():
        with pytest.raises(Exception) as caught:
            evaluator_of(f"metrics.clip.run={given}", data=tmp_path)
        assert str(messages.user_error(caught.value)) == f"error: metrics.clip.run={problem}"
