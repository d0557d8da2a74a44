"""The sum of losses of both members, who learns from what, the net taken over from a finished run, float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.losses.perceptual import Pyramid, VGGFeatures
from atelier.models.base import Translator
from atelier.models.srgan import SRGAN
from atelier.nets.vgg import VGG19, VGG54, vgg
from atelier.runs import build
from tests.compose import composed
from tests.players import Recording
from tests.tiny import COMMON

TINY = [  # beside tests/tiny.py:COMMON
    "model=srresnet",
    "adversarial@model.loss=relativistic_average",
    "perceptual@model.perceptual=pyramid",
    "data.image_size=16",
    "data.task=low_resolution",
    "model.net.width=4",
    "model.net.n_blocks=1",
    "model.perceptual.n_levels=1",
    "model.adversarial_weight=0.1",
    "model.discriminator={_target_:atelier.nets.srgan.SRDiscriminator,"
    "image_size:16,image_channels:3,width:2,dense:4,norm:batch}",
    "model.discriminator_optimizer={_target_:atelier.optim.adamw,"
    "_partial_:true,lr:1e-3,betas:[0.9,0.99],weight_decay:0.0,warmup_images:0,decay:constant,decay_from:0,decay_to:96}",
]

DATA = [*COMMON, "data.task=low_resolution"]
NET = ["model.net.width=4", "model.net.n_blocks=1"]
PLAYER = ["model.discriminator.width=2", "model.discriminator.dense=4", "model.perceptual.n_levels=1"]


def alone(*words: str) -> SRGAN:
    """The page srresnet."""
    torch.manual_seed(0)
    return build.model(composed("model=srresnet", *DATA, *NET, *words), Path("unused"))


def beside(*words: str, first_stage: nn.Module | None = None, small: Sequence[str] = PLAYER, **changed: Any) -> SRGAN:
    """The page srgan on a net that is handed over as that of a finished run."""
    torch.manual_seed(1)
    node = build.plain(composed("model=srgan", *DATA, *small, *words))["model"]
    cfg = OmegaConf.create({"model": node | changed}, flags={"allow_objects": True})
    first_stage = alone("model.net.residual=false").net if first_stage is None else first_stage
    return build.on_parts(cfg, {"first_stage": first_stage})


def batch(n: int = 6, size: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    image, source = (2 * torch.rand(n, 3, side, side, generator=rng) - 1 for side in (size, size // 4))
    return {"image": image, "source": source}


def step(model: SRGAN, monkeypatch: pytest.MonkeyPatch, x: dict | None = None) -> tuple[list[str], list[dict]]:
    """One batch: whose turn it was, and the gradients of each player."""
    log: list[str] = []
    nets = [("G", model.net), ("D", model.discriminator)]
    optimizers = [Recording(name, net, log) for name, net in nets if net is not None]
    monkeypatch.setattr(model, "optimizers", lambda: optimizers if len(optimizers) > 1 else optimizers[0])
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    model.reported.clear()
    model.zero_grad()
    model.training_step(batch() if x is None else x)
    return log, [optimizer.gradients for optimizer in optimizers]


# What is learned


@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_alone_it_learns_from_pixels(pixel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone(f"model.pixel_loss={pixel}", "model.pixel_weight=0.3", "model.net.residual=false")
    log, (ours,) = step(model, monkeypatch)
    assert log == ["G"] and {"loss", "pixel"} <= set(model.reported)
    model.zero_grad()
    x = batch()
    loss = 0.3 * (F.l1_loss if pixel == "l1" else F.mse_loss)(model.net(x["source"]), x["image"])
    assert model.reported["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)


def test_alone_it_may_have_a_perceptual_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone("perceptual@model.perceptual=pyramid", "model.perceptual_weight=0.5")
    step(model, monkeypatch)
    told, x = model.reported, batch()
    distance = Pyramid(n_levels=3)(x["image"], model.net(x["source"])).mean()
    assert told["perceptual"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert told["loss"].item() == pytest.approx((told["pixel"] + 0.5 * distance).item(), rel=1e-5)


WEIGHTS = ["model.pixel_weight=0.2", "model.perceptual_weight=0.7", "model.adversarial_weight=0.4"]


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic", "relativistic_average"])
def test_beside_a_discriminator_the_sum_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas written out here; the net learns before the discriminator, which sees the same results."""
    model = beside(*WEIGHTS, f"adversarial@model.loss={kind}").eval()
    log, (ours, theirs) = step(model, monkeypatch)
    assert log == ["G", "D"]
    x, reported = batch(), model.reported
    model.zero_grad()
    made = model.net(x["source"])
    real, fake = model.discriminator(x["image"]), model.discriminator(made)
    heard = {
        "non_saturating": F.softplus(-fake),
        "relativistic": F.softplus(real - fake),
        "relativistic_average": F.softplus(real - fake.mean()) + F.softplus(real.mean() - fake),
    }[kind].mean()
    content = 0.2 * (x["image"] - made).abs().mean() + 0.7 * Pyramid(n_levels=1)(x["image"], made).mean()
    loss = content + 0.4 * heard
    assert reported["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)
    model.zero_grad()
    fake = model.discriminator(made.detach())
    real = model.discriminator(x["image"])
    if kind == "non_saturating":
        judged = F.softplus(-real).mean() + F.softplus(fake).mean()
    elif kind == "relativistic":
        judged = F.softplus(fake - real).mean()
    else:
        judged = F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean()
    judged.backward()
    assert reported["discriminator"].item() == pytest.approx(judged.item(), rel=1e-5)
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(theirs[name], p.grad)


ALONE = ["model.discriminator.norm=none"]


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic"])
def test_penalties_of_the_discriminator_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared gradients at images and at results, of each image alone, halved; the net has none of it."""
    page = [*ALONE, f"adversarial@model.loss={kind}"]
    model = beside(*page, "model.r1_gamma=0.6", "model.r2_gamma=0.2")
    _, (ours, theirs) = step(model, monkeypatch)
    x, reported = batch(), model.reported
    model.zero_grad()
    made = model.net(x["source"]).detach()
    real, fake = model.discriminator(x["image"]), model.discriminator(made)
    loss = F.softplus(fake - real).mean() if kind == "relativistic" else (F.softplus(-real) + F.softplus(fake)).mean()
    assert reported["discriminator"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, gamma, shown in (("r1", 0.6, x["image"]), ("r2", 0.2, made)):
        gradients = []
        for image in shown:
            at = image[None].requires_grad_()
            gradients.append(torch.autograd.grad(model.discriminator(at).sum(), at, create_graph=True)[0])
        penalty = torch.cat(gradients).square().sum((1, 2, 3)).mean()
        assert reported[name].item() == pytest.approx(penalty.item(), rel=1e-4)
        loss = loss + gamma / 2 * penalty
    loss.backward()
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(theirs[name], p.grad, rtol=1e-4, atol=1e-7)
    free = beside(*page)
    _, (unchanged, _) = step(free, monkeypatch)
    assert all(torch.equal(ours[name], gradient) for name, gradient in unchanged.items())
    assert not {"r1", "r2"} & set(free.reported)


@pytest.mark.parametrize(("name", "other"), [("r1", "r2"), ("r2", "r1")])
def test_one_penalty_alone(name: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = beside(*ALONE, f"model.{name}_gamma=1")
    step(model, monkeypatch)
    assert model.reported[name] > 0 and other not in model.reported


def test_a_run_from_before_there_were_penalties_is_built() -> None:
    node = build.plain(composed("model=srgan", *DATA, *PLAYER))["model"]
    old = {key: value for key, value in node.items() if key not in ("first_stage", "r1_gamma", "r2_gamma")}
    del old["discriminator"]["norm"]
    model = instantiate(old, _convert_="all", _partial_=True)(first_stage=alone().net)
    assert not model.penalised and not model.discriminator.per_sample


def test_penalties_are_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = beside(*ALONE, "model.r1_gamma=1"), []
    model.discriminator.head.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, monkeypatch)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]  # for the net, then its own step: images, results


@pytest.mark.parametrize("name", ["r1_gamma", "r2_gamma"])
def test_a_penalty_with_batch_norm_is_one_line(name: str) -> None:
    with pytest.raises(Exception) as caught:
        beside(f"model.{name}=0.1")
    assert user_error(caught.value).line().startswith("error: model.discriminator.norm=batch: with batch norm")


@pytest.mark.parametrize(("kind", "shown"), [("hinge", 2), ("relativistic", 3)])
def test_real_images_are_shown_once_unless_they_are_compared(
    kind: str, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, x = beside(f"adversarial@model.loss={kind}"), [], batch()
    model.discriminator.register_forward_hook(lambda net, args, out: seen.append(torch.equal(args[0], x["image"])))
    step(model, monkeypatch, x)
    assert sum(seen) == shown - 1 and len(seen) == shown + 1


def test_a_discriminator_step_leaves_the_net_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = beside()
    _, (ours, _) = step(model, monkeypatch)
    assert ours and all(torch.equal(p.grad, ours[n]) for n, p in model.net.named_parameters())


def test_losses_are_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = beside(), {}
    model.net.up.register_forward_hook(lambda net, args, out: seen.update(net=out.dtype))
    model.discriminator.head.register_forward_hook(lambda net, args, out: seen.update(discriminator=out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, monkeypatch)
    assert set(seen.values()) == {torch.bfloat16}  # autocast was on
    assert {v.dtype for v in model.reported.values()} == {torch.float32}


def test_each_optimizer_owns_its_player() -> None:
    for model, nets in ((beside(), ("net", "discriminator")), (alone(), ("net",))):
        held = [{id(p) for group in o.param_groups for p in group["params"]} for o in model.configure_optimizers()]
        assert held == [{id(p) for p in getattr(model, net).parameters()} for net in nets]


# What it stands on


def test_the_net_of_a_finished_run_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape and weights are those of the run, and they are saved, averaged and trained."""
    first = alone("model.net.width=6", "model.net.n_blocks=2").net
    before = {name: value.clone() for name, value in first.state_dict().items()}
    model = beside(first_stage=first)
    assert model.net.state_dict().keys() == before.keys() and model.ema_nets == ("net",)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert {f"net.{name}" for name in before} < set(model.state_dict())
    nn.init.normal_(model.net.last.weight)
    _, (ours, _) = step(model, monkeypatch)
    assert len(ours) == len(list(model.net.parameters())) and model.net.first[0].weight.grad.any()


@pytest.mark.parametrize(("changed", "line"), [
    ({"net": None}, "error: model.net=SRResNet: the first stage has the net already. Fix: "),
    ({"loss": None}, "error: model.loss=None: it goes with discriminator. Fix: model=srgan"),
    ({"discriminator_optimizer": None}, "error: model.discriminator_optimizer=None: it goes with discriminator. Fix: "),
    ({"first_stage": nn.Conv2d(3, 3, 1)}, "error: model.first_stage=Conv2d: it enlarges no images. Fix: model.first"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(changed: dict[str, Any], line: str) -> None:
    if "net" in changed:
        changed = {"net": alone().net}
    with pytest.raises(Exception) as caught:
        beside(**changed)
    assert user_error(caught.value).line().startswith(line)


@pytest.mark.parametrize("name", ["adversarial_weight", "r1_gamma", "r2_gamma"])
def test_the_weight_of_nobody_is_one_line(name: str) -> None:
    with pytest.raises(Exception) as caught:
        alone(f"model.{name}=0.1")
    line = f"error: model.{name}=0.1: there is no discriminator. Fix: model.{name}=0"
    assert user_error(caught.value).line() == line


def test_without_any_net_there_is_no_model() -> None:
    with pytest.raises(Exception) as caught:
        alone("model.net=null")
    assert user_error(caught.value).line().startswith("error: model.net=None: there is no net")


def test_sources_of_another_factor_are_one_line() -> None:
    with pytest.raises(UserError) as caught:
        alone("model.net.scale_factor=2").training_step(batch())
    line = "error: model.net.scale_factor=2: sources of 2 px do not become images of 8 px by it. "
    assert caught.value.line() == line + "Fix: model.net.scale_factor=4"


# The verbs


def test_it_is_a_translator_that_enlarges() -> None:
    model = alone("model.net.scale_factor=3", "model.net.kernel=9")
    assert isinstance(model, Translator) and (model.scale_factor, model.size_divisor, model.same_domain) == (
        3,
        1,
        False,
    )
    assert model.receptive_radius == model.net.receptive_radius and model.needs == {"source"}
    x = batch(2)
    cond = model.condition({"image": x["image"], "source": torch.zeros(2, 3, 5, 7)}, "")
    assert model.sample(cond, ImageRngs(0, 0, 2)).shape == (2, 3, 15, 21)
    assert model.answer(x, "") is x["image"]


def test_a_result_depends_on_its_source_alone() -> None:
    """Batch norm at sampling takes its running statistics, at training those of the batch."""
    model = alone("model.net.norm=batch", "model.net.residual=false")
    source = batch()["source"]
    assert not torch.allclose(model.net(source)[:2], model.net(source[:2]), atol=1e-2)
    model.eval()
    with torch.no_grad():
        together = model.sample({"source": source}, ImageRngs(0, 0, 6))
        torch.testing.assert_close(model.sample({"source": source[:2]}, ImageRngs(0, 0, 2)), together[:2])


def test_a_place_is_enlarged_alike_wherever_it_is_cut_out() -> None:
    """With `reach` pixels around it, nothing of a large source changes what becomes of a part."""
    model = alone("model.net.residual=true").eval()
    nn.init.normal_(model.net.last.weight, std=0.1)
    r, source = model.receptive_radius, torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        whole = model.sample({"source": source}, ImageRngs(0, 0, 1))
        part = model.sample({"source": source[..., 17 - r : 23 + r, 17 - r : 23 + r]}, ImageRngs(0, 0, 1))
    inside = slice(4 * r, 4 * (6 + r))
    torch.testing.assert_close(part[..., inside, inside], whole[..., 68:92, 68:92], rtol=0, atol=1e-5)


# Features of VGG19


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random numbers under the names of torchvision's vgg19."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg19.pth"
    torch.save({f"features.{name}": value for name, value in vgg(VGG19)[:-1].state_dict().items()}, path)
    return path


def test_content_is_the_squared_difference_of_features(vgg_file: Path) -> None:
    loss, net = VGGFeatures(vgg=str(vgg_file)), VGG54(torch.load(vgg_file, weights_only=True))
    x, y = batch(2, 32)["image"], batch(3, 32)["image"][1:]
    expected = (net(x) - net(y)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss(x, y), expected.detach(), rtol=1e-5, atol=0)
    assert loss(x, x).tolist() == [0, 0] and (expected > 0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), loss.float()(x, y)) and loss(x, y).dtype == torch.float32


def test_features_are_neither_trained_nor_saved(vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data.image_size=16", "perceptual@model.perceptual=vgg", f"model.perceptual.vgg={vgg_file}"]
    model = beside(*words, small=[word for word in PLAYER if "n_levels" not in word])
    assert isinstance(model.perceptual, VGGFeatures) and not model.perceptual.train().net.net.training
    assert {name.split(".")[0] for name in model.state_dict()} == {"net", "discriminator"}
    assert sum(p.numel() for p in model.parameters()) < 20_000
    log, (ours, _) = step(model, monkeypatch, batch(2, 16))
    assert log == ["G", "D"] and model.reported["perceptual"] > 0 and ours["last.weight"].any()


def test_a_file_that_does_not_do_is_one_line(vgg_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(vgg_file.read_bytes()[:1000])
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    for name, problem in (("none", "no such file"), ("cut", "it is cut"), ("other", "it holds other layers")):
        with pytest.raises(UserError) as caught:
            VGGFeatures(vgg=str(tmp_path / f"{name}.pth"))
        line = caught.value.line()
        assert line.startswith("error: .vgg=") and problem in line and "conf/perceptual/vgg.yaml" in line
    with pytest.raises(UserError) as caught:
        VGGFeatures(vgg=str(vgg_file))(batch()["image"], batch()["image"])
    assert caught.value.line() == "error: data.image_size=8: VGG19 needs 16 px a side. Fix: data.image_size=16"
