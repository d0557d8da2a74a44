"""The tiny pretrained autoencoder: its layout by an independent walk over the keys, and photographs through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atelier.checkpoints import taesd_files
from atelier.core.errors import UserError
from atelier.data.classes import class_files
from atelier.data.reading import pixels
from atelier.images.pixels import to_float
from atelier.nets.taesd import TAESD

SHARED = Path(__file__).parents[3] / "shared"
FILES = SHARED / "weights"
PSNR = [23.943, 36.065, 31.649]  # dB, of the three photographs, measured once


def shaken(net: TAESD) -> TAESD:
    """Weights that keep maps at about unit size."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim == 1 else 1.2 * p[0].numel() ** -0.5)
    return net.eval()


def small() -> TAESD:
    return shaken(TAESD(image_size=16, width=8, latent_channels=5))


def residual(x: Tensor, at: dict[str, Tensor]) -> Tensor:
    if "pool.0.weight" in at:
        inner = F.group_norm(F.conv2d(x, at["pool.0.weight"]), 4, at["pool.1.weight"], at["pool.1.bias"])
        x = x + F.conv2d(inner.clamp(min=0), at["pool.3.weight"])
    y = x
    for k in (0, 2, 4):
        y = F.conv2d(y.clamp(min=0) if k else y, at[f"conv.{k}.weight"], at[f"conv.{k}.bias"], padding=1)
    return (x + y).clamp(min=0)


def walked(x: Tensor, state: dict[str, Tensor], halves: tuple[int, ...], doubles: tuple[int, ...]) -> Tensor:
    """What the layers with these numbers make of x: halved by some, doubled before others."""
    for k in sorted({int(name.split(".")[0]) for name in state}):
        at = {name.split(".", 1)[1]: value for name, value in state.items() if name.split(".")[0] == str(k)}
        if k in doubles:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if "conv.0.weight" in at:
            x = residual(x, at)
        else:
            x = F.conv2d(x, at["weight"], at.get("bias"), padding=1, stride=2 if k in halves else 1)
        if "bias" in at and doubles and k == 1:
            x = x.clamp(min=0)
    return x


@torch.no_grad()
def test_the_layers_are_those_of_the_files() -> None:
    net = small()
    x, z = torch.rand(2, 3, 16, 16) * 2 - 1, 5 * torch.randn(2, 5, 2, 2)
    mean, logvar = net.encode(x)
    expected = walked((x + 1) / 2, net.encoder.state_dict(), (2, 6, 10), ())
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    assert mean.shape == (2, *net.latent_shape) == (2, 5, 2, 2) and (logvar == -20).all()
    decoded = walked(3 * torch.tanh(z / 3), net.decoder.state_dict(), (), (7, 12, 17))
    torch.testing.assert_close(net.decode(z), 2 * decoded - 1, atol=1e-5, rtol=1e-5)
    assert mean.std() > 0.1 and decoded.std() > 0.1


def written(folder: Path, net: TAESD) -> Path:
    """The two files, in half precision as they are published."""
    for part, name in zip((net.encoder, net.decoder), taesd_files.FILES, strict=True):
        torch.save({key: value.half() for key, value in part.state_dict().items()}, folder / name)
    return folder


@torch.no_grad()
def test_files_are_read_in_float32(tmp_path: Path) -> None:
    net = small()
    read = taesd_files.read(written(tmp_path, net), 16, 3)
    assert {p.dtype for p in read.parameters()} == {torch.float32} and not read.training
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(read.encode(x)[0], net.half().float().encode(x)[0])
    assert taesd_files.read(tmp_path, 24, 3).latent_shape == (5, 3, 3)


def broken(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:500])


def changed(folder: Path, key: str, value: Tensor | None) -> None:
    state = torch.load(folder / "taef2_encoder.pth", weights_only=True)
    state = {name: old for name, old in state.items() if name != key} | ({} if value is None else {key: value})
    torch.save(state, folder / "taef2_encoder.pth")


@pytest.mark.parametrize(("break_it", "problem"), [
    (lambda f: broken(f, "taef2_decoder.pth"), "taef2_decoder.pth cannot be read"),
    (lambda f: torch.save([1], f / "taef2_encoder.pth"), "taef2_encoder.pth is no state dict"),
    (lambda f: torch.save({}, f / "taef2_decoder.pth"), "taef2_decoder.pth lacks 1.weight"),
    (lambda f: changed(f, "0.bias", None), "taef2_encoder.pth is of another layout at 0.bias"),
    (lambda f: changed(f, "0.bias", torch.zeros(3)), "taef2_encoder.pth is of another layout at 0.bias"),
    (lambda f: changed(f, "15.bias", torch.zeros(3)), "taef2_encoder.pth is of another layout at 15.bias"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_what_cannot_be_read_is_one_line(break_it: object, problem: str, tmp_path: Path) -> None:
    break_it(written(tmp_path, small()))
    with pytest.raises(UserError, match=r"error: model\.first_stage\.run=.*FOLDER with taef2_en") as caught:
        taesd_files.read(tmp_path, 16, 3)
    assert problem in str(caught.value)


def test_images_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    written(tmp_path, small())
    with pytest.raises(UserError, match="3 channels, these have 1"):
        taesd_files.read(tmp_path, 16, 1)
    with pytest.raises(UserError, match=r"data\.image_size=28: its latents are 8 times smaller.*image_size=32"):
        taesd_files.read(tmp_path, 28, 3)


@pytest.mark.skipif(not (FILES / "taef2_encoder.pth").exists(), reason="no ../shared/weights/taef2_encoder.pth")
@pytest.mark.skipif(not (SHARED / "data/clothing128").is_dir(), reason="no ../shared/data/clothing128")
@torch.no_grad()
def test_photographs_come_back() -> None:
    """The mean of 64 of them is 30.7 dB; norms of 8 groups in place of 4 cost 1 to 3 dB."""
    root = SHARED / "data/clothing128"
    paths = [root / names[0] for names in class_files(str(root), "test").values()][:3]
    net = taesd_files.read(FILES, 128, 3)
    x = to_float(torch.stack([pixels(Image.open(path).convert("RGB")) for path in paths]))
    error = (net.decode(net.encode(x)[0]).clamp(-1, 1) - x).square().mean([1, 2, 3])
    assert (10 * torch.log10(4 / error)).tolist() == pytest.approx(PSNR, abs=0.01)
