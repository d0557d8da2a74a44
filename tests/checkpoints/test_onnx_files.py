"""Graphs of ONNX run by onnxruntime beside torch: a net, its decoder, and a whole way to images in numpy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import export as entry
from atelier.checkpoints import diffusers_conditional, diffusers_folder, onnx_files
from atelier.checkpoints.onnx_files import CONDITIONS, DECODER, DENOISER, SCHEDULE
from atelier.core.batch import Cond
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.diffusion_sampler import DiffusionSampler
from atelier.diffusion.guidance import ClassifierFree
from atelier.diffusion.objective import Objective
from atelier.diffusion.samplers import DDIM
from atelier.diffusion.schedules import EDM, Cosine, Flow, ScaledLinear
from atelier.diffusion.targets import Epsilon, Preconditioned, VectorField, Velocity
from atelier.diffusion.times import Uniform
from atelier.diffusion.weightings import Plain
from atelier.nets import lora
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.codec import LatentCodec
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.dit import DiT
from atelier.nets.frozen import Frozen
from atelier.nets.quantizers import VectorQuantizer
from atelier.nets.unet import UNet
from atelier.nets.vqgan import VQGANNet
from tests.compose import composed
from tests.nets.test_spatial_transformer import shaken

onnx = pytest.importorskip("onnx", reason="onnx holds the graphs: pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the graphs: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript writes the graphs: pip install -e '.[onnx]'")

Arrays = dict[str, np.ndarray]
N_LABELS, N_TOKENS = 6, 5
KL = {
    "image_size": 16,
    "image_channels": 3,
    "width": 8,
    "multipliers": [1, 2],
    "n_blocks": 1,
    "attention": [],
    "middle_attention": True,
    "norm_groups": 4,
    "dropout": 0.5,
    "latent_channels": 4,
}
BESIDE = f"{DENOISER}.data"  # where large weights lie


class Given(nn.Module):
    """The condition of a net is what it was asked by; nothing is halves, and one token in sight."""

    conditions = ("vector", "tokens", "mask", "planes")

    def __init__(self, net: UNet | DiT) -> None:
        super().__init__()
        self.cond_sizes, self.shape = net.cond_sizes, net.shape

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        return Condition(**cond)

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        mask = torch.arange(N_TOKENS).expand(n, -1) == 0
        shapes = {"vector": (), "tokens": (N_TOKENS,), "planes": ()}
        made = {name: torch.full((n, *shapes[name], size), 0.5) for name, size in self.cond_sizes.items()}
        if "planes" in made:
            made["planes"] = made["planes"][:, :, None, None].expand(-1, -1, *self.shape[1:])
        return Condition(mask=mask, **made)


class Model(NamedTuple):
    how: DiffusionSampler
    codec: LatentCodec | None = None


def text_and_planes() -> Model:
    """Latents; a vector through two layers, tokens, planes: what Stable Diffusion's nets have."""
    net = UNet(
        image_size=8,
        image_channels=4,
        width=8,
        multipliers=[1],
        n_blocks=1,
        attention=[],
        heads=2,
        token_dim=12,
        cond_dim=6,
        deep_cond=True,
        plane_channels=2,
        dropout=0.5,
    )
    first_stage = KLNet(**KL)
    objective = Objective(ScaledLinear(), Epsilon(), Plain(), Uniform())
    sampler = DDIM(steps=5, spacing="leading", offset=1, to_image=False)
    how = DiffusionSampler(objective, shaken(net), Given(net), sampler, ClassifierFree(guidance=2.0), clip=False)
    return Model(how, LatentCodec(Frozen(shaken(first_stage)), 0.5, 0.1, "sample"))


def labels() -> Model:
    """Pixels, a transformer, a schedule that scales what the net sees."""
    net = DiT(
        image_size=8,
        image_channels=3,
        patch_size=2,
        width=16,
        n_layers=1,
        heads=2,
        cond_dim=8,
        qk_norm=True,
        dropout=0.5,
    )
    objective = Objective(EDM(), Preconditioned(), Plain(), Uniform())
    return Model(
        DiffusionSampler(objective, shaken(net), of_labels(), DDIM(steps=5), ClassifierFree(guidance=3.0), True)
    )


def of_labels() -> ConditionEmbedder:
    return ConditionEmbedder(dim=8, conditions=["label"], n_classes=N_LABELS, label_factors=[2, 3], n_attributes=0)


def pixels() -> Model:
    """DDPM's U-Net, with all that a page may ask of it."""
    net = UNet(
        image_size=16,
        image_channels=3,
        width=8,
        multipliers=[1, 2],
        n_blocks=1,
        attention=[4],
        scale_shift=True,
        patch_size=2,
        cond_dim=8,
        learned_variance=True,
        checkpointing=True,
    )
    objective = Objective(Cosine(), Velocity(), Plain(), Uniform(), "hybrid", learned_variance=True)
    guider = ClassifierFree(guidance=1.5)
    return Model(DiffusionSampler(objective, shaken(net), of_labels(), DDIM(steps=5), guider, clip=True))


def stable_diffusion() -> Model:
    """Parts that diffusers has written, with the layers of version 1 on two levels."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        sample_size=16,
        norm_num_groups=4,
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    with TemporaryDirectory() as folder:
        shaken(unet).save_pretrained(f"{folder}/unet")
        shaken(vae).save_pretrained(f"{folder}/vae")
        net, first_stage = diffusers_conditional.read(f"{folder}/unet"), diffusers_folder.read(f"{folder}/vae")
    objective = Objective(ScaledLinear(), Epsilon(), Plain(), Uniform())
    sampler = DDIM(steps=5, spacing="leading", offset=1, to_image=False)
    how = DiffusionSampler(objective, net, Given(net), sampler, ClassifierFree(guidance=7.5), clip=False)
    return Model(how, LatentCodec(Frozen(first_stage), 0.18215, 0.0, "sample"))


def quantised() -> Model:
    """A net of tokens alone, with an adapter, on latents that the decoder quantises; a straight path."""
    net = DiT(image_size=8, image_channels=4, patch_size=2, width=16, n_layers=1, heads=2, token_dim=12)
    lora.add(net, name="style", targets=["qkv.q", "out"], rank=2, alpha=4)
    quantizer = VectorQuantizer(n_codes=16, dim=4, **diffusers_folder.OUR_QUANTIZER)
    first_stage = shaken(VQGANNet(**KL, quantizer=quantizer))
    objective = Objective(Flow(), VectorField(), Plain(), Uniform())
    how = DiffusionSampler(objective, shaken(net), Given(net), DDIM(steps=5), ClassifierFree(guidance=2.0), clip=False)
    return Model(how, LatentCodec(Frozen(first_stage), 1.0, 0.0, "mode"))


MODELS = {"text_and_planes": text_and_planes, "labels": labels}
MORE = {"pixels": pixels, "stable_diffusion": stable_diffusion, "quantised": quantised}  # seconds each


class Written(NamedTuple):
    model: Model
    folder: Path
    files: list[Path]


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """The files of a model; the weights of that of labels lie beside its graphs, of the other there are old ones."""
    torch.manual_seed(0)
    model, folder = MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "labels":
            patch.setattr(onnx_files, "LARGEST", 0)
        (folder / BESIDE).write_bytes(b"old")
        before = as_it_is(model)
        files = onnx_files.write(*model, folder)
    assert as_it_is(model) == before
    model.how.net.eval()
    yield Written(model, folder, files)


def as_it_is(model: Model) -> list[Any]:
    """Modes and weights, and which of them are trained."""
    parts = [part for part in (*model.how.__dict__.values(), model.codec) if isinstance(part, nn.Module)]
    modes = [layer.training for part in parts for layer in part.modules()]
    return modes + [
        (name, value.requires_grad, value.sum().item()) for part in parts for name, value in part.named_parameters()
    ]


def run(path: Path, **given: Any) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in given.items()})


def told(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def asked(how: DiffusionSampler, n: int, n_tokens: int = N_TOKENS) -> Condition:
    """n conditions that differ; the first has no token in sight."""
    torch.manual_seed(3)
    sizes = how.net.cond_sizes
    vector = torch.randn(n, sizes["vector"]) if "vector" in sizes else None
    if "tokens" not in sizes:
        return Condition(vector)
    mask = torch.arange(n_tokens) < torch.arange(n)[:, None]
    planes = torch.randn(n, sizes["planes"], *how.net.shape[1:]) if "planes" in sizes else None
    return Condition(vector, torch.randn(n, n_tokens, sizes["tokens"]), mask, planes)


def fields(cond: Condition) -> dict[str, Tensor]:
    return {name: value for name, value in vars(cond).items() if value is not None}


@pytest.mark.parametrize(("n", "n_tokens"), [(1, 1), (5, 7)])
def test_the_denoiser_is_ours_at_any_batch_and_number_of_tokens(written: Written, n: int, n_tokens: int) -> None:
    same_denoised(written, n, n_tokens)


@torch.no_grad()
def same_denoised(written: Written, n: int, n_tokens: int = N_TOKENS) -> None:
    """From noise to almost the image, within 1e-4; up to 9e-6, of images of 50, were measured."""
    how = written.model.how
    cond, t = asked(how, n, n_tokens), torch.linspace(1, 0.02, n).double()
    x = how.objective.schedule.sigma(t).view(-1, 1, 1, 1).float() * torch.randn(n, *how.net.shape)
    wanted = how.objective.denoise(how.net, x, t, cond)[:, : x.shape[1]]
    (found,) = run(written.folder / DENOISER, x=x, t=t, **fields(cond))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_models_are_theirs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MORE[name]()
    files = onnx_files.write(*model, tmp_path)
    model.how.net.eval()
    same_denoised(Written(model, tmp_path, files), 5)
    same_images(Written(model, tmp_path, files))


def test_the_schedule_is_ours_from_the_image_to_noise(written: Written) -> None:
    schedule = written.model.how.objective.schedule
    t = torch.cat([torch.tensor([0, 1e-4]), torch.linspace(0.001, 1, 77)]).double()
    alpha, sigma, start = run(written.folder / SCHEDULE, t=t)
    np.testing.assert_allclose(alpha, schedule.alpha(t), rtol=1e-12)
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-12)
    np.testing.assert_allclose(start, schedule.prior_std(t), rtol=1e-12)
    assert (alpha[0], sigma[0]) == (1, 0)


def test_the_decoder_is_ours_at_any_batch(written: Written) -> None:
    model = written.model
    if model.codec is None:
        assert not (written.folder / DECODER).exists()
        return
    z = torch.randn(5, *model.codec.latent_shape)
    wanted = model.codec.decode(z)
    (found,) = run(written.folder / DECODER, z=z)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.1


@torch.no_grad()
def test_a_way_to_images_in_numpy_is_that_of_our_sampler(written: Written) -> None:
    same_images(written)


@torch.no_grad()
def same_images(written: Written) -> None:
    """DDIM with the model's own times and guidance, within 1e-3; up to 2.2e-6 were measured."""
    how, codec, n = *written.model, 2
    known, noise = asked(how, n), torch.randn(n, *how.net.shape)
    if isinstance(how.embedder, ConditionEmbedder):
        cond = {"label": torch.tensor([1, 5])}
        known = Condition(torch.from_numpy(load_file(written.folder / CONDITIONS)["label.vector"][[1, 5]]))
    else:
        cond = fields(known)
    wanted = how(cond, noise, ImageRngs(0, 0, n))
    found = by_numpy(written.folder, {name: value.numpy() for name, value in fields(known).items()}, noise.numpy())
    if codec is not None:
        wanted, (found,) = codec.decode(wanted), run(written.folder / DECODER, z=found)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    assert wanted.std() > 0.1


def by_numpy(folder: Path, known: Arrays, noise: np.ndarray) -> np.ndarray:
    """DDIM by the files of a folder alone."""
    how = told(folder / DENOISER)
    times, guidance, clip = (json.loads(how[name]) for name in ("times", "guidance", "clip"))
    alpha, sigma, start = run(folder / SCHEDULE, t=np.array(times))
    null = {name: value.repeat(len(noise), 0) for name, value in of_nothing(folder).items()}
    both = {name: np.concatenate([null[name], known[name]]) for name in known}
    x = start[0] * noise.astype(np.float64)
    for i in range(len(times) - 1):
        t = np.full(2 * len(x), times[i])
        (answers,) = run(folder / DENOISER, x=np.concatenate([x, x]).astype(np.float32), t=t, **both)
        free, told_more = np.split(answers, 2)
        denoised = free + guidance * (told_more - free)
        denoised = denoised.clip(-1, 1) if clip else denoised
        eps = (x - alpha[i] * denoised) / sigma[i]
        x = alpha[i + 1] * denoised + sigma[i + 1] * eps
    return x.astype(np.float32)


def of_nothing(folder: Path) -> Arrays:
    found = load_file(folder / CONDITIONS)
    return {name.removeprefix("null."): value for name, value in found.items() if name.startswith("null.")}


def test_what_lies_in_the_folder(written: Written) -> None:
    """All files are told; large weights lie beside their graph, and old ones are gone."""
    beside, pixels = [BESIDE], [DENOISER, SCHEDULE, CONDITIONS]
    wanted = pixels + (beside if written.model.codec is None else [DECODER])
    assert sorted(path.name for path in written.files) == sorted(wanted)
    assert sorted(path.name for path in written.folder.iterdir()) == sorted(wanted)


def test_nothing_is_left_out_at_random(written: Written) -> None:
    """The nets have dropout and are in train mode; onnxruntime itself would not run it."""
    graphs = [onnx.load(path).graph for path in written.files if path.suffix == ".onnx"]
    assert not [node for graph in graphs for node in graph.node if node.op_type == "Dropout"]


def test_what_the_files_say_of_themselves(written: Written) -> None:
    pixels = written.model.codec is None
    how, given = (
        told(written.folder / DENOISER),
        {"x", "t", "vector"} | ({"tokens", "mask", "planes"} if not pixels else set()),
    )
    about = {"schedule", "target", "sampler", "guider", "times", "guidance", "clip"}
    assert set(how) == given | about | {"denoised"}
    assert (how["schedule"], how["target"]) == (("EDM", "Preconditioned") if pixels else ("ScaledLinear", "Epsilon"))
    assert (how["guidance"], how["clip"]) == (("3.0", "true") if pixels else ("2.0", "false"))
    assert set(told(written.folder / SCHEDULE)) == {"t", "alpha", "sigma", "start"}
    assert pixels or set(told(written.folder / DECODER)) == {"z", "image"}


def test_without_the_libraries_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError) as caught:
        onnx_files.write(*labels(), tmp_path / "new")
    assert caught.value.line() == ('error: layout=onnx: onnxscript is not installed. Fix: pip install -e ".[onnx]"')
    assert not (tmp_path / "new").exists()


def test_a_run_goes_out_by_the_command(finished: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    entry.export(composed(f"run={finished['ddpm']}", "layout=onnx", f"out={out}", config="export"))
    card = (out / "README.md").read_text()
    assert (out / "denoiser.onnx").exists() and 'onnxruntime.InferenceSession("FOLDER/denoiser.onnx")' in card
