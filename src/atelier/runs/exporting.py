"""A run, or what others have published, as files that others read: where from, of which parts, into which folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from atelier.checkpoints import adapters, diffusers_conditional, diffusers_pipeline, onnx_files
from atelier.checkpoints import single_file as one_file
from atelier.checkpoints.diffusers_pipeline import PipelineParts
from atelier.checkpoints.lora_files import Layout
from atelier.core.errors import UserError
from atelier.models.base import Model
from atelier.runs import adapted, folders, published
from atelier.runs.folders import LoadedRun

MODEL = f"model{one_file.SUFFIX}"


@dataclass
class Exported:
    """What was written.

    Args:
        names: files or folders that hold the model.
        pipeline: class of diffusers that opens it whole; None: its parts are opened one by one.
        notes: lines to be told.
        use: lines of Python that open what neither a pipeline nor its parts are.
    """

    names: list[str]
    pipeline: str | None
    notes: list[str] = field(default_factory=list)
    use: list[str] = field(default_factory=list)


def located(run: str, vocabulary: str | None) -> Path:
    """The folder of a run or of a pipeline; a single file becomes one beneath ATELIER_CACHE.

    Args:
        run: folder, single file, or `last`.
        vocabulary: path of CLIP's vocabulary, for a single file.

    Raises:
        UserError: there is none, or no tokenizer for a single file.
    """
    file = Path(run).expanduser()
    if file.suffix == one_file.SUFFIX and file.is_file():
        return published.unpacked(file, vocabulary, place="")
    if vocabulary is not None:
        raise UserError("vocabulary", vocabulary, "it is for a single .safetensors as run", "leave vocabulary out")
    return folders.find(run)


def origin(run: str, found: LoadedRun) -> Path | None:
    """What others published and the model is, as it was typed; None: it was trained here."""
    return Path(run) if published.lies_in(found.folder) else None


def parts(run: LoadedRun) -> PipelineParts:
    """What the model of a run is made of; adapters become a part of its weights.

    Raises:
        UserError: it is no diffusion model.
    """
    model = _merged(run)
    objective, codec = model.objective, getattr(model, "codec", None)
    latents = {}
    if codec is not None:
        latents = {"first_stage": codec.autoencoder.net, "scale": _number(float(codec.scale)), "shift": codec.shift}
    return PipelineParts(
        net=model.net,
        embedder=model.embedder,
        schedule=objective.schedule,
        target=objective.target,
        sampler=model.diffusion_sampler.sampler,
        planes=getattr(model, "planes", None),
        linear=_linear(run),
        source=run.folder if published.lies_in(run.folder) else None,
        **latents,
    )


def _merged(run: LoadedRun) -> Model:
    """The diffusion model of a run, whose adapters are a part of its weights from here on."""
    model = _diffusion_model(run)
    adapters.merge(model.net, model.embedder)
    return model


def _diffusion_model(run: LoadedRun) -> Model:
    """Raises UserError where the run is of another kind."""
    if not run.model.takes_adapters:
        problem = f"{type(run.model).__name__} is no diffusion model"
        raise UserError("run", run.folder, problem, "run=DIR of one; of a first stage, diffusers/ in its folder is one")
    return run.model


def _number(value: float) -> float:
    """A float32 without the digits that it does not have."""
    return float(f"{value:.7g}")


def _linear(run: LoadedRun) -> bool | None:
    """Whether the net that was published has linear layers around its attention; None: it was made here."""
    place = run.folder / ("unet" if published.lies_in(run.folder) else "frozen/net")
    if not (place / "config.json").exists() or not diffusers_conditional.holds(place):
        return None
    return published.config(place).get("use_linear_projection", False)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which becomes it when all is written; of a failure nothing is left.

    Raises:
        UserError: `out` holds something, or it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("out", out, "there is something already", "out=ANOTHER_FOLDER")
    part = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    made = [folder for folder in part.parents if not folder.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except (OSError, SafetensorError) as error:  # its writer tells the disk's failures in its own words
        why = getattr(error, "strerror", None) or error
        raise UserError("out", out, f"it cannot be written ({why})", "out=A_FOLDER_OF_YOURS") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # it became what was asked for
            for folder in made:
                folder.rmdir()


# ---- layouts


def diffusers(of: PipelineParts, folder: Path) -> Exported:
    """A folder that a pipeline of diffusers opens, or where there is none a folder for each part.

    Raises:
        UserError: diffusers has none of its parts.
    """
    reason = diffusers_pipeline.missing(of)
    if reason is None:
        notes = diffusers_pipeline.write(of, folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        return Exported(names, diffusers_pipeline.pipeline(of), notes)
    written, refused = diffusers_pipeline.write_parts(of, folder)
    others = [line for line in refused if line != reason]
    if not set(written) - {"scheduler"}:
        raise UserError("layout", "diffusers", "; ".join([reason, *others]), "a run on parts that diffusers has")
    lacking = "".join(f"; nor {line}" for line in others)
    opened = ", ".join(f"{name}/" for name in written) + (" open one by one" if len(written) > 1 else " opens alone")
    return Exported(written, None, [f"no pipeline of diffusers opens it whole ({reason}{lacking}): {opened}"])


def single_file(of: PipelineParts, folder: Path) -> Exported:
    """One .safetensors of the original layout.

    Raises:
        UserError: a part of it is of another kind than in Stable Diffusion 1, 2 and XL.
    """
    if reason := diffusers_pipeline.missing(of):
        fix = "layout=diffusers writes the parts that diffusers has"
        raise UserError("layout", "single_file", reason, fix)
    try:
        notes = diffusers_pipeline.write_file(of, folder / MODEL)
    except UserError as error:
        raise UserError("layout", "single_file", error.problem, "layout=diffusers") from error
    return Exported([MODEL], diffusers_pipeline.pipeline(of), notes)


def onnx(run: LoadedRun, folder: Path) -> Exported:
    """Graphs of a denoising step, the noise levels and the decoder; adapters become a part of the weights.

    Raises:
        UserError: it is no diffusion model, or what writes them is not installed.
    """
    model = _merged(run)
    files = onnx_files.write(model.diffusion_sampler, getattr(model, "codec", None), folder)
    notes = ["the step is without guidance; what encodes texts and images and makes planes is not among the files"]
    use = ["import onnxruntime", f'step = onnxruntime.InferenceSession("FOLDER/{onnx_files.DENOISER}")']
    use += ["step.get_modelmeta().custom_metadata_map  # what inputs and outputs mean"]
    return Exported([file.name for file in files], None, notes, use)


def lora(run: LoadedRun, folder: Path, layout: Layout) -> Exported:
    """The adapters that a run has trained, alone.

    Raises:
        UserError: it has trained none, or the layout has no names for its net.
    """
    model = _diffusion_model(run)
    if not model.given:
        problem = "it has trained no adapters"
        raise UserError("layout", layout, problem, "run=RUN of lora=..., or layout=diffusers")
    adapters.write(model.net, model.embedder, folder / adapted.FILE, layout)
    use = [f'pipeline.load_lora_weights("FOLDER", weight_name="{adapted.FILE}")  # a pipeline of the base']
    return Exported([adapted.FILE], None, [f"adapters alone, under {layout}'s names"], use)
