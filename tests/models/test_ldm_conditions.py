"""Latent models that see texts, maps, holes and sources: what each looks at, and what it never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from atelier.core.batch import Batch
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.diffusion.guidance import Dual
from atelier.images.pixels import to_uint8
from atelier.models.base import sampling_mode
from atelier.models.ldm import LDM
from atelier.nets.conditions import word_spans
from atelier.requests.attention import sheets
from atelier.requests.request import Request
from atelier.runs import build, starting
from tests.compose import composed

SMALL = ["data=shapes", "data.image_size=16", "data.n_train_scenes=20", "data.n_test_scenes=8"]
NET = ["model.net.width=4", "model.net.attention=[4]", "model.sampler.steps=2"]
FIRST = ["model=vae", "model.net.width=4", "model.net.n_downs=2", "model.net.latent_channels=2"]
CLIP = ["model=clip", "model.net.width=4", "model.net.token_dim=8", "model.net.heads=2", "model.net.max_tokens=14"]
VARIATION = ["model=ldm", "embedder@model.embedder=image"]  # of an image
TASKS = {"text_to_image": [], "label_map_to_image": ["data.task=label_map"], "inpaint": ["data.task=inpaint"],
         "instruct_pix2pix": ["data.task=edit"], "variation": []}  # fmt: skip


def lent(page: list[str]) -> nn.Module:
    torch.manual_seed(0)
    return build.untrained_part(composed(*page, *SMALL), {})


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return {"first_stage": lent(FIRST), "encoder": lent(CLIP)}


def made(page: str, parts: dict[str, nn.Module], *words: str) -> tuple[LDM, Batch]:
    """A model whose net says something of all that it sees, and test images."""
    chosen = VARIATION if page == "variation" else [f"model={page}"]
    cfg = composed(*chosen, *SMALL, *NET, *TASKS[page], *words)
    torch.manual_seed(0)
    model = build.on_parts(cfg, {name: parts[name.rpartition(".")[2]] for name in build.parts(cfg)})
    model.codec.scale.fill_(1.0)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.eval(), build.data(cfg).test_batch(0, 4)


def drawn(model: LDM, batch: Batch, **options: Any) -> torch.Tensor:
    with sampling_mode(model, options):
        return model.sample(model.condition(batch, ""), ImageRngs(0, 0, 4), **options)


@pytest.mark.parametrize(("page", "field"), [
    ("text_to_image", "text"), ("label_map_to_image", "source"), ("inpaint", "text"), ("inpaint", "mask"),
    ("instruct_pix2pix", "instruction"), ("instruct_pix2pix", "source"), ("variation", "image"),
])  # fmt: skip
def test_another_condition_is_another_image(page: str, field: str, parts: dict[str, nn.Module]) -> None:
    model, batch = made(page, parts)
    values = batch[field]
    other = values[1:] + values[:1] if isinstance(values, list) else values.roll(1, 0)
    first, second = drawn(model, batch), drawn(model, batch | {field: other})
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(first, second, strict=True) if not torch.equal(a, b))
    assert not torch.equal(first, second)


def test_each_page_needs_what_it_looks_at(parts: dict[str, nn.Module]) -> None:
    needs = {page: set(made(page, parts)[0].needs) for page in TASKS}
    assert needs == {
        "text_to_image": {"text"},
        "label_map_to_image": {"source"},
        "inpaint": {"text", "image", "mask"},
        "instruct_pix2pix": {"instruction", "source"},
        "variation": {"image"},
    }
    told = {page: made(page, parts)[0].source_fields for page in ("inpaint", "instruct_pix2pix", "variation")}
    assert told == {"inpaint": {}, "instruct_pix2pix": {"": "source"}, "variation": {"": "image"}}


def test_outside_the_mask_nothing_changes_and_below_it_nothing_is_looked_at(parts: dict[str, nn.Module]) -> None:
    model, batch = made("inpaint", parts)
    hole = batch["mask"] > 0.5
    filled = drawn(model, batch)
    assert torch.equal(filled.masked_fill(hole, 0), batch["image"].masked_fill(hole, 0)), "0 grey levels"
    other = batch | {"image": torch.where(hole, torch.randn_like(batch["image"]), batch["image"])}
    assert torch.equal(drawn(model, other), filled)
    whole, none = (batch | {"mask": torch.full_like(batch["mask"], full)} for full in (1.0, 0.0))
    assert torch.equal(drawn(model, none), batch["image"]), "without a hole, the image to the bit"
    assert not torch.equal(drawn(model, whole), batch["image"])


def test_the_verb_inpaint_asks_a_model_of_holes_itself(parts: dict[str, nn.Module]) -> None:
    model, batch = made("inpaint", parts)
    cond = model.condition(batch | {"mask": 1 - batch["mask"]}, "")  # of another hole, which the request replaces
    with sampling_mode(model, {}):
        filled = model.inpaint(batch["image"], batch["mask"] > 0.5, cond, ImageRngs(0, 0, 4), 1)
    assert torch.equal(filled, drawn(model, batch))


def test_text_and_source_are_guided_apart(parts: dict[str, nn.Module]) -> None:
    model, batch = made("instruct_pix2pix", parts)
    null = model.embedder.null(4, model.condition(batch, ""))
    assert not null.planes.any(), "of no image, as guidance by the image needs"
    assert isinstance(model.diffusion_sampler.guider, Dual)
    apart = [drawn(model, batch, guidance=g, image_guidance=i) for g, i in ((3.0, 1.5), (3.0, 3.0), (1.0, 1.5))]
    assert not any(torch.equal(apart[0], other) for other in apart[1:])


def test_a_guider_of_one_number_takes_no_second(parts: dict[str, nn.Module]) -> None:
    model, batch = made("text_to_image", parts)
    with pytest.raises(UserError, match=r"image_guidance=1.5.*Fix: guider=dual"):
        drawn(model, batch, image_guidance=1.5)


def test_a_negative_prompt_stands_in_place_of_the_empty_one(parts: dict[str, nn.Module]) -> None:
    model, batch = made("text_to_image", parts)
    plain, empty = drawn(model, batch, guidance=3.0), drawn(model, batch | {"negative": [""] * 4}, guidance=3.0)
    torch.testing.assert_close(plain, empty)
    away = drawn(model, batch | {"negative": ["a red star"] * 4}, guidance=3.0)
    assert (away - plain).abs().amax((1, 2, 3)).min() > 1e-4
    own = drawn(model, batch | {"negative": batch["text"]}, guidance=3.0)
    torch.testing.assert_close(own, drawn(model, batch, guidance=1.0), msg="away from itself leads nowhere")


def test_where_a_net_looks_for_each_word_is_a_sheet_of_maps(parts: dict[str, nn.Module]) -> None:
    model, batch = made("text_to_image", parts)
    cond, text = model.condition(batch, ""), batch["text"][0]
    spans = word_spans(parts["encoder"], text)
    assert [word for word, _ in spans] == text.split()
    assert [list(span) for _, span in spans] == [[k] for k in range(1, 1 + len(spans))], "behind the start, one each"
    with sampling_mode(model, {}):
        steps = list(model.attending(cond, ImageRngs(0, 0, 4), 2))
        pictures = sheets(model, cond, ImageRngs(0, 0, 4), 2, {})
    for _, maps in steps:
        assert maps.shape[:2] == (4, 14)
        torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0])), "shares of what each place looks at"
    assert [p.shape[1] for p in pictures] == [2 + 66 * (1 + len(t.split())) for t in batch["text"]]
    assert not made("label_map_to_image", parts)[0].reads_words


def test_a_model_of_holes_begins_as_the_text_to_image_model_that_it_comes_from(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    source, _ = made("text_to_image", parts)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    cfg = composed("model=text_to_image", *SMALL)
    for name in build.parts(cfg):
        section = build.section(cfg, name)
        OmegaConf.set_struct(section, False)
        section.sha256 = "same"
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    below = cfg.copy()
    below.start_from = str(tmp_path)
    model, batch = made("inpaint", parts)
    starting.start_from(model, below)
    n = model.net.stem.n_own
    assert torch.equal(model.net.stem.weight[:, :n], source.net.stem.weight)
    assert not model.net.stem.weight[:, n:].any()
    with torch.no_grad():
        x, t, cond = torch.randn(4, 2, 4, 4), torch.full((4,), 500.0), model.embedder(model.condition(batch, ""), 4)
        told = source.embedder(source.condition(batch, ""), 4)
        assert torch.equal(model.net(x, t, cond), source.net(x, t, told)), "to the bit, whatever the planes hold"
    below.model.first_stage.sha256 = "another"
    with pytest.raises(UserError, match="it stands on another first_stage"):
        starting.start_from(model, below)
    (tmp_path / "weights.safetensors").write_bytes(b"cut")
    below.model.first_stage.sha256 = "same"
    with pytest.raises(UserError, match=r"error: start_from=.*: it cannot be read .*. Fix: start_from=ANOTHER"):
        starting.start_from(model, below)
    with pytest.raises(UserError, match="no finished run lies there"):
        starting.start_from(model, OmegaConf.merge(below, {"start_from": str(tmp_path / "nothing")}))


def test_planes_that_would_reach_no_net_are_refused(parts: dict[str, nn.Module]) -> None:
    with pytest.raises(UserError, match="ConditionEmbedder hands none on to the net"):
        cfg = composed("model=ldm", *SMALL, *NET, "planes@model.planes=source_latents")
        build.on_parts(cfg, {"first_stage": parts["first_stage"]})


def test_an_encoder_is_in_no_checkpoint(parts: dict[str, nn.Module]) -> None:
    model, _ = made("inpaint", parts)
    assert not [name for name in model.state_dict() if "encoder" in name or "autoencoder" in name]


WORDS = dict.fromkeys(("label", "direction", "source", "strength", "mask", "resamplings", "prompts", "instruction"))
WORDS |= dict.fromkeys(("prompt", "negative", "attributes", "scale_factor")) | {"seed": 0}


def asked(page: str, parts: dict[str, nn.Module], **words: Any) -> Request:
    model, _ = made(page, parts)
    data = build.data(composed(f"model={page}", *SMALL, *TASKS[page]))
    return Request.of(model, data, {}, WORDS | {"do": "sample"} | words)


def test_a_prompt_is_of_all_pictures_and_prompts_come_in_turn(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    assert asked("text_to_image", parts, prompt="a red star").conditions(3, 2)["text"] == ["a red star"] * 2
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    several = asked("text_to_image", parts, prompts=str(tmp_path / "prompts.txt"), negative="a ring")
    assert several.conditions(2, 3)["text"] == ["three", "one", "two"]
    assert several.conditions(2, 3)["negative"] == ["a ring"] * 3


@pytest.mark.parametrize(("page", "words", "line"), [
    ("text_to_image", {"instruction": "make it blue"}, "LDM of this run reads none. Fix: leave instruction out"),
    ("label_map_to_image", {"negative": "a ring"}, "LDM of this run reads none. Fix: leave negative out"),
    ("text_to_image", {"prompt": "a", "prompts": "b"}, "prompt says it already"),
    ("text_to_image", {"prompt": "star " * 20}, "it has 22 tokens, of which 14 are read. Fix: shorter"),
    ("text_to_image", {"do": "inpaint", "mask": "object"}, "mask=object: the set has no masks"),
    ("inpaint", {"do": "inpaint", "mask": "object", "source": "x.png"}, "files have no mask of their own"),
    ("inpaint", {"do": "edit"}, "LDM of this run fills holes. Fix: do=inpaint mask=FILE_OR_FOLDER"),
    ("instruct_pix2pix", {"do": "edit", "source": "x.png"}, "takes no source images. Fix: do=sample"),
])  # fmt: skip
def test_words_that_a_run_does_not_read_are_refused(
    page: str, words: dict[str, str], line: str, parts: dict[str, nn.Module]
) -> None:
    with pytest.raises(UserError) as error:
        asked(page, parts, **words)
    assert line in error.value.line()


def test_a_request_is_about_its_own_image_and_mask(parts: dict[str, nn.Module]) -> None:
    """Not about those of the test image whose caption it takes."""
    request = asked("inpaint", parts, do="inpaint", mask="center")
    batch = request.data.test_batch(0, 1)
    with sampling_mode(request.model, {}):
        filled = next(request.pictures("inpaint", 0, 1, 1)).images
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    assert torch.equal(filled[0][:, ~hole], to_uint8(batch["image"])[0][:, ~hole])
    own = asked("inpaint", parts, do="inpaint", mask="object")
    assert torch.equal(own._mask(0, 1, "", (16, 16)), batch["mask"] > 0.5)
