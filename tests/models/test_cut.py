"""CUT: the contrast of patches on closed forms, what each player learns from, one direction at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.batch import Batch
from atelier.core.rng import ImageRngs
from atelier.losses.contrastive import patch_nce
from atelier.models.cut import CUT
from atelier.nets.resnet_translator import ResNetTranslator
from atelier.runs import build
from tests.compose import composed
from tests.players import Recording
from tests.tiny import tiny

TINY = [  # beside tests/tiny.py:COMMON
    "model=cut",
    "data.task=fill",
    "model.generator.width=4",
    "model.generator.n_blocks=1",
    "model.discriminator.width=4",
    "model.discriminator.n_layers=1",
    "model.patch_dim=4",
]


def made(*words: str) -> CUT:
    torch.manual_seed(0)
    return build.model(composed(*tiny("cut"), *words), Path("unused"))


def batch(n: int = 4) -> Batch:
    torch.manual_seed(1)
    return {f"image_{side}": torch.rand(n, 3, 8, 8) * 2 - 1 for side in "ab"}


def test_places_that_are_told_apart_and_places_that_are_not() -> None:
    """Orthogonal vectors leave log(1 + (S - 1) exp(-1 / T)), equal ones log S, exchanged ones 1 / T more."""
    apart = torch.eye(5)[None].repeat(2, 1, 1)
    assert patch_nce(apart, apart, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-5)
    same = torch.ones(2, 5, 5) / 5**0.5
    assert patch_nce(same, same, 0.07).item() == pytest.approx(math.log(5), rel=1e-5)
    wrong = patch_nce(apart.roll(1, dims=1), apart, 0.5).item()
    assert wrong == pytest.approx(2 + math.log(1 + 4 * math.exp(-2)), rel=1e-5)


def test_other_images_are_not_among_the_wrong_places() -> None:
    torch.manual_seed(0)
    query, key = (F.normalize(torch.randn(3, 7, 4), dim=2) for _ in range(2))
    alone = [patch_nce(query[i : i + 1], key[i : i + 1], 0.1) for i in range(3)]
    torch.testing.assert_close(patch_nce(query, key, 0.1), torch.stack(alone).mean())


def test_the_published_net_is_looked_at_in_five_places() -> None:
    """Pixels, both halvings, the first and the fifth of nine blocks."""
    with torch.device("meta"):
        net = ResNetTranslator(
            in_channels=3, image_channels=3, width=64, n_downs=2, n_blocks=9, patch_size=1, norm="instance",
            padding="reflect", residual=False,
        )  # fmt: skip
    assert list(net.looked_at.values()) == [3, 128, 256, 256, 256]
    kinds = [type(net.layers[k]).__name__ for k in net.looked_at]
    assert kinds == ["PixelUnshuffle", "Conv2d", "Conv2d", "TranslatorBlock", "TranslatorBlock"]
    blocks = [k for k, layer in enumerate(net.layers) if type(layer).__name__ == "TranslatorBlock"]
    assert list(net.looked_at)[3:] == [blocks[0], blocks[4]]


def test_features_are_what_passes_through_the_net() -> None:
    net, seen = made("model.generator.n_blocks=3").generator, {}
    for k in net.looked_at:
        net.layers[k].register_forward_hook(lambda layer, args, out, k=k: seen.update({k: out}))
    x = batch()["image_a"]
    found = net.features(x)
    net(x)
    for k, n, h in zip(net.looked_at, net.looked_at.values(), found, strict=True):
        torch.testing.assert_close(h, seen[k])
        assert h.shape[1] == n


def step(model: CUT, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[dict[str, Tensor]]]:
    """One batch: whose turn it was, and the gradients of each player."""
    log: list[str] = []
    ours = nn.ModuleDict({"generator": model.generator, "heads": model.heads})
    optimizers = [Recording("G", ours, log), Recording("D", model.discriminator, log)]
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    model.zero_grad()
    model.training_step(batch())
    return log, [optimizer.gradients for optimizer in optimizers]


def contrast(model: CUT, source: Tensor, result: Tensor) -> Tensor:
    """All places of all depths, written out."""
    losses = []
    for head, x, y in zip(model.heads, model.generator.features(source), model.generator.features(result), strict=True):
        x, y = (F.normalize(head(h.flatten(2).transpose(1, 2)), dim=2) for h in (x, y))
        scores = torch.einsum("bsd,btd->bst", y, x.detach()) / 0.07
        losses.append((scores.logsumexp(2) - scores.diagonal(dim1=1, dim2=2)).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("identity", [0.0, 0.6])
def test_the_sum_by_hand(identity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas written out here; the discriminator learns first, from the same results."""
    model = made("model.patch_weight=0.4", f"model.identity_weight={identity}")
    log, (ours, theirs) = step(model, monkeypatch)
    assert log == ["D", "G"]
    told, x = dict(model.reported), batch()
    model.zero_grad()
    a, b = x["image_a"], x["image_b"]
    fake = model.generator(a)
    judged = ((model.discriminator(b) - 1).square().mean() + model.discriminator(fake.detach()).square().mean()) / 2
    assert told["discriminator"].item() == pytest.approx(judged.item(), rel=1e-5)
    judged.backward()
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(theirs[name], p.grad)
    model.zero_grad()
    loss = (model.discriminator(fake) - 1).square().mean() + 0.4 * contrast(model, a, fake)
    if identity:
        loss = loss + identity * contrast(model, b, model.generator(b))
    loss.backward()
    for part in ("generator", "heads"):
        for name, p in getattr(model, part).named_parameters():
            torch.testing.assert_close(ours[f"{part}.{name}"], p.grad, msg=name)
    assert ("identity" in told) == bool(identity)


def test_few_patches_are_drawn_anew() -> None:
    model, x = made("model.n_patches=2"), batch()
    source, result = x["image_a"], x["image_b"]
    drawn = {model._apart(source, result).item() for _ in range(8)}
    assert len(drawn) > 1
    torch.manual_seed(3)
    first = model._apart(source, result)
    torch.manual_seed(3)
    torch.testing.assert_close(model._apart(source, result), first)


def test_each_optimizer_owns_its_player() -> None:
    model = made()
    ours, theirs = model.configure_optimizers()
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    both = [*model.generator.parameters(), *model.heads.parameters()]
    assert held == [{id(p) for p in both}, {id(p) for p in model.discriminator.parameters()}]


@pytest.mark.parametrize("direction", ["a2b", "b2a"])
def test_direction(direction: str) -> None:
    model, x = made(f"model.direction={direction}"), batch()
    source, target = (f"image_{side}" for side in (direction[0], direction[2]))
    assert model.cases == (direction,)
    cond = model.condition(x, direction)
    assert set(cond) == {source} and model.real_fields[direction] == target
    torch.testing.assert_close(model.sample(cond, ImageRngs(0, 0, 4)), model.generator(x[source]))


def test_losses_are_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = made(), []
    model.generator.layers[1].register_forward_hook(lambda net, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, monkeypatch)
    assert set(dtypes) == {torch.bfloat16}
    assert {v.dtype for v in model.reported.values()} == {torch.float32}
