"""`doctor=true`: what it says of a run, that every family can be tried, and that nothing is left of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

import train
from atelier.cli import jobs
from atelier.core.errors import UserError
from atelier.models.growing import Growing
from atelier.runs import doctor, pretrained, trying
from atelier.runs.doctor import Candidate, Tried
from tests.compose import composed
from tests.conftest import overrides
from tests.programs import python
from tests.test_entry_points import ROOT, environment
from tests.tiny import STANDS_ON, TINY

CPU = torch.device("cpu")
RATES = {"float32": 40e9, "bf16": 100e9}
CANARY = "canary-91c7-token"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, and no time for measuring."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trying, "TRIAL", 0.0)
    monkeypatch.setattr(doctor.machine, "convolution_rates", lambda device, seconds: RATES)
    yield tmp_path


def told(capsys: pytest.CaptureFixture, *words: str) -> str:
    train.train(composed(*words, "doctor=true"))
    return capsys.readouterr().out


def test_by_the_command_line_nothing_is_left(tmp_path: Path) -> None:
    """In a folder that is the home too, with secrets in its variables; lines are of 100 columns, but for paths."""
    secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY}
    words = [*TINY["ddpm"], "doctor=true"]
    done = python(str(ROOT / "train.py"), *words, folder=tmp_path, environment=environment(tmp_path) | secrets)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()) and CANARY not in done.stdout + done.stderr
    assert re.search(r"GFLOP/s +float32 [\d.,]+, bf16 [\d.,]+: a convolution", done.stdout)
    assert re.search(r"\n  W&B +there: WANDB_API_KEY\n  the hub +there: HF_TOKEN\n", done.stdout)
    assert re.search(r"\n  step +8 images in [\d.]+ s, [\d.,]+ images/s; ", done.stdout)
    assert re.search(r"\n  time +96 images: about \d+ s without judging", done.stdout)
    rest = [line for line in done.stdout.splitlines() if len(line) > 100]
    assert all(len(line.split()) <= 2 for line in rest), rest
    assert "too long" not in done.stdout


def test_a_sweep_is_refused_in_one_line(tmp_path: Path) -> None:
    words = ["-m", "doctor=true", "seed=0,1"]
    done = python(str(ROOT / "train.py"), *words, folder=tmp_path, environment=environment(tmp_path))
    line = "error: doctor=true: it tells of one run and writes nothing, -m is for several. Fix: leave -m out\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line) and not list(tmp_path.iterdir())


def test_a_job_of_a_sweep_is_refused() -> None:
    jobs.fits_a_sweep(composed(), HydraConfig.get())
    with pytest.raises(UserError, match="leave -m out"):
        jobs.fits_a_sweep(composed("doctor=true"), HydraConfig.get())


@pytest.mark.parametrize("family", TINY)
def test_every_family_can_be_tried(
    family: str, finished: dict[str, Path], elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    """On the finished run that it stands on."""
    text = told(capsys, *overrides(family, finished[STANDS_ON.get(family, "vae")]))
    assert re.search(r"\n  step +8 images in ", text) and re.search(r"\n  memory +[\d.]+ GB", text)
    assert "\n  disk " in text and not list(elsewhere.iterdir())
    if family in STANDS_ON:
        assert f"there: {finished[STANDS_ON[family]]}" in text


def test_a_first_stage_that_is_not_there_is_told_and_not_trained(
    elsewhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_train", lambda *given: pytest.fail("it was trained"))
    words = [word for word in TINY["ldm"] if "first_stage" not in word]
    text = told(capsys, *words, "model.first_stage.images=4_000_000")
    plain = " ".join(text.split())
    assert "first_stage not there: no finished run of experiment=shapes_vae under" in plain
    assert f"under {elsewhere}/outputs, so it is trained first" in plain
    times = re.findall(r"([\d,]+) images: about (.*?) without", text)
    assert [images for images, _ in times] == ["4,000,000", "96"] and "\ntogether\n" in text
    assert "  model.first_stage.images=" in text and "  budget.images=" not in text
    assert not list(elsewhere.iterdir())


def test_a_first_stage_is_found_under_outputs(
    finished: dict[str, Path], elsewhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "finished", lambda plan: finished["vae"])
    words = [word for word in TINY["ldm"] if "first_stage" not in word]
    text = told(capsys, *words)
    assert f"there: {finished['vae']}" in text and "trained first" not in text and "together" not in text


def test_a_set_whose_files_are_not_there_is_a_line(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    root = f"data.root={elsewhere}/nowhere"
    words = ["data=celeba", root, "data.image_size=8", "data.download=true", "data.batch_size=4"]
    text = told(capsys, *[w for w in TINY["ddpm"] if not w.startswith("data")], *words)
    plain = " ".join(text.split())
    assert f"data not there in {elsewhere}/nowhere: no {elsewhere}/nowhere/celeba/list_attr_celeba.txt" in plain
    assert "the run downloads it first" in plain
    assert "noise of their size" in plain and "  step " in text and not list(elsewhere.iterdir())


def test_files_that_are_there_are_counted_and_some_are_read(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    """What is found out by decoding them all is kept for training, and not found out here."""
    from PIL import Image

    folder = elsewhere / "pictures"
    folder.mkdir()
    for k in range(5):
        Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "broken.png").write_text("no picture")
    before = sorted(elsewhere.rglob("*"))
    words = ["data=images", f"data.root={folder}", "data.image_size=8", "data.batch_size=4"]
    text = told(capsys, *[w for w in TINY["ddpm"] if not w.startswith("data")], *words)
    assert f"ImageFolder in {folder}: 6 training images" in " ".join(text.split())
    assert "a file is read in " in text and sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "key", "fix"),
    [
        (["model=ldm", "first_stage@model.first_stage=sd_vae"], "model.first_stage.run", "fetch=true downloads it"),
        (
            ["model=ldm", "first_stage@model.first_stage=sd_vae", "model.first_stage.fetch=true"],
            "model.first_stage.run",
            "doctor=false",
        ),
        (["model=ldm", "model.first_stage.run=nowhere"], "model.first_stage.run", "model.first_stage.run=auto"),
        (["model=cyclegan"], "model", "data.task=fill"),
    ],
)
def test_a_run_that_cannot_begin_is_one_line_behind_the_rest(
    words: list[str],
    key: str,
    fix: str,
    elsewhere: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        train.train(composed(*words, "doctor=true"))
    assert error.value.key == key and fix in error.value.fix
    assert "\ncredentials\n" in capsys.readouterr().out


def test_weights_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(doctor.published.hub, "folder", lambda place, fetch, key: asked.append(fetch) or Path(place))
    cfg = composed("model=ldm", "first_stage@model.first_stage=sd_vae", "model.first_stage.fetch=true")
    assert doctor.named("first_stage", cfg) == Path("stabilityai/sd-vae-ft-mse")
    assert asked == [False] and cfg.model.first_stage.fetch is True


def test_a_single_file_is_not_unpacked(elsewhere: Path) -> None:
    (elsewhere / "sd.safetensors").touch()
    cfg = composed("model=stable_diffusion", "model.net.run=sd.safetensors", "data=captioned", "data.root=x")
    with pytest.raises(UserError, match="doctor writes nothing"):
        doctor.named("net", cfg)


def test_of_two_ranks_a_share_is_tried_and_the_second_is_silent(
    elsewhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    look = doctor.described
    monkeypatch.setattr(doctor, "described", lambda *args: seen.append(args[1].batch_size) or look(*args))
    cfg = composed(*TINY["ddpm"], "trainer=ddp", "trainer.accelerator=cpu", "doctor=true")
    doctor.examine(cfg)
    assert seen == [4] and "  step          8 images in" in (text := capsys.readouterr().out)
    assert "a share of 1/2 was tried" in " ".join(text.split())
    monkeypatch.setenv("LOCAL_RANK", "1")
    doctor.examine(cfg)
    assert capsys.readouterr().out == ""


def test_words_of_a_trial_by_hand() -> None:
    """0.01 s an image, 0.2 GFLOP: 20 GFLOP/s, half of the convolution's; a million images are 10,000 s."""
    one = Tried(1_000_000, 32, 1, 0.01, 0.2, 40e9, 3 * 10**9, 16 * 10**9, 45_000_000)
    assert one.total == 1_000_000 / (1 / 0.01)
    assert dict(doctor.of_trial(one)) == {
        "step": "32 images in 0.32 s, 100 images/s; 0.2 GFLOP an image, 50 % as fast as that convolution",
        "memory": "3 GB, 16 GB are free",
        "disk": "45 MB for checkpoints",
        "time": "1,000,000 images: about 2 h 47 min without judging (200 TFLOP)",
    }
    rows = dict(doctor.of_trial(Tried(100, 32, 4, 0.01, None, 40e9, None, None, 0.0)))
    assert rows["step"] == "32 images in 0.32 s, 100 images/s; a share of 1/4 was tried, without what ranks exchange"
    assert "memory" not in rows and rows["time"] == "100 images: about 1 s without judging"


def test_minutes_cut_the_budget(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    text = told(capsys, *TINY["ddpm"], "budget.images=100_000_000", "budget.minutes=2")
    assert re.search(r"images: about 2 min without judging", text) and "too long" not in text


def advised(words: list[str], rates: dict[str, float], seconds: float = 0.1) -> dict[str, str]:
    cfg = composed(*words)
    asked = Candidate("", cfg, {}, [], "budget.images")
    tried = Tried(100_000, 32, 1, seconds, 0.2, 40e9, 1, 1, 1.0)
    return dict(doctor.advice(asked, {"budget.images": tried}, rates, CPU))


def test_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.1 s an image 1,800 are 3 min and 36,000 an hour; bf16 is 2.5 times as fast."""
    monkeypatch.setattr(doctor.machine, "cores", lambda: 64.0)
    rows = advised(["data.image_size=32", "trainer.precision=32-true"], RATES)
    assert rows["budget.images=1_800"] == "fits 3 min; schedules follow it"
    assert rows["budget.images=36_000"] == "fits an hour"
    assert rows["trainer.precision=bf16-mixed"].startswith("up to 2.5 times as fast")
    assert {"OMP_NUM_THREADS=64", "model.net.width=16", "data.image_size=16", "a GPU"} <= rows.keys()
    monkeypatch.setattr(doctor.machine, "cores", lambda: float(torch.get_num_threads()))
    rows = advised(["trainer.precision=bf16-mixed"], {"float32": 50e9, "bf16": 20e9}, 0.01)
    assert rows["trainer.precision=32-true"].startswith("up to 2.5 times as fast")
    assert not {"OMP_NUM_THREADS=64", "data.image_size=8", "budget.images=36_000"} & rows.keys()


def test_what_is_offered_can_be_made() -> None:
    """No net whose width does not divide by its heads, and none on a part that is of images of another size."""
    asked = Candidate("", composed("model.net.width=32", "model.net.heads=8"), {}, [], "budget.images")
    assert not doctor._can_be(asked, "model.net.width", 18) and doctor._can_be(asked, "model.net.width", 16)
    assert not doctor._can_be(Candidate("", asked.cfg, {"a": torch.nn.Identity()}, [], ""), "data.image_size", 8)


def test_adapters_are_tried_on_the_run_that_they_are_of(
    finished: dict[str, Path], elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of an average of adapters alone the checkpoints are small."""
    disks = {}
    for more in ([], ["lora=attention", f"start_from={finished['ddpm']}"]):
        text = told(capsys, *TINY["ddpm"], "model.net.attention=[4]", *more)
        disks[len(more)] = float(re.search(r"disk +([\d.]+) MB for checkpoints", text)[1])
    assert "in adapters are trained" in " ".join(text.split()) and disks[2] < disks[0] / 2


def test_what_judges_is_looked_for_inside_of_the_suite_too() -> None:
    text = doctor.of_metrics(composed("perceptual@metrics.lpips=lpips", "metrics.lpips.vgg=nowhere/vgg.pth"))
    assert text.startswith("metrics.lpips.vgg=nowhere/vgg.pth: there is no such file") and "vgg=PATH" in text
    assert doctor.of_metrics(composed("metrics=mobilenet")).startswith("metrics.weights=None: mobilenet needs")
    assert doctor.of_metrics(composed()) == "metrics=auto: nothing is missing"


def test_threads_are_those_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "cores", lambda: 64.0)
    assert "OMP_NUM_THREADS=16" in advised(["trainer=ddp", "trainer.devices=4"], RATES)


def test_what_is_not_tried_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    rows = dict(doctor.left_out(composed("compile=true", "latent_cache=auto", run_dir=tmp_path)))
    assert list(rows) == ["compile", "latent_cache", "run_dir"] and str(tmp_path) in rows["run_dir"]


def test_names_and_texts_stand_in_columns(capsys: pytest.CaptureFixture) -> None:
    doctor.section("a title", [("name", "word " * 30), ("a_name_longer_than_its_columns", "text")])
    first, title, *lines = capsys.readouterr().out.splitlines()
    assert (first, title) == ("", "a title") and lines[0].startswith("  name          word word")
    assert lines[1].startswith(" " * 16 + "word") and lines[-1] == "  a_name_longer_than_its_columns text"
    assert max(map(len, lines)) <= 100


def test_the_estimate_is_images_by_images_a_second(
    elsewhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 8 takes 0.8 s: 10 images a second, 96 of them in 9.6 s, 36,000 an hour."""
    monkeypatch.setattr(trying.Trial, "seconds_per_batch", 0.8)
    text = told(capsys, *TINY["ddpm"], "budget.images=40_000")
    assert "  step          8 images in 0.8 s, 10 images/s; " in text
    assert "  time          40,000 images: about 67 min without judging" in text
    assert "  budget.images=1_800" in text and "  budget.images=36_000" in text


@pytest.mark.parametrize("family", ["progan", "stylegan"])
def test_what_grows_is_tried_at_its_full_size(
    elsewhere: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    levels, grow = [], Growing.grow
    monkeypatch.setattr(Growing, "grow", lambda model: levels.append(grow(model)) or levels[-1])
    assert "\n  grows         at its full size" in told(capsys, *TINY[family])
    assert levels[0] == 0 and set(levels[1:]) == {1.0}
