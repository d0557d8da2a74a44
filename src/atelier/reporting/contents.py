"""What a report says, as tables of words and as plots: the page and its Markdown twin show the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from atelier.evaluation.meanings import WIDTH, meanings
from atelier.reporting import plots
from atelier.reporting.facts import FOLDER, KINDS, REAL, SAMPLES, SOURCES, WALK, Told, figure
from atelier.reporting.structure import NOISE
from atelier.runs import ledger

STEP = "A step of training is drawn without perceptual nets, which only measure how far images are apart."
CONDITIONS = "Column k has the condition of test image k, for all that follow one."
WAYS = "Autoencoders go from one test image to the next, all others from one draw of their noise."
VALID, ASKED, PSNR = "judge/valid", ("judge/asked", "answer/all"), ("pair/psnr", "recon/psnr")
ENOUGH_VALID = 20  # valid scenes that can be told apart
ENCODERS = {"reconstruct": "yes", "invert": "by inversion", "project": "by search"}  # a verb -> how an image is encoded


class Around(NamedTuple):
    """Paragraphs that stand first in a report, and those that stand last."""

    first: list[str]
    last: list[str]


class Sheet(NamedTuple):
    """Words in rows; the first cell of each is the name of a run or of a part."""

    heads: list[str]
    rows: list[list[str]]


class Plot(NamedTuple):
    """A plot with what it shows, and a name for its file."""

    name: str
    caption: str
    svg: str


class Strips(NamedTuple):
    """Pictures below one another, each with a name: of the true images or the sources first, then of runs."""

    name: str
    title: str
    note: str
    above: list[tuple[str, Path]]
    rows: list[tuple[str, Path]]


class Column(NamedTuple):
    """A column of the table that has runs side by side; one that no run has anything in is left out."""

    head: str
    cell: Callable[[Told], str]


def sets(found: Iterable[Told]) -> dict[str, list[Told]]:
    """Runs by the set that they were trained on."""
    return _grouped(found, lambda one: one.facts.data)


def families(found: Iterable[Told]) -> dict[str, list[Told]]:
    """Runs by family."""
    return _grouped(found, lambda one: one.facts.family)


def _grouped(found: Iterable[Told], by: Callable[[Told], str]) -> dict[str, list[Told]]:
    grouped: dict[str, list[Told]] = {}
    for one in found:
        grouped.setdefault(by(one), []).append(one)
    return grouped


def distance(runs: list[Told]) -> str | None:
    """The distance to real images that most of these runs have been judged by."""
    names = Counter(figure(key) for one in runs for key in one.summary["metrics"])
    return next((name for name, _ in names.most_common() if name.startswith(("fid", "fd_"))), None)


def _recall(distance: str) -> str:
    """The figure of the net that a distance is by."""
    return f"recall{distance[2:]}" if distance.startswith("fd_") else "recall"


def side_by_side(runs: list[Told]) -> Sheet:
    """Quality, work and time of the runs on one set."""
    fd = distance(runs) or "fd"
    recall = _recall(fd)
    columns = [
        Column("valid (95 %)", _valid),
        Column("as asked", lambda one: percent(one.metric(*ASKED))),
        Column("different", _different),
        Column("recall", lambda one: number(one.metric(recall))),
        Column("class seen", lambda one: percent(one.metric("label/accuracy"))),
        Column(fd, lambda one: number(one.metric(fd))),
        Column("PSNR, dB", lambda one: number(one.metric(*PSNR))),
        Column("bits/dim", lambda one: number(one.metric("bpd"))),
        Column("TFLOP", lambda one: number(one.tflop)),
        Column("TFLOP below", lambda one: number(one.tflop_below or None)),
        Column("training, s", lambda one: number(one.summary.get("seconds"))),
        Column("images seen", lambda one: f"{one.facts.images_seen:,}"),
        Column("evaluations", lambda one: "" if one.facts.sampling is None else str(evaluations(one))),
        Column("GFLOP an image", lambda one: "" if one.facts.sampling is None else number(one.facts.sampling.gflop)),
        Column("ms an image", lambda one: number(one.facts.ms)),
        Column("parameters", lambda one: f"{one.facts.parameters / 1e6:.2f} M"),
    ]
    rows = [[one.name, *(column.cell(one) for column in columns)] for one in runs]
    shown = [k for k in range(len(columns) + 1) if any(row[k] for row in rows)]
    heads = ["run", *(column.head for column in columns)]
    return Sheet([heads[k] for k in shown], [[row[k] for k in shown] for row in rows])


def evaluations(one: Told) -> int:
    return one.facts.sampling.evaluations if one.facts.sampling else 0


def _valid(one: Told) -> str:
    """Share of valid scenes, and its interval."""
    ends = next((ends for name, ends in one.summary.get("intervals", {}).items() if figure(name) == VALID), None)
    between = "" if ends is None else " ({:.1f} .. {:.1f})".format(*(100 * end for end in ends))
    return percent(one.metric(VALID)) + between


def _different(one: Told) -> str:
    """Of so few valid scenes that each would be another one in any case: nothing."""
    valid = (one.metric(VALID) or 0.0) * one.summary["protocol"].get("n_samples", 0)
    return number(one.metric("judge/combinations")) if round(valid) >= ENOUGH_VALID else ""


def explained(runs: list[Told]) -> list[str]:
    """A sentence for each figure of `side_by_side`."""
    fd = distance(runs) or "fid"
    recall = _recall(fd)
    figures = {"valid": (VALID,), "as asked": ASKED, "different": ("judge/combinations",), "recall": (recall,)}
    figures |= {"class seen": ("label/accuracy",), fd: (fd,), "PSNR": PSNR, "bits/dim": ("bpd",)}
    shown, lines = side_by_side(runs).heads, []
    for head, names in figures.items():
        known = [name for name in names if any(one.metric(name) is not None for one in runs)]
        told = [line[2 + WIDTH :] for line in meanings(known, 1000)]
        few = f"; empty below {ENOUGH_VALID} valid scenes" if head == "different" else ""
        lines += [f"{head}: {'; or '.join(told)}{few}"] if any(name.startswith(head) for name in shown) else []
    return [
        *lines,
        "TFLOP: of training; TFLOP below: of the runs that it stands on; evaluations: how often an image needs the net"
        " that is called most (with guidance each is two passes)",
    ]


def what_it_has(runs: list[Told]) -> Sheet:
    """What can be asked of the runs of a family."""
    heads = ["run", "set", "conditional on", "likelihood", "encoder", "walks between latents", "evaluations an image"]
    return Sheet(heads, [[one.name, one.facts.data, *_abilities(one)] for one in runs])


def _abilities(one: Told) -> list[str]:
    facts = one.facts
    encoder = next((how for verb, how in ENCODERS.items() if verb in facts.verbs), "no")
    made_of = [name for name in facts.sampling.sources if name != NOISE] if facts.sampling else [""]
    return [
        ", ".join(made_of) or ("nothing" if facts.sampling else ""),
        "yes" if facts.likelihood else "no",
        encoder,
        "yes" if "interpolate" in facts.verbs else "no",
        str(evaluations(one)) if facts.sampling else "makes no images",
    ]


def protocols(runs: list[Told]) -> Sheet:
    """How the figures of each run came about."""
    heads = ["run", "set", "command", "samples", "seed", "judging", "device", "commit", "ms an image"]
    return Sheet(heads, [[one.name, one.facts.data, *_protocol(one)] for one in runs])


def _protocol(one: Told) -> list[str]:
    summary = one.summary
    told = summary["protocol"]
    judged = f"{told.get('n_real', '')} real images, {told['net']}" if "net" in told else ""
    commit = summary.get("commit") or ""
    words = [ledger.portable(word) for word in ledger.typed(one.folder, summary.get("command", ""))]
    return [
        f"`{' '.join(['train.py', *words])}`",
        str(told.get("n_samples", "")),
        str(told.get("seed", "")),
        judged,
        summary.get("device", ""),
        f"`{commit[:7]}{'-dirty' if commit.endswith('-dirty') else ''}`" if commit else "",
        one.facts.timed,
    ]


def losses(runs: list[Told]) -> str:
    """The adversarial losses of a family's runs, which its formula calls l_G and l_D; "" where it has none."""
    named = list(dict.fromkeys(one.facts.losses for one in runs if one.facts.losses))
    return f"l_G, l_D: {', '.join(named)}" if named else ""


def strips(name: str, runs: list[Told]) -> list[Strips]:
    """Samples of the runs on a set under the same conditions, a task at a time, and their ways between latents."""
    made = [one for one in runs if one.picture(SAMPLES)]
    found = []
    for task in dict.fromkeys(one.facts.task for one in made):
        some = [one for one in made if one.facts.task == task]
        first = next((path for one in some for file in (REAL, SOURCES) if (path := one.picture(file))), None)
        above = [("test images" if first.name == REAL else "sources", first)] if first else []
        title = f"The same conditions{'' if task == 'image' else f': {task}'}"
        rows = [(one.name, one.folder / FOLDER / SAMPLES) for one in some]
        found.append(Strips(f"{name}_samples_{task}", title, CONDITIONS, above, rows))
    walks = [(one.name, path) for one in runs if (path := one.picture(WALK))]
    return found + ([Strips(f"{name}_walk", "From one latent to the next", WAYS, [], walks)] if walks else [])


def drawn(name: str, runs: list[Told]) -> list[Plot]:
    """Quality against time, against work and on its way, by each figure that two runs on a set have."""
    fd = distance(runs)
    found = []
    for metric, label, log in [(VALID, "share of valid scenes", False)] + ([(fd, fd, True)] if fd else []):
        if sum((one.metric(metric) or 0) > 0 for one in runs) < 2:
            continue
        file = f"{name}_{metric.replace('/', '_')}"
        note = "lower is better" if log else "runs without any are left out"
        against = {
            "sampling": (lambda one: one.facts.ms, "milliseconds an image", "sampling time"),
            "work": (_whole_work, "training, TFLOP", "training work, with that of what it stands on"),
        }
        for what, (x, x_label, words) in against.items():
            points = _points(runs, x, metric)
            if what == "work" and _amounts(points) < 3:  # two columns of names say less than the table
                continue
            svg = plots.scatter(points, x_label, label, _wide(points), log)
            found.append(Plot(f"{file}_{what}", f"{label} against {words}; {note}", svg))
        curves = _curves(runs, metric)
        if curves:
            svg = plots.panels(curves, "images, in shares of the run's TFLOP", label, log)
            found.append(Plot(f"{file}_curves", f"{label} while training goes on; {note}", svg))
    return found


def _whole_work(one: Told) -> float | None:
    return None if one.tflop is None else one.tflop + one.tflop_below


def _amounts(points: dict[str, plots.Points]) -> int:
    """How many times or amounts of work there are; those within 10 % are one."""
    kept: list[float] = []
    for x in sorted(x for named in points.values() for x, _ in named.values()):
        kept += [x] if not kept or x > 1.1 * kept[-1] else []
    return len(kept)


def _wide(points: dict[str, plots.Points]) -> bool:
    """Whether their times or work are as different as a logarithm is for."""
    xs = [x for named in points.values() for x, _ in named.values() if x > 0]
    return bool(xs) and max(xs) > 20 * min(xs)


def _points(runs: list[Told], x: Callable[[Told], float | None], metric: str) -> dict[str, plots.Points]:
    points: dict[str, plots.Points] = {kind: {} for kind in (*KINDS, "others")}
    for one in runs:
        place = x(one), one.metric(metric)
        if None not in place and place[1] > 0:
            points[one.facts.kind][one.name] = place
    return {kind: named for kind, named in points.items() if named}


def _curves(runs: list[Told], metric: str) -> dict[str, dict[str, plots.Curve]]:
    """A figure of each evaluation over the images until then, each at the run's mean work of an image.

    That is the work until then where all images take the same; of nets that grow the first take less.
    """
    curves: dict[str, dict[str, plots.Curve]] = {kind: {} for kind in (*KINDS, "others")}
    for one in runs:
        each = one.summary.get("gflop_per_image")
        key = next((k for row in one.rows for k in row if k.startswith("val/") and figure(k) == metric), None)
        rows = [row for row in one.rows if key in row]
        curve = [(row["images_seen"] * each / 1e3, row[key]) for row in rows if each and math.isfinite(row[key])]
        if len(curve) > 1 and any(y > 0 for _, y in curve):
            curves[one.facts.kind][one.name] = curve
    return {kind: named for kind, named in curves.items() if named}


def number(value: float | None) -> str:
    """Three digits, or one to three decimals; nothing of what is not known."""
    if value is None or math.isnan(value):
        return ""
    if value == 0:
        return "0.0"
    decimals = min(3, max(1, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
