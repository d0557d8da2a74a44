"""FID beside torch-fidelity's own, from the same files of images and of weights."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch_fidelity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from atelier.core.errors import UserError
from atelier.images.pictures import save_png
from atelier.metrics import distances
from atelier.metrics.features import Inception

N, SIZE = 8, 24


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published format, such that features are about 1."""
    with (
        torch.random.fork_rng(),
        mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    return Inception(weights)


def images(seed: int, contrast: float) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (128 + contrast * torch.randn(N, 3, SIZE, SIZE, generator=rng)).clamp(0, 255).byte()


def test_it_equals_torch_fidelity(tmp_path: Path, weights: Path, inception: Inception) -> None:
    real, fake = images(1, 40), images(2, 70)
    for folder, pictures in (("real", real), ("fake", fake)):
        (tmp_path / folder).mkdir()
        for k, picture in enumerate(pictures):
            save_png(picture, tmp_path / folder / f"{k}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=N,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )["frechet_inception_distance"]
    ours = distances.fid(inception(real), inception(fake))
    assert theirs > 1
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_antialiasing_is_another_number(weights: Path, inception: Inception) -> None:
    large = torch.randint(0, 256, (1, 3, 400, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = Inception(weights, antialias=True)
    assert (smooth(large) - inception(large)).abs().max() > 0.01 * inception(large).abs().max()
    assert smooth.protocol["resize"] != inception.protocol["resize"]


def test_other_weights_are_never_called_published(inception: Inception) -> None:
    assert not inception.published


def test_grey_is_repeated_and_logits_have_no_bias(inception: Inception) -> None:
    grey = images(1, 40)[:1, :1]
    features = inception(grey)
    assert torch.equal(features, inception(grey.repeat(1, 3, 1, 1)))
    with torch.no_grad():
        assert torch.allclose(inception.logits(features), inception.net.fc(features) - inception.net.fc.bias, atol=1e-4)


def test_a_cut_file_is_one_line(tmp_path: Path, weights: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:-100_000])
    with pytest.raises(UserError, match=r"error: metrics\.weights=.*: it is cut or no state dict .*sha256"):
        Inception(cut)
    torch.save({"fc.weight": torch.zeros(2)}, cut)
    with pytest.raises(UserError, match="other layers"):
        Inception(cut)
