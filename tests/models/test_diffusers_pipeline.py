"""Whole ways from a prompt to latents and images beside the pipelines of diffusers, on random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atelier.checkpoints import diffusers_conditional, diffusers_folder, transformers_folder, weight_files
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.multistep import PLMS
from atelier.diffusion.samplers import DDIM, Euler, Sampler
from atelier.models.base import sampling_mode
from atelier.models.ldm import LDM
from atelier.runs import build, folders
from atelier.runs.pretrained import link_pretrained
from tests.checkpoints import test_transformers_folder as texts
from tests.compose import composed

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs

PROMPTS, NEGATIVE, N = ["a cab", "cab bac abc"], ["it's a 9", "bac"], 5  # which divides the table: theirs steps evenly
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
WITHOUT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NETS = {
    "SD1": {"attention_head_dim": 2},
    "SD2": {"attention_head_dim": [1, 2, 4], "use_linear_projection": True},
}


def unet(kind: str, in_channels: int = 4) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, block_out_channels=(8, 16, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=texts.SIZES["hidden_size"], **NETS[kind],
        down_block_types=[CROSS.format("Down"), CROSS.format("Down"), PLAIN.format("Down")],
        up_block_types=[PLAIN.format("Up"), CROSS.format("Up"), CROSS.format("Up")],
    )  # fmt: skip


def written(folder: Path, kind: str, scheduler: Any, pad: str | None = None, in_channels: int = 4) -> Path:
    """A pipeline of random weights as diffusers saves it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    encoder = texts.written(folder / "made", pad=pad)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "made", model_max_length=10)
    net = unet(kind, in_channels)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.02 * torch.randn_like(weight)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": net, "scheduler": scheduler}
    diffusers.StableDiffusionPipeline(**parts, **WITHOUT).save_pretrained(folder)
    return folder


def pipeline_of(folder: Path, kind: str) -> Any:
    """Theirs, which draws nothing of the posterior of an image."""
    made = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(folder, **WITHOUT)
    made.set_progress_bar_config(disable=True)
    return made


def ours(folder: Path, *words: str, page: str = "stable_diffusion") -> LDM:
    cfg = composed(f"model={page}", f"model.net.run={folder}", "data.image_size=64", *words)
    parts = {
        "net": diffusers_conditional.read(folder / "unet"),
        "first_stage": diffusers_folder.read(folder / "vae", 64, 3),
        "embedder.sources.text.encoder": transformers_folder.text_encoder(str(folder / "text_encoder")),
    }
    return build.on_parts(cfg, parts).eval()


class Case(NamedTuple):
    """A scheduler of theirs, the sampler that it is here, and words that say the rest."""

    kind: str
    scheduler: Any
    sampler: Sampler
    words: tuple[str, ...] = ()
    pad: str | None = None


V = ("target@model.objective.target=v",)
CASES = {
    "SD1 PNDM": Case(
        "SD1", diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        PLMS(steps=N, spacing="leading", offset=1, to_image=False),
    ),
    "SD1 DDIM": Case(
        "SD1", diffusers.DDIMScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=False),
        DDIM(steps=N, spacing="leading", offset=1, to_image=False),
    ),
    "SD1 Euler": Case(
        "SD1", diffusers.EulerDiscreteScheduler(**BETAS, **LEADING), Euler(steps=N, spacing="leading", offset=1)
    ),
    "SD2 v DDIM": Case(
        "SD2", diffusers.DDIMScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=False,
                                       prediction_type="v_prediction"),
        DDIM(steps=N, spacing="leading", offset=1, to_image=False), V, "!",
    ),
    "SD2 v zero SNR": Case(
        "SD2", diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False,
                                       prediction_type="v_prediction", rescale_betas_zero_snr=True),
        DDIM(steps=N), (*V, "schedule@model.objective.schedule=zero_terminal"), "!",
    ),
}  # fmt: skip


def made_for(page: str, folder: Path) -> list[str]:
    """Words for a page of conf/model, with the pipeline that it asks for."""
    case = CASES["SD2 v DDIM" if page == "stable_diffusion_2" else "SD1 PNDM"]
    channels = {"stable_diffusion_inpaint": 9, "stable_diffusion_edit": 8}.get(page, 4)
    if page.startswith("sdxl"):
        xl(folder)
    else:
        written(folder, case.kind, case.scheduler, case.pad, channels)
    return [f"model.net.run={folder}", "data.image_size=32", *(["model.embedder.size_dim=8"] * page.startswith("sdxl"))]


def assert_same(a: Tensor, b: Tensor) -> None:
    """Within 1e-5 of the largest number: guidance makes latents of random weights large."""
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_text_to_image(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = written(tmp_path, case.kind, case.scheduler, case.pad)
    pipeline = pipeline_of(folder, "")
    model = ours(folder, *case.words)
    for negative in (None, NEGATIVE):
        noise = model.noise(ImageRngs(0, 0, 2))
        options = {"num_inference_steps": N, "guidance_scale": 7.5, "height": 64, "width": 64}
        theirs = pipeline(PROMPTS, negative_prompt=negative, latents=noise, output_type="latent", **options).images
        cond = {"text": PROMPTS} | ({"negative": negative} if negative else {})
        with sampling_mode(model, {}), torch.no_grad():
            how = model.diffusion_sampler.asked(case.sampler, 7.5, None)
            latents = how(cond, noise, ImageRngs(0, 0, 2))
            assert_same(latents, theirs)
            image = pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample
            torch.testing.assert_close(model.decode(latents), image, atol=1e-4, rtol=0)


def test_a_pipeline_lies_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nets have the tensors of the files, but for those that are made of several or turned round."""
    held: set[int] = set()

    def noting(read: Any) -> Any:
        def noted(*given: Any) -> dict[str, Tensor]:
            found = read(*given)
            held.update(value.data_ptr() for value in found.values())
            return found

        return noted

    monkeypatch.setattr(weight_files, "read", noting(weight_files.read))
    model = ours(written(tmp_path, "SD1", CASES["SD1 DDIM"].scheduler))
    for net in (model.net, model.first_stage, model.embedder.sources["text"].encoder):
        alone = [w for name, w in net.named_parameters() if "kv" not in name and name != "time.1.weight"]
        assert len(alone) > 30 and all(weight.data_ptr() in held for weight in alone)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs takes the mean of a posterior where it would draw from it."""
    kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{kind}.sample", lambda self, generator=None: self.mode())


def test_inpainting(modes: None, tmp_path: Path) -> None:
    """Noisy latents, mask, masked image: nine channels in this order, on a mask that halves evenly."""
    case = CASES["SD1 DDIM"]
    folder = written(tmp_path, case.kind, case.scheduler, in_channels=9)
    model = ours(folder, page="stable_diffusion_inpaint")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, 16:40, 24:56] = 1
    noise = model.noise(ImageRngs(0, 0, 2))
    options = {"num_inference_steps": N, "guidance_scale": 7.5, "height": 64, "width": 64, "output_type": "latent"}
    theirs = pipeline_of(folder, "Inpaint")(
        PROMPTS, image=image, mask_image=mask, latents=noise, strength=1.0, **options
    ).images
    with sampling_mode(model, {}), torch.no_grad():
        planes = torch.cat([mask[:, :, ::8, ::8], model.encode((2 * image - 1) * (mask < 0.5))], 1)
        how = model.diffusion_sampler.asked(case.sampler, 7.5, None)
        assert_same(how({"text": PROMPTS, "planes": planes}, noise, ImageRngs(0, 0, 2)), theirs)


def test_editing_by_instruction(modes: None, tmp_path: Path) -> None:
    """Eight channels, the source's latents as they are; guided by text and by image."""
    case = CASES["SD1 Euler"]
    folder = written(tmp_path, case.kind, case.scheduler, in_channels=8)
    model = ours(folder, page="stable_diffusion_edit")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    noise = model.noise(ImageRngs(0, 0, 2))
    pipeline = pipeline_of(folder, "InstructPix2Pix")
    theirs = pipeline(
        PROMPTS, image=image, latents=noise, num_inference_steps=N, guidance_scale=7.5, image_guidance_scale=1.5,
        output_type="latent",
    ).images  # fmt: skip
    with sampling_mode(model, {}), torch.no_grad():
        cond = model._with_planes({"instruction": PROMPTS, "source": 2 * image - 1})
        how = model.diffusion_sampler.asked(case.sampler, 7.5, None, 1.5)
        assert_same(how(cond, noise, ImageRngs(0, 0, 2)), theirs)


def test_image_to_image(modes: None, tmp_path: Path) -> None:
    """Noised to the level of the first step that is left, then denoised from there."""
    case = CASES["SD1 DDIM"]
    folder = written(tmp_path, case.kind, case.scheduler)
    model, steps = ours(folder), 10
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sampler = DDIM(steps=steps, spacing="leading", offset=1, to_image=False)
    first = sampler.times(model.objective.schedule, torch.device("cpu"))[4]  # strength 0.6 of ten steps leaves six
    rngs = ImageRngs(0, 0, 2)
    drawn = rngs.randn(*model.net.shape)
    pipeline = pipeline_of(folder, "Img2Img")
    patched = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched, lambda *_, **__: drawn)
        theirs = pipeline(PROMPTS, image=image, strength=0.6, num_inference_steps=steps, output_type="latent").images
    with sampling_mode(model, {}), torch.no_grad():
        how = model.diffusion_sampler.asked(sampler, 7.5, None)
        latents = how.edit({"text": PROMPTS}, model.encode(2 * image - 1), ImageRngs(0, 0, 2), float(first))
        assert_same(latents, theirs)


TURBO = {  # as its file says
    **BETAS, "steps_offset": 1, "timestep_spacing": "trailing", "prediction_type": "epsilon", "trained_betas": None,
    "interpolation_type": "linear", "clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False,
    "sample_max_value": 1.0,
}  # fmt: skip


def xl(folder: Path, scheduler: Any = None) -> Path:
    """A pipeline of SDXL's topology: no attention at the first level, two text encoders, sizes beside the vector."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025,
    )  # fmt: skip
    width, out = texts.SIZES["hidden_size"], 7
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=2 * width, attention_head_dim=(1, 2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=out + 6 * 8,
        down_block_types=[PLAIN.format("Down"), CROSS.format("Down"), CROSS.format("Down")],
        up_block_types=[CROSS.format("Up"), CROSS.format("Up"), PLAIN.format("Up")],
    )  # fmt: skip
    second = texts.written(folder / "made_2", "CLIPTextModelWithProjection", pad="!")
    encoders = [texts.written(folder / "made"), second]
    with torch.no_grad():
        for weight in [*net.parameters(), *encoders[1].parameters()]:
            weight += 0.02 * torch.randn_like(weight)
    words = [transformers.CLIPTokenizer.from_pretrained(folder / n, model_max_length=10) for n in ("made", "made_2")]
    scheduler = scheduler or diffusers.EulerDiscreteScheduler(**BETAS, **LEADING)
    diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=words[0], tokenizer_2=words[1],
        unet=net, scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_text_to_image_xl(tmp_path: Path) -> None:
    folder = xl(tmp_path)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    cfg = composed("model=sdxl", f"model.net.run={folder}", "data.image_size=64", "model.embedder.size_dim=8")
    read = partial(transformers_folder.text_encoder, layer="penultimate", final_norm=False)
    parts = {
        "net": diffusers_conditional.read(folder / "unet"),
        "first_stage": diffusers_folder.read(folder / "vae", 64, 3),
        "embedder.encoder": read(str(folder / "text_encoder")),
        "embedder.second": read(str(folder / "text_encoder_2")),
    }
    model = build.on_parts(cfg, parts).eval()
    noise = model.noise(ImageRngs(0, 0, 2))
    sampler = Euler(steps=N, spacing="leading", offset=1)
    for negative in (None, NEGATIVE):
        options = {"num_inference_steps": N, "guidance_scale": 5.0, "height": 64, "width": 64}
        theirs = pipeline(PROMPTS, negative_prompt=negative, latents=noise, output_type="latent", **options).images
        cond = {"text": PROMPTS} | ({"negative": negative} if negative else {})
        with sampling_mode(model, {}), torch.no_grad():
            how = model.diffusion_sampler.asked(sampler, 5.0, None)
            assert_same(how(cond, noise, ImageRngs(0, 0, 2)), theirs)


def turbo(folder: Path) -> Path:
    """SDXL-Turbo: its scheduler_config.json as it was published, with what no scheduler of that class knows."""
    xl(folder, diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"))
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TURBO))
    return folder


@pytest.mark.parametrize("steps", [1, 4])
def test_a_pipeline_turbo_is_asked_as_a_run_is(steps: int, tmp_path: Path) -> None:
    """In few steps and without guidance, with theirs' noise on the way.

    Theirs starts from noise of the deviation s of its first level, ours from 1, as sqrt(s^2 + 1) is in theirs, so its
    noise is given to it that much larger: 0.2 %.
    """
    folder = turbo(tmp_path)
    run = folders.load_generator(folders.find(str(folder)), True, None)
    sampler, cfg = run.model.diffusion_sampler.sampler, run.cfg
    assert cfg.choices.model == "sdxl_turbo" and sampler == DDIM(steps=4, eta=1.0) and cfg.model.guider.guidance == 1
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(steps)
    first, noise = float(pipeline.scheduler.sigmas[0]), run.model.noise(ImageRngs(0, 0, 2))
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=0.0, height=64, width=64, output_type="latent",
        latents=noise * (first**2 + 1) ** 0.5 / first, generator=ImageRngs(0, 0, 2).generators,
    ).images  # fmt: skip
    with sampling_mode(run.model, {}), torch.no_grad():
        how = run.model.diffusion_sampler.asked(replace(sampler, steps=steps))
        assert_same(how({"text": PROMPTS}, noise, ImageRngs(0, 0, 2)), theirs)


def test_the_refiner_is_told_by_what_differs(tmp_path: Path) -> None:
    """One text encoder, and five numbers beside its vector."""
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=(1, 2), use_linear_projection=True, transformer_layers_per_block=2,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 5 * 8,
        down_block_types=[PLAIN.format("Down"), CROSS.format("Down")],
        up_block_types=[CROSS.format("Up"), PLAIN.format("Up")],
    )  # fmt: skip
    xl(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    net.save_pretrained(tmp_path / "unet")
    wanted = r"it is SDXL's refiner, which reads one text encoder and an aesthetic score, not two encoders\. Fix: "
    with pytest.raises(UserError, match=rf"error: run=.*: {wanted}run=FOLDER of SDXL's base"):
        folders.load(tmp_path, True)
    cfg = composed("model=sdxl", f"model.net.run={tmp_path}", "data.image_size=64")
    with pytest.raises(UserError, match=rf"error: model\.net\.run=.*: {wanted}model\.net\.run=FOLDER"):
        link_pretrained(cfg, tmp_path / "run")


@pytest.mark.parametrize("name", ["SD1 PNDM", "SD2 v zero SNR"])
def test_a_pipeline_is_asked_as_a_run_is(name: str, tmp_path: Path) -> None:
    """`sample.py run=FOLDER prompt=TEXT`: with the sampler, the levels and the target that its scheduler says."""
    case = CASES[name]
    folder = written(tmp_path, case.kind, case.scheduler, case.pad)
    run = folders.load_generator(folders.find(str(folder)), True, None)
    assert type(run.model.diffusion_sampler.sampler) is type(case.sampler) and not run.model.training
    options = {"num_inference_steps": 50, "guidance_scale": 7.5, "height": 64, "width": 64, "output_type": "latent"}
    noise = run.model.noise(ImageRngs(0, 0, 2))
    theirs = pipeline_of(folder, "")(PROMPTS, latents=noise, **options).images
    with sampling_mode(run.model, {}), torch.no_grad():
        batch = run.data.test_batch(0, 2) | {"text": PROMPTS}
        image = run.model.sample(run.model.condition(batch, ""), ImageRngs(0, 0, 2))
        torch.testing.assert_close(image, run.model.decode(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [9, 8])
def test_which_page_a_pipeline_is(channels: int, tmp_path: Path) -> None:
    case = CASES["SD1 DDIM"]
    run = folders.load_generator(written(tmp_path, case.kind, case.scheduler, in_channels=channels), True, None)
    assert run.cfg.choices.model == {9: "stable_diffusion_inpaint", 8: "stable_diffusion_edit"}[channels]
    batch = run.data.test_batch(0, 2)
    with sampling_mode(run.model, {}), torch.no_grad():
        image = run.model.sample(run.model.condition(batch, ""), ImageRngs(0, 0, 2), sampler=Euler(steps=2))
    assert image.shape == (2, 3, 64, 64) and image.isfinite().all()


BETAS_OF = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "half as many": BETAS | {"num_train_timesteps": 500, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", BETAS_OF)
def test_a_pipeline_has_the_levels_that_its_scheduler_says(name: str, tmp_path: Path, capsys: Any) -> None:
    """Also where no sampler here is its own, which one line says."""
    theirs = diffusers.DPMSolverMultistepScheduler(**BETAS_OF[name])
    run = folders.load_generator(written(tmp_path, "SD1", theirs), True, None)
    levels = run.model.objective.schedule.logsnrs.sigmoid()
    torch.testing.assert_close(levels, theirs.alphas_cumprod.double(), atol=1e-6, rtol=1e-4)
    assert "it holds a DPMSolverMultistepScheduler" in capsys.readouterr().err


def test_a_pipeline_without_weights_that_are_read_is_refused(tmp_path: Path) -> None:
    case = CASES["SD1 DDIM"]
    folder = written(tmp_path, case.kind, case.scheduler)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"error: run=.*: unet/ has no weights in .safetensors beside its config.json"):
        folders.load(folder, True)
    (folder / "unet/config.json").unlink()
    with pytest.raises(UserError, match=r"error: run=.*: unet/ has no readable config.json. Fix: run=FOLDER"):
        folders.load(folder, True)
    for ema, root, line in ((4000, None, "ema=4000: the run has no averages"), (True, "x", "root=x: a pipeline of ")):
        with pytest.raises(UserError, match=line):
            folders.load(folder, ema, root)


def test_a_pipeline_xl_is_asked_as_a_run_is(tmp_path: Path) -> None:
    run = folders.load_generator(folders.find(str(xl(tmp_path))), True, None)
    batch = run.data.test_batch(0, 2) | {"text": PROMPTS}
    with sampling_mode(run.model, {}), torch.no_grad():
        image = run.model.sample(run.model.condition(batch, ""), ImageRngs(0, 0, 2), sampler=Euler(steps=2))
    assert image.shape == (2, 3, 64, 64) and image.isfinite().all()
