"""The U-Net translator: its size and start as published, its way by hand, where dropout lies, what is normed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.pix2pix import UNetTranslator, spread

CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d
NORMS = nn.BatchNorm2d | nn.InstanceNorm2d


def made(
    size: int = 16, width: int = 4, n_downs: int = 3, norm: str = "instance", n_dropout: int = 2, source_levels: int = 1
) -> UNetTranslator:
    torch.manual_seed(0)
    options = {"image_size": size, "width": width, "n_downs": n_downs, "norm": norm, "n_dropout": n_dropout}
    return UNetTranslator(in_channels=2, source_levels=source_levels, image_channels=3, **options)


def ones(net: UNetTranslator, x: Tensor) -> list[Tensor]:
    return [torch.ones(len(x), *shape) for shape in net.mask_shapes(*x.shape[2:])]


@pytest.mark.parametrize(("norm", "weights"), [
    ("batch", 54_413_955),
    ("instance", 54_413_955),  # scale and shift as in batch norm
    ("none", 54_409_603),      # 3008 biases down, 2496 up
])  # fmt: skip
def test_the_published_size(norm: str, weights: int) -> None:
    """256 px, width 64: convolutions 54,404,099, the last with a bias; norms behind 2432 channels down, 2496 up."""
    with torch.device("meta"):
        options = {
            "image_size": 256,
            "in_channels": 3,
            "source_levels": 1,
            "image_channels": 3,
            "width": 64,
            "n_downs": 8,
        }
        net = UNetTranslator(norm=norm, n_dropout=3, **options)
        source = torch.empty(1, 3, 256, 256)
        assert net(source, [torch.empty(1, *s) for s in net.mask_shapes(256, 256)]).shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in net.parameters()) == weights
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, CONVOLUTIONS)) + 3
    assert convolutions == 54_404_099
    assert net.mask_shapes(256, 256) == [(512, 2, 2), (512, 4, 4), (512, 8, 8)] and net.size_divisor == 256


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_it_starts_as_published(norm: str) -> None:
    net = made(width=32, norm=norm)
    for layer in net.modules():
        if isinstance(layer, CONVOLUTIONS):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(layer.weight.mean()) < 3e-3
        if isinstance(layer, NORMS):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.02) and layer.eps == 1e-5
            assert 0.01 < layer.weight.std() < 0.03 and not layer.bias.any()


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def by_hand(net: UNetTranslator, x: Tensor, masks: list[Tensor]) -> Tensor:
    """Three halvings; no norm at the outermost and the innermost map."""
    (_, c1, n1), (_, c2, n2) = net.downs
    assert isinstance(n1, NORMS) and isinstance(n2, nn.Identity) and isinstance(net.first[1], nn.Identity)
    a = F.conv2d(x, net.first[0].weight, None, 2, 1)
    b = normed(n1, F.conv2d(F.leaky_relu(a, 0.2), c1.weight, None, 2, 1))
    c = F.conv2d(F.leaky_relu(b, 0.2), c2.weight, None, 2, 1)
    (_, u1, m1), (_, u2, m2) = net.ups
    h = masks[0] * normed(m1, F.conv_transpose2d(c.clamp(min=0), u1.weight, None, 2, 1))
    h = masks[1] * normed(m2, F.conv_transpose2d(torch.cat([h, b], 1).clamp(min=0), u2.weight, None, 2, 1))
    last = net.last[1]
    return F.conv_transpose2d(torch.cat([h, a], 1).clamp(min=0), last.weight, last.bias, 2, 1).tanh()


def test_the_way_by_hand() -> None:
    net, x = made(width=3), torch.randn(2, 2, 16, 24)
    with torch.no_grad():
        net.last[1].weight.mul_(20)
    masks = [2.0 * (torch.rand(2, *shape) < 0.5) for shape in net.mask_shapes(16, 24)]
    assert [m.shape[1:] for m in masks] == [(6, 4, 6), (3, 8, 12)]
    found = net(x, masks)
    torch.testing.assert_close(found, by_hand(net, x, masks))
    assert (found - net(x, ones(net, x))).abs().max() > 1e-2  # dropout is heard


def test_a_plane_is_told_by_its_levels() -> None:
    x = torch.tensor([[-1.0, -0.5, 0.0], [0.25, 1.0, 3.0]])[None, None]
    planes = spread(torch.cat([x, -x], dim=1), 3)
    assert planes.shape == (1, 6, 2, 3)
    low, middle, high = planes[0, :3].tolist()
    assert low == [[1, 0.5, 0], [0, 0, 0]]
    assert middle == [[0, 0.5, 1], [0.75, 0, 0]]
    assert high == [[0, 0, 0], [0.25, 1, 0]]
    assert torch.equal(planes[:, 3], spread(-x, 3)[:, 0])
    numbers = torch.randint(7, (2, 1, 4, 4))
    assert torch.equal(spread(2 * numbers / 6 - 1, 7).round(decimals=5), F.one_hot(numbers[:, 0], 7).movedim(3, 1))
    net, source = made(source_levels=3), torch.rand(2, 2, 16, 16)
    assert net.in_channels == 2 and net.first[0].in_channels == 6
    other = made(source_levels=1)
    other.load_state_dict(net.state_dict() | {"first.0.weight": other.first[0].weight})
    other.first[0] = net.first[0]
    torch.testing.assert_close(net(source, ones(net, source)), other(spread(source, 3), ones(net, source)))


def test_masks_of_numbers() -> None:
    """Half of all are dropped, the others doubled, so that the mean stays."""
    net = made()
    assert net.kept(torch.tensor([0.0, 0.49, 0.5, 0.99])).tolist() == [0, 0, 2, 2]
    assert made(n_dropout=0).mask_shapes(16, 16) == []


@pytest.mark.parametrize(("norm", "training", "alone"), [
    ("instance", True, True), ("instance", False, True), ("batch", True, False), ("batch", False, True),
    ("none", True, True),
])  # fmt: skip
def test_who_is_normed_with_whom(norm: str, training: bool, alone: bool) -> None:
    net, x = made(norm=norm).train(training), torch.randn(4, 2, 16, 16)
    with torch.no_grad():
        net.last[1].weight.mul_(20)
        together, single = net(x, ones(net, x)), net(x[1:2], ones(net, x[1:2]))
    assert torch.allclose(together[1:2], single, atol=1e-5) == alone


def test_images_are_float32_under_bf16() -> None:
    net, x, seen = made(), torch.randn(2, 2, 16, 16), []
    net.last[1].register_forward_hook(lambda net, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x, ones(net, x)).dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.bfloat16)]  # masks do not make float32 of the way up


@pytest.mark.parametrize(("options", "line"), [
    ({"size": 24, "n_downs": 4}, ".n_downs=4: 24 px cannot be halved 4 times. Fix: .n_downs=3"),
    ({"size": 17, "n_downs": 3}, ".n_downs=3: 17 px cannot be halved 3 times. Fix: data.image_size=16"),
    ({"n_dropout": 3}, ".n_dropout=3: 3 halvings have 2 such blocks. Fix: .n_dropout=2"),
])  # fmt: skip
def test_what_does_not_fit(options: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        made(**options)
    assert caught.value.line() == f"error: {line}"


def test_the_smallest_images() -> None:
    """A map of one pixel has no norm, in which it would vanish."""
    for downs in (1, 2, 3):
        net, x = made(2**downs, n_downs=downs, n_dropout=downs - 1).train(), torch.randn(2, 2, 2**downs, 2**downs)
        assert net(x, ones(net, x)).shape == (2, 3, 2**downs, 2**downs)
