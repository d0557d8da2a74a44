"""A run that looks its texts up is the run that encodes them, and what cannot be kept is refused."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

import train
from atelier.callbacks.ema import average_of
from atelier.checkpoints.store import load, newest
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.base import DataModule, MemoryImages
from atelier.data.text_cache import TextCache
from atelier.models.ldm import LDM
from atelier.nets.clip import ClipNet
from atelier.nets.conditions import TextEmbedder
from atelier.nets.words import BytePairs
from atelier.runs import build, keeping, texts
from tests.campaign import differences, flat
from tests.compose import composed
from tests.conftest import shared, train_once
from tests.data.test_latent_cache import line_of
from tests.runs.test_latents import changed
from tests.tiny import COMMON

PAGE = ["model=text_to_image", "model.net.width=4", "model.net.multipliers=[1,2]", "model.net.attention=[]"]
SET = ["data=captioned", "data.image_size=8", "data.batch_size=8", "metrics=none"]
CLIP = "model=clip model.net.width=4 model.net.token_dim=8 model.net.heads=2 model.net.max_tokens=14".split()
COLOURS, N = ("red", "green", "blue"), 14


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with one to three captions, some of several images."""
    root = tmp_path / "captioned"
    root.mkdir()
    for k in range(N):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator(k)).numpy()
        Image.fromarray(pixels).save(root / f"{k}.png")
    lines = [f"{k}.png\ta {colour} star beside {k % 5}" for k in range(N) for colour in COLOURS[: 1 + k % 3]]
    (root / "captions.tsv").write_text("\n".join(lines))
    return root


def of_folder(root: Path, *more: str) -> DictConfig:
    return changed([*PAGE, *SET, *more], f"data.root={root}", f"data.cache={root.parent / 'known'}")


def captioned(root: Path, *more: str) -> DataModule:
    data = build.data(of_folder(root, *more))
    data.prepare_data()
    return data


def conditioned(cfg: DictConfig, *more: str) -> LDM:
    """A fresh model on an untrained first stage and an untrained text encoder."""
    pages = {
        name: CLIP if name.endswith("encoder") else ["model=vae", "model.net.width=4"] for name in build.parts(cfg)
    }
    torch.manual_seed(0)
    lent = {n: build.untrained_part(composed(*page, "data.image_size=8", *more), {}) for n, page in pages.items()}
    return build.on_parts(cfg, lent)


def reader(model: LDM) -> TextEmbedder:
    return model.embedder.sources["text"]


def rank_of(rank: int = 0, ranks: int = 1) -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(is_global_zero=rank == 0, global_rank=rank, world_size=ranks, strategy=strategy)


def asked(cfg: DictConfig, model: LDM, data: DataModule, cache: Path | str) -> TextCache:
    """The cache that a run would look texts up in, which is not made yet."""
    cfg.text_cache = str(cache)
    data.beforehand.clear()
    texts.keep(cfg, model, data)
    return data.beforehand[0].keywords["cache"]


def kept(cfg: DictConfig, model: LDM, data: DataModule, cache: Path) -> TextCache:
    """The same, made by one rank and handed to the model."""
    found = asked(cfg, model, data, cache)
    for work in data.beforehand:
        work(rank_of())
    assert found.check()
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of the frozen encoder."""
    calls: list[list[str]] = []
    original = ClipNet.encode_texts

    def noted(self: ClipNet, texts: list[str]) -> object:
        calls.append(texts)
        return original(self, texts)

    monkeypatch.setattr(ClipNet, "encode_texts", noted)
    return calls


# ---- the same


@pytest.mark.parametrize("reads", ["[vector,tokens]", "[tokens]", "[vector]"])
@pytest.mark.parametrize("null_kind", ["empty", "learned"])
def test_a_loss_with_the_cache_is_that_without_and_encodes_nothing(
    reads: str, null_kind: str, folder: Path, tmp_path: Path, counted: list[list[str]]
) -> None:
    """The same texts, nulls, noise and times; gradients too."""
    page = "model.embedder.sources.text"
    words = [f"{page}.reads={reads}", f"{page}.null_kind={null_kind}", "model.cond_dropout=0.4"]
    cfg = of_folder(folder, *words, *(["model.net.cond_dim=null"] if "vector" not in reads else []))
    model, data = conditioned(cfg), captioned(folder)
    model.codec.scale.fill_(1.0)
    losses: list[list[float]] = []
    for cache in (None, tmp_path / "cache"):
        if cache is not None:
            kept(cfg, model, data, cache)
            counted.clear()
            with torch.inference_mode():  # a shard may be opened while samples are made
                reader(model).null(2)
        losses.append([])
        for k in range(3):
            model.zero_grad()
            torch.manual_seed(k)
            indices = [(k + i) % len(data.split("train")) for i in range(8)]
            loss = model.training_step(data.split("train").read(indices, [generator(k, i) for i in indices]))
            loss.backward()
            gradients = [p.grad.norm() for p in model.trained().values() if p.grad is not None]
            losses[-1] += [float(loss.detach()), float(torch.stack(gradients).norm())]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6 if "vector" not in reads else 1e-5)
    assert losses[1][::2] == pytest.approx(losses[0][::2], rel=1e-6) and len(set(losses[0])) == 6
    assert counted == []


def test_the_same_images_lose_their_text(folder: Path, tmp_path: Path) -> None:
    cfg = of_folder(folder, "model.cond_dropout=0.4")
    model, data = conditioned(cfg), captioned(folder)
    null, vectors = reader(model).null(1).vector, []
    for cache in (None, tmp_path / "cache"):
        if cache is not None:
            kept(cfg, model, data, cache)
        torch.manual_seed(0)
        for k in range(20):
            batch = data.split("train").read([*range(8)], [generator(k, i) for i in range(8)])
            vectors.append(model.embedder(model.condition(batch, ""), 8, model.cond_dropout).vector)
    lost = (torch.stack(vectors) - null).abs().amax(2) < 1e-5  # (40, 8)
    assert torch.equal(lost[:20], lost[20:]) and 0.3 < lost[20:].float().mean() < 0.5


def test_what_is_not_kept_is_encoded(folder: Path, tmp_path: Path, counted: list[list[str]]) -> None:
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    told = {"text": ["a red star beside 0", "a user's prompt"], "negative": ["blue"] * 2}
    without = [model.embedder(told, 2), model.embedder.null(2, told)]
    kept(cfg, model, data, tmp_path / "cache")
    counted.clear()
    for known, before in zip([model.embedder(told, 2), model.embedder.null(2, told)], without, strict=True):
        assert torch.equal(known.vector, before.vector) and torch.equal(known.tokens, before.tokens)
    assert counted == [told["text"], told["negative"]]
    average = average_of(model)["embedder"]
    average.null(3), average({"text": ["a red star beside 0"]}, 1)
    assert len(counted) == 2 and average.sources["text"].kept is reader(model).kept
    assert set(reader(model).kept.texts) == {"", *(t for some in data.split("train").fields["text"] for t in some)}


def test_two_ranks_make_what_one_does(folder: Path, tmp_path: Path) -> None:
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    kept(cfg, model, data, tmp_path / "one")
    for rank in (1, 0):  # the first one calls it finished
        found = asked(cfg, model, data, tmp_path / "two")
        found.begin()
        found.fill(reader(model).encode, texts.AT_ONCE, rank, 2)
    found.finish()
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert one.name == two.name == "embedder.sources.text"
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_a_compiled_embedder_looks_up_too(folder: Path, tmp_path: Path, counted: list[list[str]]) -> None:
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    told = [data.split("train").read([k, k + 1, k + 2], None)["text"] for k in range(4)]
    before = [model.embedder({"text": some}, 3) for some in told]
    kept(cfg, model, data, tmp_path / "cache")
    counted.clear()
    model.embedder.compile(backend="eager")
    for some, known in zip(told, before, strict=True):
        torch.testing.assert_close(model.embedder({"text": some}, 3).tokens, known.tokens)
    assert counted == []


# ---- runs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two finished runs, which text_to_image stands on."""
    root = shared(tmp_path_factory) / "finished"
    root.mkdir(exist_ok=True)
    for family in ("vae", "clip"):
        train_once(root, family, True)
    return [f"model.first_stage.run={root / 'vae'}", f"model.embedder.sources.text.encoder.run={root / 'clip'}"]


def trained(run: Path, folder: Path, parts: list[str], *more: str) -> dict:
    """Weights, averages and optimizers at the end of a tiny run of text_to_image."""
    common = [word for word in COMMON if not word.startswith(("data=", "data.n_", "eval."))]
    words = ["eval.n_samples=4", "eval.n_real=2", "eval.n_diagnosed=0", "eval.every_images=1000", "budget.images=48"]
    words += ["model.sampler.steps=2", f"data.root={folder}", f"data.cache={folder.parent / 'known'}", *parts]
    train.train(composed(*PAGE, *SET, *common, *words, *more, run_dir=run))
    checkpoint = load(newest(run / "checkpoints"))
    told = {k: checkpoint[k] for k in ("state_dict", "callbacks", "optimizer_states")}
    told["callbacks"] = {k: v for k, v in told["callbacks"].items() if "Work" not in k}  # what encoding costs
    return flat(told, "")


def test_a_run_with_the_cache_is_one_without_to_rounding_and_resumes_bit_for_bit(
    tmp_path: Path,
    folder: Path,
    parts: list[str],
    counted: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    step, during = LDM.training_step, []

    def noted(self: LDM, batch: dict) -> Tensor:
        before = len(counted)
        loss = step(self, batch)
        during.append(len(counted) - before)
        return loss

    monkeypatch.setattr(LDM, "training_step", noted)
    plain = trained(tmp_path / "plain", folder, parts)
    assert len(during) == 6 and set(during) <= {1, 2}  # the texts of a batch, and the empty one where one is left out
    during.clear()
    cached = trained(tmp_path / "run", folder, parts, f"text_cache={tmp_path / 'cache'}")
    assert during == [0] * 6
    assert f"training reads encodings of 14 texts, 0.0 MB in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert cached.keys() == plain.keys() and not [name for name in cached if "kept" in name]
    tensors = [name for name, value in plain.items() if isinstance(value, Tensor)]
    assert len(tensors) > 100
    for name in tensors:
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-3, atol=1e-4)
    sizes = [newest(tmp_path / run / "checkpoints").stat().st_size for run in ("plain", "run")]
    assert abs(sizes[0] - sizes[1]) < 1000
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    newest(tmp_path / "again/checkpoints").unlink()  # as if it had ended after its last checkpoint but one
    moved, during[:] = shutil.move(tmp_path / "cache", tmp_path / "moved"), []
    assert differences(cached, trained(tmp_path / "again", folder, parts, f"text_cache={moved}")) == []
    assert during == [0] * 3


# ---- which


def test_auto_is_a_folder_for_each_identity(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path))
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    folders = [asked(cfg, model, captioned(folder, *more), "auto").folder for more in ([], ["data.limit=3"])]
    folders.append(asked(cfg, model, captioned(folder, "data.seed=3", "data.flip=false"), "auto").folder)
    alone = of_folder(folder, "model.embedder.sources.text.reads=[vector]")
    folders.append(asked(alone, conditioned(alone), data, "auto").folder)
    with torch.no_grad():
        reader(model).encoder.text.rows.weight[0, 0] += 1e-6
    folders.append(asked(cfg, model, data, "auto").folder)
    assert len(set(folders)) == 4 and folders[0] == folders[2]
    assert {one.parent for one in folders} == {tmp_path / "texts"}


def test_texts_that_are_trained_on_are_kept(folder: Path, tmp_path: Path) -> None:
    cfg, data = of_folder(folder), captioned(folder, "data.limit=3")
    of = {t for k in data.order("train")[:3] for t in data.split("train").fields["text"][k]}
    assert set(asked(cfg, conditioned(cfg), data, tmp_path / "cache").texts) == {"", *of}


@pytest.mark.parametrize(
    ("page", "field"), [("text_to_image", "text"), ("inpaint", "text"), ("instruct_pix2pix", "instruction")]
)
def test_pages_that_see_pixels_keep_their_texts(page: str, field: str, tmp_path: Path) -> None:
    """Texts need no pixels, so what a cache of latents refuses has one of texts."""
    cfg = composed(f"model={page}", "model.net.width=4", "data.image_size=16", "data.n_train_scenes=4")
    model, data = conditioned(cfg, "data.image_size=16"), build.data(cfg)
    said = ["make it red", "make it blue", "make it red"]
    data._splits["train"] = MemoryImages(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), {field: said}, False)
    data.limit = 3
    assert kept(cfg, model, data, tmp_path).texts == ["", "make it blue", "make it red"]
    assert reader(model).conditions == (field,) and "make it red" in reader(model).kept


# ---- what makes it stale


def test_captions_that_were_touched_copied_or_moved_are_the_same_texts(folder: Path, tmp_path: Path) -> None:
    cfg = of_folder(folder)
    model = conditioned(cfg)
    kept(cfg, model, captioned(folder), tmp_path / "cache")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert asked(cfg, model, captioned(folder), tmp_path / "cache").check()
    assert asked(cfg, model, captioned(copied), tmp_path / "cache").check()
    moved = shutil.move(copied, tmp_path / "moved")
    assert asked(cfg, model, captioned(moved), tmp_path / "cache").check()
    with (folder / "captions.tsv").open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    (folder / "captions.tsv").write_text("\n".join("\t".join(row) for row in reversed(rows)))
    assert asked(cfg, model, captioned(folder), tmp_path / "cache").check()  # in another order


def test_a_stale_cache_is_refused_by_the_field_that_differs(folder: Path, tmp_path: Path) -> None:
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    kept(cfg, model, data, tmp_path / "cache")
    alone = of_folder(folder, "model.embedder.sources.text.reads=[vector]")
    line = line_of(lambda: asked(alone, conditioned(alone), data, tmp_path / "cache"))
    assert line.startswith("error: text_cache=") and "it was made with tokens of a text=14, this run has 0" in line
    text = (folder / "captions.tsv").read_text()
    (folder / "captions.tsv").write_text(text.replace("a red star beside 0", "a red star beside O"))
    line = line_of(lambda: asked(cfg, model, captioned(folder), tmp_path / "cache"))
    assert "it was made with content of the texts=" in line and "Fix: text_cache=auto" in line
    with torch.no_grad():
        reader(model).encoder.text.rows.weight[0, 0] += 1e-6
    line = line_of(lambda: asked(cfg, model, data, tmp_path / "cache"))
    assert "it was made with text encoder=" in line


def test_another_vocabulary_makes_it_stale() -> None:
    """Of one size, with the same weights: only the tokenizer tells them apart."""
    net = torch.nn.Linear(1, 1)
    rows = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3}
    told = []
    for merges, pad in (([("a", "b")], None), ([("b", "a")], None), ([("a", "b")], 3)):
        net.words = BytePairs(rows, merges, pad)
        told.append(texts.identity(net, 4, ["a"]))
    net.words("a b")  # what it remembers of texts is no part of it
    assert told[2] == texts.identity(net, 4, ["a"])
    assert len({one["tokenizer"] for one in told}) == 3 and len({one["text encoder"] for one in told}) == 1


# ---- what cannot be kept


def test_what_reads_no_texts_or_draws_them_is_refused(tmp_path: Path) -> None:
    cfg = composed("model=text_to_image", "model.net.width=4", "data.image_size=16", "data.n_train_scenes=4")
    line = line_of(lambda: asked(cfg, conditioned(cfg), build.data(cfg), tmp_path))
    problem = "it draws its texts on the spot, so there is no list of them to be kept"
    assert line == f"error: data=Shapes: {problem}. Fix: text_cache=null"
    cfg = composed("model=ddpm", "model.net.width=4", "data.image_size=16", "data.n_train_scenes=4")
    line = line_of(lambda: asked(cfg, build.on_parts(cfg, {}), build.data(cfg), "auto"))
    assert line == "error: text_cache=auto: DDPM reads no texts by a frozen encoder. Fix: text_cache=null"


def test_an_encoder_that_gives_no_finite_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    cfg = of_folder(folder)
    model, data = conditioned(cfg), captioned(folder)
    with torch.no_grad():
        encoder = reader(model).encoder
        encoder.text.rows.weight[encoder.words("green")[1]] = torch.inf
    with pytest.raises(
        UserError, match="the text encoder gives 'a green star beside .' an encoding that is not finite"
    ):
        kept(cfg, model, data, tmp_path / "cache")
    assert reader(model).kept is None


def test_what_one_rank_meets_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/runs/test_latents.py` has the exchange itself; here, that nothing is finished then."""
    done: list[str] = []
    cache = SimpleNamespace(
        check=lambda: False,
        begin=lambda: done.append("begin"),
        finish=lambda: done.append("finish"),
        describe=lambda: "rows",
    )

    def fill() -> None:
        raise UserError("text_cache", "x", "the disk is full", "y")

    with pytest.raises(UserError, match="the disk is full"):
        keeping.made(rank_of(), cache, fill)
    assert done == ["begin"]
