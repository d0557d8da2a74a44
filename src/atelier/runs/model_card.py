"""What stands beside exported weights: what they are, of what data, by which command, how good, under which licence."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from atelier.checkpoints import forms, single_file
from atelier.evaluation.evaluator import intervals
from atelier.runs import build, ground, ledger, published
from atelier.runs.exporting import MODEL, Exported
from atelier.runs.folders import LoadedRun, summary

CARD = "README.md"
UNKNOWN = "unknown"  # as the hub calls a licence of which nothing is known
HUB = re.compile(r"[\w-]+/[\w.-]+")  # OWNER/NAME, which is no path
LICENCE = re.compile(r"\A---\n(?:(?!---\n).*\n)*?license:[ \t]*(\S+)[ \t]*\n")  # in the front matter of a card


def write(folder: Path, run: LoadedRun, made: Exported, origin: Path | None) -> None:
    """README.md, as the hub of Hugging Face shows it; no absolute path is in it.

    Args:
        folder: folder of what was exported.
        run: run that it is of.
        made: files and folders that were written.
        origin: place of what others published, where that is all of it.
    """
    bases = _bases(run, origin)
    sections = {
        "Data": _data(run, origin),
        "Command": _command(run, origin),
        "Numbers": _numbers(run, origin),
        "Base and licence": _licences(bases),
        "Use": _use(run, made, folder),
    }
    text = "\n\n".join(f"## {title}\n\n{prose}" for title, prose in sections.items())
    head = f"---\n{_front(run, made, bases)}---\n\n# {_name(run, origin)}\n\n{_what(run, made)}"
    (folder / CARD).write_text(f"{head}\n\n{text}\n", encoding="utf-8")


def licence(place: Path) -> str:
    """The licence that the model card of a folder, or of the one that a part or a file lies in, says; else unknown."""
    above = [place.parent] if place.is_file() or published.lies_in(place.parent) else []
    for card in (folder / CARD for folder in [place, *above]):
        if card.is_file() and (found := LICENCE.match(card.read_text(encoding="utf-8", errors="replace"))):
            return found[1].strip("'\"")
    return UNKNOWN


# ---- the parts of the card


def _front(run: LoadedRun, made: Exported, bases: dict[str, str | None]) -> str:
    known, task, pipeline = set(bases.values()), _task(run), made.pipeline or ""
    of_pipeline = ["stable-diffusion-xl" if "XL" in pipeline else "stable-diffusion"] * bool(pipeline)
    own = (known.pop() if len(known) == 1 else None) or UNKNOWN
    tags = "".join(f"- {tag}\n" for tag in [*of_pipeline, task, "diffusers", "atelier"])
    return f"license: {own}\nlibrary_name: diffusers\npipeline_tag: {task}\ntags:\n{tags}"


def _task(run: LoadedRun) -> str:
    """As the hub calls it."""
    needs = run.model.needs
    if needs & {"source", "image", "mask"}:
        return "image-to-image"
    return "text-to-image" if "text" in needs else "unconditional-image-generation"


def _name(run: LoadedRun, origin: Path | None) -> str:
    return ledger.named(run.folder) if origin is None else _called(str(origin))


def _what(run: LoadedRun, made: Exported) -> str:
    millions = sum(weight.numel() for weight in run.model.net.parameters()) / 1e6
    channels, height, width = run.model.net.shape
    known = ", ".join(sorted(run.model.needs)) or "nothing"
    apart = ", ".join(made.names) if made.use else "parts that open one by one"
    opened = apart if made.pipeline is None else f"`{made.pipeline}` of diffusers"
    target, levels = type(run.model.objective.target).__name__, type(run.model.objective.schedule).__name__
    size, inside = run.cfg.data.image_size, f"{channels} x {height} x {width} numbers"
    lines = [
        f"A diffusion model of images of {size} x {size} pixels, conditional on {known}: {opened}.",
        f"Its net has {millions:.2f} M weights, denoises {inside} and answers {target} on the levels of {levels}.",
        *(f"Note: {note}." for note in made.notes),
    ]
    return "\n".join(lines)


def _data(run: LoadedRun, origin: Path | None) -> str:
    if origin is not None:
        return "As whoever published it says; nothing was trained here."
    data = run.cfg.data
    root = f", in a folder called `{ledger.named(Path(data.root))}`" if data.get("root") else ""
    trained = f"{run.images_seen:,} images were shown in batches of {data.batch_size}"
    shape = f"{data.image_channels} x {data.image_size} x {data.image_size}"
    names = ground.names(run.folder) if "label" in run.model.needs else None
    labels = f" Labels: {names.lines()['label']}." if names and names.labels else ""
    return f"The set `data={run.cfg.choices.data}` of this project ({shape}{root}); {trained}.{labels}"


def _command(run: LoadedRun, origin: Path | None) -> str:
    if origin is not None:
        return "None: these are the weights as they were published."
    words = ledger.typed(run.folder, summary(run.folder).get("command", ""))
    told = shlex.join(["python", "train.py", *map(ledger.portable, words)])
    weights = f"the average of half-life {run.ema[0]:,} images" if run.ema else "those of the last step, not averaged"
    return f"```\n{told}\n```\n\nWeights: {weights}."


def _numbers(run: LoadedRun, origin: Path | None) -> str:
    found = summary(run.folder) if origin is None else {"metrics": {}, "protocol": {}}
    metrics = {name: value for name, value in found["metrics"].items() if not name.startswith(("real/", "raw/"))}
    if not metrics:
        return "None: it was never judged here."
    ranges = found.get("intervals") or intervals(found["metrics"], found["protocol"])
    rows = [f"| {name} | {_shown(value)} | {_range(ranges.get(name))} |" for name, value in metrics.items()]
    protocol = ", ".join(f"{name} {value}" for name, value in found["protocol"].items())
    table = "\n".join(["| metric | value | 95 % interval |", "| --- | --- | --- |", *rows])
    return f"{table}\n\nAfter {found.get('images_seen', 0):,} images. Protocol: {protocol}."


def _shown(value: float) -> str:
    return "no valid sample" if math.isnan(value) else f"{value:.4g}"


def _range(ends: Any) -> str:
    return "" if ends is None else f"{ends[0]:.3f} .. {ends[1]:.3f}"


# ---- what it stands on


def _bases(run: LoadedRun, origin: Path | None) -> dict[str, str | None]:
    """What others published and it stands on, by name, with its licence; None of what was trained here."""
    if origin is not None:
        return {_called(str(origin)): licence(origin)}
    found: dict[str, str | None] = {}
    for name in build.parts(run.cfg):
        place = Path(build.section(run.cfg, name).run)
        ours = forms.form(run.folder / "frozen" / name) == forms.OURS
        whole = place.parent if published.lies_in(place.parent) or place.parent.suffix == single_file.SUFFIX else place
        found[_called(str(place if ours else whole))] = None if ours else licence(whole)
    return found or {ledger.named(run.folder): None}


def _called(place: str) -> str:
    """A folder or a file by its name; what the hub has by OWNER/NAME."""
    return place if HUB.fullmatch(place) and not Path(place).exists() else Path(place).absolute().name


def _licences(bases: dict[str, str | None]) -> str:
    return "\n".join(f"- {_base(name, told)}" for name, told in bases.items())


def _base(name: str, told: str | None) -> str:
    if told is None:
        return f"`{name}` was trained here: its licence is for whoever trained it to say."
    if told == UNKNOWN:
        return f"`{name}`: licence unknown: ask whoever published {name}."
    return f"`{name}`: licence {told}, as its model card says."


# ---- how it is opened


def _use(run: LoadedRun, made: Exported, folder: Path) -> str:
    parts = made.pipeline is None and not made.use
    lines = _of_parts(made, folder) if parts else made.use or _of_pipeline(run, made)
    return "\n".join(["```python", *lines, "```"])


def _of_pipeline(run: LoadedRun, made: Exported) -> list[str]:
    how = run.model.diffusion_sampler
    opened = f'from_single_file("{MODEL}")' if made.names == [MODEL] else 'from_pretrained("FOLDER")'
    given = [*(["image=IMAGE"] if "Pix2Pix" in made.pipeline or "Inpaint" in made.pipeline else [])]
    given += ["mask_image=MASK"] if "Inpaint" in made.pipeline else []
    given += [f"num_inference_steps={how.sampler.steps}", f"guidance_scale={how.guider.guidance:g}"]
    given += [f"image_guidance_scale={how.guider.image_guidance:g}"] if hasattr(how.guider, "image_guidance") else []
    return [
        f"from diffusers import {made.pipeline}",
        f"pipeline = {made.pipeline}.{opened}",
        f'pipeline("TEXT", {", ".join(given)}).images[0].save("image.png")',
    ]


def _of_parts(made: Exported, folder: Path) -> list[str]:
    """The class of each part, and the call that opens it."""
    classes = {name: _class(folder / name) for name in made.names}
    imports = [f"from {library} import {kind}" for library, kind in dict.fromkeys(classes.values())]
    return imports + [f'{name} = {kind}.from_pretrained("FOLDER/{name}")' for name, (_, kind) in classes.items()]


def _class(part: Path) -> tuple[str, str]:
    """The library that opens a part, and its class there."""
    path = next(path for path in sorted(part.glob("*config.json")) if "token" not in path.name)
    told = json.loads(path.read_text(encoding="utf-8"))
    return ("diffusers", told["_class_name"]) if "_class_name" in told else ("transformers", told["architectures"][0])
