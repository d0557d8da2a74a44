"""The same as Markdown, its pictures in files beside it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from atelier.images.pictures import labelled, save_png
from atelier.reporting import contents, diagram, plots
from atelier.reporting.contents import Around, Plot, Sheet
from atelier.reporting.facts import Told

MARGIN, CELL = 110, 32  # pixels of a picture of strips: for the name of a run, and at least for an image


def text(
    title: str, around: Around, found: list[Told], drawn: dict[str, list[Plot]], pictures: str, ledger: str
) -> str:
    """The Markdown.

    Args:
        title: heading.
        around: paragraphs that stand first, and those that stand last.
        found: runs.
        drawn: set -> plots.
        pictures: folder of its pictures, as seen from it.
        ledger: file of results/ that has a row for each run, which its tables name; "": none.
    """
    first, last = ([line for paragraph in paragraphs for line in (paragraph, "")] for paragraphs in around)
    lines = [f"# {title}", "", *first]
    for name, runs in contents.sets(found).items():
        lines += [f"## {name}: side by side", "", *_tie(ledger, name), *table(contents.side_by_side(runs)), ""]
        lines += [f"- {line}" for line in contents.explained(runs)] + [""]
        for plot in drawn[name]:
            lines += [f"![{plot.caption}]({pictures}/{plot.name}.svg)", ""]
        for strips in contents.strips(name, runs):
            lines += [f"{strips.title}. {strips.note}", "", f"![{strips.title}]({pictures}/{strips.name}.png)", ""]
    lines += ["## Families", "", contents.STEP, ""]
    for family, runs in contents.families(found).items():
        lines += [f"### {family}", "", *_family(runs, ledger)]
    lines += ["## Where the figures come from", ""]
    for name, runs in contents.sets(found).items():
        lines += [*_tie(ledger, name), *table(contents.protocols(runs)), ""]
    return "\n".join(lines + last).rstrip("\n") + "\n"


def write_pictures(folder: Path, found: list[Told], drawn: dict[str, list[Plot]]) -> None:
    """The files that the Markdown shows; those of an earlier report are replaced."""
    for name, runs in contents.sets(found).items():
        for plot in drawn[name]:
            (folder / f"{plot.name}.svg").write_text(plots.on_white(plot.svg))
        for strips in contents.strips(name, runs):
            save_png(_stacked(strips.above + strips.rows), folder / f"{strips.name}.png")


def table(shown: Sheet) -> list[str]:
    """Lines of a table, the first cell of each row as code."""
    rows = [[f"`{row[0]}`", *row[1:]] for row in shown.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (shown.heads, ["---"] * len(shown.heads), *rows)]


def _tie(ledger: str, data: str) -> list[str]:
    """The line above a table that names the rows of results/ which its numbers are of."""
    return [f"<!-- results/{ledger}.jsonl: data={data} -->"] if ledger else []


def _family(runs: list[Told], ledger: str) -> list[str]:
    facts = runs[0].facts
    lines = [runs[0].idea, "", "```", runs[0].formula, "```", ""]
    lines += [f"{losses}.", ""] if (losses := contents.losses(runs)) else []
    for name, some in contents.sets(runs).items():
        lines += [*_tie(ledger, name), *table(contents.what_it_has(some)), ""]
    for structure, what in ((facts.training, "A step of training"), (facts.sampling, "Making an image")):
        if structure is not None:
            lines.append(f"- {what}: `{diagram.sentence(structure)}`")
            lines += [f"  - `{part.name}`: {diagram.size(part)}" for part in structure.parts]
    return [*lines, ""]


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
