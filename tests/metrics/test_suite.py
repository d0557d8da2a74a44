from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.images.pixels import to_uint8
from atelier.metrics import classifier, features, suite
from atelier.metrics.classifier import Classifier, train_classifier
from atelier.metrics.features import INCEPTION_FILE, Inception
from atelier.metrics.suite import Suite
from atelier.shapes import world

SCENES = world.scenes(0, range(300), "train")
IMAGES = to_uint8(world.render(SCENES, 16))
NAMES = ["fid", "kid", "is", "precision", "recall"]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and a training of a few steps."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    quick = train_classifier
    monkeypatch.setattr(classifier, "train_classifier", lambda images, targets, steps: quick(images, targets, 5))
    return tmp_path / "hub" / "checkpoints" / INCEPTION_FILE


def training_set() -> tuple[Tensor, Tensor]:
    return IMAGES, world.label(SCENES)


def made(tmp_path: Path, *, net: str = "auto", names: list[str] | None = None, weights: str | None = None) -> Suite:
    return Suite(
        net=net, weights=weights, names=names or ["fid"], antialias=False, fetch=False, cache=str(tmp_path / "cache")
    )


def test_without_inception_a_classifier_of_the_set_judges_and_says_so_once(tmp_path: Path) -> None:
    judges = made(tmp_path, names=NAMES)
    notice = judges.prepare("a", training_set)
    assert "fd_classifier" in notice
    assert "\n" not in notice
    real, fake = judges.features(IMAGES[:150]), judges.features(IMAGES[150:])
    values = judges.compare(real, fake)
    assert list(values) == [f"{name}_classifier" for name in ("fd", "kid", "is", "precision", "recall")]
    assert all(value == value for value in values.values())
    assert judges.protocol()["kid_subset_size"] == 1000
    assert made(tmp_path, net="classifier").prepare("a", training_set) is None


@pytest.mark.parametrize(("n_real", "n_fake", "left"), [
    (1, 50, {"is"}), (50, 1, set()), (2, 50, {"fd", "kid", "is"}), (50, 3, {"fd", "kid"}),
    (4, 9, {"fd", "kid", "precision", "recall"}), (4, 10, {"fd", "kid", "is", "precision", "recall"}),
])  # fmt: skip
def test_what_so_few_images_do_not_tell_is_left_out(tmp_path: Path, n_real: int, n_fake: int, left: set[str]) -> None:
    judges = made(tmp_path, names=NAMES)
    judges.net = Classifier(Classifier.layers(3).state_dict(), "labels", 3)
    found = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    values = judges.compare(found[:n_real], found[50 : 50 + n_fake])
    assert {name.removesuffix("_classifier") for name in values} == left
    assert all(value == value for value in values.values())


def test_a_world_with_a_judge_has_no_classifier_unless_it_is_asked_for(tmp_path: Path, hub: Path) -> None:
    judges = made(tmp_path)
    notice = judges.prepare("a", lambda: pytest.fail("trained"), judged=True)
    assert not judges.active and "metrics=classifier" in notice and "\n" not in notice and len(notice) <= 200
    asked = made(tmp_path, net="classifier")
    assert asked.prepare("a", training_set, judged=True) is None and asked.named("fid") == "fd_classifier"
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"cut")
    with pytest.raises(UserError, match="metrics.weights"):  # Inception is at hand: it is taken
        made(tmp_path).prepare("a", training_set, judged=True)


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    judges = made(tmp_path, names=["fid", "kid"])
    judges.prepare("a", training_set)
    whole = judges.compare(judges.features(IMAGES[:100]), judges.features(IMAGES[100:]))
    index = torch.cat([torch.arange(100, 300, 2), torch.arange(101, 300, 2)])
    ranks = torch.cat([judges.features(part) for part in IMAGES[index].split(32)])
    gathered = judges.compare(judges.features(IMAGES[:100]), ranks[index.argsort()])
    assert gathered == pytest.approx(whole, rel=1e-5)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_features_of_real_images_are_computed_once(tmp_path: Path) -> None:
    judges, calls = made(tmp_path), []
    judges.prepare("a", training_set)

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"features": judges.features(IMAGES), "label": world.label(SCENES)}

    first = judges.real("test", compute)
    assert same(judges.real("test", compute), first)
    assert len(calls) == 1
    judges.real("other images", compute)
    assert len(calls) == 2
    judges.real("test", compute, agree=lambda found: False)  # another rank has lost its file
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert same(judges.real("test", compute), first)
    assert len(calls) == 4
    judges.net = Classifier(**train_classifier(IMAGES, None, 1))  # another protocol
    judges.real("test", compute)
    assert len(calls) == 5


def test_inception_is_taken_where_it_lies_and_only_it_makes_fid(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def inception(weights: str | Path, antialias: bool) -> Inception:
        taken.append(str(weights))
        net = Inception.__new__(Inception)
        torch.nn.Module.__init__(net)
        net.published = str(weights) == str(hub)
        return net

    monkeypatch.setattr(suite, "Inception", inception)
    hub.parent.mkdir(parents=True)
    hub.touch()
    own = tmp_path / "own.pth"
    own.touch()
    for kind, weights, name in (
        ("auto", None, "fid"),
        ("inception", None, "fid"),
        ("auto", str(own), "fd_inception"),
    ):
        judges = made(tmp_path, net=kind, weights=weights)
        assert judges.prepare("a", training_set) is None
        assert judges.named("fid") == name
    assert taken == [str(hub), str(hub), str(own)]


@pytest.mark.parametrize(
    ("net", "weights", "line"),
    [
        ("inception", None, rf"metrics\.weights=None: .*{INCEPTION_FILE}.*Fix: metrics\.fetch=true"),
        ("inception", "/nowhere.pth", r"metrics\.weights=/nowhere\.pth: there is no such file"),
        ("auto", "/nowhere.pth", r"metrics\.weights=/nowhere\.pth: there is no such file"),
        ("mobilenet", None, r"metrics\.weights=None: mobilenet needs its weight file"),
    ],
)
def test_missing_weights_are_seen_before_anything_starts(tmp_path: Path, net: str, weights, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        made(tmp_path, net=net, weights=weights).check()
    assert len(caught.value.line()) <= 200


def test_nothing_is_downloaded_unasked_and_a_failed_download_is_one_line(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(url: str, dst: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, dst, hash_prefix))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    made(tmp_path).prepare("a", training_set)
    assert not asked
    wants = made(tmp_path, net="inception")
    wants.fetch = True
    wants.check()
    with pytest.raises(UserError, match=r"error: metrics\.fetch=True: .*no network") as caught:
        wants.prepare("a", training_set)
    assert len(caught.value.line()) <= 200
    assert asked == [(features.INCEPTION_URL, str(hub), "6726825d")]


def test_inception_score_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.names=is: .*no labels"):
        made(tmp_path, names=["is"]).prepare("b", lambda: (IMAGES, None))


def test_the_asked_class_is_recognised_by_a_classifier_of_labels(tmp_path: Path) -> None:
    judges = made(tmp_path, net="classifier")
    judges.prepare("a", training_set)
    found = judges.features(IMAGES)
    seen = judges.net.logits(judges.net(IMAGES)).argmax(1)
    assert judges.knows_labels
    assert judges.recognised(found, seen) == 1.0
    assert judges.recognised(found, torch.where(torch.arange(300) < 75, seen, (seen + 1) % 36)) == 0.25
    judges.prepare("b", lambda: (IMAGES, world.attributes(SCENES)))
    assert not judges.knows_labels


def test_none_measures_nothing(tmp_path: Path) -> None:
    judges = made(tmp_path, net="none", weights="/nowhere.pth")
    judges.check()
    assert not judges.active
    assert judges.prepare("a", training_set) is None
