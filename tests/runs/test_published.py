"""First stages that were published: linked and hashed as runs are, from a folder or the hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

import train
from atelier.checkpoints import diffusers_folder, forms, single_file, taesd_files, transformers_folder, weight_files
from atelier.checkpoints.store import newest
from atelier.cli.messages import user_error
from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models import first_stage
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.taesd import TAESD
from atelier.nets.words import BytePairs
from atelier.runs import build, folders, preflight, pretrained, resume
from tests.checkpoints import test_single_file as files
from tests.checkpoints import test_transformers_folder as transformers_text
from tests.compose import composed
from tests.conftest import overrides
from tests.models import test_diffusers_pipeline as pipeline
from tests.nets.test_taesd import shaken, small, written
from tests.tiny import COMMON

PLACE = "owner/name"
LAYOUT = {"image_size": 16, "image_channels": 3, "width": 4, "multipliers": [1, 2], "n_blocks": 1, "attention": []}
LAYOUT |= {"middle_attention": False, "norm_groups": 2, "dropout": 0.0, "latent_channels": 2}


def words(page: str, place: Path | str, *more: str) -> list[str]:
    """A tiny ldm of 16 px on a published first stage."""
    kept = [word for word in overrides("ldm") if "first_stage" not in word]
    chosen = [f"first_stage@model.first_stage={page}", f"model.first_stage.run={place}"]
    return [*kept, "data.image_size=16", *chosen, *more]


def linked(folder: Path, *given: str) -> DictConfig:
    cfg = composed(*given, run_dir=folder)
    preflight.check(cfg)
    pretrained.link_pretrained(cfg, folder)
    return cfg


def autoencoder(folder: Path, **config: float) -> Path:
    """A folder of diffusers whose config.json says these numbers."""
    torch.manual_seed(0)
    diffusers_folder.write(KLNet(**LAYOUT), folder)
    path = folder / diffusers_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds owner/name, as the hub lays it out; nothing is ever downloaded."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    page, blobs = root / "models--owner--name", root / "models--owner--name/blobs"
    for below in ("", "vae"):
        snapshot = page / "snapshots" / "abc" / below
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in autoencoder(blobs, scaling_factor=0.18215).iterdir():
            (snapshot / file.name).symlink_to(file)
    (page / "refs").mkdir()
    (page / "refs/main").write_text("abc")
    return root


def test_a_run_on_taef2_is_whole_by_itself_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    given = written(tmp_path / "files", small())
    told = words("taef2", given, "model.net.multipliers=[1,1]")
    train.train(composed(*told, "budget.images=8", run_dir=tmp_path / "run"))
    shutil.rmtree(given)
    train.train(composed(*told, "budget.images=16", run_dir=tmp_path / "run"))
    loaded = folders.load(tmp_path / "run", ema=True)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = small().half().float().encode(x)[0]
    torch.testing.assert_close(loaded.model.codec.centre(x), expected * loaded.model.codec.scale)
    assert loaded.images_seen == 16 and not [name for name in loaded.model.state_dict() if "autoencoder" in name]
    cond = loaded.model.condition(loaded.data.test_batch(0, 2), "")
    assert loaded.model.sample(cond, ImageRngs(0, 0, 2)).isfinite().all()


def test_a_run_on_a_text_encoder_of_transformers_is_whole_by_itself(tmp_path: Path) -> None:
    """Its tokenizer, which diffusers keeps in a folder beside it, comes with it, padding included."""
    pipeline, files = tmp_path / "pipeline", tmp_path / "files"
    for folder in (pipeline / "tokenizer", files):
        folder.mkdir(parents=True)
    transformers_text.written(pipeline / "text_encoder", pad="!")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (pipeline / "text_encoder" / name).rename(pipeline / "tokenizer" / name)
    texts = ["a cab", "it's a 9"]
    wanted = transformers_folder.text_encoder(str(pipeline / "text_encoder")).encode_texts(texts)
    given = [f"model.first_stage.run={written(files, small())}", "model.net.multipliers=[1,1]", "model.net.width=4"]
    given += [f"model.embedder.sources.text.encoder.run={pipeline / 'text_encoder'}", "data.image_size=16"]
    given += ["model=text_to_image", "first_stage@model.first_stage=taef2", "model.net.attention=[]"]
    kept = [word for word in COMMON if not word.startswith("data.image_size")]
    train.train(composed(*kept, *given, "budget.images=8", run_dir=tmp_path / "run"))
    shutil.rmtree(pipeline)
    train.train(composed(*kept, *given, "budget.images=16", run_dir=tmp_path / "run"))
    encoder = folders.load(tmp_path / "run", ema=True).model.embedder.sources["text"].frozen.net
    torch.testing.assert_close(encoder.encode_texts(texts).tokens, wanted.tokens, atol=0, rtol=0)
    copy = tmp_path / "run/frozen/embedder.sources.text.encoder"
    (copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="these are not the weights that this run stands on"):
        folders.load(tmp_path / "run", ema=True)


def test_a_net_whose_scheduler_says_otherwise_is_refused(tmp_path: Path) -> None:
    case = pipeline.CASES["SD2 v zero SNR"]
    folder = pipeline.written(tmp_path / "pipeline", case.kind, case.scheduler)
    given = ["model=stable_diffusion", f"model.net.run={folder}", "data.image_size=32"]
    with pytest.raises(UserError) as caught:
        linked(tmp_path / "run", *given)
    target = (
        "error: model.objective.target=Epsilon: its scheduler_config.json says v. Fix: target@model.objective.target=v"
    )
    assert caught.value.line() == target
    with pytest.raises(
        UserError, match=r"model.objective.schedule=ScaledLinear: its .* other noise levels, ZeroTerminal"
    ):
        linked(tmp_path / "run", *given, "target@model.objective.target=v")
    right = [*given, "target@model.objective.target=v", "schedule@model.objective.schedule=zero_terminal"]
    cfg = linked(tmp_path / "run", *right)
    assert sorted(path.name for path in (tmp_path / "run/frozen").iterdir()) == sorted(build.parts(cfg))


@pytest.mark.parametrize(("page", "channels", "right"), [
    ("stable_diffusion", 9, "stable_diffusion_inpaint"), ("stable_diffusion_inpaint", 8, "stable_diffusion_edit"),
    ("sdxl", 4, "stable_diffusion"),
])  # fmt: skip
def test_a_net_of_another_page_is_told_its_own(page: str, channels: int, right: str, tmp_path: Path) -> None:
    case = pipeline.CASES["SD1 PNDM"]
    folder = pipeline.written(tmp_path / "pipeline", case.kind, case.scheduler, in_channels=channels)
    with pytest.raises(UserError) as caught:
        linked(tmp_path / "run", f"model={page}", f"model.net.run={folder}", "data.image_size=32")
    assert (caught.value.key, caught.value.value, caught.value.fix) == ("model", page, f"model={right}")
    assert caught.value.problem.startswith("the net in ") and caught.value.problem.endswith(f" is one of {right}")


def test_a_single_file_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path / "cache"))
    rows, merges = transformers_text.ROWS, [tuple(line.split()) for line in transformers_text.MERGES]
    monkeypatch.setattr(BytePairs, "published", lambda path: BytePairs(rows, merges))
    model = files.wide("sd1")
    single_file.write(tmp_path / "sd.safetensors", files.parts_of(model))
    given = ["model=stable_diffusion_inpaint", f"model.net.run={tmp_path / 'sd.safetensors'}", "data.image_size=32"]
    with pytest.raises(UserError, match=r"error: model.net.vocabulary=None: a single file has no tokenizer. Fix: "):
        linked(tmp_path / "run", *given)
    unpacked = f"unpacking {tmp_path / 'sd.safetensors'} into "
    assert capsys.readouterr().err.count(unpacked) == 1
    cfg = linked(tmp_path / "run", *given, "model.net.vocabulary=PATH")
    net = build.part(tmp_path / "run/frozen/net", cfg.model.net.sha256, cfg)
    files.same(net, model["unet"])
    words = ["vocab.json", "merges.txt", "tokenizer_config.json"]
    copy = tmp_path / "run/frozen/embedder.sources.text.encoder"
    assert sorted(path.name for path in copy.iterdir()) == sorted(["config.json", "model.safetensors", *words])
    linked(tmp_path / "again", *given)
    assert unpacked not in capsys.readouterr().err


def test_a_checkpoint_is_what_is_trained_and_little_else(tmp_path: Path) -> None:
    """Denoiser, averages and two moments; the first stage, which is as large as the denoiser, is in none of it."""
    (tmp_path / "files").mkdir()
    net = shaken(TAESD(image_size=16, width=64, latent_channels=32))
    told = words("taef2", written(tmp_path / "files", net), "model.net.multipliers=[1,1]", "model.net.width=64")
    train.train(composed(*told, "budget.images=8", "checkpoint.every_images=8", run_dir=tmp_path / "run"))
    model = folders.load(tmp_path / "run", ema=True).model
    trained = sum(p.numel() * p.element_size() for p in model.trained("net", "embedder").values())
    first = sum(p.numel() * p.element_size() for p in net.parameters())
    size = newest(tmp_path / "run/checkpoints").stat().st_size
    assert size <= 1.05 * trained * (1 + 2 + 2) < size + first  # two half-lives


@pytest.mark.parametrize("half", taesd_files.FILES)
def test_either_file_of_taef2_is_known_by_the_hash(tmp_path: Path, half: str) -> None:
    given = written(tmp_path, small())
    cfg = linked(tmp_path / "run", *words("taef2", given))
    copy = tmp_path / "run/frozen/first_stage"
    assert sorted(path.name for path in copy.iterdir()) == sorted(taesd_files.FILES)
    build.part(copy, cfg.model.first_stage.sha256, cfg)
    state = torch.load(copy / half, weights_only=True)
    (copy / half).unlink()
    torch.save({name: value + 1e-3 for name, value in state.items()}, copy / half)
    with pytest.raises(UserError, match="these are not the weights that this run stands on"):
        build.part(copy, cfg.model.first_stage.sha256, cfg)


@pytest.mark.parametrize("page", ["taef2", "sd_vae"])
def test_weights_that_are_no_numbers_are_refused_at_loading(tmp_path: Path, page: str) -> None:
    """Else pictures would be black without a word."""
    if page == "taef2":
        net = small()
        net.decoder[1].bias.data[0] = torch.nan
        written(tmp_path, net)
    else:
        autoencoder(tmp_path, scaling_factor=0.18215)
        path = tmp_path / diffusers_folder.WEIGHTS
        state = load_file(path)
        state["decoder.conv_in.bias"][0] = torch.inf
        save_file(state, path)
    cfg = linked(tmp_path / "run", *words(page, tmp_path))
    with pytest.raises(UserError, match=r"model\.first_stage(\.run)?=.*not all numbers of decoder\..*bias are finite"):
        build.part(tmp_path / "run/frozen/first_stage", cfg.model.first_stage.sha256, cfg)


@pytest.mark.parametrize("place", [PLACE, f"{PLACE}/vae"])
def test_the_cache_of_the_hub_is_enough(tmp_path: Path, cache: Path, place: str) -> None:
    """What is linked are the weights, not the cache's links to them; the key stays what was typed."""
    told = words("sd_vae", place)
    cfg = linked(tmp_path / "run", *told)
    shutil.rmtree(cache)
    first = cfg.model.first_stage
    assert first.run == place and first.sha256 == forms.digest(tmp_path / "run/frozen/first_stage")
    model = build.model(cfg, tmp_path / "run")
    torch.manual_seed(0)
    expected, x = KLNet(**LAYOUT), torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(x), expected.encode(x)[0] * 0.18215)
    assert model.codec.given and model.codec.scale == pytest.approx(0.18215)


def test_what_the_cache_lacks_is_downloaded_only_where_that_was_asked_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo, allow_patterns, local_files_only))
        if local_files_only:
            return kept(repo, allow_patterns=allow_patterns, local_files_only=True)
        return str(autoencoder(tmp_path / "got/vae", scaling_factor=0.18215).parent)

    kept = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"run=owner/other: it is no folder here, nor .*model\.first_stage\.fetch=true"):
        linked(tmp_path / "run", *words("sd_vae", "owner/other"))
    linked(tmp_path / "run", *words("sd_vae", "owner/other/vae", "model.first_stage.fetch=true"))
    plain = [diffusers_folder.CONFIG, *weight_files.patterns(diffusers_folder.WEIGHTS)]
    names = [f"vae/{name}" for name in plain]
    assert asked == [("owner/other", plain, True), ("owner/other", names, False)]
    with pytest.raises(UserError, match=r"could not be downloaded \(no diffusion_pytorch"):
        linked(tmp_path / "run", *words("sd_vae", "owner/other", "model.first_stage.fetch=true"))


def test_the_download_need_not_be_asked_for_again_to_go_on(tmp_path: Path) -> None:
    told = words("sd_vae", autoencoder(tmp_path / "files", scaling_factor=0.18215))
    resume.reconcile_config(composed(*told, "model.first_stage.fetch=true", run_dir=tmp_path), tmp_path)
    again = resume.reconcile_config(composed(*told, run_dir=tmp_path), tmp_path)
    assert again.model.first_stage.sha256 == forms.digest(tmp_path / "files")


def test_another_scale_than_the_published_one_is_one_line(tmp_path: Path) -> None:
    given = autoencoder(tmp_path / "files", scaling_factor=0.3611, shift_factor=0.1159)
    for more, key in (((), "scale=0.18215"), (("model.first_stage.scale=0.3611",), "shift=0.0")):
        with pytest.raises(UserError, match=rf"model\.first_stage\.{key}: its config\.json says "):
            linked(tmp_path / "run", *words("sd_vae", given, *more))
    both = "model.first_stage.scale=0.3611", "model.first_stage.shift=0.1159"
    right = linked(tmp_path / "run", *words("sd_vae", given, *both))
    assert (right.model.codec.scale, right.model.codec.shift) == (0.3611, 0.1159)
    assert linked(tmp_path / "run", *words("sd_vae", given, "model.first_stage.scale=null")).model.codec.scale is None


def test_what_cannot_be_trained_is_refused_before_anything() -> None:
    with pytest.raises(UserError, match="what is published is not trained"):
        preflight.check(composed(*words("taef2", "auto")))
    with pytest.raises(Exception, match="first_stage.run") as caught:
        preflight.check(composed("model=ldm", "first_stage@model.first_stage=taef2"))
    assert "model.first_stage.run=VALUE" in user_error(caught.value).line()


TUNED = [
    "model=kl_tuned",
    *(word for word in COMMON if "image_size" not in word),
    "data.image_size=16",
    "model.discriminator.width=2",
    "model.discriminator.n_layers=1",
    "model.adversarial_start=8",
    "checkpoint.every_images=8",
]


def test_a_published_autoencoder_is_trained_on(tmp_path: Path) -> None:
    """It starts from the weights of the folder, changes, goes on, and is a first stage as any other."""
    given, run = autoencoder(tmp_path / "files", scaling_factor=0.18215), tmp_path / "run"
    told = [*TUNED, f"model.first_stage.run={given}"]
    begun = build.model(linked(tmp_path / "begun", *told), tmp_path / "begun").net
    torch.manual_seed(0)
    before = KLNet(**LAYOUT).state_dict()
    assert begun.training and all(torch.equal(value, before[name]) for name, value in begun.state_dict().items())
    train.train(composed(*told, "budget.images=8", run_dir=run))
    shutil.rmtree(given)
    train.train(composed(*told, "budget.images=24", run_dir=run))
    after = folders.load(run, ema=True).model.net.state_dict()
    changes = torch.cat([(after[name] - value).abs().flatten() for name, value in before.items()])
    assert 0 < changes.median() < 1e-3 and changes.max() < 1e-2  # three steps of 1e-4, averaged
    first = linked(tmp_path / "ldm", *words("sd_vae", run / "diffusers", "model.first_stage.scale=null"))
    lent = build.model(first, tmp_path / "ldm").codec.autoencoder.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in lent.items())


def test_what_cannot_be_trained_on_is_one_line(tmp_path: Path) -> None:
    cfg = linked(tmp_path / "run", *TUNED, f"model.first_stage.run={written(tmp_path, small())}")
    with pytest.raises(UserError, match=r"model\.first_stage=TAESD: only an AutoencoderKL is trained on"):
        build.model(cfg, tmp_path / "run")
    net = KLNet(**LAYOUT)
    with pytest.raises(Exception, match="there is no net") as caught:
        build.on_parts(composed(*TUNED), {"first_stage": None})
    assert "Fix: model=autoencoder_kl" in user_error(caught.value).line()
    with pytest.raises(UserError, match=r"\.net=KLNet: the first stage has the net already. Fix: model=kl_tuned"):
        first_stage._one(net, net)


@pytest.mark.parametrize("said", ["v", "epsilon", None])
def test_the_target_of_a_single_file_of_version_2_is_told(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By the file where it says it, else by the page, which one line tells."""
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path / "cache"))
    rows, merges = transformers_text.ROWS, [tuple(line.split()) for line in transformers_text.MERGES]
    monkeypatch.setattr(BytePairs, "published", lambda path: BytePairs(rows, merges))
    file = tmp_path / "sd.safetensors"
    single_file.write(file, files.parts_of(files.wide("sd2")))
    save_file(load_file(file), file, metadata=None if said is None else {"modelspec.prediction_type": said})
    given = [f"model.net.run={file}", "data.image_size=32", "model.net.vocabulary=PATH"]
    line = "net: nothing says what this net answers, {} is taken; version 2 of 768 px says v, its base of 512 px eps"
    for page, target in (("stable_diffusion", "eps"), ("stable_diffusion_2", "v")):
        if said is None or {"v": "v", "epsilon": "eps"}[said] == target:
            linked(tmp_path / "run", f"model={page}", *given)
        else:
            with pytest.raises(UserError, match=rf"says {'v' if target == 'eps' else 'eps'}\. Fix: target@model"):
                linked(tmp_path / "run", f"model={page}", *given)
        assert (line.format(target) in capsys.readouterr().out) == (said is None)


def test_a_whole_pipeline_is_taken_from_the_cache_of_the_hub_by_its_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts of it, asked for with one name; what checks pictures is not asked for."""
    page = cache / "models--owner--sd"
    place = page / "snapshots" / "abc"
    pipeline.written(place, "SD1", pipeline.CASES["SD1 DDIM"].scheduler)
    (page / "refs").mkdir()
    (page / "refs" / "main").write_text("abc")
    asked: list[str] = []
    kept = huggingface_hub.snapshot_download

    def watched(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.extend(allow_patterns)
        return kept(repo, allow_patterns=allow_patterns, local_files_only=local_files_only)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    told = ["model=stable_diffusion", "model.net.run=owner/sd", "data.image_size=64"]
    cfg = linked(tmp_path / "run", *told)
    for name, part in {"net": "unet", "first_stage": "vae", "embedder.sources.text.encoder": "text_encoder"}.items():
        assert forms.digest(tmp_path / "run" / "frozen" / name) == forms.digest(place / part)
        assert build.section(cfg, name).run == "owner/sd"
    assert folders.find("owner/sd") == place
    assert "unet/config.json" in asked and not any("safety" in name or name.startswith("*") for name in asked)
    with pytest.raises(
        UserError, match=r"model\.net\.run=owner/other: it is no folder here, nor .*model\.net\.fetch=true"
    ):
        linked(tmp_path / "other", "model=stable_diffusion", "model.net.run=owner/other")
