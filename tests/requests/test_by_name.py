"""Classes and attributes by name: of every kind of set, of every family that is conditional, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import sample as entry
from atelier.cli import usage
from atelier.core.errors import UserError
from atelier.data.base import DataModule
from atelier.data.celeba import CelebA
from atelier.data.cifar10 import CIFAR10
from atelier.data.classes import ClassFolders
from atelier.data.mnist import MNIST, FashionMNIST
from atelier.images.pictures import LINE, png_texts
from atelier.models.base import Generator
from atelier.models.stargan import StarGAN
from atelier.requests.request import Request
from atelier.runs import build, folders
from tests.compose import composed
from tests.data import test_folders, test_hugging_face, test_published
from tests.requests.test_files import WORDS, save
from tests.test_entry_points import cli
from tests.tiny import PICTURELESS, TINY

HAD, NAME = 25, "green ring"  # the label of the tiny test split's first image
FAMILIES = [family for family in TINY if family not in PICTURELESS]


def shapes(_: Path) -> DataModule:
    return build.data(composed(*TINY["gan"]))


def fashion(root: Path) -> DataModule:
    return test_published.data(FashionMNIST, root)


def cifar10(root: Path) -> DataModule:
    return test_published.data(CIFAR10, root)


def mnist(root: Path) -> DataModule:
    return test_published.data(MNIST, root)


def classes(root: Path) -> DataModule:
    made = test_folders.classes(root, cat=2, dog=1)
    (root / "dog").rename(root / "a dog (big)")
    return test_folders.data(ClassFolders, made, n_classes=2)


def odd_classes(root: Path) -> DataModule:
    """One folder has a name of other bytes than text."""
    made = test_folders.classes(root, cat=2, dog=1)
    (root / "dog").rename(root / "d\udcffg")
    return test_folders.data(ClassFolders, made, n_classes=2, n_attributes=2)


def hugging_face(root: Path) -> DataModule:
    return test_hugging_face.opened(test_hugging_face.saved(root, 4), {"label": "kind"}, n_classes=2)


def plain_numbers(root: Path) -> DataModule:
    """A dataset of Hugging Face whose labels are whole numbers and no ClassLabel."""
    kinds = test_hugging_face.KINDS | {"kind": datasets.Value("int64")}
    test_hugging_face.table(4).cast(datasets.Features(kinds)).save_to_disk(root)
    return test_hugging_face.opened(root, {"label": "kind"}, n_classes=2)


def celeba(root: Path) -> DataModule:
    test_published.write_celeba(root)
    return test_published.data(CelebA, root, attributes=["A7", "A2"], n_attributes=2)


@pytest.mark.parametrize(("opened", "some", "n", "attributes"), [
    (shapes, {0: "red circle", HAD: NAME, 35: "cyan cross"}, 36, 14),
    (fashion, {0: "T-shirt/top", 1: "Trouser", 9: "Ankle boot"}, 10, 0),
    (cifar10, {0: "airplane", 3: "cat", 9: "truck"}, 10, 0),
    (mnist, {}, 0, 0),
    (classes, {0: "a dog (big)", 1: "cat"}, 2, 0),
    (odd_classes, {0: "cat", 1: r"'d\udcffg'"}, 2, 2),
    (hugging_face, {0: "a", 1: "b"}, 2, 0),
    (plain_numbers, {}, 0, 0),
    (celeba, {}, 0, 2),
])  # fmt: skip
def test_a_set_says_what_its_labels_are_called(
    tmp_path: Path, opened: object, some: dict[int, str], n: int, attributes: int
) -> None:
    names = opened(tmp_path / "set").names
    assert (len(names.labels), len(names.attributes)) == (n, attributes)
    assert {k: names.labels[k] for k in some} == some
    assert {name for group in names.exclusive for name in group} <= set(names.attributes)
    json.dumps([names.labels, names.attributes]).encode("ascii")  # as runs keep them
    " ".join(names.labels).encode()  # as pictures do


def test_names_of_shapes_are_those_of_their_captions() -> None:
    data = shapes(Path())
    batch = data.split("test").read(list(range(16)), None)
    for text, label in zip(batch["text"], batch["label"].tolist(), strict=True):
        assert set(data.names.called(label).split()) <= set(text.split())
    for group in data.names.exclusive:
        places = [data.names.attributes.index(name) for name in group]
        assert (batch["attributes"][:, places].sum(1) == 1).all()


def of(model: Generator, data: DataModule, **words: object) -> Request:
    missing = {"attributes": None, "scale_factor": None}
    return Request.of(model, data, {}, WORDS | missing | words)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_conditional_family_is_asked_by_name(finished: dict[str, Path], family: str) -> None:
    """A label's pictures are those of its number; attributes that change take the place of the test images' own."""
    run = folders.load(finished[family], True)
    model, data, known = run.model, run.data, []
    if "label" in model.needs:
        known.append("label")
        by_name = of(model, data, label="Green_Ring").items
        assert by_name == of(model, data, label=HAD).items
        assert data.split("test").labels[by_name].tolist() == [HAD] * len(by_name)
    if "attributes" in model.needs:
        known.append("attributes")
        own = data.test_batch(0, 5)["attributes"]
        field = "target" if "target" in model.needs else "attributes"
        changed = of(model, data, attributes=["+cyan", "-striped"]).conditions(0, 5)[field]
        places = [data.names.attributes.index(name) for name in (*data.names.exclusive[0], "striped")]
        others = [k for k in range(14) if k not in places]
        assert changed[:, places].tolist() == [[0, 0, 0, 0, 0, 1, 0]] * 5
        assert torch.equal(changed[:, others].cpu(), own[:, others]) and own[:, others].any()
        alone = of(model, data, attributes="cyan").conditions(0, 5)[field]
        assert alone.sum(1).tolist() == [1] * 5 and alone[:, places[5]].all()
    for key, typed in (("label", NAME), ("attributes", "+cyan")):
        if key not in known:
            with pytest.raises(UserError, match=f"leave {key} out"):
                of(model, data, **{key: typed})


def test_several_labels_come_in_turn(finished: dict[str, Path]) -> None:
    """Each with its own test images, which come round again."""
    run = folders.load(finished["gan"], True)
    labels = run.data.split("test").labels
    counts = labels.bincount(minlength=36)
    often = int(counts.argmax())
    seldom = next(k for k in range(36) if 0 < counts[k] < counts[often])
    request = of(run.model, run.data, label=[run.data.names.called(often), seldom])
    asked = request.conditions(0, 7)["label"].tolist()
    assert asked == [often, seldom, often, seldom, often, seldom, often]
    assert set(request.items) == set(((labels == often) | (labels == seldom)).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("words", "line"), [
    ({"label": "green rng"}, "Fix: 'label=green ring'"),
    ({"label": [HAD, "reed star"]}, "Fix: 'label=red star'"),
    ({"label": NAME, "do": "project"}, "do=project is of the test images in order"),
    ({"attributes": "+cyan", "do": "project"}, "do=project is of the test images in order"),
    ({"label": None, "do": "project", "source": "x.png"}, "Fix: 'label=red circle'"),
])  # fmt: skip
def test_a_mistake_names_what_there_is(finished: dict[str, Path], words: dict[str, object], line: str) -> None:
    run = folders.load(finished["gan"], True)
    with pytest.raises(UserError) as error:
        of(run.model, run.data, **words)
    assert line in error.value.line()


def test_what_files_show_is_not_known_to_a_diffusion_model(finished: dict[str, Path]) -> None:
    run = folders.load(finished["ddpm"], True)
    words = {"do": "edit", "source": "x.png"}
    with pytest.raises(UserError, match="what else the files show is not known.*Fix: attributes=red,small"):
        of(run.model, run.data, **words, attributes=["+red", "+small"])
    request = of(run.model, run.data, **words, attributes=["red", "small"])
    assert not request.unknown and request.conditions(3, 1)["attributes"].sum() == 2


def test_guidance_without_a_condition_offers_what_the_model_knows(finished: dict[str, Path]) -> None:
    run = folders.load(finished["ddpm"], True)
    words = WORDS | {"do": "edit", "source": "x.png", "attributes": None, "scale_factor": None}
    for needs, fix in (({"label", "attributes"}, "label=0"), ({"attributes"}, "attributes=NAMES")):
        run.model.needs = frozenset(needs)
        with pytest.raises(UserError, match=f"guidance needs something to lead to. Fix: {fix}, or leave guidance out"):
            Request.of(run.model, run.data, {"guidance": 2.0}, words)


def test_a_translator_keeps_what_its_discriminator_sees_in_a_file(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the set is not there to say its names."""
    for name in ("label_names", "attribute_names", "exclusive_attributes", "images"):
        monkeypatch.setattr(f"atelier.data.shapes.Shapes.{name}", property(lambda self: pytest.fail("no set here")))
    save(tmp_path / "in.png", 8, 8)
    asked: list[Tensor] = []
    made = StarGAN.sample
    monkeypatch.setattr(StarGAN, "sample", lambda *a: asked.append(a[1]["target"]) or made(*a))
    words = f"run={finished['stargan']}", f"source={tmp_path / 'in.png'}", f"out={tmp_path / 'out'}"
    entry.sample(composed(*words, "attributes=[+red,-large]", config="sample"))
    model = folders.load(finished["stargan"], True).model
    x = torch.from_numpy(np.array(Image.open(tmp_path / "in.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        seen = (model.discriminator(x)[1] > 0).float()
    expected = seen.clone()
    expected[0, :6], expected[0, 6:8] = torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.tensor([seen[0, 6], 0.0])
    assert torch.equal(asked[0], expected) and not torch.equal(seen, expected) and expected.sum() > 1
    changes = png_texts(tmp_path / "out" / "in.png")["asked"].split()
    told = {"+red": seen[0, 0] == 0, "-large": seen[0, 7] == 1}  # other colours go without saying
    assert set(changes) == {word for word, new in told.items() if new} and "+red" in changes


def test_a_translator_between_classes_sees_one_of_them() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0], [4.0, 1.0, 3.0]])
    for exclusive, expected in ((True, [[0, 1, 0], [1, 0, 0]]), (False, [[0, 0, 0], [1, 1, 1]])):
        model = SimpleNamespace(exclusive=exclusive, device="cpu", discriminator=lambda x: (x, logits))
        assert StarGAN.attributes_of(model, torch.zeros(2, 3, 4, 4)).tolist() == expected


def test_the_names_are_written_and_read_again(finished: dict[str, Path], tmp_path: Path) -> None:
    """In the request, in each picture, and below each picture of the grid, which has a column for each label."""
    out = tmp_path / "out"
    entry.sample(composed(f"run={finished['ddpm']}", f"label={HAD}", "n=4", f"out={out}", config="sample"))
    request, picture = OmegaConf.load(out / "request.yaml"), out / "000002.png"
    assert request.label == NAME and png_texts(picture)["asked"] == NAME
    entry.sample(composed(f"like={picture}", f"out={tmp_path / 'again'}", config="sample"))
    first, again = (np.array(Image.open(folder / picture.name), dtype=int) for folder in (out, tmp_path / "again"))
    assert abs(first - again).max() <= 1
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (2 + 2 * 66, 2 + 2 * (66 + LINE))
        assert np.array(grid)[66 : 66 + LINE, 2:66].max() > 200  # words
    labels = folders.load(finished["ddpm"], True).data.test_batch(0, 16)["label"].unique()[:2].tolist()
    entry.sample(composed(f"run={finished['ddpm']}", f"label={labels}", "n=6", f"out={out}", config="sample"))
    told = [png_texts(out / f"{k:06d}.png")["asked"] for k in range(6)]
    assert told == 3 * list(OmegaConf.load(out / "request.yaml").label) and len(set(told)) == 2
    assert Image.open(out / "grid.png").size[0] == 2 + 4 * 66


def test_grids_of_training_have_words_where_classes_are_asked_for(finished: dict[str, Path]) -> None:
    for family, words in (("ddpm", True), ("stargan", True), ("vae", False), ("cyclegan", False)):
        real = next((finished[family] / "samples").glob("*real.png"))
        assert Image.open(real).size[1] == 2 + 2 * (66 + 2 * words * LINE), family


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["sample.py", *words])
    with pytest.raises(SystemExit):
        usage.answer_help()
    return capsys.readouterr().out


def test_help_about_a_run_lists_its_names(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(monkeypatch, capsys, f"run={finished['ddpm']}", "--help")
    assert found.startswith("usage: python sample.py") and max(map(len, found.splitlines())) <= 120 + len(str(tmp_path))
    names = " ".join(found.split(f"names in {finished['ddpm']}\n")[1].split())
    assert names.startswith("label= 0 red circle, 1 green circle,") and ", 35 cyan cross attributes= red, " in names
    before = Path(__file__).parents[1] / "runs_of_before" / "gan"
    assert "keeps no names" in told(monkeypatch, capsys, "--help", f"run={before}")
    assert "error: run=nowhere: no run folder" in told(monkeypatch, capsys, "run=nowhere", "--help")
    assert "names in" not in told(monkeypatch, capsys, "--help")


def test_names_are_typed_plainly(finished: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(finished["ddpm"], tmp_path / "run")
    typed = "label=Green_Ring,yellow square", "attributes=+striped,-small"
    cli(tmp_path, "sample.py", "run=run", "n=2", "out=pictures", *typed)
    request = OmegaConf.load(tmp_path / "pictures" / "request.yaml")
    assert request.label == [NAME, "yellow square"] and request.attributes == ["+striped", "-small"]
