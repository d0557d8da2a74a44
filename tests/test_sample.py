"""sample.py: what is written, what each option changes, what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import sample as entry
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.data.reading import pixels, square
from atelier.evaluation.evaluator import sample
from atelier.images.pictures import LINE, grid, png_texts, save_png
from atelier.images.pixels import to_float, to_uint8
from atelier.losses.perceptual import Pyramid
from atelier.models.base import Cond
from atelier.models.vae import VAE
from atelier.requests import latents
from atelier.requests.folder import COLUMNS
from atelier.requests.request import Request
from atelier.runs import asking, build, folders
from tests.compose import composed
from tests.tiny import PICTURELESS, TINY

FAMILIES = [family for family in TINY if family not in PICTURELESS]
AUTOENCODERS = ("ae", "vae", "vqvae", "first_stage")
NOISELESS = ("cyclegan", "cut", "stargan", "srgan")  # an image of a source, whatever the seed
HAD = 25  # the label of the tiny test split's first image


def drawn(run: Path, out: Path, *words: str) -> Tensor:
    """The pictures of a request, (n, C, H, W) int16."""
    entry.sample(composed(f"run={run}", f"out={out}", *words, config="sample"))
    return read(out)


def read(out: Path) -> Tensor:
    paths = sorted(out.glob("[0-9]*.png"))
    assert [path.name for path in paths] == [f"{k:06d}.png" for k in range(len(paths))]
    return torch.stack([opened(path) for path in paths])


def opened(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).short()


def pairs(run: Path, *words: str) -> tuple[Tensor, Tensor]:
    """The images that a request changes, and what becomes of them, (n, C, H, W) int16 each."""
    cfg = composed(f"run={run}", *words, config="sample")
    made = list(asking.ReadyRun(build.plain(cfg)).asked(cfg).pictures())
    return tuple(torch.cat(each).short() for each in zip(*[(one.sources, one.images) for one in made], strict=True))


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        entry.sample(composed(*words, config="sample"))
    return error.value.line()


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_pictures_a_grid_and_the_request(finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    pictures = drawn(finished[family], tmp_path, "n=10", "batch_size=4", "seed=3")
    size = OmegaConf.load(finished[family] / "config.yaml").data.image_size
    assert pictures.shape == (10, 3, size, size)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {*(f"{k:06d}.png" for k in range(10)), "grid.png", "request.yaml"}
    request = OmegaConf.load(tmp_path / "request.yaml")
    assert (request.n, request.seed, request.images_seen, request.run) == (10, 3, 96, str(finished[family]))
    assert request.do == ("reconstruct" if family in AUTOENCODERS else "sample")


@pytest.mark.parametrize("family", FAMILIES)
def test_picture_k_is_the_same_in_any_batch(finished: dict[str, Path], tmp_path: Path, family: str) -> None:
    one = drawn(finished[family], tmp_path / "a", "n=7", "batch_size=7", "do=sample")
    other = drawn(finished[family], tmp_path / "b", "n=11", "batch_size=3", "do=sample")
    assert (one - other[:7]).abs().max() <= 1
    assert not torch.equal(one[0], one[1])
    other = drawn(finished[family], tmp_path / "c", "n=7", "seed=1", "do=sample")
    assert ((other - one).abs().max() > 1) == (family not in NOISELESS)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("ddpm", ["sampler=euler", "sampler.steps=3", "guidance=1.5", "label=25"]),
        ("ddpm", ["do=edit", "strength=0.3"]),
        ("vae", ["do=interpolate"]),
    ],
)
def test_a_picture_is_made_again_from_what_is_written_in_it(
    finished: dict[str, Path], tmp_path: Path, lively: None, family: str, words: list[str]
) -> None:
    """To the bit where it was made alone; what is typed goes before what is written."""
    made = drawn(finished[family], tmp_path / "a", "n=11", "batch_size=1", "seed=5", *words)
    picture = tmp_path / "a" / "000009.png"
    texts = png_texts(picture)
    assert (texts["run"], texts["seed"]) == (str(finished[family]), "5")
    entry.sample(composed(f"like={picture}", f"out={tmp_path / 'b'}", config="sample"))
    again = opened(tmp_path / "b" / "000009.png")
    assert torch.equal(again, made[9]) and not torch.equal(again, made[8])
    assert len(list((tmp_path / "b").glob("[0-9]*.png"))) == 1
    entry.sample(composed(f"like={picture}", "seed=6", f"out={tmp_path / 'b'}", config="sample"))
    other = opened(tmp_path / "b" / "000009.png")
    assert (other - again).abs().max() > 1 or words[0] == "do=interpolate"


def test_a_result_of_a_file_is_made_again(finished: dict[str, Path], tmp_path: Path, lively: None) -> None:
    """By the noise of its number, though it is the only file now."""
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    words = [f"run={finished['ddpm']}", "do=edit", f"source={tmp_path}", f"out={tmp_path.parent / 'out'}"]
    entry.sample(composed(*words, config="sample"))
    first, second = (opened(tmp_path.parent / "out" / f"{name}.png") for name in "ab")
    entry.sample(composed(f"like={tmp_path.parent / 'out' / 'b.png'}", f"out={tmp_path.parent / 'c'}", config="sample"))
    again = opened(tmp_path.parent / "c" / "b.png")
    assert (again - second).abs().max() <= 1 < (first - second).abs().max()


def test_a_picture_of_others_has_no_request(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "other.png", {"request": "5"})  # of another program
    for name, problem in (
        ("plain", "it is no picture with a request"),
        ("text", "it is no"),
        ("none", "No such file"),
        ("other", "it is no"),
    ):
        line = refused(f"like={tmp_path / name}.png")
        assert problem in line and "like=A_PICTURE that sample.py made" in line


VERBS = [("vae", do) for do in ("interpolate", "reconstruct", "resample", "traverse")]


@pytest.mark.parametrize(
    ("family", "do"),
    [
        *VERBS,
        ("gan", "interpolate"),
        ("gan", "traverse"),
        ("stylegan2", "mix"),
        ("stylegan2", "truncate"),
        *[(family, do) for family in ("ddpm", "ldm") for do in ("edit", "interpolate", "invert", "paths")],
    ],
)
def test_other_verbs_are_the_same_in_any_batch_too(
    finished: dict[str, Path], tmp_path: Path, family: str, do: str
) -> None:
    one = drawn(finished[family], tmp_path / "a", "n=19", "batch_size=19", f"do={do}")
    other = drawn(finished[family], tmp_path / "b", "n=19", "batch_size=5", f"do={do}")
    assert (one - other).abs().max() <= 1


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs come back with weights that listen to their conditions; 96 images of training leave them near zero."""
    original = folders.load

    def load(folder: Path, ema: bool, root: str | None = None) -> folders.LoadedRun:
        loaded, random = original(folder, ema), torch.Generator().manual_seed(0)
        for parameter in loaded.model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
        return loaded

    monkeypatch.setattr(folders, "load", load)


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_guidance_and_sampler_pass_through(
    finished: dict[str, Path], tmp_path: Path, lively: None, family: str
) -> None:
    def differs(*words: str) -> bool:
        return bool((drawn(finished[family], tmp_path / "b", "n=4", *words) - own).abs().max() > 1)

    own = drawn(finished[family], tmp_path / "a", "n=4")
    same = ["sampler=euler", "sampler.steps=2", "guidance=2"]
    assert not differs(*same)
    assert differs(*same, "guidance=1")
    assert differs(*same, "sampler.steps=4")
    assert differs("sampler=ddim", "sampler.steps=2", "sampler.eta=1.0")


def test_averaged_weights_are_the_default(finished: dict[str, Path], tmp_path: Path) -> None:
    for family in set(FAMILIES) - {"vqprior"}:  # whose codes do not move by so little
        averaged = drawn(finished[family], tmp_path / family, "n=4")
        raw = drawn(finished[family], tmp_path / family, "n=4", "ema=false")
        assert not torch.equal(averaged, raw), family


def test_a_label_takes_the_test_images_that_have_it(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = type(folders.load(finished["ddpm"], True).model).sample
    monkeypatch.setattr("atelier.models.ddpm.DDPM.sample", lambda *a, **k: asked.append(a[1]) or original(*a, **k))
    drawn(finished["ddpm"], tmp_path, "n=5", "batch_size=2", f"label={HAD}")
    assert torch.cat([cond["label"] for cond in asked]).tolist() == [HAD] * 5
    attributes = torch.cat([cond["attributes"] for cond in asked])
    colour = attributes[:, :6].argmax(1)
    assert colour.tolist() == [HAD % 6] * 5  # of the same scenes


@pytest.mark.parametrize("family", ["ddpm", "gan", "ldm"])
def test_a_label_changes_the_pictures(finished: dict[str, Path], tmp_path: Path, lively: None, family: str) -> None:
    labels = folders.load(finished[family], True).data.test_batch(0, 16)["label"].tolist()
    assert labels[0] == HAD
    other = next(label for label in labels if label != HAD)
    one, two = (drawn(finished[family], tmp_path / str(k), "n=4", f"label={k}") for k in (HAD, other))
    assert not torch.equal(one, two)


def test_reconstructions_stand_beside_the_test_images(finished: dict[str, Path], tmp_path: Path) -> None:
    run = folders.load(finished["vae"], True)
    pictures = drawn(finished["vae"], tmp_path, "n=4")
    x = run.data.test_batch(0, 4)["image"]
    with torch.inference_mode():
        back = run.model.decode(run.model.encode(x))
    assert (pictures.float() / 127.5 - 1 - back).abs().max() <= 1.01 / 127.5
    each = torch.stack([to_uint8(x), pictures.to(torch.uint8)], dim=1).flatten(0, 1)
    assert torch.equal(opened(tmp_path / "grid.png"), grid(each, COLUMNS).short())


def test_a_draw_of_the_posterior_differs_each_time(finished: dict[str, Path], lively: None) -> None:
    (x, mode), (same, one), (again, two) = (
        pairs(finished["vae"], "n=4", f"do={do}", f"seed={seed}")
        for do, seed in (("reconstruct", 0), ("resample", 0), ("resample", 1))
    )
    assert torch.equal(x, same) and torch.equal(x, again)  # the test images
    assert not torch.equal(mode, one) and not torch.equal(one, two)


def test_interpolations_begin_and_end_at_samples(finished: dict[str, Path], tmp_path: Path) -> None:
    between = drawn(finished["gan"], tmp_path / "a", "n=24", "do=interpolate")
    with Image.open(tmp_path / "a" / "walk.gif") as walk:
        assert walk.n_frames > 20 and min(walk.size) >= 64
    samples = drawn(finished["gan"], tmp_path / "b", "n=4", "do=sample")
    assert (between[0::8] - samples[:3]).abs().max() <= 1
    assert not torch.equal(between[0], between[4])


def test_an_autoencoder_interpolates_between_test_images(finished: dict[str, Path], tmp_path: Path) -> None:
    between = drawn(finished["vae"], tmp_path / "a", "n=24", "do=interpolate")
    back = drawn(finished["vae"], tmp_path / "b", "n=4", "do=reconstruct")
    assert (between[0::8] - back[:3]).abs().max() <= 1
    assert (between[7::8] - back[1:]).abs().max() <= 1


def test_a_traversal_changes_one_coordinate_a_row(
    finished: dict[str, Path], tmp_path: Path, lively: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = VAE.generate
    monkeypatch.setattr(VAE, "generate", lambda *a, **k: seen.append(a[1]) or original(*a, **k))
    drawn(finished["vae"], tmp_path, "n=24", "batch_size=24", "do=traverse")
    z = seen[0].flatten(1)
    run = folders.load(finished["vae"], True)
    with torch.inference_mode():
        start = run.model.encode(run.data.test_batch(0, 1)["image"]).flatten()
    for row in range(3):
        rows = z[8 * row : 8 * row + 8]
        torch.testing.assert_close(rows[:, row], torch.linspace(-3, 3, 8))
        others = [k for k in range(z.shape[1]) if k != row]
        torch.testing.assert_close(rows[:, others], start[others].expand(8, -1), atol=1e-5, rtol=1e-5)


def test_what_a_model_lacks_is_refused_in_one_line(finished: dict[str, Path]) -> None:
    vae, gan = f"run={finished['vae']}", f"run={finished['gan']}"
    line = "error: guidance=3: VAE takes no guidance here. Fix: leave guidance out"
    assert refused(vae, "guidance=3", "do=sample") == line
    assert refused(gan, "sampler=ddim").startswith("error: sampler=ddim: GAN takes no sampler here")
    assert "VAE was trained without labels" in refused(vae, "label=3", "do=sample")
    assert "Fix: do=sample" in refused(vae, "label=3")
    assert "the 36 labels are 0 to 35" in refused(gan, "label=36")
    assert "none of 16 test images has it" in refused(gan, "label=3")
    assert refused(vae, "do=interpolat") == (
        "error: do=interpolat: VAE can sample, interpolate, traverse, project, reconstruct, resample. Fix: do=interpolate"  # noqa: E501
    )
    assert "GAN can sample, interpolate, traverse" in refused(gan, "do=reconstruct")
    assert "error: n=0:" in refused(vae, "n=0")


def test_an_unconditional_model_takes_no_guidance(finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = folders.load(finished["ddpm"], True)
    loaded.model.needs = frozenset()
    monkeypatch.setattr(folders, "load", lambda *_: loaded)
    assert "the model was trained without conditions" in refused(f"run={finished['ddpm']}", "guidance=3")


def test_last_is_the_newest_run(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, family in enumerate(("gan", "ddpm", "vae")):
        folder = Path(shutil.copytree(finished[family], f"outputs/{family}/run"))
        os.utime(folder / "config.yaml", (0, 1_000_000 - age))
    (tmp_path / "outputs/young").mkdir()
    (tmp_path / "outputs/young/config.yaml").touch()  # no checkpoint yet
    drawn(Path("last"), tmp_path / "out", "n=1")
    assert OmegaConf.load("out/request.yaml").run == "outputs/gan/run"
    assert "Fix: run=outputs/gan/run" in refused("run=outputs/gan/rum")
    shutil.rmtree("outputs")
    assert "no run with a checkpoint under outputs/. Fix: python train.py" in refused("run=last")


def test_a_folder_that_cannot_be_written(finished: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        assert refused(f"run={finished['gan']}", f"out={out}").startswith(f"error: out={str(out)[:10]}")


def test_a_shorter_request_replaces_a_longer_one(finished: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "000099.png").write_text("mine")
    drawn_before = entry.sample(composed(f"run={finished['gan']}", f"out={tmp_path}", "n=6", config="sample"))
    assert drawn_before is None and (tmp_path / "000005.png").exists()
    entry.sample(composed(f"run={finished['gan']}", f"out={tmp_path}", "n=2", config="sample"))
    left = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert left == ["000000.png", "000001.png", "000099.png"]


def test_the_grid_shows_the_first_64(finished: dict[str, Path], tmp_path: Path) -> None:
    drawn(finished["gan"], tmp_path, "n=70", "batch_size=48")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (8 * 66 + 2, 8 * (66 + 2 * LINE) + 2)
        top = 2 + 7 * (66 + 2 * LINE)
        assert picture.convert("RGB").crop((464, top, 528, top + 64)).getextrema() != ((0, 0),) * 3


def test_where_memory_runs_out_the_pictures_stay_the_same() -> None:
    class Hungry:
        def sample(self, cond: Cond, rngs: ImageRngs) -> Tensor:
            noise = rngs.randn(3, 2, 2)
            if len(noise) > 2:
                raise MemoryError
            return noise + cond["shift"].view(-1, 1, 1, 1)

    shift = torch.arange(7.0)
    pictures = sample(Hungry(), {"shift": shift}, ImageRngs(0, 5, 7), {})
    torch.testing.assert_close(pictures, ImageRngs(0, 5, 7).randn(3, 2, 2) + shift.view(-1, 1, 1, 1))


@pytest.mark.parametrize("family", ["stylegan2", "gan", "vae"])
def test_projection_comes_nearer_than_the_draws_it_starts_from(finished: dict[str, Path], family: str) -> None:
    x, found, started = searched(finished[family])
    nearer = (found - x).abs().mean((1, 2, 3)) / (started - x).abs().mean((1, 2, 3))
    assert (nearer < 1).all() and nearer.mean() < 0.97


@pytest.mark.parametrize("family", ["progan", "stylegan", "ae", "vqvae", "first_stage", "normalizing_flow"])
def test_projection_brings_down_what_it_searches_by(
    finished: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fewer steps, of tiny nets whose latents change little."""
    monkeypatch.setattr(latents, "PROJECTION_STEPS", 60)
    x, found, started = searched(finished[family])
    edges = Pyramid(n_levels=3)
    far, before = ((y - x).abs().mean((1, 2, 3)) + edges(y, x) for y in (found, started))
    assert (far < before).all() and (far / before).mean() < 0.996


def searched(run: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Three test images, what was found for them, and the draws that the search started from."""
    loaded = folders.load(run, ema=True)
    batch = loaded.data.test_batch(0, 3)
    x, cond, rngs = batch["image"], loaded.model.condition(batch, ""), ImageRngs(0, 0, 3)
    with torch.inference_mode():
        found = latents.projection(loaded.model, x, cond, rngs, {})
        started = loaded.model.generate(loaded.model.sample_latents(rngs.again(), cond), cond, rngs.again())
        return x, found.clone(), started.clone()


def test_an_image_of_the_users_own_is_projected(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its central square at the net's size is what is looked for."""
    monkeypatch.setattr(latents, "PROJECTION_STEPS", 20)
    run = folders.load(finished["gan"], ema=True)
    batch = run.data.test_batch(0, 1)
    label = int(batch["label"])
    mine = Image.fromarray(to_uint8(batch["image"])[0].permute(1, 2, 0).numpy()).resize((20, 13))
    mine.save(tmp_path / "mine.png")
    x = to_float(pixels(square(mine, 8)))[None]
    words = f"run={finished['gan']}", "do=project", f"source={tmp_path / 'mine.png'}"
    assert "of which class are the images?" in refused(*words, f"out={tmp_path / 'out'}")
    entry.sample(composed(*words, f"label={label}", f"out={tmp_path / 'out'}", config="sample"))
    found = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "mine.png"))).permute(2, 0, 1)
    with torch.inference_mode():
        having = [k for k in run.data.order("test") if run.data.split("test").labels[k] == label]
        cond = Request(run.model, run.data, items=having).conditions(0, 1)
        expected = latents.projection(run.model, x, cond, ImageRngs(0, 0, 1), {})
    assert torch.equal(found, to_uint8(expected)[0])
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 2 * 8  # the source beside it
    assert "Fix: do=project" in refused(f"run={finished['gan']}", f"source={tmp_path / 'mine.png'}")


def test_a_row_of_truncations_goes_from_the_mean_through_the_sample(finished: dict[str, Path], tmp_path: Path) -> None:
    """Column 0 is the same style in all rows; the noise of a row is that of its sample."""
    run = folders.load(finished["stylegan2"], ema=True)
    with torch.inference_mode():
        cond = run.model.condition(run.data.test_batch(0, 2), "")
        z = run.model.sample_latents(ImageRngs(0, 0, 2), cond)
        mean = run.model.synthesize(run.model.styles(z, cond, 0.0), ImageRngs(0, 0, 2))
        beyond = run.model.synthesize(run.model.styles(z, cond, latents.TRUNCATED), ImageRngs(0, 0, 2))
    rows = drawn(finished["stylegan2"], tmp_path, "n=16", "do=truncate")
    for k in range(2):
        assert (rows[8 * k] - to_uint8(mean)[k].int()).abs().max() <= 1
        assert (rows[8 * k + 7] - to_uint8(beyond)[k].int()).abs().max() <= 1


def test_mixed_pictures_have_coarse_styles_of_their_row_and_fine_ones_of_their_column(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    run = folders.load(finished["stylegan2"], ema=True)
    pictures = drawn(finished["stylegan2"], tmp_path, "n=24", "do=mix")
    with torch.inference_mode():
        cond = run.model.condition(run.data.test_batch(0, 10), "")
        styles = run.model.styles(run.model.sample_latents(ImageRngs(0, 0, 10), cond), cond)
        cut = styles.shape[1] // 2
        for k, left, top in ((3, 3, 3), (8, 8, 8), (11, 8, 3), (21, 9, 5)):
            mixed = torch.cat([styles[left, :cut], styles[top, cut:]])[None]
            expected = to_uint8(run.model.synthesize(mixed, ImageRngs(0, k, 1)))[0].int()
            assert (pictures[k] - expected).abs().max() <= 1


# ---- diffusion models

EDITS = [
    ["do=edit", "strength=0.4", "sampler=heun", "sampler.steps=5"],
    ["do=edit", "sampler=ddpm", "sampler.steps=6", f"label={HAD}", "guidance=2"],
    ["do=inpaint", "mask=random", "resamplings=2", "sampler=ddpm", "sampler.steps=6"],
    ["do=inpaint", "mask=center", "guidance=2"],
    ["do=invert", f"label={HAD}", "sampler.steps=5", "sampler=ddim"],
]


@pytest.mark.parametrize("words", EDITS, ids=" ".join)
@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_sources_stand_beside_what_becomes_of_them(
    finished: dict[str, Path], lively: None, family: str, words: list[str]
) -> None:
    sources, one = pairs(finished[family], "n=3", *words)
    _, other = pairs(finished[family], "n=4", "batch_size=3", *words)
    assert (one - other[:3]).abs().max() <= 1  # the same in any batch
    x = to_uint8(folders.load(finished[family], True).data.test_batch(0, 3)["image"]).short()
    seen = x == sources
    assert seen.all() or ("do=inpaint" in words and 0.3 < seen.float().mean() < 0.95)
    assert not torch.equal(sources, one)


def test_an_edited_image_keeps_what_was_not_asked_for_beside_the_label(finished: dict[str, Path]) -> None:
    """Its colour becomes that of the label, its size, fill and ground stay: no test image need have them all."""
    run = folders.load(finished["ddpm"], True)
    run.data.n_test_scenes = 400
    labels = run.data.split("test").labels.tolist()
    other = max(set(labels) - {HAD}, key=labels.count)
    words = {**composed(f"run={finished['ddpm']}", "do=edit", config="sample"), "label": [HAD, other]}
    own = run.data.test_batch(1, 40)
    asked = Request.of(run.model, run.data, {}, words)._asked(1, 40, own)
    assert asked["label"].tolist() == [other, HAD] * 20
    assert asked["attributes"][:, :6].argmax(1).tolist() == [other % 6, HAD % 6] * 20
    assert torch.equal(asked["attributes"][:, 6:], own["attributes"][:, 6:])


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_outside_the_mask_nothing_changes_and_what_is_below_it_has_no_say(
    finished: dict[str, Path], tmp_path: Path, lively: None, family: str
) -> None:
    run = folders.load(finished[family], True)
    x = to_uint8(run.data.test_batch(0, 1)["image"])[0].permute(1, 2, 0).numpy()
    levels = np.zeros((8, 8), np.uint8)
    levels[:, 5:] = 255
    Image.fromarray(levels).save(tmp_path / "mask.png")
    made = []
    for k, below in enumerate((0, 255)):
        source = x.copy()
        source[:, 5:] = below
        Image.fromarray(source).save(tmp_path / "source.png")
        words = "do=inpaint", f"mask={tmp_path / 'mask.png'}", f"source={tmp_path / 'source.png'}"
        entry.sample(composed(f"run={finished[family]}", f"out={tmp_path / str(k)}", *words, config="sample"))
        made.append(np.array(Image.open(tmp_path / str(k) / "source.png")))
    assert np.array_equal(made[0][:, :5], x[:, :5])
    assert np.array_equal(made[0], made[1]) and made[0][:, 5:].std() > 0


def test_a_faint_edit_is_the_source_and_a_full_one_a_sample(
    finished: dict[str, Path], tmp_path: Path, lively: None
) -> None:
    run, words = finished["ddpm"], ("sampler=ddim", "sampler.steps=4")
    faint = drawn(run, tmp_path / "a", "n=4", "do=edit", "strength=0.3", *words)
    full = drawn(run, tmp_path / "b", "n=4", "do=edit", "strength=1.0", *words)
    sampled = drawn(run, tmp_path / "c", "n=4", *words)
    assert (full - sampled).abs().max() <= 1 and (faint - full).abs().max() > 1
    assert OmegaConf.load(tmp_path / "a" / "request.yaml").strength == 0.3


def test_of_a_file_nothing_is_known_unless_a_label_says_it(
    finished: dict[str, Path], tmp_path: Path, lively: None
) -> None:
    run = folders.load(finished["ddpm"], ema=True)
    batch = run.data.test_batch(0, 1)
    Image.fromarray(to_uint8(batch["image"])[0].permute(1, 2, 0).numpy()).save(tmp_path / "mine.png")
    x, rngs = to_float(pixels(Image.open(tmp_path / "mine.png"))[None]), ImageRngs(0, 0, 1)
    cond = run.model.condition(batch, "")
    for label, guidance in (([], 0.0), ([f"label={HAD}"], None)):
        words = "do=edit", f"source={tmp_path / 'mine.png'}", f"out={tmp_path / 'out'}", *label
        entry.sample(composed(f"run={finished['ddpm']}", *words, config="sample"))
        with torch.inference_mode():
            expected = to_uint8(run.model.edit(x, cond, rngs.again(), 0.5, guidance=guidance))
        assert torch.equal(pixels(Image.open(tmp_path / "out" / "mine.png")), expected[0])
    told = refused(f"run={finished['ddpm']}", *words[:2], f"out={tmp_path / 'out2'}", "guidance=2")
    assert "label=None: guidance needs something to lead to. Fix: label=0, or leave guidance out" in told


def test_an_inverted_image_comes_back_under_its_own_condition_and_changes_under_another(
    finished: dict[str, Path], tmp_path: Path, lively: None
) -> None:
    run = folders.load(finished["ddpm"], ema=True)
    batch = run.data.test_batch(0, 4)
    own, words = run.model.condition(batch, ""), ("do=invert", "n=4")
    back = drawn(finished["ddpm"], tmp_path / "a", *words)
    other = drawn(finished["ddpm"], tmp_path / "b", *words, f"label={HAD}")
    cond = run.model.condition(Request(run.model, run.data, items=_having(run, HAD))._asked(0, 4, batch), "")
    with torch.inference_mode():
        x_t, times = run.model.diffusion_sampler.asked(None, 1.0).invert(own, batch["image"])
        for made, under, guidance in ((back, own, 1.0), (other, cond, None)):
            expected = to_uint8(run.model.diffusion_sampler.asked(None, guidance).revert(under, x_t, times))
            assert (made - expected.short()).abs().max() <= 1
    assert not torch.equal(back, other)


def _having(run: folders.LoadedRun, label: int) -> list[int]:
    return [k for k in run.data.order("test") if run.data.split("test").labels[k] == label]


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
@pytest.mark.parametrize("sampler", [["sampler=ddim"], ["sampler=ddpm"]], ids=str)
def test_noise_is_interpolated_on_the_way_too(
    finished: dict[str, Path], tmp_path: Path, lively: None, family: str, sampler: list[str]
) -> None:
    words = "sampler.steps=6", *sampler
    between = drawn(finished[family], tmp_path / "a", "n=24", "do=interpolate", *words)
    samples = drawn(finished[family], tmp_path / "b", "n=3", *words)
    assert (between[0::8] - samples).abs().max() <= 1
    assert not torch.equal(between[0], between[4])
    assert Image.open(tmp_path / "a" / "walk.gif").n_frames > 10


@pytest.mark.parametrize("family", ["ddpm", "ldm"])
def test_paths_go_from_test_images_to_noise_and_from_noise_to_samples(
    finished: dict[str, Path], tmp_path: Path, lively: None, family: str
) -> None:
    words = "n=6", "sampler=heun", "sampler.steps=5", "batch_size=4"
    samples = drawn(finished[family], tmp_path / "a", "do=paths", *words)
    assert (samples - drawn(finished[family], tmp_path / "b", *words)).abs().max() <= 1
    with Image.open(tmp_path / "a" / "reverse.gif") as reverse:
        assert reverse.n_frames == 5 and reverse.size == (8 * 66 + 2, 2 * 66 + 2)  # twelve pictures
    with Image.open(tmp_path / "a" / "forward.gif") as forward:
        assert forward.n_frames == 24 and forward.size == (6 * 66 + 2, 66 + 2)
        if family == "ddpm":
            first = np.array(forward.convert("RGB"))[2:66:8, 2:66:8].astype(int)
            x = to_uint8(folders.load(finished[family], True).data.test_batch(0, 1)["image"])[0].permute(1, 2, 0)
            assert np.abs(first - x.numpy()).mean() < 10  # as many colours as a GIF has
    drawn(finished[family], tmp_path / "a", "n=2")
    assert not list((tmp_path / "a").glob("*.gif"))


def test_a_folder_of_sources_with_a_folder_of_masks(finished: dict[str, Path], tmp_path: Path) -> None:
    for name, size in (("one.png", (20, 10)), ("two.png", (8, 8))):
        for folder, colour in (("in", "red"), ("masks", "white")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", size, colour).save(tmp_path / folder / name)
    words = f"run={finished['ddpm']}", "do=inpaint", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}"
    entry.sample(composed(*words, f"mask={tmp_path / 'masks'}", config="sample"))
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"one.png", "two.png", "grid.png"}
    assert "it is 20 x 10 pixels, the image 8 x 8" in refused(*words, f"mask={tmp_path / 'masks' / 'one.png'}")
    (tmp_path / "masks" / "two.png").unlink()
    assert "no mask named like two.png is there" in refused(*words, f"mask={tmp_path / 'masks'}")


def test_what_an_edit_lacks_is_refused_in_one_line(finished: dict[str, Path], tmp_path: Path) -> None:
    ddpm, gan = f"run={finished['ddpm']}", f"run={finished['gan']}"
    told = "error: mask=None: nothing says what is to be filled. Fix: mask=FILE_OR_FOLDER, or center, left, random"
    assert refused(ddpm, "do=inpaint") == told
    for strength in ("0", "1.5", "-1"):
        assert refused(ddpm, "do=edit", f"strength={strength}").startswith(f"error: strength={strength}")
    assert "error: resamplings=0" in refused(ddpm, "do=inpaint", "mask=left", "resamplings=0")
    assert refused(ddpm, "strength=0.5") == "error: strength=0.5: do=sample takes none. Fix: do=edit"
    assert refused(ddpm, "do=edit", "mask=left") == "error: mask=left: do=edit takes none. Fix: do=inpaint"
    assert refused(gan, "resamplings=2") == "error: resamplings=2: do=sample takes none. Fix: leave resamplings out"
    assert "GAN can sample, interpolate, traverse, project. Fix: do=" in refused(gan, "do=edit")
    can = "DDPM can sample, edit, inpaint, invert, interpolate, paths. Fix: do=inpaint"
    assert can in refused(ddpm, "do=inpant")
    assert "do=paths takes no source images. Fix: do=edit" in refused(ddpm, "do=paths", f"source={tmp_path}/x.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "mask.png")
    told = "it is 6 x 4 pixels, the image 8 x 8. Fix: a mask of 8 x 8, or mask=center"
    assert told in refused(ddpm, "do=inpaint", f"mask={tmp_path / 'mask.png'}")
