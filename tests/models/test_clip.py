"""Texts and images in one space: what is learned, what decays, how the search is counted, what a run lends."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from atelier.core.rng import ImageRngs
from atelier.models.base import Generator
from atelier.models.clip import SEARCHES, Clip
from atelier.nets.clip import ClipNet
from atelier.nets.contracts import ImageEncoder, TextEncoder, keeps
from atelier.optim import adamw
from atelier.runs import folders
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
    from atelier.runs import build

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
    for _ in range(60):
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
