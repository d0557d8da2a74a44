"""report.py on tiny runs: a file that needs no other, whose numbers are those of the runs, and its Markdown twin."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import report
from atelier.core.errors import UserError
from atelier.reporting import contents, facts, plots
from tests.test_documents import shows

FAMILIES = ("vae", "gan", "ddpm", "cyclegan", "vqprior", "clip")


@pytest.fixture(scope="module")
def runs(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [shutil.copytree(finished[family], folder / family) for family in FAMILIES]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return report.report([str(runs[0].parent), f"out={runs[0].parent / 'out'}"])


class Tags(HTMLParser):
    """All opened and closed tags, and where what is fetched comes from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "path", "rect", "use", "circle"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "use", "circle"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_one_file(page: Path) -> None:
    text = page.read_text()
    tags = Tags(text)
    assert not tags.open and all(source.startswith(("data:image/png", "#")) for source in tags.sources)
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert {source[1:] for source in tags.sources if source.startswith("#")} <= ids
    assert "<script" not in text and "url(http" not in text
    for word in ("CycleGAN", "net.encoder", "L = (E_q(z|x)", "makes no images", "16 at once"):
        assert word in text
    assert text.count('class="diagram"') == 2 * len(FAMILIES) - 1  # clip makes no images


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_no_wider_than_its_window(page: Path, width: int) -> None:
    """Tables and drawings that are wider scroll by themselves; nothing is fetched."""
    driver = pytest.importorskip("playwright.sync_api")
    words = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    fetched: list[str] = []
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=words.split())
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(page.absolute().as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert [url for url in fetched if not url.startswith("data:")] == [page.absolute().as_uri()]
        browser.close()


def test_numbers_side_by_side_are_those_of_the_runs(runs: list[Path], page: Path) -> None:
    """As printed: each is of the run's summary.json or of its facts."""
    found = facts.told(runs, lambda _: None)
    told = contents.side_by_side(found)
    assert told.heads[0] == "run" and len(told.rows) == len(runs)
    for one, row in zip(found, told.rows, strict=True):
        below = sum(json.loads((Path(f) / "summary.json").read_text())["tflop"] for f in one.facts.stands_on)
        asked = json.loads((one.folder / facts.FOLDER / facts.FACTS).read_text())
        asked |= {"millions": one.facts.parameters / 1e6, "below": below}
        numbers = [number for cell in row[1:] for number in re.findall(r"\d[\d,.]*\d|\d", cell)]
        known = [
            json.loads((one.folder / "summary.json").read_text()),
            asked,
            {"all": one.facts.sampling and [one.facts.sampling.evaluations, one.facts.sampling.gflop]},
        ]
        assert numbers and not [number for number in numbers if not shows(number, known)]
        assert f"<td>{row[0]}</td>" in page.read_text()


def test_the_markdown_twin_has_the_same_tables_and_its_pictures(runs: list[Path], page: Path) -> None:
    text = page.with_suffix(".md").read_text()
    found = facts.told(runs, lambda _: None)
    for row in contents.side_by_side(found).rows:
        assert "| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" in text
    shown = re.findall(r"\]\(([^)]+)\)", text)
    assert shown and {page.parent / name for name in shown} == set((page.parent / "report").iterdir())
    for one in found:
        assert one.idea in text and one.formula in text
    for sheet in (contents.protocols(found), *map(contents.what_it_has, contents.families(found).values())):
        for row in sheet.rows:
            assert "| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" in text
    assert all(
        note in text and note in page.read_text() for note in (contents.CONDITIONS, contents.WAYS, contents.STEP)
    )
    assert str(runs[0].parent) not in text  # paths of commands are told by their names


def test_conditional_is_a_family_on_what_an_image_of_it_takes(runs: list[Path]) -> None:
    told = {one.folder.name: contents.what_it_has([one]) for one in facts.told(runs, lambda _: None)}
    cells = {name: sheet.rows[0][sheet.heads.index("conditional on")] for name, sheet in told.items()}
    assert cells["cyclegan"] == "image_a" and cells["vae"] == "nothing" and cells["clip"] == ""
    assert "label" in cells["ddpm"]


def judged(one: facts.Told, images: int, **metrics: float) -> facts.Told:
    """The same run after another evaluation."""
    values = {name.replace("__", "/"): value for name, value in metrics.items()}
    summary = one.summary | {"metrics": values, "intervals": {}}
    return dataclasses.replace(one, summary=summary | {"protocol": {**one.summary["protocol"], "n_samples": images}})


def test_figures_of_the_way_back_count_too_and_few_scenes_are_not_told_apart(runs: list[Path]) -> None:
    (one,) = facts.told([runs[FAMILIES.index("cyclegan")]], lambda _: None)
    some = {"b2a__judge__valid": 0.1, "b2a__judge__combinations": 0.5, "b2a__fd_classifier": 3.0}
    few, enough = judged(one, 190, **some), judged(one, 200, **some)
    assert contents.distance([few]) == "fd_classifier" and few.metric("judge/valid") == 0.1
    assert "different" not in contents.side_by_side([few]).heads
    sheet = contents.side_by_side([few, enough])
    assert [row[sheet.heads.index("different")] for row in sheet.rows] == ["", "0.500"]
    lines = contents.explained([few, enough])
    said = "different scenes seen; 1 = as many as among true ones; empty below 20 valid scenes"
    assert f"different: {said}" in lines and not any(line.startswith("different") for line in contents.explained([few]))


def test_a_plot_against_work_wants_three_amounts_of_it(runs: list[Path]) -> None:
    (one,) = facts.told(runs[:1], lambda _: None)
    told = [judged(one, 200, judge__valid=0.5) for _ in range(4)]
    for run, tflop in zip(told, (1.0, 1.05, 2.0, 2.1), strict=True):
        run.name, run.summary["tflop"] = f"of {tflop}", tflop
    names = {plot.name for plot in contents.drawn("shapes", told)}
    told[3].summary["tflop"] = 4.0
    assert {plot.name for plot in contents.drawn("shapes", told)} - names == {"shapes_judge_valid_work"}


def test_words_that_are_no_run_are_refused_in_a_line(runs: list[Path], tmp_path: Path) -> None:
    for words in (["nowhere"], [str(runs[0]), "colour=red"]):
        with pytest.raises(UserError):
            report.report(words)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report.report([str(runs[0]), f"out={tmp_path / 'file'}"])


def test_points_that_a_logarithm_has_not_are_left_out_and_names_do_not_touch() -> None:
    points = {"diffusion": {"one": (1.0, 2.0), "two": (1.0, 2.0), "none": (0.0, 1.0)}, "others": {"far": (100.0, 5.0)}}
    drawn = plots.scatter(points, "x", "y", True, True)
    assert ">none<" not in drawn and {">one<", ">two<", ">far<"} <= set(re.findall(r">\w+<", drawn))
    found = re.findall(r' x="([\d.]+)" y="([\d.]+)" transform="[^"]*">(\w+)<', drawn)
    places = {name: (float(x), float(y)) for x, y, name in found}
    (x1, y1), (x2, y2) = places["one"], places["two"]
    assert (abs(y1 - y2) >= 8 or abs(x1 - x2) >= 15) and places["far"][1] < y1 - 8
    assert plots.INK not in plots.inline(drawn) and "currentColor" in plots.inline(drawn)


def test_names_stay_inside_the_axes_and_near_their_points() -> None:
    """Nine at the foot of a plot, a far one, and one at the top; those that had to move have a line."""
    crowd = {f"name{k}": (1.0 + 0.01 * k, 0.0) for k in range(9)} | {"right": (3.0, 1.0), "top": (2.0, 1.0)}
    drawn = plots.scatter({"others": crowd}, "x", "y", False, False)
    corners = re.search(r'id="patch_2">(.*?)z', drawn, re.DOTALL)[1]
    left, bottom, right, _, _, top = (float(number) for number in re.findall(r"[\d.]+", corners)[:6])
    names = re.findall(r' x="([\d.]+)" y="([\d.]+)" transform="[^"]*">(name\d|right|top)<', drawn)
    assert len(names) == len(crowd)
    for x, y, name in ((float(x), float(y), name) for x, y, name in names):
        assert left <= x and x + 4 * len(name) <= right and top < y <= bottom
        assert not name.startswith("name") or (bottom - y < 80 and x < left + (right - left) / 3)
    lines = drawn.count("stroke-width: 0.4")
    assert 0 < lines < len(crowd)


def test_a_figure_on_the_edge_has_its_name_on_the_other_side() -> None:
    drawn = plots.scatter(
        {"others": {"a": (0.0, 0.0), "a_name_as_long_as_this_one_is": (1.0, 1.0)}}, "x", "y", False, False
    )
    x = float(re.search(r' x="([\d.]+)"[^>]*>a_name_as', drawn)[1])
    point = max(float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)" y="[\d.]+" style="fill: #', drawn))
    assert x < point
