"""What a run can be asked for on the page: a list of named controls, and the request that their values make."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atelier.diffusion.guidance import Dual
from atelier.models.diffusion_model import DiffusionModel
from atelier.requests import masks
from atelier.requests.checks import OF_IMAGES, TEXTS, verbs
from atelier.requests.folder import COLUMNS
from atelier.requests.request import STRENGTH
from atelier.runs import published
from atelier.runs.asking import ReadyRun
from atelier.runs.pages import keys_of_page, members, page_of

DRAWN = "drawn"  # the mask that is painted on the page
ROW, COLUMN = "row", "column"  # of a way through latents: no keys of sample.py, but the number of a picture there
WAYS = ("interpolate", "traverse", "truncate", "mix")  # verbs whose picture 8 r + c is place c of row r
LENGTHS = {"guidance": 10.0, "image_guidance": 5.0, "temperature": 1.5, "truncation": 1.5}  # of sliders from 0
STEPS = "sampler.steps"
PICTURES, MOST = 8, 64  # at first, and at most


@dataclass(frozen=True)
class Control:
    """One thing that can be set.

    Args:
        key: key of sample.py; `ROW` and `COLUMN` are those of a picture's place.
        verbs: values of `do` that take it.
        value: value at first, that of the run itself; None or "": nothing is asked for.
        low: least value of a slider.
        high: greatest value of a slider; 0: it is none.
        step: distance of two values of a slider.
        choices: pairs of what is shown and the value that it stands for.
    """

    key: str
    verbs: frozenset[str]
    value: Any = None
    low: float = 0
    high: float = 0
    step: float = 1
    choices: tuple[tuple[str, Any], ...] = ()


def controls(run: ReadyRun) -> list[Control]:
    """The controls of a run, in the order of the page."""
    able = frozenset(verbs(run.model))
    found = [*_conditions(run), *_options(run), *_images(run)]
    found.append(Control(ROW, able & {*WAYS}, 0, 0, MOST - 1))
    found.append(Control(COLUMN, able & {*WAYS}, COLUMNS // 2, 0, COLUMNS - 1))
    found.append(Control("n", able - {*WAYS}, PICTURES, 1, MOST))
    found.append(Control("seed", able, 0))
    return [control for control in found if control.verbs]


def _conditions(run: ReadyRun) -> list[Control]:
    """What pictures are to show, where the model knows it: labels and attributes by name, texts, directions."""
    model, data = run.model, run.loaded.data
    needs, free = model.needs, frozenset(verbs(model)) - {"reconstruct", "resample"}
    found = []
    if "label" in needs:
        labels = tuple((str(data.names.called(k)), data.names.called(k)) for k in range(data.n_classes))
        found.append(Control("label", free, "", choices=(("as in the test images", ""), *labels)))
    if needs & {"attributes", "target"}:
        signed = tuple((sign + name, sign + name) for name in data.names.attributes for sign in "+-")
        found.append(Control("attributes", free, choices=signed))
    for key, field in TEXTS.items():
        if key != "prompts" and needs & ({"text", "instruction"} if field == "negative" else {field}):
            found.append(Control(key, free))
    if len(model.cases) > 1:
        found.append(Control("direction", free, model.cases[0], choices=tuple((c, c) for c in model.cases)))
    return found


def _options(run: ReadyRun) -> list[Control]:
    """The keyword arguments of the model's methods."""
    model, found = run.model, []
    own = dict(model.protocol())
    if isinstance(model, DiffusionModel) and isinstance(model.diffusion_sampler.guider, Dual):
        own["image_guidance"] = model.diffusion_sampler.guider.image_guidance
    for key, high in LENGTHS.items():
        if key in own and (model.needs or key != "guidance"):
            found.append(Control(key, _taking(run, key), own[key], 0, max(high, own[key]), 0.1))
    taking = _taking(run, "sampler")
    page, section = own_sampler(run)
    own_choice = () if page else (("the run's own, and its steps", ""),)
    choices = (*own_choice, *((name, name) for name in members("sampler")))
    steps = section.get("steps", 20)
    found.append(Control("sampler", taking, page or "", choices=choices))
    found.append(Control(STEPS, taking, steps, 1, max(200, steps)))
    return found


def _taking(run: ReadyRun, name: str) -> frozenset[str]:
    """The verbs whose method has this argument."""
    return frozenset(do for do, maker in verbs(run.model).items() if name in inspect.signature(maker).parameters)


def own_sampler(run: ReadyRun) -> tuple[str | None, Mapping[str, Any]]:
    """The page that the sampler of a run was chosen by, with what the run's config says of it.

    None and nothing where that is no page's: a published pipeline has the sampler of its scheduler.
    """
    section = run.loaded.cfg.model.get("sampler")
    if section is None or published.lies_in(run.loaded.folder):
        return None, {}
    page = page_of("sampler", section)
    return (page, section) if keys_of_page("sampler", page)["_target_"] == section._target_ else (None, {})


def _images(run: ReadyRun) -> list[Control]:
    """What becomes of an image, of the user's or of the test split."""
    model = run.model
    able = frozenset(verbs(model))
    words = (*masks.WORDS, *([masks.OBJECT] if "mask" in run.loaded.data.provides else []), DRAWN)
    inpaint = able & {"inpaint"}
    return [
        Control("source", (able & {*OF_IMAGES}) | (able & {"sample"} if model.source_fields else frozenset())),
        Control("strength", able & {"edit"}, STRENGTH, 0.02, 1, 0.02),
        Control("mask", inpaint, masks.WORDS[0], choices=tuple((word, word) for word in words)),
        Control("resamplings", inpaint, 1, 1, 20),
    ]


def request(run: ReadyRun, do: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of sample.py that the controls of a verb say; what is empty, or the run's own number, is left out.

    The run's own sampler is asked for by its page and whatever the run has set otherwise, so that its steps can be
    changed alone.

    Args:
        run: run that is asked.
        do: verb.
        values: value by the key of a control; those of other verbs are not looked at.
    """
    given: dict[str, Any] = {"do": do, "batch_size": PICTURES}
    for control in controls(run):
        value = values.get(control.key)
        own = control.key in LENGTHS and value == control.value
        if do in control.verbs and control.key != "source" and value not in (None, "", []) and not own:
            given[control.key] = value
    if do in WAYS:
        given |= {"n": 1, "first": COLUMNS * given.pop(ROW, 0) + given.pop(COLUMN, 0)}
    page, section = own_sampler(run)
    if "sampler" not in given:
        given.pop(STEPS, None)
    elif given["sampler"] == page:
        shipped = keys_of_page("sampler", page)
        changed = {key: value for key, value in section.items() if shipped.get(key) != value}
        given = {f"sampler.{key}": value for key, value in changed.items()} | given
    return given
