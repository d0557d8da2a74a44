"""Which controls a run gets, and that a request of them is one of sample.py: no browser, no Gradio."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from atelier import load
from atelier.demo.controls import DRAWN, STEPS, Control, controls, own_sampler, request
from atelier.diffusion.guidance import Dual
from atelier.requests import latents
from atelier.requests.checks import verb, verbs
from atelier.runs import asking, preflight
from atelier.runs.asking import ReadyRun
from tests.test_sample import drawn
from tests.tiny import PICTURELESS, TINY

FAMILIES = [family for family in TINY if family not in PICTURELESS]
EXPECTED = {  # family and verb -> the keys that are set there, in the order of the page
    ("ddpm", "sample"): ["label", "attributes", "guidance", "sampler", "sampler.steps", "n", "seed"],
    ("ddpm", "edit"): [
        *["label", "attributes", "guidance", "sampler", "sampler.steps"],
        *["source", "strength", "n", "seed"],
    ],
    ("ddpm", "inpaint"): [
        *["label", "attributes", "guidance", "sampler", "sampler.steps"],
        *["source", "mask", "resamplings", "n", "seed"],
    ],
    ("ddpm", "interpolate"): [
        *["label", "attributes", "guidance", "sampler", "sampler.steps"],
        *["row", "column", "seed"],
    ],
    ("stylegan2", "sample"): ["label", "attributes", "truncation", "n", "seed"],
    ("stylegan2", "truncate"): ["label", "attributes", "row", "column", "seed"],
    ("vae", "reconstruct"): ["n", "seed"],
    ("vae", "traverse"): ["row", "column", "seed"],
    ("pix2pix", "sample"): ["source", "n", "seed"],
    ("cyclegan", "sample"): ["direction", "source", "n", "seed"],
    ("stargan", "sample"): ["attributes", "source", "n", "seed"],
    ("normalizing_flow", "sample"): ["label", "attributes", "temperature", "n", "seed"],
}


def of_verb(run: ReadyRun, do: str) -> dict[str, Control]:
    return {control.key: control for control in controls(run) if do in control.verbs}


def first_values(run: ReadyRun, do: str) -> dict[str, Any]:
    return {key: control.value for key, control in of_verb(run, do).items()}


@pytest.mark.parametrize(("family", "do"), EXPECTED, ids=lambda one: one)
def test_the_controls_of_a_run(finished: dict[str, Path], family: str, do: str) -> None:
    assert list(of_verb(load(finished[family]), do)) == EXPECTED[family, do]


def test_every_option_of_a_signature_has_its_control(finished: dict[str, Path]) -> None:
    """But the guider, which stands on a run; numbers begin as the run has them."""
    for family in FAMILIES:
        run = load(finished[family])
        offered = {(do, control.key) for control in controls(run) for do in control.verbs}
        for do, maker in verbs(run.model).items():
            asked = {name for name in preflight.options() if name in inspect.signature(maker).parameters} - {"guider"}
            asked -= {"image_guidance"}  # of guider=dual alone
            asked -= set() if run.model.needs else {"guidance"}
            assert {(do, name) for name in asked} <= offered, (family, do)


@pytest.mark.parametrize("family", ["ddpm", "stylegan2", "vae", "vqprior", "normalizing_flow", "cyclegan"])
def test_what_is_not_set_changes_nothing(finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    """The pictures of the page as it is opened are those of sample.py."""
    run = load(finished[family])
    do = verb(None, run.model)
    given = request(run, do, first_values(run, do))
    made = run.ask(do, options={key: value for key, value in given.items() if key != "do"} | {"n": 8})
    typed = drawn(finished[family], tmp_path, "n=8", "batch_size=8")
    assert torch.equal(torch.cat([part.images for part in made]).short(), typed)


@pytest.mark.parametrize("family", ["ddpm", "stylegan2", "vae", "pix2pix", "vqprior"])
def test_every_verb_can_be_asked_as_it_stands(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(latents, "PROJECTION_STEPS", 2)
    run = load(finished[family])
    for do in verbs(run.model):
        values = first_values(run, do) | {"n": 2}
        (made,) = run.asked(asking.config({"run": run.loaded.folder} | request(run, do, values))).pictures()
        assert len(made.images) == (1 if "row" in values else 2), do


def test_a_place_on_a_way_is_the_number_of_a_picture(finished: dict[str, Path], tmp_path: Path) -> None:
    run = load(finished["gan"])
    given = request(run, "traverse", {"row": 2, "column": 5, "seed": 3})
    (made,) = run.asked(asking.config({"run": run.loaded.folder} | given)).pictures()
    whole = drawn(finished["gan"], tmp_path, "do=traverse", "n=24", "seed=3")
    assert (made.images[0].short() - whole[21]).abs().max() <= 1 < (made.images[0].short() - whole[20]).abs().max()


def test_the_runs_own_sampler_keeps_what_the_run_has_set(finished: dict[str, Path]) -> None:
    """Its steps can be changed alone; another sampler is as its page says."""
    run = load(finished["ddpm"])
    run.loaded.cfg = OmegaConf.merge(run.loaded.cfg, {"model": {"sampler": {"grid": "uniform"}}})
    page, section = own_sampler(run)
    assert section.grid == "uniform"
    own = request(run, "sample", {"sampler": page, STEPS: 3})
    assert (own["sampler"], own["sampler.grid"], own[STEPS]) == (page, "uniform", 3)
    assert "" not in [value for _, value in of_verb(run, "sample")["sampler"].choices]  # it is chosen by its page
    other = request(run, "sample", {"sampler": "heun", STEPS: 3})
    assert other["sampler"] == "heun" and "sampler.grid" not in other
    assert not {"sampler", STEPS} & set(request(run, "sample", {"sampler": "", STEPS: 3}))


def test_a_sampler_of_no_page_is_the_runs_own(finished: dict[str, Path]) -> None:
    run = load(finished["ddpm"])
    del run.loaded.cfg.model.sampler
    sampler = of_verb(run, "sample")["sampler"]
    assert sampler.value == "" and sampler.choices[0] == ("the run's own, and its steps", "")


def test_what_reads_texts_and_instructions_gets_boxes_for_them(finished: dict[str, Path]) -> None:
    run = load(finished["ldm"])
    run.model.needs = frozenset({"text", "instruction"})
    object.__setattr__(run.model.diffusion_sampler, "guider", Dual(guidance=7.5, image_guidance=1.25))
    found = of_verb(run, "sample")
    assert {"prompt", "negative", "instruction"} <= set(found)
    assert (found["guidance"].value, found["image_guidance"].value) == (7.5, 1.25)
    values = {"prompt": "a star", "negative": "", "guidance": 7.5, "image_guidance": 2.0}
    given = request(run, "sample", values)
    assert given == {"do": "sample", "batch_size": 8, "prompt": "a star", "image_guidance": 2.0}


def test_choices_are_the_names_of_the_set(finished: dict[str, Path]) -> None:
    found = of_verb(load(finished["ddpm"]), "inpaint")
    assert found["label"].choices[1] == ("red circle", "red circle") and len(found["label"].choices) == 37
    assert ("+red", "+red") in found["attributes"].choices and ("-red", "-red") in found["attributes"].choices
    assert [value for _, value in found["mask"].choices] == ["center", "left", "random", DRAWN]
