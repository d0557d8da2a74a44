from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier.core.errors import UserError
from atelier.images.pixels import to_uint8
from atelier.metrics import features
from atelier.metrics.classifier import Classifier, classifier_of, train_classifier
from atelier.metrics.features import FeatureNet, MobileNet
from atelier.shapes import world

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v1_0.75_224.pt"
CLOTHING = SHARED / "data" / "clothing128" / "test"
STEPS = 60


def set_of(n: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Scenes of 16 px and their shapes."""
    scenes = world.scenes(0, range(n), split)
    return to_uint8(world.render(scenes, 16)), scenes.colour


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(**train_classifier(*set_of(1000), steps=STEPS))


@pytest.fixture(scope="module")
def mobilenet() -> MobileNet:
    if not WEIGHTS.exists():
        pytest.skip(f"no {WEIGHTS.name}")
    return MobileNet(WEIGHTS)


def features_are_sound(net: FeatureNet, images: Tensor) -> None:
    """float32 whatever the autocast, each image's own, grey as RGB, and no gradients."""
    found = net(images)
    assert found.shape == (len(images), net.n_features)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), found)
    parts = torch.cat([net(part) for part in images.split([1, len(images) - 1])])
    torch.testing.assert_close(parts, found, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(images[:, :1]), net(images[:, :1].repeat(1, 3, 1, 1)))
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(module.training for module in net.train().modules())


def test_classifier_features(classifier: Classifier) -> None:
    features_are_sound(classifier, set_of(7)[0])


def test_classifier_knows_the_set(classifier: Classifier) -> None:
    images, labels = set_of(500, "test")
    assert (classifier.logits(classifier(images)).argmax(1) == labels).float().mean() > 0.9
    assert classifier.task == "labels"
    assert classifier.sorts


def test_classifier_is_a_function_of_the_set_and_leaves_the_generator() -> None:
    images, labels = set_of(200)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = train_classifier(images, labels, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = train_classifier(images, labels, steps=3)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    other = train_classifier(images, labels, steps=3, seed=1)
    assert Classifier(**other).protocol != Classifier(**first).protocol


def test_classifier_of_attributes_or_of_rotations() -> None:
    scenes = world.scenes(0, range(1000), "train")
    images = to_uint8(world.render(scenes, 16))
    attributes = world.attributes(scenes)
    net = Classifier(**train_classifier(images, attributes, steps=STEPS))
    grounds = net.logits(net(images))[:, -4:].argmax(1)
    assert (grounds == scenes.ground).float().mean() > 0.9
    upright = images[(scenes.shape == 2) & (scenes.ground == 0)]  # triangles have an up
    turned = Classifier(**train_classifier(upright, None, steps=2 * STEPS))
    assert (turned.logits(turned(upright.rot90(1, (2, 3)))).argmax(1) == 1).float().mean() > 0.6
    assert (turned.n_logits, turned.sorts, net.n_logits, net.sorts) == (4, False, 14, False)


def test_large_images_are_reduced(classifier: Classifier) -> None:
    images = to_uint8(world.render(world.scenes(0, range(4), "train"), 64))
    assert classifier(images).shape == (4, 128)


def count(calls: list[int]) -> tuple[Tensor, Tensor]:
    calls.append(1)
    return set_of(100)


def test_a_kept_classifier_is_not_trained_again(tmp_path: Path) -> None:
    calls: list[int] = []
    first = classifier_of(lambda: count(calls), "a", tmp_path, steps=2)
    again = classifier_of(lambda: count(calls), "a", tmp_path, steps=2)
    assert again.protocol == first.protocol
    assert len(calls) == 1
    classifier_of(lambda: count(calls), "another set", tmp_path, steps=2)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2  # and no unfinished file


def test_that_a_classifier_is_trained_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = "distances: a small classifier of this set is trained first, once for all runs\n"

    def images() -> tuple[Tensor, Tensor]:
        assert capsys.readouterr() == ("", said)
        return set_of(100)

    for _ in range(2):
        classifier_of(images, "a", tmp_path, steps=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "html"])
def test_a_broken_kept_classifier_is_made_again(tmp_path: Path, fault: str) -> None:
    calls: list[int] = []
    first = classifier_of(lambda: count(calls), "a", tmp_path, steps=2)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    file.write_bytes({"cut": data[:-1000], "flipped": bytes(flipped), "empty": b"", "html": b"<html>" * 99}[fault])
    again = classifier_of(lambda: count(calls), "a", tmp_path, steps=2)
    assert len(calls) == 2
    assert again.protocol == first.protocol
    assert file.read_bytes() == data


def clothing(name: str) -> Tensor:
    files = sorted((CLOTHING / name).glob("*.jpg"))[:12]
    return torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files])


def test_mobilenet_features(mobilenet: MobileNet) -> None:
    features_are_sound(mobilenet, set_of(3)[0])


def test_mobilenet_tells_shoes_from_dresses(mobilenet: MobileNet) -> None:
    """By the nearer mean of half of the pictures; chance is one half."""
    if not CLOTHING.exists():
        pytest.skip("no clothing128")
    sets = [mobilenet(clothing(name)) for name in ("shoes", "dress")]
    means = torch.stack([found[::2].mean(0) for found in sets])
    right = [torch.cdist(found[1::2], means).argmin(1) == k for k, found in enumerate(sets)]
    assert torch.cat(right).float().mean() > 0.9
    running_shoe, gown = 770, 578  # of ImageNet's 1,000
    assert mobilenet.logits(sets[0])[:, [running_shoe, gown]].mean(0).argmax() == 0
    assert mobilenet.logits(sets[1])[:, [running_shoe, gown]].mean(0).argmax() == 1


def test_padding_is_tensorflows() -> None:
    """`same` on an even side with stride 2 pads below and right alone; batch norm divides by sqrt(var + 1e-3)."""
    layer = features._Convolution(1, 1, kernel=3, stride=2).eval()
    torch.nn.init.ones_(layer.conv.weight)
    expected = torch.tensor([[9.0, 6.0], [6.0, 4.0]]) / 10 / 1.001**0.5
    torch.testing.assert_close(layer(torch.full((1, 1, 4, 4), 0.1))[0, 0], expected)


def test_mobilenet_weights_that_are_not() -> None:
    with pytest.raises(UserError, match=r"error: metrics\.weights=/nowhere/x\.pt: there is no such file"):
        MobileNet("/nowhere/x.pt")
