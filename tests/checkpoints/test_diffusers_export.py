"""export.py: runs and what was published in the files of diffusers and transformers, opened there and here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import export as entry
import train
from atelier.checkpoints import (
    diffusers_conditional,
    diffusers_folder,
    diffusers_pipeline,
    single_file,
    transformers_folder,
)
from atelier.checkpoints.store import load as load_checkpoint
from atelier.checkpoints.store import newest
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.schedules import Flow
from atelier.diffusion.targets import X0
from atelier.models.base import sampling_mode
from atelier.nets import lora
from atelier.nets.conditioning import NoCondition
from atelier.nets.planes import FoldedSource
from atelier.nets.taesd import TAESD
from atelier.nets.unet import UNet
from atelier.nets.words import BytePairs
from atelier.runs import build, exporting, folders, ground, model_card
from tests.checkpoints import test_single_file as files
from tests.checkpoints import test_transformers_folder as texts
from tests.checkpoints.test_diffusers_unet_conditional import equal
from tests.compose import composed
from tests.models import test_diffusers_pipeline as pipelines
from tests.models.test_diffusers_pipeline import CASES, PROMPTS, N
from tests.nets.test_spatial_transformer import shaken
from tests.tiny import COMMON

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs

SMALL = [*(word for word in COMMON if not word.startswith("data.image_size")), "data.image_size=32"]
NET = ["model.net.width=4", "model.net.norm_groups=2", f"model.sampler.steps={N}"]
CROSS = [*NET, "model.net.attention=[2]", "model.net.cond_dim=null"]
TEXT = "model.embedder.sources.text"
EPS = ["schedule@model.objective.schedule=scaled_linear", "target@model.objective.target=eps"]
V = ["schedule@model.objective.schedule=zero_terminal", "target@model.objective.target=v"]
LABELS = ["data.conditions=[label]", "model.net.cond_dim=8", "model.embedder.dim=8"]
PLAIN = ["time_distribution@model.objective.time_distribution=uniform"]
PLMS = ["sampler@model.sampler=plms", "model.sampler.spacing=leading", "model.sampler.offset=1"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1 of random weights, in a folder of diffusers."""
    case = CASES["SD1 PNDM"]
    return pipelines.written(tmp_path_factory.mktemp("published"), case.kind, case.scheduler)


def made(folder: Path, published: Path, *words: str) -> folders.LoadedRun:
    """A run of our own, untrained, on the first stage and the text encoder of others; its net says something."""
    first = ["first_stage@model.first_stage=sd_vae", f"model.first_stage.run={published / 'vae'}"]
    cfg = composed(*SMALL, *first, *words)
    torch.manual_seed(0)
    nodes = {name: build.section(cfg, name) for name in build.parts(cfg)}
    nets = {n: lent() if node.run == "auto" else build._read(Path(node.run), cfg, node) for n, node in nodes.items()}
    model = build.on_parts(cfg, nets).eval()
    shaken(model.net)
    return folders.LoadedRun(folder, cfg, build.data(cfg), model, 96, [16])


def lent() -> nn.Module:
    """A text encoder of our own."""
    tiny = ["model=clip", "model.net.width=4", "model.net.token_dim=8", "model.net.heads=2", "model.net.max_tokens=14"]
    return build.untrained_part(composed(*SMALL, *tiny), {})


def of_texts(published: Path, *words: str) -> list[str]:
    encoder = [f"{TEXT}.encoder.run={published / 'text_encoder'}", f"{TEXT}.reads=[tokens]", f"{TEXT}.cut=true"]
    return ["model=text_to_image", *encoder, *CROSS, *words]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Calls export.py; a run that is there already is not loaded."""

    def exported(run: folders.LoadedRun | Path, out: Path, *words: str) -> Path:
        cfg = composed(*words, config="export")  # which is kept for the same words
        cfg.run, cfg.out = str(run), str(out)
        if isinstance(run, folders.LoadedRun):
            cfg.run = str(run.folder)
            if not (run.folder / "model_index.json").exists():
                run.folder.mkdir(exist_ok=True)
                (run.folder / "config.yaml").touch()
            monkeypatch.setattr(folders, "load_generator", lambda *_: run)
        entry.export(cfg)
        return out

    return exported


def drawn(run: folders.LoadedRun, noise: Tensor) -> Tensor:
    """Images in [0, 1] that our sampler makes of this noise, (n, 3, H, W)."""
    model = run.model
    with sampling_mode(model, {}), torch.no_grad():
        latents = model.diffusion_sampler.asked(None, 3.0, None)({"text": PROMPTS}, noise, ImageRngs(0, 0, 2))
        return (model.decode(latents) / 2 + 0.5).clamp(0, 1)


def same_image(run: folders.LoadedRun, pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    noise = run.model.noise(ImageRngs(0, 0, 2))
    steps = run.model.diffusion_sampler.sampler.steps
    theirs = pipeline(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=3.0, output_type="pt").images
    ours = drawn(run, noise)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("words", [
    [*EPS, *PLMS, "model.sampler.to_image=false"],
    [*EPS, "sampler@model.sampler=ddim"],
    [*V, "sampler@model.sampler=ddim"],
    [*EPS, "sampler@model.sampler=euler", "model.sampler.grid=uniform"],
], ids=["eps PLMS", "eps DDIM", "v zero SNR DDIM", "eps Euler"])  # fmt: skip
def test_a_run_of_texts_opens_as_a_pipeline(
    words: list[str], published: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *words, *PLAIN))
    out = export(run, tmp_path / "out")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if words[: len(V)] == V else "epsilon")
    same_image(run, pipeline)


def test_another_sampler_gives_way_to_one_that_diffusers_has(
    published: Path, export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN, "sampler@model.sampler=heun"))
    out = export(run, tmp_path / "out")
    told = "a DDIMScheduler is written in its place"
    assert told in capsys.readouterr().out and told in (out / "README.md").read_text()
    assert type(diffusers.StableDiffusionPipeline.from_pretrained(out).scheduler).__name__ == "DDIMScheduler"


def test_adapters_become_a_part_of_the_weights(published: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN, "sampler@model.sampler=ddim"))
    before = {name: value.clone() for name, value in run.model.net.state_dict().items()}
    lora.add(run.model.net, name="a", targets=["qkv"], rank=2, alpha=4.0)
    for one in lora.adapters(run.model.net, "a").values():
        for weight in one.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    noise = run.model.noise(ImageRngs(0, 0, 2))
    adapted = drawn(run, noise)
    out = export(run, tmp_path / "out")
    stored = diffusers_conditional.read(out / "unet").state_dict()
    assert stored.keys() == before.keys() and any(not torch.equal(stored[name], before[name]) for name in stored)
    torch.testing.assert_close(drawn(run, noise), adapted, atol=1e-4, rtol=0)
    same_image(run, diffusers.StableDiffusionPipeline.from_pretrained(out))


# ---- trained further


@pytest.fixture(scope="module")
def tuned(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on a pipeline with a licence."""
    (published / "README.md").write_text("---\nlanguage: en\nlicense: creativeml-openrail-m\n---\n# Base\n")
    folder = tmp_path_factory.mktemp("tuned") / "run"
    words = ["model=stable_diffusion", f"model.net.run={published}", f"{TEXT}.cut=true", "budget.images=16"]
    train.train(composed(*SMALL, *words, "sampler@model.sampler=ddim", f"model.sampler.steps={N}", run_dir=folder))
    return folder


@pytest.fixture(scope="module")
def loaded(tuned: Path) -> folders.LoadedRun:
    return folders.load_generator(tuned, True, None)


def test_a_run_that_was_trained_further(
    loaded: folders.LoadedRun, published: Path, export: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its averages in the net, all else as it was published; the same image, in a file too, with what no file says."""
    run, out = loaded, export(loaded, tmp_path / "out")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    same_image(run, pipeline)
    for part, name in (("vae", diffusers_folder.WEIGHTS), ("text_encoder", transformers_folder.WEIGHTS)):
        equal(load_file(out / part / name), files.whole(part, load_file(published / part / name)))
    averages = run.model.net.state_dict()
    equal(diffusers_conditional.read(out / "unet").state_dict(), averages)
    file = export(run, tmp_path / "file", "layout=single_file") / exporting.MODEL
    beside = {"config": str(out), "local_files_only": True, "safety_checker": None, "feature_extractor": None}
    assert "nothing in the file says unet.norm_num_groups=4, unet.attention_head_dim=2, " in capsys.readouterr().out
    same_image(run, diffusers.StableDiffusionPipeline.from_single_file(str(file), **beside))


def test_the_weights_are_those_that_are_asked_for(tuned: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    """By the command itself, in the run's own folder."""
    entry.export(composed(f"run={tuned}", "ema=false", config="export"))
    raw = load_file(tuned / "weights.safetensors")
    out = tuned / "exported/diffusers"
    mine = diffusers_conditional.read(out / "unet").state_dict()["stem.weight"]
    checkpoint = load_checkpoint(newest(tuned / "checkpoints"))["state_dict"]
    assert torch.equal(mine, checkpoint["net.stem.weight"]) and not torch.equal(mine, raw["net.stem.weight"])
    assert "those of the last step" in (out / "README.md").read_text()


def test_the_model_card(
    tuned: Path, loaded: folders.LoadedRun, published: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    told = json.loads((tuned / "summary.json").read_text())
    words = f"train.py model=stable_diffusion model.net.run={published} run_dir={tuned}"
    (tuned / "summary.json").write_text(json.dumps(told | {"command": words}))
    card = (export(loaded, tmp_path / "out") / model_card.CARD).read_text()
    front = card.split("---\n")[1]
    told = ("license: creativeml-openrail-m", "library_name: diffusers", "pipeline_tag: text-to-image")
    assert all(f"{line}\n" in front for line in (*told, "- stable-diffusion"))
    found = folders.summary(tuned)
    metrics = {name: value for name, value in found["metrics"].items() if not name.startswith(("real/", "raw/"))}
    shown = {name: "no valid sample" if value != value else f"{value:.4g}" for name, value in metrics.items()}
    assert shown and all(f"| {name} | {value} |" in card for name, value in shown.items())
    assert all(f"{name} {value}" in card for name, value in found["protocol"].items())
    assert f"`{published.name}`: licence creativeml-openrail-m" in card and "half-life 16 images" in card
    assert (
        "`data=shapes`" in card
        and f"```\npython train.py model=stable_diffusion model.net.run={published.name}\n```" in card
    )
    assert f"num_inference_steps={N}, guidance_scale=7.5" in card
    assert str(tmp_path.parent) not in card and not re.search(r"(?<![\w.)>])/(tmp|home|work|root)/", card)
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3


def test_the_card_of_what_nobody_has_judged(published: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN))
    card = (export(run, tmp_path / "out") / model_card.CARD).read_text()
    assert "None: it was never judged here." in card
    bare = tmp_path / "bare"
    bare.mkdir()
    assert model_card.licence(bare) == "unknown"
    assert "licence unknown: ask whoever published bare." in model_card._licences({"bare": "unknown"})
    cards = {"---\nlicense: mit\n---\n": "mit", "# Base\nlicense: mit\n": "unknown"}
    cards |= {"---\ntags: a\n---\nlicense: mit\n": "unknown", "---\ntags:\n- a\nlicense: 'mit'\n---\n": "mit"}
    for head, told in cards.items():
        (bare / "README.md").write_text(head)
        assert model_card.licence(bare) == told


# ---- import and export


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def halved(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "channels", "kind"), [
    ("halves", 4, ""), ("SD2 v zero SNR", 4, ""), ("SD1 DDIM", 9, "Inpaint"), ("SD1 Euler", 8, "InstructPix2Pix"),
    ("XL", 4, "XL"),
])  # fmt: skip
def test_what_is_read_is_written_to_the_bit(
    name: str, channels: int, kind: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    """All tensors, of folders and from there of a single file; the scheduler's file; and the pipeline opens."""
    source, case = tmp_path / "source", CASES.get(name, CASES["SD1 PNDM"])
    if name == "XL":
        pipelines.xl(source)
    else:
        pipelines.written(source, case.kind, case.scheduler, case.pad, channels)
    if name == "halves":
        halved(source)
    run = folders.load_generator(source, True, None)
    out, one = export(run, tmp_path / "out"), export(run, tmp_path / "one", "layout=single_file")
    read = single_file.read(one / exporting.MODEL)
    assert {path.parent.name for path in source.glob("[!m]*/*.safetensors")} == set(read.configs)
    for part in read.configs:
        wanted = files.whole(part, tensors(source, part))
        equal(tensors(out, part), wanted)
        equal(read.tensors(part), wanted)
        kinds = {torch.float16 if name == "halves" else torch.float32}
        assert {value.dtype for given in (tensors(out, part), read.tensors(part)) for value in given.values()} == kinds
    config = "scheduler/scheduler_config.json"
    assert (out / config).read_bytes() == (source / config).read_bytes()
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(out)
    told = json.loads((out / "model_index.json").read_text())
    assert (
        told["_class_name"]
        == type(pipeline).__name__
        == json.loads((source / "model_index.json").read_text()).get(
            "_class_name" if kind in ("", "XL") else "", type(pipeline).__name__
        )
    )
    for part in [part for part in told if part.startswith("tokenizer")]:
        theirs = transformers.CLIPTokenizer.from_pretrained(source / part)
        same = {"padding": "max_length", "truncation": True}
        assert getattr(pipeline, part)(texts.TEXTS, **same)["input_ids"] == theirs(texts.TEXTS, **same)["input_ids"]


PREFIXES = {
    "sd1": {"model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."},
    "sd2": {"model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."},
    "sdxl": {
        "model.diffusion_model.",
        "first_stage_model.",
        "conditioner.embedders.0.transformer.text_model.",
        "conditioner.embedders.1.model.",
    },
}


def single(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A tiny model in a file, whose heads and groups are those that a reader supposes, and a tokenizer for it."""
    monkeypatch.setenv("ATELIER_CACHE", str(folder / "cache"))
    rows, merges = texts.ROWS, [tuple(line.split()) for line in texts.MERGES]
    monkeypatch.setattr(BytePairs, "published", lambda path: BytePairs(rows, merges, pad=0))
    source = folder / "sd.safetensors"
    model = dict(files.wide(name))
    width = sum(net.config.hidden_size for part, net in model.items() if "text" in part)
    unet = files.WIDE[name] | {"layers_per_block": 1, "cross_attention_dim": width}
    model["unet"] = shaken(diffusers.UNet2DConditionModel(**unet))
    single_file.write(source, files.parts_of(model))
    return source


@pytest.mark.parametrize(("name", "half"), [("sd1", False), ("sd2", True), ("sdxl", False)])
def test_a_single_file_comes_back_to_the_bit(
    name: str,
    half: bool,
    export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Keys as older programs expect them, and all tensors."""
    source = single(tmp_path, monkeypatch, name)
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in load_file(source).items()}
        save_file(state, source)
    with pytest.raises(
        UserError, match=r"error: vocabulary=None: a single file has no tokenizer. Fix: vocabulary=PATH"
    ):
        export(source, tmp_path / "none")
    words = ["layout=single_file", "vocabulary=PATH"]
    found = load_file(export(source, tmp_path / "out", *words) / exporting.MODEL)
    equal(found, load_file(source))
    assert "nothing in the file says" not in capsys.readouterr().out  # it is as its readers suppose
    assert {value.dtype for value in found.values()} - {torch.int64} == {torch.float16 if half else torch.float32}
    assert all(any(key.startswith(prefix) for key in found) for prefix in PREFIXES[name])
    assert all(key.startswith(tuple(PREFIXES[name])) for key in found)


def test_a_single_file_becomes_a_folder(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of version 2, whose file tells no target: it is that of the published one."""
    source = single(tmp_path, monkeypatch, "sd2")
    out = export(source, tmp_path / "folder", "vocabulary=PATH")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert "`sd.safetensors`: licence unknown: ask whoever published sd.safetensors." in (out / "README.md").read_text()


# ---- parts that open one by one


def test_flow_on_labels_opens_part_by_part(
    published: Path, export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run", published, "model=ldm", *NET, *LABELS)
    run.folder.mkdir()
    (run.folder / ground.FILE).write_text(json.dumps({"names": {"labels": ["cat", "dog"]}}))
    out = export(run, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "unet: it is conditional on label, pipelines on a text" in lines[0]
    assert (
        lines[0].endswith("unet/, vae/ open one by one") and "nor scheduler: no scheduler of diffusers has" in lines[0]
    )
    assert not (out / "model_index.json").exists()
    net, model = diffusers.UNet2DModel.from_pretrained(out / "unet"), run.model
    z, t, labels = model.noise(ImageRngs(0, 0, 2)), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    with torch.no_grad():
        ours = model.net(z, t, model.embedder({"label": labels}, 2))
        torch.testing.assert_close(ours, net(z, t, class_labels=labels).sample, atol=1e-4, rtol=0)
        decoded = diffusers.AutoencoderKL.from_pretrained(out / "vae").decode(z / 0.18215).sample
        torch.testing.assert_close(model.decode(z), decoded, atol=1e-5, rtol=0)
    card = (out / "README.md").read_text()
    assert 'unet = UNet2DModel.from_pretrained("FOLDER/unet")' in card and " Labels: 0 cat, 1 dog.\n" in card


def test_flow_on_texts_opens_part_by_part(
    published: Path, export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run", published, *of_texts(published))
    out = export(run, tmp_path / "out")
    (line, _) = capsys.readouterr().out.splitlines()
    assert "unet: its answer is a VectorField, pipelines want eps or v" in line
    assert line.endswith("unet/, vae/, text_encoder/ open one by one")
    net, model = diffusers.UNet2DConditionModel.from_pretrained(out / "unet"), run.model
    encoder = transformers.CLIPTextModel.from_pretrained(out / "text_encoder")
    words = transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")
    rows = words(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    z, t = model.noise(ImageRngs(0, 0, 2)), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        cond, states = model.embedder({"text": PROMPTS}, 2), encoder(rows).last_hidden_state
        torch.testing.assert_close(cond.tokens, states, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.net(z, t, cond), net(z, t, states).sample, atol=1e-4, rtol=0)
    with pytest.raises(
        UserError, match=r"layout=single_file: unet: its answer is a VectorField.*Fix: layout=diffusers"
    ):
        export(run, tmp_path / "file", "layout=single_file")
    assert not (tmp_path / "file").exists() and not list(tmp_path.glob("*.tmp"))


UNET = {"image_size": 4, "image_channels": 4, "width": 4, "multipliers": [1, 2], "n_blocks": 1, "attention": [2]}


def test_which_part_no_pipeline_has(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN))
    parts, text = exporting.parts(run), run.model.embedder.sources["text"]
    size = {"token_dim": text.encoder.token_dim, "norm_groups": 2}

    def reason(**changed: Any) -> str | None:
        return diffusers_pipeline.missing(parts._replace(**changed))

    assert reason() is None
    assert reason(shift=0.5) == "vae: pipelines subtract nothing of latents, this 0.5"
    assert reason(first_stage=None).startswith("vae: pipelines have an AutoencoderKL, this is none")
    assert reason(first_stage=TAESD(image_size=16, width=4, latent_channels=4)).endswith("this is a TAESD")
    assert reason(target=X0()) == "unet: its answer is a X0, pipelines want eps or v"
    assert reason(schedule=Flow()) == "scheduler: Flow is no table of levels"
    folded = FoldedSource(source_size=32, source_channels=3, n_frequencies=0)
    assert reason(planes=folded) == "unet: no pipeline gives it FoldedSource"
    assert reason(embedder=NoCondition()) == "unet: it is conditional on nothing, pipelines on a text"
    assert reason(net=UNet(**UNET | size | {"norm_groups": None})).startswith("unet: diffusers has no norms of [1, 2")
    assert reason(net=UNet(**UNET | size, learned_variance=True)).startswith("unet: diffusers has no variance in a net")
    monkeypatch.setattr(text.encoder, "layer", "penultimate")
    assert reason() == "text_encoder: its tokens are not those of the last block behind the norm"
    monkeypatch.setattr(text, "null_kind", "zeros")
    assert reason() == "text_encoder: for no text stands zeros, in pipelines the empty prompt"
    vector = made(tmp_path / "run", published, *of_texts(published), *VECTOR).model
    assert reason(embedder=vector.embedder).startswith("unet: it takes a vector of the text")


VECTOR = [f"{TEXT}.reads=[vector,tokens]", f"{TEXT}.dim=8", "model.net.cond_dim=8"]


def test_our_own_text_encoder_is_none_of_transformers(
    published: Path, export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokens see those behind them too."""
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN), f"{TEXT}.encoder.run=auto")
    export(run, tmp_path / "out")
    (line, _) = capsys.readouterr().out.splitlines()
    assert line == (
        "no pipeline of diffusers opens it whole (text_encoder: transformers has no ClipNet):"
        " unet/, vae/, scheduler/ open one by one"
    )
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        getattr(diffusers, kind).from_pretrained(tmp_path / "out" / part)


# ---- mistakes


def test_mistakes_are_one_line(published: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    run = made(tmp_path / "run", published, *of_texts(published, *EPS, *PLAIN))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, line in (
        (["layout=onnyx"], "error: layout=onnyx: "),
        (["vocabulary=PATH"], "error: vocabulary=PATH: it is for a single .safetensors as run"),
    ):
        with pytest.raises(UserError, match=line):
            export(run, tmp_path / "out", *words)
    with pytest.raises(UserError, match=r"error: out=.*full: there is something already. Fix: out=ANOTHER_FOLDER"):
        export(run, tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"error: out=.*file/out: it cannot be written"):
        export(run, tmp_path / "file/out")
    cfg = composed("model=gan", *SMALL)
    gan = folders.LoadedRun(tmp_path / "gan", cfg, run.data, build.on_parts(cfg, {}), 0, [])
    with pytest.raises(UserError, match=r"error: run=.*gan: GAN is no diffusion model. Fix: run=DIR of one"):
        export(gan, tmp_path / "out/deep")
    assert not (tmp_path / "out").exists(), "a folder that was made for it"
    assert not (tmp_path / "out").exists()
