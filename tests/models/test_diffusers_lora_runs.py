"""Runs that train adapters alone: what they change, save and lend, and that diffusers gives the same with them."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

import export as entry
import train
from atelier.callbacks.ema import average_of
from atelier.checkpoints import adapters, store
from atelier.checkpoints.store import load, newest, sha256
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models.base import sampling_mode
from atelier.models.ldm import LDM
from atelier.nets import lora
from atelier.nets.conditions import TextEmbedder
from atelier.runs import adapted, build, folders, preflight
from tests.compose import composed
from tests.models import test_diffusers_pipeline as pipeline
from tests.tiny import COMMON, tiny

SHORT = ["budget.images=48", "eval.every_images=1000", "checkpoint.every_images=24"]


def drawn(model: LDM, n: int = 2, **given: list[str]) -> Tensor:
    cond = model.condition(asked_of(model, n) | given, "")
    with sampling_mode(model, {}):
        return model.sample(cond, ImageRngs(3, 0, n))


def asked_of(model: LDM, n: int) -> dict[str, Tensor]:
    return {"label": torch.arange(n), "text": ["a cab"] * n, "attributes": torch.ones(n, 14)}


@pytest.fixture(scope="module")
def runs(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished model, and one of adapters that begins with it."""
    folder = tmp_path_factory.mktemp("lora") / "adapters"
    words = [*tiny("ldm", finished["ldm"].parent), *SHORT, f"start_from={finished['ldm']}", "lora=blocks"]
    words = [word for word in words if not word.startswith("model.first_stage.run")]  # that of the run it begins with
    train.train(composed(*words, "lora.targets=['.*']", "lora.alpha=8", "model.optimizer.lr=0.1", run_dir=folder))
    return {"base": finished["ldm"], "lora": folder}


def test_adapters_alone_are_trained_saved_and_averaged(runs: dict[str, Path]) -> None:
    checkpoint = load(newest(runs["lora"] / "checkpoints"))
    base = load_file(runs["base"] / "weights.safetensors")
    saved = checkpoint["state_dict"]
    assert {name for name in saved if ".lora." not in name} == {name for name in base if name.startswith("codec.")}
    assert any(".lora.trained.all.up.weight" in name for name in saved)
    for nets in checkpoint["callbacks"]["EMA"]["nets"].values():
        assert nets["net"] and all(".lora." in name for name in nets["net"])
    run = folders.load(runs["lora"], False)
    now = run.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert all(block.up.weight.any() for block in lora.adapters(run.model.net, "trained").values())
    assert (runs["lora"] / "frozen" / "base" / "weights.safetensors").samefile(runs["base"] / "weights.safetensors")
    assert OmegaConf.load(runs["lora"] / "config.yaml").model.first_stage.run.endswith("frozen/first_stage")


def test_its_file_on_the_run_it_began_with_is_the_run(runs: dict[str, Path]) -> None:
    own, plain, worn = (folders.load(runs[name], True) for name in ("lora", "base", "base"))
    told = adapted.put_on(worn.model, str(runs["lora"]), None)
    digest = sha256(runs["lora"] / "lora.safetensors")[:12]
    assert told == {"adapters": [["adapters", 1.0, digest]]}
    expected = drawn(own.model)
    assert torch.equal(drawn(worn.model), expected)
    assert (drawn(plain.model) - expected).abs().max() > 1e-3
    adapters.merge(worn.model.net, worn.model.embedder)
    torch.testing.assert_close(drawn(worn.model), expected, atol=1e-5, rtol=0)
    assert worn.model.state_dict().keys() == plain.model.state_dict().keys()


def test_several_count_as_they_are_weighed(runs: dict[str, Path]) -> None:
    """The same one twice, by 2 and by -1, is once; by 0 it is none."""
    own, plain, worn = (folders.load(runs[name], True).model for name in ("lora", "base", "base"))
    adapted.put_on(worn, str(runs["lora"]), 2)
    told = adapted.put_on(worn, [str(runs["lora"] / "lora.safetensors")], [-1])  # beside one that counts twice
    assert [[name, weight] for name, weight, _ in told["adapters"]] == [["lora.safetensors", -1.0]]
    torch.testing.assert_close(drawn(worn), drawn(own), atol=1e-5, rtol=0)
    adapted.put_on(own, [str(runs["lora"])], [-1])  # beside those that the run has trained
    torch.testing.assert_close(drawn(own), drawn(plain), atol=1e-5, rtol=0)
    off = folders.load(runs["base"], True).model
    adapted.put_on(off, str(runs["lora"]), 0)
    assert torch.equal(drawn(off), drawn(plain))


@pytest.mark.parametrize(("places", "weights", "line"), [
    (["a", "b"], [1], "adapter_weights=[1]: there are 2 adapters. Fix: adapter_weights=[1,1]"),
    (None, 0.5, "adapter_weights=0.5: there are 0 adapters. Fix: adapters=FILE"),
    ("nothing.safetensors", None, "adapters=nothing.safetensors: no such file"),
])  # fmt: skip
def test_what_cannot_be_put_on_is_one_line(
    places: list[str] | str | None, weights: list[float] | float | None, line: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(UserError) as caught:
        adapted.put_on(folders.load(runs["base"], True).model, places, weights)
    assert line in caught.value.line()


def test_a_run_without_adapters_and_a_model_that_takes_none_are_refused(
    runs: dict[str, Path], finished: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"adapters=.*: this folder has no lora.safetensors"):
        adapted.put_on(folders.load(runs["base"], True).model, str(runs["base"]), None)
    gan = folders.load(finished["gan"], True).model
    with pytest.raises(UserError, match="GAN takes none, diffusion models do"):
        adapted.put_on(gan, str(runs["lora"]), None)
    with pytest.raises(UserError, match="lora=attention: GAN takes no adapters, diffusion models do"):
        preflight.check(composed("model=gan", "lora=attention", f"start_from={finished['gan']}"))


@pytest.mark.parametrize(("words", "line"), [
    (["lora=attention"], "start_from=null: adapters would be trained on a net of random weights. Fix: start_from=RUN"),
    (["lora=attention", "start_from=BASE", "text_cache=auto", "lora.text_targets=[qkv]"],
     "text_cache=auto: training changes what the text encoder says. Fix: text_cache=null, or lora.text_targets=[]"),
    (["lora=attention", "start_from=LORA"], "it holds adapters, not a whole model"),
    (["lora=attention", "start_from=BASE", "lora.rank=0"], "lora.rank=0: it must be greater than 0"),
    (["lora=attention", "start_from=BASE", "lora.targets=[]"], "lora.targets=[]: "),
])  # fmt: skip
def test_a_command_that_cannot_train_adapters_is_one_line(words: list[str], line: str, runs: dict[str, Path]) -> None:
    given = [word.replace("BASE", str(runs["base"])).replace("LORA", str(runs["lora"])) for word in words]
    with pytest.raises(UserError) as caught:
        preflight.check(composed("model=ldm", *given))
    assert line in caught.value.line()


@pytest.mark.parametrize(("targets", "text_targets", "line"), [
    (["to_x"], [], "lora.targets=to_x: no Linear or Conv2d of the net is called so. Fix: lora.targets=["),
    (["qkv"], ["qkv"], "lora.text_targets=['qkv']: ConditionEmbedder reads no texts. Fix: lora.text_targets=[]"),
])  # fmt: skip
def test_layers_that_no_net_has_are_named(
    targets: list[str], text_targets: list[str], line: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(UserError) as caught:
        folders.load(runs["base"], False).model.adapt(lora.Recipe(2, 2.0, targets, text_targets))
    assert line in caught.value.line()


def test_a_base_that_was_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    cfg = build.safe_config(runs["lora"])
    state = load_file(runs["base"] / "weights.safetensors")
    (tmp_path / "base").mkdir()
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "base" / "weights.safetensors")
    (tmp_path / "base" / "config.yaml").touch()
    with pytest.raises(UserError, match="these are not the weights that the adapters were trained on"):
        build._base(tmp_path / "base", cfg)


def test_a_run_goes_on_where_the_one_that_it_began_with_has_moved(runs: dict[str, Path], tmp_path: Path) -> None:
    """It has a copy of it; typed by its old place, which is empty now, or by a link to its own."""
    copied, moved = tmp_path / "lora", tmp_path / "base"
    shutil.copytree(runs["lora"], copied)
    cfg = build.stored_config(copied)
    cfg.start_from = str(moved)
    store.write_text(copied / "config.yaml", OmegaConf.to_yaml(cfg))
    moved.symlink_to(runs["base"])
    parts = [f"model.first_stage.run={cfg.model.first_stage.run}"]
    words = [w for w in tiny("ldm", runs["base"].parent) if not w.startswith("model.first_stage.run")]
    words = [*words, *SHORT, *parts, "lora=blocks", "lora.targets=['.*']", "lora.alpha=8", "model.optimizer.lr=0.1"]
    train.train(composed(*words, "budget.images=56", f"start_from={runs['base']}", run_dir=copied))
    moved.unlink()
    train.train(composed(*words, "budget.images=64", f"start_from={moved}", run_dir=copied))
    assert folders.load(copied, False).images_seen == 64


def test_adapters_learn_what_the_net_that_they_are_of_answers(runs: dict[str, Path], tmp_path: Path) -> None:
    words = [w for w in tiny("ldm", runs["base"].parent) if not w.startswith("model.first_stage.run")]
    words = [*words, *SHORT, f"start_from={runs['base']}", "lora=blocks", "target@model.objective.target=x0"]
    with pytest.raises(UserError, match=r"target=.*: the net of .* was trained with VectorField"):
        train.train(composed(*words, run_dir=tmp_path / "run"))


def test_images_that_the_first_stage_of_the_base_does_not_fit_name_the_base(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    words = [
        w for w in tiny("ldm", runs["base"].parent) if not w.startswith(("model.first_stage.run", "data.image_si"))
    ]
    words = [*words, *SHORT, f"start_from={runs['base']}", "lora=blocks", "data.image_size=16"]
    with pytest.raises(UserError, match=r"data.image_size=8.* Fix: start_from=A run on such images"):
        train.train(composed(*words, run_dir=tmp_path / "run"))


def test_of_a_text_encoder_only_what_is_looked_at_is_adapted(tmp_path: Path) -> None:
    """The last block's states are no tokens of SDXL's first encoder, whose vector is not used."""
    pipeline.xl(tmp_path)
    run = folders.load(tmp_path, True)
    first, second = run.model.embedder.encoders
    run.model.adapt(lora.Recipe(2, 2.0, ["cross.q"], ["qkv"]))
    n = len(first.blocks)
    for encoder, blocks in ((first, n - 1), (second, n)):
        assert {name.split(".")[1] for name in lora.adapters(encoder, "trained")} == {str(k) for k in range(blocks)}
    assert not hasattr(first.blocks[-1].qkv, "lora")
    known = run.model.embedder({"text": ["a cab"]}, 1)
    (known.tokens.sum() + known.vector.sum()).backward()
    grads = [p.grad for p in run.model.embedder.parameters() if p.requires_grad]
    assert grads and all(grad is not None for grad in grads)


def test_adapters_that_no_text_reaches_are_refused(finished: dict[str, Path]) -> None:
    """The attention that pools the places of an image belongs to the same net."""
    encoder = folders.load(finished["clip"], True).model.part()
    options = {"field": "text", "reads": ["tokens"], "dim": 4, "null_kind": "empty"}
    embedder = TextEmbedder(encoder=encoder, **options)
    with pytest.raises(UserError, match=r".text_targets=\['pool.out'\]: no text goes through these layers"):
        embedder.adapt(lora.Recipe(1, 1.0, ["x"], ["pool.out"]))


# ---- Stable Diffusion


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of diffusers, and adapters of its net and its text encoder."""
    case, folder = pipeline.CASES["SD1 DDIM"], tmp_path_factory.mktemp("stable")
    pipeline.written(folder / "base", case.kind, case.scheduler, case.pad)
    page = ["model=stable_diffusion", f"model.net.run={folder / 'base'}", "model.embedder.sources.text.cut=true"]
    small = [*COMMON, *SHORT, "data.image_size=64", "data.batch_size=4", "budget.images=8"]
    words = [*page, *small, "lora=attention", "lora.alpha=3", "lora.text_targets=[qkv,mlp_in]"]
    train.train(composed(*words, "model.optimizer.lr=1e-2", run_dir=folder / "lora"))
    return {"base": folder / "base", "lora": folder / "lora"}


def test_diffusers_pipeline_with_the_lora_file_gives_our_latents(stable: dict[str, Path]) -> None:
    pytest.importorskip("peft")
    model = folders.load(stable["lora"], True).model
    worn = pipeline.ours(stable["base"])
    adapted.put_on(worn, str(stable["lora"]), None)
    theirs = pipeline.pipeline_of(stable["base"], "")
    noise = model.noise(ImageRngs(0, 0, 2))
    options = {"num_inference_steps": pipeline.N, "guidance_scale": 7.5, "height": 64, "width": 64}
    plain = theirs(pipeline.PROMPTS, latents=noise, output_type="latent", **options).images
    theirs.load_lora_weights(stable["lora"], weight_name="lora.safetensors")
    expected = theirs(pipeline.PROMPTS, latents=noise, output_type="latent", **options).images
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    for one in (model, worn):
        with sampling_mode(one, {}), torch.no_grad():
            how = one.diffusion_sampler.asked(pipeline.CASES["SD1 DDIM"].sampler, 7.5, None)
            pipeline.assert_same(how({"text": pipeline.PROMPTS}, noise, ImageRngs(0, 0, 2)), expected)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_run_of_adapters_is_exported_in_the_layouts_of_others(
    layout: str, stable: dict[str, Path], tmp_path: Path
) -> None:
    entry.export(composed(f"run={stable['lora']}", f"layout={layout}", f"out={tmp_path / 'out'}", config="export"))
    assert "lora" in (tmp_path / "out" / "README.md").read_text().lower()
    first, second = (pipeline.ours(stable["base"]) for _ in range(2))
    adapted.put_on(first, str(stable["lora"]), None)
    adapted.put_on(second, str(tmp_path / "out" / "lora.safetensors"), None)
    assert torch.equal(drawn(first, text=["a cab"] * 2), drawn(second, text=["a cab"] * 2))


def test_merged_saved_and_opened_again_it_gives_the_same_picture(stable: dict[str, Path], tmp_path: Path) -> None:
    """By its own folder of a pipeline, and by the base with the adapters as an option of the export."""
    own, other = tmp_path / "own", tmp_path / "other"
    entry.export(composed(f"run={stable['lora']}", f"out={own}", config="export"))
    entry.export(composed(f"run={stable['base']}", f"adapters={stable['lora']}", f"out={other}", config="export"))
    own_run = folders.load(stable["lora"], True).model
    expected = drawn(own_run, text=["a cab"] * 2)
    for place in (own, other):
        again = folders.load(place, True).model
        again.diffusion_sampler = replace(again.diffusion_sampler, sampler=own_run.diffusion_sampler.sampler)
        torch.testing.assert_close(drawn(again, text=["a cab"] * 2), expected, atol=1e-4, rtol=0)


def test_a_run_without_adapters_has_none_to_be_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layout=kohya: it has trained no adapters"):
        entry.export(composed(f"run={runs['base']}", "layout=kohya", f"out={tmp_path / 'out'}", config="export"))


def test_a_text_encoder_with_adapters_is_trained_averaged_and_kept(stable: dict[str, Path]) -> None:
    saved = load(newest(stable["lora"] / "checkpoints"))
    own = [name for name in saved["state_dict"] if name.startswith("embedder.")]
    assert own and all(re.search(r"\.adapters\.0-blocks-\d-(qkv|mlp_in)\.trained\.", name) for name in own)
    assert not [name for name in saved["state_dict"] if name.startswith("net.") and ".lora." not in name]
    raw, averaged = (folders.load(stable["lora"], ema).model for ema in (False, True))
    blocks = [lora.adapters(model.embedder.sources["text"].encoder, "trained") for model in (raw, averaged)]
    assert len(blocks[0]) == 3 * 4 and all(block.up.weight.any() for block in blocks[0].values())
    assert any(not torch.equal(blocks[0][name].up.weight, blocks[1][name].up.weight) for name in blocks[0])


def test_an_average_of_a_text_encoder_has_adapters_of_its_own_and_the_same_weights(stable: dict[str, Path]) -> None:
    model = folders.load(stable["lora"], False).model
    text, copied = model.embedder, average_of(model)["embedder"]
    first, second = (one.sources["text"].encoder for one in (text, copied))
    mine, other = lora.adapters(first, "trained"), lora.adapters(second, "trained")
    for name, block in other.items():
        layer = lora.places(second)[name].layer
        assert layer.weight is lora.places(first)[name].layer.weight and layer is not lora.places(first)[name].layer
        assert block.up.weight is not mine[name].up.weight
    assert {id(p) for block in other.values() for p in block.parameters()} <= {id(p) for p in copied.parameters()}
    before = first.encode_texts(["a cab"]).tokens
    with torch.no_grad():
        for block in other.values():
            block.up.weight.add_(1.0)
    assert torch.equal(first.encode_texts(["a cab"]).tokens, before)
    assert not torch.allclose(second.encode_texts(["a cab"]).tokens, before)
    assert copy.deepcopy(model.codec).autoencoder.net is not model.codec.autoencoder.net
