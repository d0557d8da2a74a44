"""report.py on tiny runs: a file that needs no other, whose numbers are those of the runs, and its Markdown twin."""

from __future__ import annotations

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
        assert one.facts.idea in text and one.facts.formula in text


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
    heights = {name: float(y) for y, name in re.findall(r' y="([\d.]+)" transform="[^"]*">(\w+)<', drawn)}
    assert abs(heights["one"] - heights["two"]) >= 8 and heights["far"] < heights["one"]
    assert plots.INK not in plots.inline(drawn) and "currentColor" in plots.inline(drawn)
