"""The page to play with: Gradio's components for the controls of a run, and what its buttons do."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it tells nobody
os.environ["GRADIO_RUN_HISTORY"] = "False"  # nor does it keep in the browser what was asked
import gradio as gr
import numpy as np
from gradio.exceptions import InvalidPathError
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from atelier.core.errors import UserError
from atelier.demo.controls import Control, controls
from atelier.demo.drawing import LARGEST, Asking, Runs, line_of, uploaded
from atelier.requests.checks import verb, verbs

KEYS: dict[str, tuple[type, str]] = {  # every key that some run has, in the order of the page: with what, what it means
    "label": (gr.Dropdown, "class of every picture"),
    "attributes": (gr.Dropdown, "+ is to be there, - is not; all else is as in the test images"),
    "prompt": (gr.Textbox, "text of every picture"),
    "negative": (gr.Textbox, "text that guidance leads away from"),
    "instruction": (gr.Textbox, "what is to be changed"),
    "direction": (gr.Dropdown, "from which domain to which"),
    "guidance": (gr.Slider, "1 = off, of guider=classifier 0"),
    "image_guidance": (gr.Slider, "towards the source image"),
    "temperature": (gr.Slider, "1 = the model's own distribution"),
    "truncation": (gr.Slider, "1 = off, 0 = the mean style"),
    "sampler": (gr.Dropdown, "rule of the steps from noise"),
    "sampler.steps": (gr.Slider, "more are slower and finer"),
    "source": (gr.UploadButton, ""),
    "strength": (gr.Slider, "time that the image is noised to; 1 = from noise"),
    "mask": (gr.Dropdown, "what is to be filled; drawn: as painted below"),
    "resamplings": (gr.Slider, "how often each step is taken, so that the rest comes to fit"),
    "row": (gr.Slider, "which latent, or which coordinate of it"),
    "column": (gr.Slider, "place on the way"),
    "n": (gr.Slider, "pictures"),
    "seed": (gr.Number, "picture k comes from (seed, k)"),
}
MORE: dict[str, dict[str, Any]] = {
    "attributes": {"multiselect": True},
    "seed": {"precision": 0},
    "source": {"label": "source: upload an image of yours", "type": "filepath"},
}
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # fetches no fonts
CSS = """
.pictures img, #way img {image-rendering: pixelated}
.pictures .grid-wrap {max-height: none}
.pictures .caption-label {white-space: normal}
@media (max-width: 640px) {.pictures .grid-container {grid-template-columns: 1fr 1fr !important}}
#run input, #other input {text-overflow: ellipsis}
#way img {margin-top: 2rem}
#line p {font-family: ui-monospace, monospace; overflow-wrap: anywhere}
#line {min-height: 4rem}
"""
ONE = {"concurrency_id": "one", "concurrency_limit": 1, "api_visibility": "private"}  # request at a time, whoever asks
COLUMNS = 4  # pictures beside one another, of both runs together
SWEEP, KEPT = 600, 3600  # seconds between looks at files that were shown, and as long as they stay
SHOWN = "shown"  # folder of them, within the page's own, where those of a request at work lie beside it
CANVAS = 480  # pixels of the longer side of what is painted on
ALONE = ""  # no second run
HERE = ("127.0.0.1", "localhost")  # hosts that this machine is asked by


def component(key: str) -> gr.components.Component:
    """What a key is set with, hidden until a run has it."""
    kind, means = KEYS[key]
    told = {"label": key, "visible": False, "elem_id": f"key-{key.replace('.', '-')}"}
    return kind(**told | ({"info": means} if means else {}) | MORE.get(key, {}))


def fitted(control: Control | None, do: str, anew: bool) -> dict[str, Any]:
    """How a component becomes that of a control, or is hidden.

    Args:
        control: control of the run; None: it has none for this key.
        do: verb that is chosen.
        anew: whether the run was just chosen, so that values begin anew.
    """
    if control is None or not anew:
        return gr.update(visible=control is not None and do in control.verbs)
    told: dict[str, Any] = {"visible": do in control.verbs, "value": control.value}
    told |= {"choices": list(control.choices)} if control.choices else {}
    told |= {"minimum": control.low, "maximum": control.high, "step": control.step} if control.high else {}
    return gr.update(**told)


class Components(gr.Blocks):
    """Gradio's, but that it is one line where a request names a file which was not uploaded here."""

    async def preprocess_data(self, *given: Any) -> list[Any]:
        try:
            return await super().preprocess_data(*given)
        except InvalidPathError as error:
            line = UserError("source", "FILE", "it was not uploaded here", "upload it").line()
            raise gr.Error(line, print_exception=False) from error


class Page:
    """The page, its components and what happens on it.

    An upload's own file is removed at once; copies of it and of paintings lie in the page's temporary folder.

    Args:
        runs: runs that can be chosen.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.stopped: set[str] = set()  # sessions that have pressed Stop
        with Components(analytics_enabled=False, title="atelier") as self.blocks:
            self.upload = gr.State(None, time_to_live=KEPT)
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self._choices()
                with gr.Column(scale=2, min_width=300):
                    self._pictures()
            self._events()

    def _choices(self) -> None:
        names = [(name.removeprefix("outputs/"), name) for name in self.runs.names]
        self.run = gr.Dropdown(names, value=self.runs.first, label="run", elem_id="run")
        told = {"label": "beside it", "info": "another run, asked for the same on the same seed", "elem_id": "other"}
        self.other = gr.Dropdown([("none", ALONE), *names], value=ALONE, **told)
        self.do = gr.Dropdown([], label="do", elem_id="do")
        self.keys = {}
        for key in KEYS:
            self.keys[key] = component(key)
            if key == "source":
                self.clear = gr.Button("source: test images again", visible=False, elem_id="clear")

    def _pictures(self) -> None:
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", elem_id="stop")
        self.line = gr.Markdown(elem_id="line", container=True)
        told = {"columns": COLUMNS, "fit_columns": False, "object_fit": "contain", "interactive": False}
        told |= {
            "buttons": ["download", "fullscreen"],
            "elem_classes": "pictures",
            "height": "auto",
            "show_label": False,
        }
        with gr.Row():
            self.pictures = gr.Gallery(label="pictures", elem_id="pictures", **told)
            self.others = gr.Gallery(label="of the other run", elem_id="others", visible=False, **told)
        told = {"visible": False, "interactive": False, "format": "png", "elem_id": "way", "buttons": ["fullscreen"]}
        self.way = gr.Image(label="on the way from noise; beside it what the next step aims at", **told)
        self.editor = gr.ImageEditor(
            label="paint what is to be filled",
            elem_id="editor",
            visible=False,
            sources=(),
            transforms=(),
            layers=False,
            type="numpy",
            canvas_size=(CANVAS, CANVAS),
            brush=gr.Brush(colors=["#ffffff"], default_size=48, color_mode="fixed"),
            buttons=[],
        )

    def _events(self) -> None:
        shown = [self.editor, self.clear, *self.keys.values()]
        for event in (self.blocks.load, self.run.change):
            event(self._open, [self.run, self.upload], [self.line, self.do, *shown], trigger_mode="always_last", **ONE)
        chosen, told = [self.run, self.do, self.upload], [self.line, *shown]
        self.do.input(self._choose, chosen, told, trigger_mode="always_last", **ONE)
        source, kept = self.keys["source"], [self.upload, self.clear, self.editor, self.line]
        source.upload(self._keep, [source], kept, **ONE)
        self.clear.click(
            lambda: [None, gr.update(visible=False), canvas(None), "source: test images"], None, kept, **ONE
        )
        asked = {self.run, self.other, self.do, self.upload, self.editor, *self.keys.values()} - {source}
        made = [self.line, self.pictures, self.others, self.way]
        at_once = {"queue": False, "api_visibility": "private"}
        self.draw.click(self._press, **at_once).then(self._draw, asked, made, show_progress_on=[self.line], **ONE)
        last = {"trigger_mode": "always_last", "show_progress": "hidden"}
        for key in ("row", "column"):  # a way is walked along while a slider is moved
            self.keys[key].input(self._press, **at_once).then(self._draw, asked, made, **last, **ONE)
        self.stop.click(self._stop, **at_once)
        self.blocks.unload(self._stop)

    def _open(self, name: str, upload: Image.Image | None) -> list[Any]:
        """Load a run and show what it can be asked for."""
        try:
            run = self.runs[name]
            do, line = verb(None, run.model), f"{run.model.kind}, {run.loaded.images_seen:,} images seen"
            choices = gr.update(choices=list(verbs(run.model)), value=do)
            return [line, choices, *self._fitted(name, do, upload, anew=True)]
        except Exception as error:
            return [line_of(error), *[gr.update()] * (3 + len(KEYS))]

    def _choose(self, name: str, do: str, upload: Image.Image | None) -> list[Any]:
        """Show what a verb can be asked for; what was set stays."""
        try:
            return [gr.update(), *self._fitted(name, do, upload, anew=False)]
        except Exception as error:
            return [line_of(error), *[gr.update()] * (2 + len(KEYS))]

    def _fitted(self, name: str, do: str, upload: Image.Image | None, anew: bool) -> list[Any]:
        found = {control.key: control for control in controls(self.runs[name])}
        again = upload is not None and "source" in found and do in found["source"].verbs
        editor = gr.update(visible=True, value=canvas(upload)) if do == "inpaint" else gr.update(visible=False)
        return [editor, gr.update(visible=again), *(fitted(found.get(key), do, anew) for key in KEYS)]

    def _keep(self, path: str) -> list[Any]:
        """Take an upload into memory, and its file from the disk."""
        try:
            image = uploaded(Path(path).read_bytes())
        except Exception as error:
            return [gr.update(), gr.update(), gr.update(), line_of(error)]
        finally:
            Path(path).unlink(missing_ok=True)
        said = f"source: {image.width} x {image.height} pixels"
        return [image, gr.update(visible=True), gr.update(value=canvas(image)), said]

    def _draw(self, asked: dict, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Iterator[list]:  # noqa: B008
        """Draw what is asked for, and show it as it comes."""
        session = request.session_hash
        if session in self.stopped:  # while the request waited for its turn
            yield ["stopped", gr.update(), gr.update(), gr.update()]
            return
        values = {key: asked[self.keys[key]] for key in KEYS if key != "source"}
        layers = (asked[self.editor] or {}).get("layers") or [None]
        names = [name for name in (asked[self.run], asked[self.other]) if name != ALONE]
        columns = COLUMNS // len(names)
        alone, other = (gr.update(columns=columns, visible=seen) for seen in (True, len(names) > 1))
        yield ["...", alone, other, gr.update(value=None, visible=False)]
        work = Asking(
            names,
            self.runs,
            asked[self.do],
            values,
            asked[self.upload],
            layers[0],
            tell=lambda done, n, word: progress((done, n), desc=word, unit="pictures"),
            stopped=lambda: session in self.stopped,
        )
        for shown in work.drawn():
            pictures = (found or gr.update() for found in shown.pictures)  # the last ones stay until there are others
            yield [shown.line, *pictures, gr.update(value=shown.way, visible=shown.way is not None)]

    def _press(self, request: gr.Request) -> None:
        self.stopped.discard(request.session_hash)

    def _stop(self, request: gr.Request) -> None:
        self.stopped.add(request.session_hash)


def canvas(image: Image.Image | None) -> dict[str, Any]:
    """An image as the editor shows it, its longer side `CANVAS` pixels; None: a grey square, for test images."""
    image = image or Image.new("RGB", (1, 1), (128, 128, 128))
    factor = CANVAS / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    shown = image.resize((width, height), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BILINEAR)
    return {"background": np.asarray(shown), "layers": [], "composite": None}


class FromHere:
    """Lets nobody ask but this machine's own pages: another site's may have its name or its scripts lead here.

    Args:
        app: application that answers where `Host`, and `Origin` where there is one, are of this machine.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            asked = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
            if not all(host_of(url) in HERE for url in asked):
                await PlainTextResponse("this page is for its own machine alone", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def host_of(url: str) -> str | None:
    """The host that a URL names; None: none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def serve(runs: Runs, port: int) -> None:
    """Show the page on this machine alone until the process is told to end; all its files go with it.

    Raises:
        UserError: the port is taken, or not the user's to open.
    """
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks the page whether it is there, which no proxy can tell
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HERE[0])))
    with tempfile.TemporaryDirectory(prefix="atelier-page-") as folder:
        tempfile.tempdir, os.environ["GRADIO_TEMP_DIR"] = folder, str(Path(folder) / SHOWN)
        page = Page(runs)
        try:
            page.blocks.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=LARGEST,
                show_error=True,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                theme=THEME,
                css=CSS,
                app_kwargs={"middleware": [Middleware(FromHere)]},
            )
        except OSError as error:
            other = port - 1 if port == 65535 else max(port + 1, 1024)
            raise UserError("port", port, "it is taken, or not yours to open", f"port={other}") from error
        print(f"http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
        never = threading.Event()
        while not never.wait(SWEEP):
            sweep(Path(folder), KEPT)


def sweep(folder: Path, seconds: float) -> None:
    """Remove the files that were shown longer ago than that, of all in the page's folder."""
    for path in (folder / SHOWN).rglob("*"):
        if path.is_file() and time.time() - path.stat().st_mtime > seconds:
            path.unlink(missing_ok=True)
