"""A report as one HTML file, with everything in it."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from atelier.reporting import contents, diagram, plots
from atelier.reporting.contents import Around, Plot, Sheet, Strips
from atelier.reporting.facts import Told
from atelier.reporting.structure import Structure
from atelier.reporting.template import PAGE


def html(title: str, around: Around, found: list[Told], drawn: dict[str, list[Plot]]) -> str:
    """The page; `drawn` has the plots of each set."""
    sets, families = contents.sets(found), contents.families(found)
    links = [_link(f"{name}: side by side", name) for name in sets] + [_link(name, name) for name in families]
    first, last = ([f"<p>{_code(line)}</p>" for line in lines] for lines in around)
    body = [*first, f"<nav>{' '.join(links)}</nav>"]
    for name, runs in sets.items():
        body += [f'<h2 id="{escape(name)}">{escape(name)}: side by side</h2>', table(contents.side_by_side(runs))]
        body += [_meanings(runs), _plots(drawn[name]), '<div class="plots">']
        body += [*map(_section, contents.strips(name, runs)), "</div>"]
    body += ["<h2>Families</h2>", f"<p>{HOW} {contents.STEP}</p>"]
    for name, runs in families.items():
        body += [f'<h3 id="{escape(name)}">{escape(name)}</h3>', *_family(runs)]
    body += ["<h2>Where the figures come from</h2>", table(contents.protocols(found), "words"), *last]
    return PAGE.substitute(title=escape(title), body="\n".join(body))


HOW = (
    "Boxes are parts of the built model with their parameters and the forward work that they take for an image, "
    "arrows were seen while it took a step of training and while it made an image; dashed parts are held as they were."
)


def table(shown: Sheet, kind: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in shown.heads)
    rows = "\n".join("<tr>" + "".join(f"<td>{_code(cell)}</td>" for cell in row) + "</tr>" for row in shown.rows)
    return f'<div class="wide"><table class="{kind}"><tr>{heads}</tr>\n{rows}</table></div>'


def _meanings(runs: list[Told]) -> str:
    lines = "<br>".join(map(escape, contents.explained(runs)))
    return f'<details class="note"><summary>What the figures mean</summary>{lines}</details>'


def _code(line: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(line))


def _link(text: str, place: str) -> str:
    return f'<a href="#{escape(place)}">{escape(text)}</a>'


def _plots(drawn: list[Plot]) -> str:
    figures = [
        f'<figure class="{"all" if plot.name.endswith("curves") else ""}">{plots.inline(plot.svg)}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in drawn
    ]
    return f'<div class="plots">{"".join(figures)}</div>'


def _section(strips: Strips) -> str:
    rows = [(*row, "true") for row in strips.above] + [(*row, "") for row in strips.rows]
    cells = [f'<span class="{kind}">{escape(name)}</span><img alt="" src="{_data(path)}">' for name, path, kind in rows]
    head = f'<h3>{escape(strips.title)}</h3><p class="note">{escape(strips.note)}</p>'
    return f'<section>{head}<div class="wide strips">{"".join(cells)}</div></section>'


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _family(runs: list[Told]) -> list[str]:
    facts = runs[0].facts
    note = [f'<p class="note">{escape(losses)}</p>'] if (losses := contents.losses(runs)) else []
    told = [f"<p>{escape(runs[0].idea)}</p>", f'<div class="formula">{escape(runs[0].formula)}</div>', *note]
    told.append(table(contents.what_it_has(runs), "words"))
    for structure, what in ((facts.training, "a step of training"), (facts.sampling, "making an image")):
        if structure is not None:
            told.append(_drawing(structure, f"{runs[0].name} ({facts.data}, {facts.size}): {what}"))
    return told


def _drawing(structure: Structure, title: str) -> str:
    picture = diagram.svg(structure, title)
    return f'<figure><div class="wide">{picture}</div><figcaption>{escape(title)}</figcaption></figure>'
