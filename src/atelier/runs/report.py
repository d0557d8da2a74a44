"""What the person at the keyboard reads before and after a run."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.table import Table as Shown
from safetensors import SafetensorError
from safetensors.torch import save_file

from atelier.callbacks.order import Callbacks
from atelier.callbacks.progress import Progress
from atelier.checkpoints import adapters, diffusers_folder
from atelier.checkpoints.store import warn
from atelier.core.errors import UserError
from atelier.core.lines import duration
from atelier.core.words import word
from atelier.data.base import DataModule
from atelier.evaluation.evaluator import intervals
from atelier.evaluation.meanings import meanings
from atelier.models.base import Generator, Model
from atelier.runs.adapted import FILE
from atelier.runs.folders import has_checkpoint, summary


def announce(progress: Progress, cfg: DictConfig, model: Model, data: DataModule) -> None:
    """One line: what is about to be trained on what, for how long."""
    progress.say(f"{described(model, data, cfg.choices.model)};")
    progress.say(f"{cfg.budget.images:,} images in batches of {data.batch_size}; in {cfg.run_dir}")
    if line := _long_memory(cfg.callbacks.ema.half_lives, cfg.callbacks.ema.ramp, cfg.budget.images):
        progress.say(line)


def described(model: Model, data: DataModule, page: str) -> str:
    """Which page's model it is, of how many parameters, on which images, conditioned on what."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    few = sum(p.numel() for p in model.trained().values()) / 1e6
    trained = f", of which {few:.3g} M in adapters are trained" if model.given else ""
    size = f"{data.image_channels} x {data.image_size} x {data.image_size}"
    conditioning = f"conditioned on {', '.join(sorted(model.needs))}" if model.needs else "unconditional"
    kind = f"{page}: {model.kind}, {millions:.2f} M parameters{trained}"
    return f"{kind}; {type(data).__name__} {size}, {conditioning}"


def _long_memory(half_lives: list[int], ramp: float, images: int) -> str | None:
    """One line where a half-life of an average is long beside the run."""
    long = [f"{half_life:,}" for half_life in half_lives if half_life > images / 5]
    if not long:
        return None
    line = f"callbacks.ema.half_lives: {', '.join(long)} images are more than a fifth of this run"
    if ramp * images >= images / 5:
        return f"{line}, whose average will still hold early weights"
    return f"{line}, so callbacks.ema.ramp cuts them to {ramp:.0%} of the images seen"


def finish(callbacks: Callbacks, trainer: Trainer, model: Model, folder: Path, objective: str | None) -> float | None:
    """Write the final weights, show what was reached and what to try next; gives the metric asked for.

    Raises:
        UserError: `objective` is no metric of this run.
    """
    values = callbacks.evaluation.values
    if trainer.is_global_zero:
        _export(callbacks, model, folder)
        _show(callbacks, folder, isinstance(model, Generator))
        if not has_checkpoint(folder) and not (folder / "weights.safetensors").exists():
            raise UserError("run_dir", folder, "nothing of the run could be saved", "run_dir=A_FOLDER_ON_ANOTHER_DISK")
    if objective is None:
        return None
    values = values or summary(folder)["metrics"]
    if objective not in values:
        raise UserError("objective", objective, "the run has no such metric", f"objective={next(iter(values), 'none')}")
    return values[objective]


def _export(callbacks: Callbacks, model: Model, folder: Path) -> None:
    """weights.safetensors: the averaged weights, for runs that stand on this one and for sharing.

    Of a net that diffusers has as well, its folder diffusers/ too; of adapters, lora.safetensors in diffusers' layout.
    A full disk costs these files and not the run, whose checkpoint holds the weights too.
    """
    if callbacks.clock.images_seen < callbacks.clock.images:
        return
    temporary = folder / "weights.safetensors.tmp"
    try:
        with callbacks.ema.averaged(model):
            state = {name: tensor.cpu().contiguous() for name, tensor in model.kept_state().items()}
            if model.given:
                adapters.write(model.net, model.embedder, folder / FILE, "diffusers")
            if diffusers_folder.fits(net := getattr(model, "net", None)):
                diffusers_folder.write(net, folder / "diffusers")
        save_file(state, temporary)
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # safetensors makes a file for its owner alone
        temporary.replace(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:  # its writer tells the disk's failures in its own words
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        again = f"free space, the same command with {_run_dir(folder)} writes it"
        warn(f"no weights.safetensors written ({error}); {again}")


def _show(callbacks: Callbacks, folder: Path, draws: bool) -> None:
    clock, progress = callbacks.clock, callbacks.progress
    result = summary(folder)
    if callbacks.evaluation.values:  # also where the disk had no room for them
        evaluation = callbacks.evaluation
        result |= {"metrics": evaluation.values, "protocol": evaluation.protocol, "intervals": evaluation.intervals}
    progress.show(_figures(result, f"after {clock.images_seen:,} images"))
    reasons = result.get("reasons", [])
    shown = [*result["metrics"], *(what for what, _, _ in reasons)]
    explained = meanings(shown, progress.console.width)
    for line in [*_reason_lines(reasons), *explained, *_protocol_lines(result["protocol"])]:
        progress.say(line)
    if clock.reason:
        progress.say(f"stopped early: {clock.reason}; the same command with {_run_dir(folder)} goes on")
    elif clock.resumed_at >= clock.images:
        progress.say(f"this run was finished; budget.images={2 * clock.images} {_run_dir(folder)} extends it")
    else:
        speed = f"{result.get('images_per_second', 0):,.0f} images a second overall"
        work = callbacks.work.words(clock.images_seen)
        share = callbacks.table.median("perf/mfu")
        used = "" if share is None else f"{share:.0%} of the device's peak while training (MFU)"
        since = f" from {clock.resumed_at:,} images on" if clock.resumed_at else ""
        took = ", ".join(filter(None, [f"took {duration(result.get('seconds', 0))}{since}", speed, work, used]))
        progress.say(f"{took}; pictures in {folder / 'samples'}" if draws else took)
    progress.say("next:")
    if draws:
        run = word("run", str(folder))
        progress.say(f"  python sample.py {run} n=64")
        progress.say(f"  python evaluate.py {run} eval.n_samples=1000")
    progress.say("  python train.py -m seed=0,1,2   (a sweep; python train.py --help lists models and data)")


def _run_dir(folder: Path) -> str:
    return word("run_dir", str(folder))


def _figures(result: dict, title: str) -> Shown:
    """A row for each figure, beside that of real images and, where they were judged too, of the raw weights."""
    metrics = result["metrics"]
    raw = any(name.startswith("raw/") for name in metrics)
    table = Shown("metric", "value", "95 % interval", "real images", *["raw weights"] * raw, title=title)
    ranges = result.get("intervals") or intervals(metrics, result["protocol"])
    for name, value in metrics.items():
        if not name.startswith(("real/", "raw/")):
            low, high = ranges.get(name, (math.nan, math.nan))
            others = [_number(metrics.get(f"{kind}/{name}", math.nan)) for kind in ("real", "raw")[: 1 + raw]]
            interval = "" if math.isnan(low) else f"{low:.3f} .. {high:.3f}"
            table.add_row(name, _number(value) or "no valid sample", interval, *others)
    return table


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _reason_lines(reasons: list[tuple[str, int, int]]) -> list[str]:
    """Why samples were refused, and which shapes, sizes and fills are valid how often."""
    lines = []
    for head in ("refused", "valid"):
        parts = [f"{what.split(': ')[1]} {k}/{n}" for what, k, n in reasons if what.startswith(head)]
        lines += [f"{head}: {', '.join(parts)}"] if parts else []
    return lines


def _protocol_lines(protocol: dict) -> list[str]:
    words = ", ".join(f"{name} {value}" for name, value in protocol.items())
    return [f"protocol: {words}"] if words else []
