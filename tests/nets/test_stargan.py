"""StarGAN's two nets: counts as published, their ways by hand, how attributes enter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.stargan import StarDiscriminator, StarGenerator


def generator(size: int = 8, residual: bool = False, width: int = 3) -> StarGenerator:
    torch.manual_seed(0)
    options = {"image_size": size, "image_channels": 3, "n_attributes": 2, "width": width}
    return StarGenerator(n_blocks=1, residual=residual, **options)


def discriminator(size: int = 8, n_layers: int = 2) -> StarDiscriminator:
    torch.manual_seed(0)
    return StarDiscriminator(image_size=size, image_channels=3, n_attributes=5, width=4, n_layers=n_layers)


@pytest.mark.parametrize(("n_attributes", "theirs", "ours"), [
    (5, 8_430_528, 44_762_048),     # CelebA
    (8, 8_439_936, 44_786_624),     # RaFD, "53.2M" together in table 3
])  # fmt: skip
def test_the_published_sizes(n_attributes: int, theirs: int, ours: int) -> None:
    """128 px, width 64, 6 blocks, 6 layers."""
    told = {"image_size": 128, "image_channels": 3, "n_attributes": n_attributes, "width": 64}
    with torch.device("meta"):
        nets = StarGenerator(n_blocks=6, residual=False, **told), StarDiscriminator(n_layers=6, **told)
        image = nets[0](torch.empty(2, 3, 128, 128), torch.empty(2, n_attributes))
        logits, attributes = nets[1](image)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [theirs, ours]
    assert image.shape == (2, 3, 128, 128)
    assert logits.shape == (2, 1, 2, 2) and attributes.shape == (2, n_attributes)


def normed(x: Tensor, layer: nn.InstanceNorm2d) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("residual", [False, True])
def test_the_generator_by_hand(residual: bool) -> None:
    net, x, told = generator(residual=residual), torch.rand(2, 3, 8, 12) * 2 - 1, torch.tensor([[0.0, 1], [1, 1]])
    for norm in [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    c1, n1, _, c2, n2, _, c3, n3, _, block, c4, n4, _, c5, n5, _, last = net.layers
    maps = torch.stack([torch.full((8, 12), a) for a in told.flatten().tolist()]).view(2, 2, 8, 12)
    h = normed(F.conv2d(torch.cat([x, maps], 1), c1.weight, None, 1, 3), n1).clamp(min=0)
    h = normed(F.conv2d(h, c2.weight, None, 2, 1), n2).clamp(min=0)
    h = normed(F.conv2d(h, c3.weight, None, 2, 1), n3).clamp(min=0)
    b1, m1, _, b2, m2 = block.layers
    inner = normed(F.conv2d(h, b1.weight, None, 1, 1), m1).clamp(min=0)
    h = h + normed(F.conv2d(inner, b2.weight, None, 1, 1), m2)
    h = normed(F.conv_transpose2d(h, c4.weight, None, 2, 1), n4).clamp(min=0)
    h = normed(F.conv_transpose2d(h, c5.weight, None, 2, 1), n5).clamp(min=0)
    expected = F.conv2d(h, last.weight, None, 1, 3) + (2 * x if residual else 0)
    torch.testing.assert_close(net(x, told), expected.tanh(), atol=2e-5, rtol=1e-4)


def test_attributes_reach_the_middle_through_the_border() -> None:
    """Constant maps are gone behind an instance norm but for the zeros around the image (see the docstring)."""
    net, x = generator(size=16), torch.zeros(1, 3, 16, 16)
    one, other = net(x, torch.tensor([[0.0, 1]])), net(x, torch.tensor([[1.0, 0]]))
    assert (one - other)[..., 6:10, 6:10].abs().max() > 1e-2
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "reflect"
            layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]
    first = net.layers[:2]
    maps = [torch.cat([x, torch.tensor(a).view(1, 2, 1, 1).expand(-1, -1, 16, 16)], 1) for a in ([0.0, 1], [1.0, 0])]
    assert (first(maps[0]) - first(maps[1])).abs().max() < 1e-2


def test_an_image_is_the_same_in_eval_mode_and_in_any_batch() -> None:
    net, x, told = generator(), torch.rand(4, 3, 8, 8), torch.eye(2).repeat(2, 1)
    trained = net(x, told)
    torch.testing.assert_close(net.eval()(x, told), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(x[2:3], told[2:3]), trained[2:3], atol=1e-5, rtol=1e-5)
    assert not any(name.startswith("running") for name, _ in net.named_buffers())


def test_the_discriminator_by_hand() -> None:
    net, x = discriminator(), torch.randn(3, 3, 8, 8)
    h = x
    for layer in net.layers:
        h = F.conv2d(h, layer.weight, layer.bias, 2, 1)
        h = torch.where(h > 0, h, 0.01 * h)
    logits, attributes = net(x)
    torch.testing.assert_close(logits, F.conv2d(h, net.score.weight, None, 1, 1))
    torch.testing.assert_close(attributes, torch.einsum("bchw,achw->ba", h, net.attributes.weight))
    assert h.shape == (3, 8, 2, 2)
    torch.testing.assert_close(net(x[1:2])[0], logits[1:2])


def test_outputs_are_float32_under_bf16() -> None:
    seen: list[torch.dtype] = []
    nets = generator(), discriminator()
    for layer in (nets[0].layers[-1], nets[1].score, nets[1].attributes):
        layer.register_forward_hook(lambda net, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = nets[0](torch.rand(2, 3, 8, 8), torch.ones(2, 2))
        outputs = image, *nets[1](image)
    assert {out.dtype for out in outputs} == {torch.float32} and seen == [torch.bfloat16] * 3


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError) as caught:
        generator(size=10)
    assert caught.value.line() == "error: data.image_size=10: this net needs a multiple of 4. Fix: data.image_size=8"
    with pytest.raises(UserError) as caught:
        discriminator(size=12, n_layers=3)
    line = "error: .n_layers=3: 12 px cannot be halved 3 times. Fix: .n_layers=2"
    assert caught.value.line() == line
    with pytest.raises(UserError) as caught:
        discriminator(size=7)
    assert caught.value.line().endswith("Fix: data.image_size=8")
