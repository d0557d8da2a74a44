"""Stable Diffusion 1 on random weights beside diffusers: making a picture, or a training step of an adapter.

    python benchmarks/stable_diffusion.py sampling       # 256 px, 4 steps of DDIM, guidance 7.5, three rounds
    python benchmarks/stable_diffusion.py lora           # rank 4 on all attention, batch 1
    python benchmarks/stable_diffusion.py lora --checkpointing
    python benchmarks/stable_diffusion.py sampling --width 32 --size 64     # small nets, in a minute
    python benchmarks/stable_diffusion.py lora --device cuda --precision bf16 --compile --default

diffusers makes a pipeline once, in a folder that both read: U-Net, autoencoder and CLIP's text encoder of version 1,
whose widths go with `--width`. Each round is a process for either, in turns, which loads it, does once what is not
counted, and then is timed. Memory is the peak of the whole process, imports and loading included (on a GPU, that of
torch there). Above 1 atelier is faster, and takes more memory. An adapter's step is that of diffusers' script for
text-to-image: encode image and text, add noise, squared error, gradients, clip, AdamW. In bf16 either does as it does
by itself: atelier keeps float32 weights under autocast, diffusers rounds all weights but those of adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported late: a child's peak memory is never below what its parent had when it forked
    from torch import Tensor

    from atelier.models.ldm import LDM

    Work = Callable[[], Tensor]

SIDES = ("atelier", "diffusers")
PROMPT, STEPS, GUIDANCE, RANK = "a red star beside a blue square", 4, 7.5, 4
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
TARGETS = {"atelier": ["qkv", "cross.q", "kv", "out"], "diffusers": ["to_q", "to_k", "to_v", "to_out.0"]}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


# ---- the pipeline that both read


def write(folder: Path, width: int, size: int) -> None:
    """A pipeline of random weights as diffusers saves it, and the noise that pictures start from."""
    import diffusers
    import torch

    from atelier.core.rng import ImageRngs

    torch.manual_seed(0)
    heads = max(1, width * 12 // 320)  # of the text encoder, 64 numbers each
    unet = diffusers.UNet2DConditionModel(
        sample_size=size // 8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=[CROSS.format("Down")] * 3 + [PLAIN.format("Down")],
        up_block_types=[PLAIN.format("Up")] + [CROSS.format("Up")] * 3,
        cross_attention_dim=64 * heads,
        attention_head_dim=8,
    )
    narrow = max(32, width * 128 // 320 // 32 * 32)
    vae = diffusers.AutoencoderKL(
        sample_size=size,
        block_out_channels=(narrow, 2 * narrow, 4 * narrow, 4 * narrow),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text_encoder, tokenizer = texts(heads)
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    torch.save(ImageRngs(0, 0, 1).randn(4, size // 8, size // 8), folder / "noise.pt")


def texts(heads: int) -> tuple[Any, Any]:
    """CLIP's text encoder with a tokenizer of letters, whose two marks are where CLIP has them."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = {part: k for k, part in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    rows |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    config = transformers.CLIPTextConfig(
        hidden_size=64 * heads,
        intermediate_size=256 * heads,
        num_attention_heads=heads,
        num_hidden_layers=12,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    tokenizer = transformers.CLIPTokenizer(vocab=rows, merges=[], model_max_length=77)
    return transformers.CLIPTextModel(config), tokenizer


# ---- ours


def loaded(args: argparse.Namespace) -> LDM:
    """The model of the folder."""
    from atelier.runs import folders, pipelines

    folders.register()
    return pipelines.as_run(args.folder)[1].to(args.device)


def our_picture(args: argparse.Namespace) -> Work:
    """A function that makes a picture, as `sample.py run=FOLDER sampler.steps=4` does."""
    from dataclasses import replace

    from atelier.core.rng import ImageRngs
    from atelier.models.base import sampling_mode
    from atelier.runs.trainer import autocast

    model = loaded(args).eval()
    if args.compile:
        model.net.compile()
    options = {"sampler": replace(model.diffusion_sampler.sampler, steps=STEPS), "guidance": GUIDANCE}

    def picture() -> Tensor:
        with sampling_mode(model, options), autocast(model, mixed(args.precision)):
            made = model.sample({"text": [PROMPT]}, ImageRngs(0, 0, 1), **options)
            return (made / 2 + 0.5).clamp(0, 1).cpu()

    return picture


def our_step(args: argparse.Namespace) -> tuple[Work, int]:
    """A function that does a training step of an adapter, and the number of the adapter's weights."""
    from atelier.nets import lora
    from atelier.runs.trainer import autocast

    model = loaded(args).train()
    model.net.checkpointing = args.checkpointing
    lora.add(model.net, name="style", targets=TARGETS["atelier"], rank=RANK, alpha=RANK)
    if args.compile:
        model.net.compile()
    optimizer = model.configure_optimizers()
    batch = {"image": image(args), "text": [PROMPT]}

    def step() -> Tensor:
        with autocast(model, mixed(args.precision)):
            loss = model.training_step(batch)
        loss.backward()
        model.clip(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().cpu()

    return step, sum(weight.numel() for weight in model.trained().values())


def mixed(precision: str) -> str:
    """What trainer.precision is called."""
    return "bf16-mixed" if precision == "bf16" else precision


# ---- theirs


def their_picture(args: argparse.Namespace) -> Work:
    """A function that makes a picture with their pipeline."""
    import torch
    from diffusers import StableDiffusionPipeline

    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(args.folder, dtype=kind, safety_checker=None)
    pipeline.to(args.device).set_progress_bar_config(disable=True)
    if args.compile:
        pipeline.unet.compile()
    noise = torch.load(args.folder / "noise.pt").to(args.device, kind)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return lambda: pipeline(PROMPT, latents=noise, **options).images.float().cpu()


def their_step(args: argparse.Namespace) -> tuple[Work, int]:
    """A function that does a training step of an adapter, and the number of the adapter's weights."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    bf16 = args.precision == "bf16"
    kinds = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}
    parts = {name: kind.from_pretrained(args.folder, subfolder=name) for name, kind in kinds.items()}
    for part in parts.values():
        part.requires_grad_(False).to(args.device, torch.bfloat16 if bf16 else torch.float32)
    vae, text_encoder, unet = parts.values()
    scheduler = DDPMScheduler.from_pretrained(args.folder, subfolder="scheduler")
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS["diffusers"])
    unet.add_adapter(config)
    adapter = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in adapter:
        weight.data = weight.float()
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if args.compile:
        unet.compile()
    optimizer = torch.optim.AdamW(adapter, lr=1e-4)
    tokenizer = CLIPTokenizer.from_pretrained(args.folder, subfolder="tokenizer")
    rows = tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(args.device)
    pixels = image(args).to(vae.dtype)

    def step() -> Tensor:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=args.device)
        noisy, tokens = scheduler.add_noise(latents, noise, times), text_encoder(rows, return_dict=False)[0]
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            out = unet(noisy, times, tokens, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().cpu()

    return step, sum(weight.numel() for weight in adapter)


# ---- one process


def image(args: argparse.Namespace) -> Tensor:
    """What is trained on, (1, 3, H, W) in [-1, 1]."""
    import torch

    pixels = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    return 2 * pixels.to(args.device) - 1


def measured(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to load and of each picture or step, the peak in MiB, and what shows that both sides do the same."""
    import torch

    begun, n = time.perf_counter(), 0
    if args.what == "sampling":
        work = {"atelier": our_picture, "diffusers": their_picture}[side](args)
    else:
        work, n = {"atelier": our_step, "diffusers": their_step}[side](args)
    loading, taken = time.perf_counter() - begun, []
    after_loading = peak("cpu")
    for _ in range(1 + args.timed):
        start = time.perf_counter()
        made = work()  # on the CPU, so all is done
        taken.append(time.perf_counter() - start)
    torch.save(made, args.folder / f"{side}.pt")
    found = {"loading": loading, "seconds": taken[1:], "n": n, "threads": torch.get_num_threads()}
    found |= {"peak": peak(args.device), "loaded": after_loading}
    return found | {"gflop": gflop(work)} if args.count else found


def peak(device: str) -> float:
    """MiB of this process at its peak."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gflop(work: Work) -> float:
    """Operations of a picture or step, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


# ---- all processes


def run(role: str, folder: Path, args: argparse.Namespace, count: bool = False) -> dict[str, Any]:
    """What a process of its own prints in a role: that of a side, or `write`."""
    command = [sys.executable, __file__, *words_of(role, folder, args, count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def words_of(role: str, folder: Path, args: argparse.Namespace, count: bool) -> list[str]:
    """What this program is told in a role."""
    words = [args.what, "--role", role, "--folder", str(folder), "--precision", args.precision]
    words += ["--device", args.device, *(f"--{name}={getattr(args, name)}" for name in ("width", "size", "timed"))]
    words += [f"--{name}" for name in ("checkpointing", "compile") if getattr(args, name)] + ["--count"] * count
    if args.default and role == "diffusers":
        words = [word for word in words if word != "--compile"] + ["--precision", "32-true"]
    return words


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """A line for each round, and what they say together."""
    heads = ("seconds", "of diffusers", "ratio", "peak MiB", "of diffusers", "ratio")
    lines = ["round " + "".join(f"{head:>14}" for head in heads)]
    ratios, peaks = [], []
    for k, found in enumerate(rounds, 1):
        (a, b), (m, n) = ([found[side][key] for side in SIDES] for key in ("seconds", "peak"))
        a, b = statistics.median(a), statistics.median(b)
        ratios.append(b / a)
        peaks.append(m / n)
        cells = f"{a:.3f}", f"{b:.3f}", f"{b / a:.3f}", f"{m:.0f}", f"{n:.0f}", f"{m / n:.3f}"
        lines.append(f"{k:<6}" + "".join(f"{cell:>14}" for cell in cells))
    for name, values in (("as fast", ratios), ("of the peak memory", peaks)):
        middle = statistics.median(values)
        lines.append(f"{middle:.3f}x {name} ({min(values):.3f} .. {max(values):.3f}) over {len(values)} rounds")
    for side in SIDES:
        first = rounds[0][side]
        told = f"{side}: {first['gflop']:.1f} GFLOP, loaded in {first['loading']:.1f} s at {first['loaded']:.0f} MiB"
        lines.append(told + (f", {first['n']:,} weights of the adapter" if first["n"] else ""))
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sampling", "lora"])
    parser.add_argument("--width", type=int, default=320, help="channels of the U-Net's first level, 32 k")
    parser.add_argument("--size", type=int, default=256, help="pixels, 64 k")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--timed", type=int, default=3, help="pictures or steps that are timed in a process")
    parser.add_argument("--precision", choices=["32-true", "bf16"], default="32-true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, of both")
    parser.add_argument("--compile", action="store_true", help="torch.compile of both U-Nets")
    parser.add_argument("--default", action="store_true", help="diffusers in float32 and not compiled all the same")
    parser.add_argument("--role", choices=["write", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    if args.role == "write":
        write(args.folder, args.width, args.size)
        print("{}")
    elif args.role:
        print(json.dumps(measured(args.role, args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """All rounds, and their table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("write", folder, args)
        rounds = [{side: run(side, folder, args, k == 0) for side in SIDES} for k in range(args.rounds)]
        same = difference(folder) if args.what == "sampling" else ""
    first = [rounds[0][side] for side in SIDES]
    assert first[0]["n"] == first[1]["n"], "adapters of different sizes"
    how = [args.precision, *(name for name in ("compile", "checkpointing", "default") if getattr(args, name))]
    where = f"{os.cpu_count()} cores, {first[0]['threads']} threads, {args.device}"
    print(f"```\n{args.what}, width {args.width}, {args.size} px, {', '.join(how)}; {where}")
    print(f"{table(rounds)}{same}\n```")


def difference(folder: Path) -> str:
    """How far the last pictures of both lie apart."""
    import torch

    ours, theirs = (torch.load(folder / f"{side}.pt") for side in SIDES)
    return f"\nlargest difference of a pixel: {(ours - theirs).abs().max():.1e} of {theirs.max() - theirs.min():.2f}"


if __name__ == "__main__":
    main()
