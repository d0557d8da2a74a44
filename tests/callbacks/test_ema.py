"""The average's recurrence, when it is taken, and that the raw weights come back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch import nn

import train
from atelier.callbacks import statistics
from atelier.callbacks.ema import EMA, average_of, swap
from atelier.callbacks.evaluation import Evaluation
from atelier.callbacks.grids import Grids
from atelier.checkpoints.store import Manifest, load, newest
from atelier.core.rng import ImageRngs
from atelier.evaluation.evaluator import Evaluator
from atelier.models.base import Generator
from atelier.runs import folders
from tests import stock
from tests.compose import composed
from tests.conftest import overrides
from tests.tiny import COMMON


class Model(Generator):
    ema_nets = ("net",)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.frozen = nn.Linear(2, 2)

    def sample(self, cond: dict, rngs: ImageRngs) -> torch.Tensor:
        return self.net(rngs.randn(2))


def made(half_lives: list[int], ramp: float) -> tuple[EMA, Model, SimpleNamespace]:
    clock, model = SimpleNamespace(images_seen=0), Model()
    ema = EMA(half_lives, ramp, clock)
    ema.setup(None, model, "fit")
    ema.data = SimpleNamespace(batch_size=64, split=lambda name: None)
    return ema, model, clock


def set_to(model: Model, value: float) -> None:
    with torch.no_grad():
        for p in model.net.parameters():
            p.fill_(value)


def weight(ema: EMA, half_life: int) -> float:
    (value,) = {float(x) for p in ema.nets[str(half_life)]["net"].parameters() for x in p.flatten()}
    return value


def test_half_lives_are_in_images() -> None:
    """From 0 with the weights at 1: 1 - 0.5 ** (images / half-life), in however many updates."""
    ema, model, clock = made([100, 400], ramp=1.0)
    clock.images_seen = 10_000
    set_to(model, 0.0)
    ema.updated_at = -(10**9)  # everything before is forgotten
    ema.update(model)
    set_to(model, 1.0)
    for step in (10, 30, 60):  # 100 images
        clock.images_seen += step
        ema.update(model)
    assert weight(ema, 100) == pytest.approx(0.5, abs=1e-6)
    assert weight(ema, 400) == pytest.approx(1 - 0.5**0.25, abs=1e-6)


def test_recurrence_with_a_ramp() -> None:
    """average += (1 - 0.5 ** (step / length)) (weights - average), length = min(half-life, ramp * images seen)."""
    ema, model, clock = made([1000], ramp=0.1)
    set_to(model, 0.0)
    ema.nets["1000"]["net"].load_state_dict(model.net.state_dict())
    expected = 0.0
    for k in range(1, 40):
        clock.images_seen = 500 * k
        set_to(model, float(k))
        ema.update(model)
        length = min(1000.0, 0.1 * 500 * k)
        expected += (1 - 2.0 ** (-500 / length)) * (k - expected)
        assert weight(ema, 1000) == pytest.approx(expected, rel=1e-5), k


def test_buffers_are_copied() -> None:
    ema, model, clock = made([1000], ramp=1.0)
    model.net(torch.randn(8, 2))
    clock.images_seen = 8
    ema.update(model)
    for average, raw in zip(ema.nets["1000"]["net"].buffers(), model.net.buffers(), strict=True):
        assert torch.equal(average, raw) and average is not raw
    assert ema.nets["1000"]["net"][1].num_batches_tracked.dtype == torch.int64


# ---- batch norms ---------------------------------------------------------------------------------------------------


def test_the_averages_batch_norm_has_the_statistics_of_the_average() -> None:
    """A W z + b with z ~ N(0, I) has mean b and variances diag(W W'); the raw net's are those of other weights."""
    ema, model, clock = made([1000, 10], ramp=1.0)
    model.train()
    clock.images_seen = 500
    with torch.no_grad():
        model.net[0].weight.copy_(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        model.net[0].bias.copy_(torch.tensor([5.0, -5.0]))
    for _ in range(100):
        model.net(torch.randn(64, 2))
    ema.update(model)
    raw = [b.clone() for b in model.net.buffers()]
    state = torch.get_rng_state()
    with ema.averaged(model):
        linear, norm = model.net
        z = ImageRngs(statistics.SEED, 0, 64 * statistics.BATCHES).randn(2)
        seen = (z @ linear.weight.T + linear.bias).view(statistics.BATCHES, 64, 2)
        assert torch.allclose(norm.running_mean, seen.mean((0, 1)), atol=1e-5)
        assert torch.allclose(norm.running_var, seen.var(1).mean(0), rtol=1e-4)
        assert torch.allclose(norm.running_mean, linear.bias, atol=0.2)
        assert torch.allclose(norm.running_var, linear.weight.square().sum(1), rtol=0.2)
        assert not torch.allclose(norm.running_mean, raw[0], atol=0.5)
        assert norm.training and norm.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(raw, model.net.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    short = ema.nets["10"]["net"]
    assert torch.allclose(short[1].running_mean, short[0].bias, atol=0.3)  # every half-life has its own


def test_statistics_are_taken_once_for_one_average(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, model, clock = made([1000], ramp=1.0)
    taken: list[int] = []
    monkeypatch.setattr(statistics, "take", lambda *_: taken.append(clock.images_seen))
    for step in (8, 16):
        clock.images_seen = step
        ema.update(model)
        for _ in range(2):
            with ema.averaged(model):
                pass
    ema.load_state_dict(ema.state_dict())
    ema.update_statistics(model)
    assert taken == [8, 16, 16]


def test_averages_move_with_any_optimizer_of_theirs() -> None:
    """Where the first averaged net is frozen, as under LoRA, the others still move; a step of another moves none."""
    model, clock = Model(), SimpleNamespace(images_seen=8)
    model.net.requires_grad_(False)
    model.added, model.ema_nets = nn.Linear(2, 2), ("net", "added")
    ema = EMA([8], 1.0, clock)
    ema.setup(None, model, "fit")
    model.trained = None  # looked at once, in setup
    start, average = model.added.weight.detach().clone(), ema.nets["8"]["added"].weight
    nn.init.zeros_(model.added.weight)
    for net, expected in ((model.frozen, start), (model.added, start / 2)):
        ema.on_before_optimizer_step(None, model, torch.optim.SGD(net.parameters()))
        ema.on_train_batch_end(None, model, None, {}, 0)
        torch.testing.assert_close(average, expected)


def test_a_compiled_net_takes_statistics_uncompiled() -> None:
    """Each of the 16 batches enters with a weight of its own, for each of which it would be compiled."""
    ema, model, clock = made([1000], ramp=1.0)
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model.net.compile(backend=backend)
    ema.setup(None, model, "fit")
    ema.update_statistics(model)
    assert not compiled and ema.nets["1000"]["net"][1].num_batches_tracked == statistics.BATCHES
    with torch.no_grad():
        model.net.eval()(torch.randn(8, 2))
    assert compiled


DCGAN = [
    "model=dcgan",
    *COMMON,
    "model.generator.width=2",
    "model.discriminator.width=2",
    "model.generator.noise_dim=4",
]
NORMED = {
    "dcgan": DCGAN,
    "cgan": overrides("gan"),
    "pix2pix": [*overrides("pix2pix"), "model.generator.norm=batch"],
    "srgan": [*overrides("srgan"), "model.net.norm=batch"],
}


@pytest.mark.parametrize("page", NORMED)
def test_what_a_run_saves_and_exports_has_its_own_statistics(tmp_path: Path, page: str) -> None:
    """What sampling loads, taken again from weights and data, is the same bit for bit; what was trained is not."""
    words = ["budget.images=48", "eval.every_images=1000", "callbacks.ema.half_lives=[1000]"]
    train.train(composed(*NORMED[page], *words, run_dir=tmp_path))
    saved = norms_of(folders.load(tmp_path, ema=True).model)
    exported = load_file(tmp_path / "weights.safetensors")
    assert saved and all(torch.equal(saved[name], exported[name]) for name in saved)
    Manifest(tmp_path / "checkpoints").cut(24)  # a save in passing, with no pictures before it
    averaged, raw = (folders.load(tmp_path, ema=ema) for ema in (True, False))
    assert averaged.images_seen == 24
    saved, trained = (norms_of(loaded.model) for loaded in (averaged, raw))
    assert not any(torch.equal(saved[name], trained[name]) for name in saved)
    statistics.take(averaged.model, averaged.data)
    again = norms_of(averaged.model)
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def norms_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running statistics of the averaged nets by name."""
    nets = tuple(f"{name}." for name in model.ema_nets)
    return {k: v.clone() for k, v in model.state_dict().items() if "running_" in k and k.startswith(nets)}


def test_only_the_named_nets_are_averaged() -> None:
    ema, model, _ = made([1000], ramp=1.0)
    assert set(ema.nets["1000"]) == {"net"}
    assert not any(p.requires_grad for p in ema.nets["1000"]["net"].parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_gan_is_averaged_after_generator_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """n_critic = 2, 8 images a batch: an update every 16 images, over 16 images."""
    updates: list[tuple[int, int]] = []
    update = EMA.update

    def noted(self: EMA, model: Any) -> None:
        updates.append((self.clock.images_seen, self.clock.images_seen - self.updated_at))
        update(self, model)

    monkeypatch.setattr(EMA, "update", noted)
    train.train(composed(*overrides("gan"), "model.n_critic=2", "budget.images=48", run_dir=tmp_path))
    assert updates == [(16, 16), (32, 16), (48, 16)]
    state = load(newest(tmp_path / "checkpoints"))["callbacks"]["EMA"]
    assert set(state["nets"]) == {"16", "64"} and state["updated_at"] == 48
    assert set(state["nets"]["16"]) == {"generator", "generator_embedder"}


def test_lightnings_average_misses_every_update_of_a_gan(tmp_path: Path) -> None:
    """Two optimizers move global_step by 2, and it looks at odd steps: why EMA is there."""
    average = EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    updates: list[int] = []
    taken = average.should_update
    average.should_update = lambda *args, **kwargs: updates.append(bool(taken(*args, **kwargs))) or updates[-1]
    stock.fit(tmp_path, 8, average)
    assert updates and not any(updates)


def test_swap_is_its_own_inverse_and_keeps_the_tensors() -> None:
    model = Model()
    nets = average_of(model)
    set_to(model, 3.0)
    held = model.net[0].weight
    with torch.no_grad():
        for p in nets["net"].parameters():
            p.fill_(5.0)
    swap(model, nets)
    assert model.net[0].weight is held and held[0, 0] == 5.0 and nets["net"][0].weight[0, 0] == 3.0
    swap(model, nets)
    assert held[0, 0] == 3.0 and nets["net"][0].weight[0, 0] == 5.0


def test_raw_weights_come_back_after_an_error() -> None:
    ema, model, _ = made([1000], ramp=1.0)
    set_to(model, 7.0)
    with pytest.raises(RuntimeError), ema.averaged(model):
        assert model.net[0].weight[0, 0] != 7.0
        raise RuntimeError("sampling failed")
    assert model.net[0].weight[0, 0] == 7.0


def test_without_half_lives_the_raw_weights_are_used() -> None:
    ema, model, _ = made([], ramp=1.0)
    set_to(model, 7.0)
    with ema.averaged(model):
        assert model.net[0].weight[0, 0] == 7.0


@pytest.mark.parametrize("part", ["grids", "evaluation"])
def test_an_error_in_sampling_leaves_a_run_with_its_raw_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    seen: dict[str, Any] = {}

    def noted(self: Any, trainer: Any, model: Any, *rest: Any) -> None:
        seen["model"] = model
        seen["before"] = [p.detach().clone() for p in model.parameters()]
        original(self, trainer, model, *rest)

    owner, hook = (Grids, "draw") if part == "grids" else (Evaluation, "on_validation_epoch_end")
    original = getattr(owner, hook)
    monkeypatch.setattr(owner, hook, noted)

    def failing(*_: Any) -> None:
        seen["inside"] = [p.detach().clone() for p in seen["model"].parameters()]
        raise RuntimeError("sampling failed")

    if part == "evaluation":
        monkeypatch.setattr(Evaluator, "__call__", failing)
    else:
        monkeypatch.setattr("atelier.callbacks.grids.sample", failing)
    with pytest.raises(RuntimeError, match="sampling failed"):
        train.train(composed(*overrides("vae"), "callbacks.grids.every_images=32", run_dir=tmp_path))
    after = list(seen["model"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen["before"], seen["inside"], strict=True))


def test_a_compiled_net_sees_the_swap() -> None:
    ema, model, clock = made([1000], ramp=1.0)
    model.net = nn.Linear(2, 2)
    model.net.compile(backend="eager")
    ema.setup(None, model, "fit")  # copies a compiled net
    x = torch.randn(3, 2)
    set_to(model, 1.0)
    with torch.no_grad():
        raw = model.net(x)
        with ema.averaged(model):
            averaged = model.net(x)
            expected = nn.functional.linear(x, model.net.weight, model.net.bias)
        assert torch.allclose(averaged, expected) and not torch.allclose(averaged, raw)
        assert torch.allclose(model.net(x), raw)
        set_to(model, 2.0)
        clock.images_seen = 8
        ema.update(model)
        assert torch.allclose(model.net(x), 2 * raw)


def test_state_comes_back(tmp_path: Path) -> None:
    ema, model, clock = made([16, 64], ramp=1.0)
    clock.images_seen = 24
    set_to(model, 2.0)
    ema.update(model)
    again, _, _ = made([16, 64], ramp=1.0)
    again.load_state_dict(ema.state_dict())
    assert again.updated_at == 24
    for half_life in ("16", "64"):
        old, new = (e.nets[half_life]["net"].state_dict() for e in (ema, again))
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_average_is_chosen_by_its_half_life(finished: dict[str, Path]) -> None:
    """The tiny run has 16 and 64; True is the first of them."""
    from atelier.core.errors import UserError

    checkpoint = load(newest(finished["ddpm"] / "checkpoints"))["callbacks"]["EMA"]["nets"]
    for asked, half_life in ((16, "16"), (64, "64"), (True, "16")):
        loaded = folders.load(finished["ddpm"], ema=asked)
        assert loaded.ema == [int(half_life)]
        state = loaded.model.net.state_dict()
        assert all(torch.equal(state[name], value) for name, value in checkpoint[half_life]["net"].items())
    with pytest.raises(UserError) as error:
        folders.load(finished["ddpm"], ema=32)
    assert error.value.line() == "error: ema=32: the run has averages of half-lives 16, 64. Fix: ema=16"


@pytest.mark.parametrize("config", ["sample", "evaluate", "export"])
@pytest.mark.parametrize(("word", "fits"), [("64", True), ("true", True), ("false", True), ("0", False), ("x", False)])
def test_ema_takes_a_length_on_the_command_line(config: str, word: str, fits: bool) -> None:
    from contextlib import nullcontext

    from atelier.core.errors import UserError
    from atelier.runs import preflight

    with nullcontext() if fits else pytest.raises(UserError, match="error: ema="):
        preflight.check(composed(f"ema={word}", config=config))


@pytest.mark.parametrize(
    ("half_lives", "ramp", "line"),
    [
        ([4_000], 0.05, None),
        ([4_000, 30_000], 0.05, "30,000 images are more than a fifth of this run, so callbacks.ema.ramp cuts them"),
        ([30_000], 1.0, "30,000 images are more than a fifth of this run, whose average will still hold early weights"),
        ([], 0.05, None),
    ],
)  # fmt: skip
def test_a_half_life_that_is_long_beside_the_run_is_told(
    half_lives: list[int], ramp: float, line: str | None, capsys: pytest.CaptureFixture
) -> None:
    from atelier.callbacks.progress import Progress
    from atelier.runs import report

    words = [f"callbacks.ema.half_lives=[{','.join(map(str, half_lives))}]", f"callbacks.ema.ramp={ramp}"]
    cfg = composed("budget.images=110000", *words)
    model = SimpleNamespace(kind="DDPM", parameters=list, trained=dict, given=frozenset(), needs=frozenset())
    data = SimpleNamespace(image_channels=3, image_size=16, batch_size=32)
    report.announce(Progress(SimpleNamespace()), cfg, model, data)
    told = [one for one in capsys.readouterr().out.splitlines() if one.startswith("callbacks.ema.half_lives: ")]
    assert len(told) == (line is not None) and (line or "") in "".join(told)
