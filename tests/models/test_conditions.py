"""Conditions that no page has: tokens, a text, planes; trained, averaged, dropped, guided, resumed and sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from atelier.checkpoints.store import load, newest
from atelier.core.batch import Cond, rows_of
from atelier.core.condition import Condition, dropped_rows
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Asked, ClassifierFree
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import Euler
from atelier.diffusion.schedules import Flow
from atelier.diffusion.targets import VectorField
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain
from atelier.models.ddpm import DDPM
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.unet import UNet
from atelier.optim import adamw
from atelier.runs import build, folders, preflight
from tests.compose import composed
from tests.tiny import COMMON

N, D, WORDS = 14, 8, 12  # attributes, numbers of a token, places for words


class Tokens(nn.Module):
    """A token for each attribute that an image has, behind one that every image has."""

    conditions, cond_sizes = ("attributes",), {"tokens": D}

    def __init__(self) -> None:
        super().__init__()
        self.table, self.start = nn.Parameter(torch.randn(N, D)), nn.Parameter(torch.randn(1, D))

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        mask = torch.cat([cond["attributes"].new_ones(n, 1), cond["attributes"]], dim=1) > 0
        known = Condition(tokens=torch.cat([self.start, self.table]).expand(n, -1, -1), mask=mask)
        return known if drop is None else known.drop(dropped_rows(n, drop, mask.device), self.null(n))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        mask = torch.arange(N + 1, device=self.start.device) == 0
        tokens = torch.cat([self.start, torch.zeros_like(self.table)])
        return Condition(tokens=tokens.expand(n, -1, -1), mask=mask.expand(n, -1))


class Words(nn.Module):
    """A token for each word of a caption, the same for the same letters; no word where nothing is known."""

    conditions, cond_sizes = ("text",), {"tokens": D}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, D)

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        numbers = torch.zeros(n, WORDS, dtype=torch.int64)
        for row, text in zip(numbers, cond["text"], strict=True):
            words = text.split()
            row[: len(words)] = torch.tensor([1 + sum(map(ord, word)) % 63 for word in words])
        known = self._embedded(numbers)
        return known if drop is None else known.drop(dropped_rows(n, drop, numbers.device), self.null(n))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        return self._embedded(torch.zeros(n, WORDS, dtype=torch.int64))

    def _embedded(self, numbers: Tensor) -> Condition:
        """The first token is always there: attention looks at one at least."""
        return Condition(tokens=self.table(numbers), mask=(numbers > 0) | (torch.arange(WORDS) == 0))


class CrossAttention(nn.Module):
    """Each pixel looks at the tokens."""

    shape, cond_sizes = (3, 8, 8), {"tokens": D}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, D, 3, padding=1), nn.Conv2d(D, 3, 1)
        self.attention = nn.MultiheadAttention(D, 1, batch_first=True)

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        h = self.first(x) + time.view(-1, 1, 1, 1) / 1000  # (B, D, H, W)
        pixels = h.flatten(2).transpose(1, 2)  # (B, H W, D)
        seen, _ = self.attention(pixels, cond.tokens, cond.tokens, key_padding_mask=~cond.mask)
        return self.last(h + seen.transpose(1, 2).unflatten(2, x.shape[2:]))


class Planes(nn.Module):
    """The source itself; zeros where it is not shown."""

    conditions, cond_sizes = ("source",), {"planes": 3}

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        known = Condition(planes=cond["source"])
        return known if drop is None else known.drop(dropped_rows(n, drop, known.planes.device), known.null())

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        return Condition(planes=torch.zeros(n, 3, 8, 8))


class Concatenated(nn.Module):
    """Planes beside the channels of x."""

    shape, cond_sizes = (3, 8, 8), {"planes": 3}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(6, D, 3, padding=1), nn.SiLU(), nn.Conv2d(D, 3, 1))

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        return self.layers(torch.cat([x, cond.planes], dim=1)) + time.view(-1, 1, 1, 1) / 1000


OPTIMIZER = partial(
    adamw, lr=0.01, betas=[0.9, 0.99], weight_decay=0.0, warmup_images=0, decay="constant", decay_from=0, decay_to=1
)
KINDS = {
    "tokens": (CrossAttention, Tokens, "image"),
    "text": (CrossAttention, Words, "image"),
    "planes": (Concatenated, Planes, "label_map"),
}
Train = Callable[..., Path]


def made(kind: str, drop: float = 0.3) -> DDPM:
    net, embedder, _ = KINDS[kind]
    objective, guider = Objective(Flow(), VectorField(), Plain(), Uniform()), ClassifierFree(guidance=2.0)
    return DDPM(objective, net(), embedder(), drop, Euler(steps=2), guider, OPTIMIZER, 1.0)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Inside, a config's model is the toy one."""
    monkeypatch.setattr(build, "model", lambda cfg, folder: made(request.param))
    return request.param


def trained(kind: str, folder: Path, images: int) -> Path:
    words = [word for word in COMMON if not word.startswith(("budget.", "checkpoint.", "eval.every"))]
    words += [f"budget.images={images}", "checkpoint.every_images=16", "eval.every_images=1000"]
    train.train(composed("model=flow", *words, f"data.task={KINDS[kind][2]}", run_dir=folder))
    return folder


def test_a_run_goes_on_bit_for_bit_under_averages_and_samples(kind: str, tmp_path: Path) -> None:
    whole = trained(kind, tmp_path / "whole", 32)
    trained(kind, tmp_path / "parts", 16)
    parts = trained(kind, tmp_path / "parts", 32)
    first, second = (load_file(folder / "weights.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()

    state = load(newest(whole / "checkpoints"))
    averages = next(iter(state["callbacks"]["EMA"]["nets"].values()))
    assert set(averages) == {"net", "embedder"}
    raw = {name: state["state_dict"][f"net.{name}"] for name in averages["net"]}
    assert not all(torch.equal(raw[name], value) for name, value in averages["net"].items())

    assert len(list((whole / "samples").glob("samples_*.png"))) == 1
    loaded = folders.load(whole, ema=True)
    cond = loaded.model.condition(loaded.data.test_batch(0, 6), "")
    with torch.inference_mode():
        together = loaded.model.sample(cond, ImageRngs(0, 0, 6))
        one = loaded.model.sample(rows_of(cond, slice(4, 5)), ImageRngs(0, 4, 1))
    torch.testing.assert_close(together[4:5], one, atol=1e-5, rtol=0)


def asked(kind: str, n: int = 4) -> Cond:
    torch.manual_seed(1)
    if kind == "text":
        return {"text": ["a small red disc", "a large blue star on a black ground", "a ring", "two words"][:n]}
    return {"attributes": (torch.rand(n, N) > 0.5).float()} if kind == "tokens" else {"source": torch.rand(n, 3, 8, 8)}


def reversed_rows(cond: Cond) -> Cond:
    return rows_of(cond, torch.tensor([3, 2, 1, 0]))


def test_guidance_goes_along_the_line_of_both_answers(kind: str) -> None:
    model, cond, x = made(kind), asked(kind), torch.randn(4, 3, 8, 8)
    known, null, t = model.embedder(cond, 4), model.embedder.null(4), torch.full((4,), 0.5)
    denoise = partial(model.objective.denoise, model.net)
    with torch.inference_mode():
        free, told = denoise(x, t, null), denoise(x, t, known)
        guided = ClassifierFree(guidance=3.0)(denoise, Asked(known, null, cond, model.objective.schedule))(x, t)
    torch.testing.assert_close(guided, free + 3 * (told - free), atol=1e-5, rtol=1e-5)
    assert (told - free).abs().flatten(1).amax(1).min() > 1e-3


def test_samples_follow_the_condition_and_guidance_0_does_not(kind: str) -> None:
    model, cond = made(kind), asked(kind)
    other = reversed_rows(cond)
    for guidance, follows in ((2.0, True), (1.0, True), (0.0, False)):
        with torch.inference_mode():
            one, two = (model.sample(c, ImageRngs(0, 0, 4), guidance=guidance) for c in (cond, other))
        assert torch.equal(one, two) != follows


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_condition_leaves_no_trace_in_the_loss(kind: str, drop: float) -> None:
    model, losses = made(kind, drop), []
    x, cond = torch.randn(4, 3, 8, 8), asked(kind)
    for given in (cond, reversed_rows(cond)):
        torch.manual_seed(0)
        losses.append(model.training_step({"image": x, **given}))
    assert torch.equal(*losses) == (drop == 1.0)


def test_a_set_gives_its_captions_to_a_model_that_takes_them() -> None:
    preflight.check(composed("model=vae", "data=shapes", "data.conditions=[text]"))
    with pytest.raises(UserError) as caught:
        preflight.check(composed("model=flow", "data=shapes", "data.conditions=[text]"))
    assert caught.value.line().startswith("error: data.conditions=['text']: item 0: it must be 'label' or 'attributes'")


def unet(cond_dim: int | None) -> UNet:
    sizes = {"width": 4, "multipliers": [1], "n_blocks": 1, "attention": []}
    return UNet(image_size=8, image_channels=3, cond_dim=cond_dim, **sizes)


def labels(*conditions: str) -> ConditionEmbedder:
    return ConditionEmbedder(dim=6, conditions=[*conditions], n_classes=4, label_factors=[], n_attributes=0)


@pytest.mark.parametrize(
    ("net", "embedder", "line"),
    [
        (
            lambda: unet(None),
            Tokens,
            "model.net=UNet: it takes no tokens and would ignore attributes. Fix: model.net.token_dim=8",
        ),
        (
            lambda: unet(None),
            lambda: labels("label"),
            "model.net=UNet: it takes no vector and would ignore label. Fix: model.net.cond_dim=6",
        ),
        (
            lambda: unet(5),
            lambda: labels(),
            "model.net.cond_dim=5: the embedder gives vector of size 6, the net takes 5. Fix: model.net.cond_dim=6",
        ),
        (
            Concatenated,
            Tokens,
            "model.embedder=Tokens: Concatenated takes planes, Tokens gives none. Fix: model.net._target_=atelier.",
        ),
        (lambda: unet(None), lambda: labels(), None),
        (lambda: unet(6), lambda: labels("label"), None),
    ],
)
def test_a_net_that_would_ignore_conditions_is_refused(net: Callable, embedder: Callable, line: str | None) -> None:
    """Before training, which would otherwise go on as if there were none."""
    parts = made("planes").objective, net(), embedder(), 0.1, Euler(steps=2), ClassifierFree(guidance=1.0), None, None
    if line is None:
        assert DDPM(*parts).net.cond_sizes in ({}, {"vector": 6})
        return
    with pytest.raises(UserError) as caught:
        DDPM(*parts)
    assert caught.value.at("model").line().startswith(f"error: {line}")


def test_a_net_without_a_shape_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        DDPM(made("planes").objective, nn.Conv2d(3, 3, 1), Planes(), 0.1, Euler(steps=2), None, None, None)
    assert caught.value.at("model").line().startswith("error: model.net=Conv2d: it is no denoising net")
