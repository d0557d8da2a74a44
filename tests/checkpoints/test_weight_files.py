"""Folders that diffusers and transformers wrote in several files and as variants: every tensor, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from atelier.checkpoints import diffusers_conditional, diffusers_folder, forms, weight_files
from atelier.checkpoints.transformers_folder import text_encoder
from atelier.core.errors import UserError
from atelier.runs import build, folders
from tests.checkpoints import test_transformers_folder as texts
from tests.models import test_diffusers_pipeline as pipeline
from tests.runs.test_published import linked

diffusers = pytest.importorskip("diffusers")
PLAIN = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
WAYS = {  # what save_pretrained is told -> names of the files, NAME in place of the plain one's stem
    "shards": {"max_shard_size": "30KB"},
    "variant": {"variant": "fp16"},
    "shards of a variant": {"max_shard_size": "30KB", "variant": "fp16"},
}


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    return {"unet": pipeline.unet("SD1"), "vae": vae}


def tensors(part: str, folder: Path) -> dict[str, torch.Tensor]:
    name = diffusers_folder.WEIGHTS if part != "text_encoder" else "model.safetensors"
    return weight_files.read(folder, name, lambda place, problem: UserError("folder", place, problem, "x"))


def saved(folder: Path, part: str, half: bool = False, **how: str) -> dict[str, torch.Tensor]:
    """A tiny part as its own library writes it; gives its tensors."""
    if part == "text_encoder":
        model = texts.written(folder)
        (folder / "model.safetensors").unlink()
        model = model.half() if half else model
        how = how | ({"max_shard_size": "2KB"} if "max_shard_size" in how else {})
    else:
        model = parts()[part].half() if half else parts()[part]
    model.save_pretrained(folder, **how)
    return {name: value.float() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PLAIN)
def test_every_tensor_is_what_was_saved(part: str, way: str, tmp_path: Path) -> None:
    half = "variant" in way
    wanted, found = saved(tmp_path, part, half, **WAYS[way]), tensors(part, tmp_path)
    assert found.keys() == wanted.keys() and all(value.dtype == torch.float32 for value in found.values())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    form = forms.form(tmp_path)
    assert form == (forms.TRANSFORMERS if part == "text_encoder" else forms.DIFFUSERS)
    assert forms.variant(tmp_path) == ("fp16" if half else "")
    weights = {name for name in forms.files(tmp_path) if name.endswith((".safetensors", ".json"))} - {"vocab.json"}
    assert weights == {path.name for path in tmp_path.iterdir() if path.name not in ("vocab.json", "merges.txt")}
    assert (len(weights) > 3) == ("shards" in way)


def test_the_nets_are_those_of_one_file(tmp_path: Path) -> None:
    for way in ("one", *WAYS):
        for part in PLAIN:
            saved(tmp_path / way / part, part, **WAYS.get(way, {}))
    readers: dict[str, Callable[[Path], nn.Module]] = {
        "unet": diffusers_conditional.read, "vae": diffusers_folder.read,
        "text_encoder": lambda place: text_encoder(str(place)),
    }  # fmt: skip
    for part, read in readers.items():
        one = read(tmp_path / "one" / part).state_dict()
        for way in WAYS:
            other = read(tmp_path / way / part).state_dict()
            assert all(torch.equal(other[name], value) for name, value in one.items())


def test_the_plain_weights_go_before_all_others(tmp_path: Path) -> None:
    wanted = saved(tmp_path, "vae")
    plain = forms.digest(tmp_path)
    other = {name: value + 1 for name, value in wanted.items()}
    for name in ("fp16", "non_ema"):
        save_file(other, tmp_path / f"{PLAIN['vae']}.{name}.safetensors")
    (tmp_path / f"{PLAIN['vae']}.safetensors.index.json").write_text("no index")
    found = tensors("vae", tmp_path)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert forms.digest(tmp_path) == plain and forms.variant(tmp_path) == ""
    (tmp_path / f"{PLAIN['vae']}.safetensors").unlink()
    (tmp_path / f"{PLAIN['vae']}.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"it has no .*, but the variants fp16, non_ema: leave one of them"):
        forms.form(tmp_path)


def index(folder: Path) -> Path:
    return folder / f"{PLAIN['vae']}.safetensors.index.json"


def changed(folder: Path, change: Callable[[dict], object]) -> None:
    told = json.loads(index(folder).read_text())
    change(told["weight_map"])
    index(folder).write_text(json.dumps(told))


def shard(folder: Path, k: int = 0) -> Path:
    return sorted(folder.glob("*-of-*.safetensors"))[k]


def moved(folder: Path) -> None:
    """A tensor of the first file in the second too."""
    key = "decoder.conv_in.bias"
    holds = [key in load_file(shard(folder, k)) for k in range(2)]
    other = shard(folder, holds.index(False))
    save_file(load_file(other) | {key: torch.zeros(8)}, other)


def twice(folder: Path) -> None:
    line = next(line for line in index(folder).read_text().splitlines() if "decoder.conv_in.bias" in line)
    index(folder).write_text(index(folder).read_text().replace(line, f"{line}\n{line}"))


@pytest.mark.parametrize(("damage", "line"), [
    (lambda f: shard(f).unlink(), r"it lacks diffusion_\w+-00001-of-\d+.safetensors, which .*index.json lists"),
    (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), r"-00001-of-\d+.safetensors is cut"),
    (twice, r"index.json lists decoder.conv_in.bias twice"),
    (moved, r"holds decoder.conv_in.bias, which is in diffusion_.* too"),
    (lambda f: changed(f, lambda listed: listed.pop("decoder.conv_in.bias")), "which the index does not list"),
    (lambda f: changed(f, lambda listed: listed.update(more=shard(f).name)), "safetensors lacks more"),
    (lambda f: changed(f, lambda listed: listed.update(more="model.bin")), "lists model.bin; only .safetensors beside"),
    (lambda f: changed(f, lambda listed: listed.update(more="../a.safetensors")), "lists ../a.safetensors; only"),
    (lambda f: changed(f, lambda listed: listed.clear()), "lists nothing"),
    (lambda f: index(f).write_text("[]"), "is no index of weights"),
    (lambda f: index(f).rename(f / "diffusion_pytorch_model.bin.index.json"), "pickled weights .* are not read"),
])  # fmt: skip
def test_what_is_not_whole_is_one_line(damage: Callable[[Path], object], line: str, tmp_path: Path) -> None:
    saved(tmp_path, "vae", max_shard_size="30KB")
    damage(tmp_path)
    with pytest.raises(UserError, match=line) as error:
        diffusers_folder.read(tmp_path)
    assert len(error.value.line()) <= 200


def sharded(folder: Path) -> dict[str, nn.Module]:
    """A pipeline whose parts lie in several files, and as a variant; gives its U-Net and autoencoder."""
    case = pipeline.CASES["SD1 DDIM"]
    pipeline.written(folder, case.kind, case.scheduler)
    nets = {"unet": diffusers_conditional.read(folder / "unet"), "vae": diffusers_folder.read(folder / "vae")}
    made = pipeline.pipeline_of(folder, "")
    for part, how in (("unet", WAYS["shards"]), ("vae", WAYS["variant"]), ("text_encoder", WAYS["shards"])):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        how = how | ({"max_shard_size": "2KB"} if part == "text_encoder" else {})
        getattr(made, part).save_pretrained(folder / part, **how)
    return nets


def test_a_run_stands_on_all_files_under_their_own_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pipeline"
    nets = sharded(folder)
    cfg = linked(tmp_path / "run", "model=stable_diffusion", f"model.net.run={folder}", "data.image_size=64")
    assert "vae (its variant fp16, since it has no plain weights)" in capsys.readouterr().out
    frozen = tmp_path / "run/frozen"
    for part, own in (("net", "unet"), ("first_stage", "vae"), ("embedder.sources.text.encoder", "text_encoder")):
        names = {path.name for path in (folder / own).iterdir()}
        assert names <= {path.name for path in (frozen / part).iterdir()}
    net = build.part(frozen / "net", cfg.model.net.sha256, cfg).state_dict()
    assert all(torch.equal(net[name], value) for name, value in nets["unet"].state_dict().items())
    last = shard(frozen / "net", -1)
    state = load_file(last)
    last.unlink()
    with pytest.raises(UserError, match=r"model\.net\.run=.*: it lacks diffusion_pytorch_model-"):
        build.part(frozen / "net", cfg.model.net.sha256, cfg)
    save_file({name: value + 1e-3 for name, value in state.items()}, last)
    with pytest.raises(UserError, match="these are not the weights that this run stands on"):
        build.part(frozen / "net", cfg.model.net.sha256, cfg)
    shard(folder / "unet").unlink()
    with pytest.raises(UserError, match=r"error: model\.net\.run=.*: it lacks diffusion_pytorch_model-00001-of-"):
        linked(tmp_path / "other", "model=stable_diffusion", f"model.net.run={folder}", "data.image_size=64")


def test_a_pipeline_in_several_files_is_asked_as_a_run_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nets = sharded(tmp_path)
    run = folders.load_generator(folders.find(str(tmp_path)), True, None)
    net = run.model.net.state_dict()
    assert all(torch.equal(net[name], value) for name, value in nets["unet"].state_dict().items())
    assert f"{tmp_path / 'vae'} (its variant fp16" in capsys.readouterr().err
    shard(tmp_path / "unet").unlink()
    with pytest.raises(UserError, match=r"error: run=.*: it lacks diffusion_pytorch_model-00001-of-.* Fix: run=FOLDER"):
        folders.load(tmp_path, True)
