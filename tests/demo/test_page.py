"""The page in a browser: one server, one Chromium, and what a user does there."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atelier.core.errors import UserError
from tests.demo.test_drawing import bomb
from tests.programs import ROOT, Program

pytest.importorskip("gradio", reason="Gradio is not installed")
api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
ALONE = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")]
ALONE += ["--disable-component-update", "--disable-sync"]
FIRST = 3.0  # seconds to the first picture


class Played:
    """The page as it is open, and the addresses that it has asked for."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page, self.asked = browser.new_page(viewport={"width": width, "height": 900}), []
        self.page.set_default_timeout(15_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.locator("#key-seed input").wait_for()

    def __getitem__(self, place: str) -> Any:
        return self.page.locator(place)

    def line(self) -> str:
        return self["#line p"].first.inner_text()

    def choose(self, place: str, option: str) -> None:
        self[f"{place} input"].click()
        self[place].get_by_role("option", name=option, exact=True).click()

    def put(self, place: str, number: float) -> None:
        self[f"{place} input[type=number]"].fill(str(number))
        self[f"{place} input[type=number]"].press("Enter")

    def until(self, *begins: str) -> str:
        """The line, once it begins so."""
        end = time.monotonic() + 15
        while not (line := self.line()).startswith(begins):
            assert time.monotonic() < end, line
            time.sleep(0.02)
        return line

    def draw(self, *begins: str) -> str:
        """The line that comes of it; what was there before is not it."""
        self.page.evaluate("document.querySelector('#line p').textContent = ''")
        self["#draw"].click()
        return self.until(*(begins or ("1 picture in", "2 pictures in", "8 pictures in")))

    def pictures(self, place: str = "#pictures") -> list[bytes]:
        """The files that are shown, as a browser gets them."""
        shown = self[f"{place} .grid-container img"]
        return [self.page.request.get(shown.nth(k).get_attribute("src")).body() for k in range(shown.count())]


@pytest.fixture(scope="module")
def server(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """`python demo.py run=outputs/ddpm port=...` beside two other runs, and what it has called."""
    folder = tmp_path_factory.mktemp("page")
    for family in ("vae", "pix2pix", "ddpm"):
        shutil.copytree(finished[family], folder / "outputs" / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "tests.demo.overheard", str(folder / "log"), str(ROOT / "demo.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "TMPDIR": str(folder / "tmp")}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # nobody is there
    environment |= {"NO_PROXY": "", "no_proxy": ""}
    (folder / "tmp").mkdir()
    program = Program([*words, "run=outputs/ddpm", f"port={port}"], folder, environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 100
        while url not in Path(program.outputs[0].name).read_text():
            assert program.process.is_alive() and time.monotonic() < end, Path(program.outputs[1].name).read_text()
            time.sleep(0.1)
        yield {"url": url, "folder": folder, "program": program}
    finally:
        program.process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(server: dict[str, Any], browser: Any) -> Played:
    return Played(browser, server["url"])


def test_the_first_picture_comes_soon_and_is_saved_with_its_request(page: Played) -> None:
    begun = time.monotonic()
    page["#draw"].click()
    page["#pictures .grid-container img"].first.wait_for()
    assert time.monotonic() - begun <= FIRST
    page.until("8 pictures in ")
    page["#pictures .grid-container img"].nth(3).click()
    with page.page.expect_download() as saved:
        page["#pictures [aria-label='Download']"].first.click()
    page["#pictures [aria-label='Close']"].click()
    asked = json.loads(Image.open(saved.value.path()).text["request"])
    assert saved.value.suggested_filename == "000003.png"
    assert (asked["run"], asked["first"], asked["n"], asked["do"]) == ("outputs/ddpm", 3, 1, "sample")


def test_another_guidance_is_another_picture(page: Played) -> None:
    before = page.pictures()
    page.put("#key-guidance", 6.5)
    page.draw()
    after = page.pictures()
    assert len(after) == 8 and not set(before) & set(after)
    page.put("#key-guidance", 2)  # the run's own
    page.draw()
    assert page.pictures() == before


def test_a_mistake_is_its_one_line(page: Played) -> None:
    page["#key-seed input"].fill("-4")
    assert page.draw("error") == "error: seed=-4: it must be greater than or equal to 0. Fix: seed=0"
    page["#key-seed input"].fill("0")
    page.choose("#key-label", "yellow circle")
    assert page.draw("error").startswith("error: label=yellow circle: none of 16 test images has it.")
    page.choose("#key-label", "as in the test images")


def test_stop_ends_it(page: Played) -> None:
    page.put("#key-n", 64)
    page.put("#key-sampler-steps", 200)
    page["#draw"].click()
    page["#line .progress-text, #line .progress-level"].first.wait_for()  # how far it is
    begun = time.monotonic()
    page["#stop"].click()
    page.until("stopped after ")
    assert time.monotonic() - begun < 2
    page.put("#key-n", 8)
    page.put("#key-sampler-steps", 4)
    page.draw()


def test_the_way_is_shown(page: Played) -> None:
    page.choose("#do", "paths")
    page["#key-strength"].wait_for(state="hidden")
    page.draw()
    page["#way img"].wait_for()
    for do in ("sample", "interpolate", "edit", "sample"):  # faster than the page can answer
        page.choose("#do", do)
    page["#key-strength"].wait_for(state="hidden")
    page["#key-n"].wait_for()


def test_a_hostile_upload_is_its_one_line(page: Played, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("/etc/passwd")
    (tmp_path / "bomb.png").write_bytes(bomb(20_000))
    page.choose("#do", "edit")
    for name, said in (("text", "not a PNG"), ("bomb", "Image size (400000000 pixels)")):
        page["[data-testid$='upload-button']"].set_input_files(tmp_path / f"{name}.png")
        line = page.until(f"error: source=upload: {said}")
        assert "\n" not in line and "Fix: another file" in line
    page.draw()  # of test images
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 16), "red").save(photo)
    page["[data-testid$='upload-button']"].set_input_files(photo)
    page.until("source: 20 x 16 pixels")
    assert page.draw("1 picture in ") and len(page.pictures()) == 2
    page["#clear"].click()
    page.until("source: test images")


def test_no_other_file_is_given_out_or_taken(page: Played, server: dict[str, Any]) -> None:
    request = page.page.request
    secret = server["folder"] / "outputs" / "ddpm" / "config.yaml"
    for path in ("/etc/passwd", secret, server["folder"] / "log", "demo.py", "../demo.py"):
        for front in ("/gradio_api/file=", "/file=", "/gradio_api/static/", "/"):
            assert request.get(f"{server['url']}{front}{path}").status in (403, 404, 405), (front, path)
    config = request.get(f"{server['url']}/config").json()
    (upload,) = [one for one in config["dependencies"] if one["targets"][0][1] == "upload"]
    for path in ("/etc/passwd", str(secret)):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        asked = {"fn_index": upload["id"], "data": data, "session_hash": "hostile"}
        request.post(f"{server['url']}/gradio_api/queue/join", data=asked)
        told = request.get(f"{server['url']}/gradio_api/queue/data?session_hash=hostile").text()
        assert '"success":false' in told and "root:" not in told and "_target_" not in told
        assert "error: source=FILE: it was not uploaded here. Fix: upload it" in told
    assert not any(one["api_visibility"] == "public" for one in config["dependencies"])


def test_two_runs_stand_beside_each_other(page: Played) -> None:
    page.choose("#do", "sample")
    page.choose("#other", "vae")
    page.put("#key-n", 2)
    assert page.draw("4 pictures in ") and len(page.pictures()) == len(page.pictures("#others")) == 2
    page.choose("#other", "none")


def test_another_run_has_other_controls(page: Played) -> None:
    """A latent is moved along by a slider, which draws at once."""
    page.choose("#run", "vae")
    page.until("VAE, 96 images seen")
    page["#key-guidance"].wait_for(state="hidden")
    page.choose("#do", "traverse")
    page.draw("1 picture in ")
    before = page.pictures()
    page["#key-column input[type=range]"].focus()
    page.page.keyboard.press("End")
    page["#pictures .caption-label"].get_by_text("7", exact=True).wait_for()
    assert page.pictures() != before


def test_it_fits_a_telephone(page: Played, server: dict[str, Any], browser: Any) -> None:
    narrow = Played(browser, server["url"], 390)
    narrow.draw()
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = narrow["#pictures .grid-container img"]
    boxes = [shown.nth(k).bounding_box() for k in range(shown.count())]
    assert len(boxes) == 8 and all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    narrow.put("#key-n", 64)
    narrow.put("#key-sampler-steps", 200)
    narrow["#draw"].click()
    narrow["#line .progress-text, #line .progress-level"].first.wait_for()
    page.page.evaluate("document.querySelector('#line p').textContent = ''")
    page["#draw"].click()  # one request at a time, whoever asks
    time.sleep(0.5)
    assert not page.line()
    page["#stop"].click()  # what waits, ends when its turn comes
    narrow["#stop"].click()
    narrow.until("stopped after ")
    assert page.until("stopped", "1 picture in ") == "stopped"
    page.draw("1 picture in ")
    narrow.page.close()


def test_an_upload_is_painted_on_and_filled(server: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """Its file is taken from the disk at once; what is painted alone is made anew."""
    page = Played(browser, server["url"], 390)  # the less there is to draw without a GPU, the sooner
    photo = tmp_path / "photo-of-mine.png"
    Image.new("RGB", (16, 16), "red").save(photo)
    page.choose("#do", "inpaint")
    page["[data-testid$='upload-button']"].set_input_files(photo)
    page.until("source: 16 x 16 pixels")
    assert not list((server["folder"] / "tmp").rglob("photo-of-mine*"))
    page.choose("#key-mask", "drawn")
    assert page.draw("error").startswith("error: mask=drawn: nothing is painted.")
    canvas = page["#editor canvas"].first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(x - 20, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 20, y, steps=5)
    page.page.mouse.up()
    page.draw()
    source, made = (np.asarray(Image.open(place(tmp_path, content))) for content in page.pictures())
    hidden = (source != (255, 0, 0)).any(axis=2)
    assert 4 <= hidden.sum() < 40 and hidden[3:5, 3:5].all()
    assert (made[~hidden] == (255, 0, 0)).all() and (made[hidden] != (255, 0, 0)).any()
    asked = json.loads(Image.open(place(tmp_path, page.pictures()[1])).text["request"])
    assert (asked["source"], asked["mask"]) == ("upload.png", "mask.png")
    page.page.close()


def place(folder: Path, content: bytes) -> Path:
    (folder / "shown.png").write_bytes(content)
    return folder / "shown.png"


def test_nobody_else_is_called(page: Played, server: dict[str, Any]) -> None:
    """Neither by the browser nor by the server, which keeps no history of what was asked."""
    assert {address.split("/")[2] for address in page.asked if address.startswith(("http", "ws"))} == {
        server["url"].split("/")[2]
    }
    called = {line.split()[1] for line in (server["folder"] / "log").read_text().splitlines()}
    assert called <= {"127.0.0.1", "localhost", "::1"}
    assert not page.page.request.get(f"{server['url']}/config").json()["run_history"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system does not list who listens")
def test_it_listens_on_this_machine_alone(server: dict[str, Any]) -> None:
    port, rows = int(server["url"].rpartition(":")[2]), []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        rows += [line.split()[1:4] for line in path.read_text().splitlines()[1:]] if path.exists() else []
    listening = [row[0] for row in rows if row[2] == "0A" and int(row[0].rpartition(":")[2], 16) == port]
    assert listening == [f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}:{port:04X}"]


@pytest.mark.parametrize(("header", "value", "answered"), [
    ("Host", "{here}", True),
    ("Host", "localhost:{port}", True),
    ("Host", "rebound.example:{port}", False),
    ("Host", "127.0.0.1.rebound.example", False),
    ("Host", "[", False),
    ("Origin", "http://{here}", True),
    ("Origin", "https://elsewhere.example", False),
    ("Origin", "http://localhost.elsewhere.example", False),
    ("Origin", "null", False),
])  # fmt: skip
def test_no_other_site_is_answered(server: dict[str, Any], header: str, value: str, answered: bool) -> None:
    """A name may be led to this machine (Host), and a script of any page may post to it (Origin)."""
    here = server["url"].removeprefix("http://")
    headers = {header: value.format(here=here, port=here.rpartition(":")[2])}
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/upload")):
        connection = http.client.HTTPConnection(here, timeout=10)
        connection.request(method, path, headers=headers)
        assert (connection.getresponse().status != 403) == answered, method
        connection.close()


def test_a_port_that_is_taken_is_one_line(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from atelier.demo import drawing, page

    monkeypatch.chdir(server["folder"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("NO_PROXY", "no_proxy", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    port = int(server["url"].rpartition(":")[2])
    with pytest.raises(UserError, match=f"port={port}: it is taken, or not yours to open. Fix: port={port + 1}"):
        page.serve(drawing.Runs("outputs/vae"), port)


@pytest.mark.parametrize(("port", "other"), [(7860, 7861), (65535, 65534), (80, 1024)])
def test_another_port_is_one(monkeypatch: pytest.MonkeyPatch, port: int, other: int) -> None:
    """One that exists, and that is a user's."""
    import gradio as gr

    from atelier.demo import page

    def refused(*_: Any, **__: Any) -> None:
        raise OSError

    for name in ("NO_PROXY", "no_proxy", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(gr.Blocks, "launch", refused)
    with pytest.raises(UserError, match=f"Fix: port={other}$"):
        page.serve(SimpleNamespace(names=["outputs/any"], first="outputs/any"), port)


def test_what_was_shown_an_hour_ago_is_gone(tmp_path: Path) -> None:
    """A request that takes longer keeps its files."""
    from atelier.demo.page import KEPT, sweep

    for name, age in (("shown/old", 3700), ("shown/new", 3500), ("request-1", 3700)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "picture.png").touch()
        os.utime(tmp_path / name / "picture.png", (time.time() - age,) * 2)
    sweep(tmp_path, KEPT)
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"new", "request-1"}


def test_memory_that_runs_out_is_one_line() -> None:
    """Where a run or a verb is chosen; a bug is none."""
    import gradio as gr

    from atelier.demo import page

    class Short(dict):
        names, first = ["outputs/large"], "outputs/large"
        error: Exception = MemoryError()

        def __missing__(self, name: str) -> None:
            raise self.error

    made = page.Page(Short())
    for said in (made._open("outputs/large", None), made._choose("outputs/large", "sample", None)):
        assert said[0].startswith("error: data.batch_size=: memory ran out.")
        assert all(update == gr.update() for update in said[1:])
    Short.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        made._choose("outputs/large", "sample", None)


def test_its_files_end_with_it(server: dict[str, Any]) -> None:
    """The last test: it ends the server."""
    assert list((server["folder"] / "tmp").glob("atelier-page-*"))
    os.kill(server["program"].process.pid, signal.SIGTERM)
    done = server["program"].done(20)
    assert done.returncode == 128 + signal.SIGTERM and not list((server["folder"] / "tmp").glob("atelier-page-*"))
    assert "Traceback" not in done.stderr
