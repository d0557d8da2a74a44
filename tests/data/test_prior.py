"""Prior preservation: the share of a batch, its order, ranks, resume, caches; what sample.py writes is such a set."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sample
import train
from atelier.checkpoints.store import load, newest
from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.captioned import Captioned
from atelier.data.folders import ImageFolder
from atelier.runs import build
from tests.campaign import differences, flat
from tests.compose import composed
from tests.data.test_folders import data
from tests.runs import test_latents as latents
from tests.runs import test_texts as texts
from tests.runs.test_texts import parts as parts
from tests.tiny import COMMON, UNET

THING, KIND = "a photo of sks dog", "a photo of a dog"
N_OWN, N_PRIOR = 5, 7


def noise_files(root: Path, n: int, first: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator(first + k)).numpy()
        Image.fromarray(pixels).save(root / f"{k}.png")
    return root


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Images of one thing, and of its class."""
    return noise_files(tmp_path / "own", N_OWN), noise_files(tmp_path / "prior", N_PRIOR, 100)


def both(roots: tuple[Path, Path], **more: object) -> Captioned:
    options = {"text": THING, "prior": str(roots[1]), "prior_text": KIND, "batch_size": 6, "image_size": 8}
    return data(Captioned, roots[0], **options | more)


def dealt(module: Captioned, n: int, seen: int = 0, rank: int = 0, ranks: int = 1) -> list[dict]:
    """The next n batches of a rank."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, strategy=strategy)
    module.position = lambda: seen
    module.setup("fit")
    return list(itertools.islice(module.train_dataloader(), n))


@pytest.mark.parametrize(("weight", "batch_size", "prior"), [(1.0, 6, 3), (0.5, 6, 2), (2.0, 6, 4), (0.2, 12, 2)])
def test_a_fixed_share_of_every_batch_is_of_the_prior(
    roots: tuple[Path, Path], weight: float, batch_size: int, prior: int
) -> None:
    """The last images of a batch, each share in whole epochs of its own."""
    own = batch_size - prior
    batches = dealt(both(roots, prior_weight=weight, batch_size=batch_size), 20)
    for batch in batches:
        assert batch["text"] == [THING] * own + [KIND] * prior
        assert [index >= N_OWN for index in batch["index"].tolist()] == [False] * own + [True] * prior
    for part, n in ((slice(own), N_OWN), (slice(own, None), N_PRIOR)):
        order = torch.cat([batch["index"][part] for batch in batches])
        epochs = [order[k : k + n].tolist() for k in range(0, len(order) - n, n)]
        assert len(epochs) > 2 and all(len(set(epoch)) == n for epoch in epochs) and epochs[0] != epochs[1]


def test_pixels_are_those_of_the_files(roots: tuple[Path, Path]) -> None:
    module = both(roots)
    files = [data(ImageFolder, root, image_size=8).split("train") for root in roots]
    together = torch.cat([images.read([*range(len(images))], None)["image"] for images in files])
    for batch in dealt(module, 3):
        assert torch.equal(batch["image"], together[batch["index"]])
    assert len(module.split("test")) == N_OWN and module.test_batch(0, 2)["text"] == [THING, THING]


def test_a_batch_is_known_by_its_place_and_ranks_see_parts_of_it(roots: tuple[Path, Path]) -> None:
    whole = [batch["index"].tolist() for batch in dealt(both(roots, batch_size=4), 6)]
    assert [batch["index"].tolist() for batch in dealt(both(roots, batch_size=4), 4, seen=8)] == whole[2:]
    first, second = (
        [batch["index"].tolist() for batch in dealt(both(roots, batch_size=4), 6, rank=rank, ranks=2)]
        for rank in (0, 1)
    )
    for batch, a, b in zip(whole, first, second, strict=True):
        assert sorted(a + b) == sorted(batch) and [k >= N_OWN for k in a] == [k >= N_OWN for k in b] == [False, True]
    with pytest.raises(UserError, match=r"batch_size=6: its share of 3 images does not .* 3 ranks|by 2 ranks") as error:
        dealt(both(roots), 1, ranks=2)
    assert error.value.fix == "data.batch_size=12"


def test_a_limit_leaves_the_prior(roots: tuple[Path, Path]) -> None:
    module = both(roots, limit=2)
    assert module.n_train == 2 + N_PRIOR
    own = {k for batch in dealt(module, 8) for k in batch["index"].tolist() if k < N_OWN}
    assert own == set([k for k in module.order("train") if k < N_OWN][:2])


def test_without_a_prior_the_order_is_what_it_was(roots: tuple[Path, Path]) -> None:
    plain = data(Captioned, roots[0], text=THING, image_size=8, batch_size=2)
    order = torch.cat([torch.randperm(N_OWN, generator=generator(0, epoch)) for epoch in range(2)])
    assert torch.equal(torch.cat([batch["index"] for batch in dealt(plain, 5)]), order)


def test_the_prior_is_part_of_what_is_trained_on_alone(roots: tuple[Path, Path]) -> None:
    plain = data(Captioned, roots[0], text=THING, image_size=8)
    found = {split: both(roots).fingerprint(split) for split in ("train", "test")}
    assert found["test"] == plain.fingerprint("test") and found["train"] != plain.fingerprint("train")
    assert both(roots, prior_text="a dog").fingerprint("train") != found["train"]
    moved = roots[0], Path(shutil.copytree(roots[1], roots[1].with_name("moved")))
    assert both(moved).fingerprint("train") == found["train"]
    noise_files(moved[1], 1, 500)
    assert both(moved).fingerprint("train") != found["train"]


def test_what_is_wrong_with_a_prior_is_one_line(roots: tuple[Path, Path], tmp_path: Path) -> None:
    def line(**more: object) -> str:
        with pytest.raises(UserError) as error:
            both(roots, **more).split("train")
        return error.value.line()

    told = line(prior=str(tmp_path / "priors"))
    assert told.startswith("error: data.prior=") and f"no such folder. Fix: data.prior={roots[1]}" in told
    told = line(prior_text=None)
    assert "no captions: no captions.tsv" in told and told.endswith("data.prior_text=TEXT")
    assert line(prior=None) == f"error: data.prior_text={KIND}: there is no prior. Fix: data.prior=FOLDER of its images"
    told = line(batch_size=5)
    assert told.startswith("error: data.batch_size=5: no whole number of its images is of the prior, of weight 1.")
    assert told.endswith("Fix: data.batch_size=6")
    assert line(prior_weight=0.3).endswith("Fix: data.batch_size=13")
    assert line(prior_weight=1e-4).endswith("Fix: data.prior_weight=1")
    (roots[1] / "3.png").write_bytes(b"no picture")
    told = line()
    assert told.startswith("error: data.prior=") and "1 of 7 images cannot be read: 3.png" in told


SET = ["data=captioned", "data.image_size=8", "data.batch_size=8", "metrics=none"]


def words(roots: tuple[Path, Path], *more: str) -> list[str]:
    known = [f"data.root={roots[0]}", f"data.cache={roots[0].parent / 'known'}", f"data.text={THING}"]
    return [*SET, *known, f"data.prior={roots[1]}", f"data.prior_text={KIND}", *more]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_loss_is_the_mean_of_both_by_weight(
    roots: tuple[Path, Path], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = texts.changed([*texts.PAGE, *texts.SET], *words(roots, f"data.prior_weight={weight}")[4:])
    model, each = texts.conditioned(cfg), []
    forward = type(model.objective).forward
    noted = lambda *given: each.append(forward(*given)) or each[-1]  # noqa: E731
    monkeypatch.setattr(type(model.objective), "forward", noted)
    model.calibrate(lambda _: [build.data(cfg).chosen("train", range(8))["image"]])
    for batch in dealt(build.data(cfg), 2):
        loss = model.training_step(batch)
        of_prior = torch.tensor([text == KIND for text in batch["text"]])
        wanted = (each[-1][~of_prior].mean() + weight * each[-1][of_prior].mean()) / (1 + weight)
        torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-6)


def test_texts_and_latents_of_both_are_kept(roots: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = texts.changed([*texts.PAGE, *texts.SET], *words(roots, "data.holdout=0.0")[4:])
    model, module = texts.conditioned(cfg), build.data(cfg)
    assert set(texts.asked(cfg, model, module, tmp_path / "texts").texts) == {"", THING, KIND}
    cached = latents.kept(model, module, tmp_path / "latents")
    batch, rngs = [0, N_OWN, N_OWN + N_PRIOR - 1], [generator(k) for k in range(3)]
    mirrored = module.split("train").read(batch, [generator(k) for k in range(3)])["image"]
    torch.testing.assert_close(cached.read(batch, rngs)["moments"], model.moments(mirrored), atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_bit_for_bit_and_never_with_another_prior(roots: tuple[Path, Path], tmp_path: Path) -> None:
    own = [word for word in COMMON if not word.startswith(("data.", "data="))]
    given = ["model=flow", *own, *UNET, *words(roots), "data.holdout=0", "callbacks.grids.n=2"]
    given = [word for word in given if "n_diagnosed" not in word] + ["budget.images=64", "eval.n_diagnosed=0"]
    train.train(composed(*given, run_dir=tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    newest(tmp_path / "again/checkpoints").unlink()
    train.train(composed(*given, run_dir=tmp_path / "again"))
    states = [flat(load(newest(tmp_path / name / "checkpoints"))["state_dict"], "") for name in ("run", "again")]
    assert differences(*states) == []
    noise_files(roots[1], 1, 500)
    with pytest.raises(UserError, match="was started on other images"):
        train.train(composed(*given, "budget.images=96", run_dir=tmp_path / "run"))
    with pytest.raises(UserError, match=r"data\.prior_weight=3\.0: the run in .* was started with 1\.0"):
        train.train(composed(*given, "data.prior_weight=3.0", run_dir=tmp_path / "run"))


def test_what_sample_py_writes_is_a_prior(
    tmp_path: Path, roots: tuple[Path, Path], parts: list[str], capsys: pytest.CaptureFixture
) -> None:
    """With its prompts as captions and without its grid, also when it was asked for anew; and a run trains on it."""
    (roots[0] / "captions.tsv").write_text("".join(f"{k}.png\ta red star\n" for k in range(N_OWN)))
    texts.trained(tmp_path / "base", roots[0], parts, "budget.images=8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red\tstar\n")
    asked = [f"run={tmp_path / 'base'}", f"out={tmp_path / 'made'}", "n=6", "batch_size=4"]
    sample.sample(composed(*asked, f"prompts={prompts}", config="sample"))
    made = roots[0], tmp_path / "made"
    capsys.readouterr()
    module = both(made, prior_text=None)
    assert module.split("train").fields["text"][N_OWN:] == [["a dog"], ["a red star"]] * 3
    told = capsys.readouterr().err.splitlines()
    assert "have no caption" not in "".join(told) and f"{made[1]}: left out are 1 files" in told[-1]
    assert len(both(made).split("train")) == N_OWN + 6 and len(data(ImageFolder, made[1]).split("train")) == 6
    sample.sample(composed(*asked, "n=4", "prompt=a cat", config="sample"))
    assert both(made, prior_text=None).split("train").fields["text"][N_OWN:] == [["a cat"]] * 4
    tuned = [f"data.text={THING}", f"data.prior={made[1]}", "data.holdout=0", "budget.images=16"]
    texts.trained(tmp_path / "tuned", roots[0], parts, *tuned, f"text_cache={tmp_path / 'cache'}")
