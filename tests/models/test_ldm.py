"""The codec's scale and range, and that the first stage stays out of everything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import train
from atelier.callbacks.calibration import _share
from atelier.callbacks.ema import average_of
from atelier.checkpoints.store import load, newest
from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.nets.codec import LatentCodec
from atelier.nets.frozen import Frozen
from atelier.runs import build, folders
from tests.compose import composed
from tests.conftest import overrides

TINY = [  # beside tests/tiny.py:COMMON
    "model=ldm",
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[]",
    "model.net.cond_dim=8",
    "model.embedder.dim=8",
    "model.first_stage.run=FIRST/vae",
    "model.sampler.steps=2",
]

LEVEL = 1 / 127.5


class Affine(nn.Module):
    """Encodes x to N(3 x + 5, exp(2)), decodes exactly."""

    latent_shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.weight * x + 5
        return mean, torch.full_like(mean, 2.0)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return (z - 5) / self.weight


def codec(scale: float | None = 0.25, shift: float = 2.0, mode: str = "mode") -> LatentCodec:
    return LatentCodec(Frozen(Affine()), scale, shift, mode)


def test_scale_and_shift_by_hand_and_back() -> None:
    x = torch.randn(2, 3, 4, 4)
    z = codec().encode(x)
    torch.testing.assert_close(z, (3 * x + 5 - 2) * 0.25)
    torch.testing.assert_close(codec().decode(z), x, atol=1e-5, rtol=0)


def of(x: torch.Tensor, asked: list[int] | None = None) -> Callable[[int], Iterator[torch.Tensor]]:
    """The first n images of x, by sevens; what is asked for is noted."""

    def images(n: int) -> Iterator[torch.Tensor]:
        if asked is not None:
            asked.append(n)
        yield from x[:n].split(7)

    return images


@pytest.mark.parametrize("mode", ["mode", "sample"])
def test_a_measured_scale_gives_unit_deviation(mode: str) -> None:
    torch.manual_seed(0)
    made, x = codec(None, 0.0, mode), torch.randn(400, 3, 4, 4) * torch.tensor([0.1, 0.7, 1.3])[:, None, None]
    told = made.measure(of(x))
    assert made.encode(x).std().item() == pytest.approx(1.0, abs=0.02)
    variance = (3 * x + 5).double().var(unbiased=False).item() + (torch.e**2 if mode == "sample" else 0)
    assert made.scale.item() == pytest.approx(variance**-0.5, rel=1e-6)
    channels = [((3 * c).var().item() + (torch.e**2 if mode == "sample" else 0)) ** 0.5 for c in x.unbind(1)]
    low, high = (f"{value * variance**-0.5:.2f}" for value in (min(channels), max(channels)))
    how = f"measured; deviation 1.000 after scaling, {low} to {high} by channel (400 images)"
    assert told == f"latents: scale {variance**-0.5:.4g} {how}"


def test_a_scale_that_is_given_is_kept_and_told_of_few_images() -> None:
    torch.manual_seed(0)
    made, x, asked = codec(0.25, 0.0), torch.randn(100, 3, 4, 4), []
    told = made.measure(of(x, asked))
    assert made.scale == 0.25 and asked == [64]
    assert told.startswith(f"latents: scale 0.25 as given; deviation {0.25 * 3 * x[:64].std(unbiased=False):.3f} after")


def test_as_many_images_are_measured_as_the_key_says() -> None:
    x, asked = torch.randn(100, 3, 4, 4), []
    LatentCodec(Frozen(Affine()), None, 0.0, "mode", n_measured=30).measure(of(x, asked))
    codec(None).measure(of(x, asked))
    assert asked == [30, 10_000]


@pytest.mark.parametrize(("x", "problem"), [(0.0, "are all alike"), (torch.nan, "are not finite")])
def test_latents_without_a_deviation_are_one_line(x: float, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        codec(None).measure(of(torch.full((10, 3, 4, 4), x)))


def test_ranks_measure_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 5 and 4 images give the scale of all 9."""
    x, shares = torch.randn(9, 3, 4, 4), []
    whole, halves = codec(None), [codec(None), codec(None)]
    told = whole.measure(of(x))
    monkeypatch.setattr(ranks, "summed", lambda total: shares.append(total.clone()) or total)
    for k, half in enumerate(halves):
        half.measure(of(x[k::2]))
    monkeypatch.setattr(ranks, "summed", lambda total: shares[0] + shares[1])
    for k, half in enumerate(halves):
        assert half.measure(of(x[k::2])) == told
        torch.testing.assert_close(half.scale, whole.scale, rtol=1e-7, atol=0)


@pytest.mark.parametrize("n", [7, 10_000])
def test_ranks_share_the_first_images_between_them(n: int) -> None:
    data = build.data(composed("data=shapes", "data.image_size=8", "data.n_train_scenes=20", "data.batch_size=8"))

    def share(rank: int, world: int) -> list[torch.Tensor]:
        trainer = SimpleNamespace(datamodule=data, global_rank=rank, world_size=world)
        batches = list(_share(trainer, SimpleNamespace(device="cpu"), n))
        assert max(map(len, batches)) <= 8 // world
        return [image for batch in batches for image in batch]

    one, two = share(0, 1), [share(k, 2) for k in range(2)]
    assert len(one) == min(n, 20) and abs(len(two[0]) - len(two[1])) <= 1
    for k, image in enumerate(one):
        assert torch.equal(image, two[k % 2][k // 2]) and torch.equal(image, data.chosen("train", [k])["image"][0])


def test_sample_mode_draws() -> None:
    x = torch.zeros(1000, 1, 2, 2)
    z = codec(1.0, 5.0, "sample").encode(x)
    assert z.std().item() == pytest.approx(torch.e, rel=0.05)


def test_the_codec_works_in_float32_under_bf16() -> None:
    class Net(nn.Conv2d):
        latent_shape = (1, 2, 2)

        def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(self(x).dtype)
            return self(x), self(x)

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            seen.append(self(z).dtype)
            return self(z)

    seen: list[torch.dtype] = []
    net, x = Net(1, 1, 1), torch.randn(1, 1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = LatentCodec(Frozen(net), None, 0.0, "sample")
        assert net(x).dtype == torch.bfloat16  # autocast is on
        made.measure(of(x))
        assert made.encode(x).dtype == made.decode(x.bfloat16()).dtype == torch.float32
    assert set(seen) == {torch.float32} and len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_latents_a_hundred_times_too_large_is_finite(dtype: torch.dtype) -> None:
    """As a net that has diverged makes them; in float16 the same net overflows."""

    class Net(nn.Conv2d):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return self(self(z)).tanh()

    net = Net(1, 1, 3, bias=False)
    nn.init.constant_(net.weight, 100.0)
    z = 100 * torch.ones(1, 1, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert dtype == torch.bfloat16 or not net(net(z)).isfinite().all()
        made = LatentCodec(Frozen(net), 0.2, 0.0, "mode").decode(z.to(dtype))
    assert made.dtype == torch.float32 and torch.equal(made, torch.ones(1, 1, 4, 4))


@pytest.fixture
def loaded(finished: dict[str, Path]) -> folders.LoadedRun:
    return folders.load(finished["ldm"], ema=True)


def test_the_first_stage_stays_out(loaded: folders.LoadedRun, finished: dict[str, Path]) -> None:
    model = loaded.model
    frozen = model.codec.autoencoder.net
    theirs = {id(p) for p in frozen.parameters()}
    assert len(theirs) > 10 and not theirs & {id(p) for p in model.parameters()}
    assert not [name for name in model.state_dict() if "autoencoder" in name]
    assert frozen not in list(model.modules())
    assert not theirs & {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    assert set(average_of(model)) == {"net", "embedder"}
    checkpoint = load(newest(finished["ldm"] / "checkpoints"))
    assert set(next(iter(checkpoint["callbacks"]["EMA"]["nets"].values()))) == {"net", "embedder"}
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_first_stage_stays_in_eval_and_moves_with_the_model(loaded: folders.LoadedRun) -> None:
    frozen = loaded.model.codec.autoencoder.net
    loaded.model.train()
    assert not frozen.training
    loaded.model.to(torch.float64)
    assert {p.dtype for p in frozen.parameters()} == {torch.float64}


def test_training_leaves_the_first_stage_as_it_was(loaded: folders.LoadedRun, finished: dict[str, Path]) -> None:
    first = folders.load(finished["vae"], ema=True).model.net.state_dict()
    linked = loaded.model.codec.autoencoder.net.net.state_dict()  # in `LikelihoodAutoencoder`
    assert all(torch.equal(first[name], linked[name]) for name in first)
    loaded.model.train().training_step(loaded.data.test_batch(0, 2)).backward()
    assert any(p.grad is not None and p.grad.any() for p in loaded.model.net.parameters())
    assert all(p.grad is None for p in loaded.model.codec.autoencoder.net.parameters())


def test_its_scale_is_in_the_checkpoint(loaded: folders.LoadedRun, finished: dict[str, Path]) -> None:
    state = load(newest(finished["ldm"] / "checkpoints"))["state_dict"]
    assert state["codec.scale"] > 0 and torch.equal(loaded.model.codec.scale, state["codec.scale"])


def test_a_scale_is_measured_once_and_never_when_a_run_goes_on(
    tmp_path: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    words = [*overrides("ldm", finished["vae"]), "checkpoint.every_images=8"]
    train.train(composed(*words, "budget.images=8", run_dir=tmp_path))
    scale = folders.load(tmp_path, ema=True).model.codec.scale
    assert f"latents: scale {scale:.4g} measured; deviation 1.000 after scaling, " in capsys.readouterr().out
    path = newest(tmp_path / "checkpoints")
    train.train(composed(*words, "budget.images=16", run_dir=tmp_path))
    assert "latents: " not in capsys.readouterr().out and newest(tmp_path / "checkpoints") != path
    assert torch.equal(folders.load(tmp_path, ema=True).model.codec.scale, scale)


def sampled(
    loaded: folders.LoadedRun, n: int = 8, first: int = 0, cond: dict | None = None, **options: object
) -> torch.Tensor:
    cond = loaded.model.condition(loaded.data.test_batch(first, n), "") if cond is None else cond
    with torch.inference_mode():
        return loaded.model.sample(cond, ImageRngs(0, first, n), **options)


def test_image_k_is_that_of_any_batch(loaded: folders.LoadedRun) -> None:
    together = sampled(loaded)
    assert (together[5] - sampled(loaded, n=1, first=5)[0]).abs().max() <= LEVEL
    assert (together[5] - together[4]).abs().max() > LEVEL


def test_ema_off_conditions_and_guidance_change_samples(loaded: folders.LoadedRun, finished: dict[str, Path]) -> None:
    raw = folders.load(finished["ldm"], ema=False)
    assert not torch.equal(sampled(loaded), sampled(raw))
    with torch.no_grad():
        for p in [*loaded.model.net.parameters(), *loaded.model.embedder.parameters()]:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    cond = loaded.model.condition(loaded.data.test_batch(0, 8), "")
    shuffled = {name: value.roll(1, 0) for name, value in cond.items()}
    assert (sampled(loaded, cond=cond) - sampled(loaded, cond=shuffled)).abs().max() > LEVEL
    assert (sampled(loaded, guidance=1.0) - sampled(loaded, guidance=3.0)).abs().max() > LEVEL
    assert torch.equal(sampled(loaded, guidance=2.0), sampled(loaded))


def test_sizes_follow_from_the_first_stage(loaded: folders.LoadedRun) -> None:
    assert loaded.model.net.shape == (2, 4, 4) == loaded.model.codec.autoencoder.net.latent_shape


def test_a_run_whose_page_named_the_sizes_still_loads(tmp_path: Path, finished: dict[str, Path]) -> None:
    folder = shutil.copytree(finished["ldm"], tmp_path / "run")
    cfg = OmegaConf.load(folder / "config.yaml")
    del cfg.model.net["_partial_"], cfg.model.first_stage["images"]
    cfg.model.net.update({"image_size": 4, "image_channels": 2})
    OmegaConf.save(cfg, folder / "config.yaml")
    assert torch.equal(sampled(folders.load(folder, ema=True)), sampled(folders.load(finished["ldm"], ema=True)))


def test_a_bernoulli_first_stage_decodes_to_images() -> None:
    """The decoder's output is logits: an image of 3 times as many grey levels where the mean is meant."""
    cfg = composed(*overrides("vae"), "likelihood@model.likelihood=bernoulli")
    vae = build.on_parts(cfg, {})
    z = 3 * torch.randn(4, *vae.net.latent_shape)
    x = LatentCodec(Frozen(vae.part()), 1.0, 0.0, "mode").decode(z)
    torch.testing.assert_close(x, 2 * torch.sigmoid(vae.net.decode(z)) - 1)
    torch.testing.assert_close(x, vae.decode(z))


def test_an_autoencoder_without_noise_is_a_first_stage_without_noise() -> None:
    ae = build.on_parts(composed(*overrides("ae")), {})
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    drawn = LatentCodec(Frozen(ae.part()), 1.0, 0.0, "sample").encode(x)
    torch.testing.assert_close(drawn, ae.encode(x), atol=1e-3, rtol=0)
