"""The same as Markdown, its pictures in files beside it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from atelier.images.pictures import labelled, save_png
from atelier.reporting import contents, diagram, plots
from atelier.reporting.contents import Plot, Sheet
from atelier.reporting.facts import REAL, SAMPLES, SOURCES, WALK, Told

MARGIN, CELL = 110, 32  # pixels of a picture of strips: for the name of a run, and at least for an image


def text(
    title: str, introduction: list[str], found: list[Told], drawn: dict[str, list[Plot]], pictures: str, ledger: str
) -> str:
    """The Markdown.

    Args:
        title: heading.
        introduction: paragraphs.
        found: runs.
        drawn: set -> plots.
        pictures: folder of its pictures, as seen from it.
        ledger: file of results/ that has a row for each run, which its tables name; "": none.
    """
    lines = [f"# {title}", "", *(line for paragraph in introduction for line in (paragraph, ""))]
    for name, runs in contents.sets(found).items():
        tie = [f"<!-- results/{ledger}.jsonl: data={name} -->"] if ledger else []
        lines += [f"## {name}: side by side", "", *tie, *table(contents.side_by_side(runs)), ""]
        lines += [f"- {line}" for line in contents.explained(runs)] + [""]
        for plot in drawn[name]:
            lines += [f"![{plot.caption}]({pictures}/{plot.name}.svg)", ""]
        for file, caption in _pictures(name, runs):
            lines += [f"{caption}", "", f"![{caption}]({pictures}/{file})", ""]
    lines += ["## Families", ""]
    for family, runs in contents.families(found).items():
        lines += [f"### {family}", "", *_family(runs, ledger)]
    return "\n".join(lines).rstrip("\n") + "\n"


def write_pictures(folder: Path, found: list[Told], drawn: dict[str, list[Plot]]) -> None:
    """The files that the Markdown shows; those of an earlier report are replaced."""
    for name, runs in contents.sets(found).items():
        for plot in drawn[name]:
            (folder / f"{plot.name}.svg").write_text(plots.on_white(plot.svg))
        for file, rows in _strips(name, runs).items():
            save_png(_stacked(rows), folder / file)


def table(shown: Sheet) -> list[str]:
    """Lines of a table, the first cell of each row as code."""
    rows = [[f"`{row[0]}`", *row[1:]] for row in shown.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (shown.heads, ["---"] * len(shown.heads), *rows)]


def _family(runs: list[Told], ledger: str) -> list[str]:
    facts = runs[0].facts
    losses = list(dict.fromkeys(one.facts.losses for one in runs if one.facts.losses))
    lines = [facts.idea, "", "```", facts.formula, "```", ""]
    lines += [f"l_G, l_D: {', '.join(losses)}.", ""] if losses else []
    for name, some in contents.sets(runs).items():
        tie = [f"<!-- results/{ledger}.jsonl: data={name} -->"] if ledger else []
        lines += [*tie, *table(contents.what_it_has(some)), ""]
    for structure, what in ((facts.training, "A step of training"), (facts.sampling, "Making an image")):
        if structure is not None:
            lines.append(f"- {what}: `{diagram.sentence(structure)}`")
            lines += [f"  - `{part.name}`: {diagram.size(part)}" for part in structure.parts]
    return [*lines, ""]


def _pictures(name: str, runs: list[Told]) -> list[tuple[str, str]]:
    """Files of pictures of the runs on a set, each with what it shows."""
    conditions = "The same conditions: column k has that of test image k"
    found = []
    for file in _strips(name, runs):
        task = file.removesuffix(".png").removeprefix(f"{name}_").partition("samples_")[2]
        of = "" if task == "image" else f" ({task})"
        found.append((file, f"{conditions}{of}." if task else "From one latent to the next."))
    return found


def _strips(name: str, runs: list[Told]) -> dict[str, list[tuple[str, Path]]]:
    """File -> name and picture of each of its rows."""
    files: dict[str, list[tuple[str, Path]]] = {}
    for one in runs:
        if path := one.picture(SAMPLES):
            rows = files.setdefault(f"{name}_samples_{one.facts.task}.png", [])
            first = next(((word, p) for word in (REAL, SOURCES) if (p := one.picture(word))), None)
            if not rows and first:
                rows.append(("test images" if first[0] == REAL else "sources", first[1]))
            rows.append((one.name, path))
    walks = [(one.name, path) for one in runs if (path := one.picture(WALK))]
    return files | ({f"{name}_walk.png": walks} if walks else {})


def _stacked(rows: list[tuple[str, Path]]) -> Tensor:
    """Strips below one another, each with its name at the left, (3, H, W) uint8."""
    strips = [(name, pil_to_tensor(Image.open(path).convert("RGB"))) for name, path in rows]
    width = max(strip.shape[2] for _, strip in strips)
    height = max(strip.shape[1] * (width // strip.shape[2]) for _, strip in strips)
    factor = max(1, CELL // height)
    large = [(name, _enlarged(strip, factor * (width // strip.shape[2]))[None]) for name, strip in strips]
    return labelled(large, margin=MARGIN)


def _enlarged(strip: Tensor, factor: int) -> Tensor:
    return strip.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
