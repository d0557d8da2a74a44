"""The U-Net: the published parameter count, gradients everywhere, no leak between images."""

import pytest
import torch

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.layers import ResBlock, SelfAttention, TimeEmbedding, norm
from atelier.nets.unet import UNet, UNetBlock


def small(**changes):
    options = {
        "image_size": 8,
        "image_channels": 3,
        "width": 16,
        "multipliers": [1, 2],
        "n_blocks": 1,
        "attention": [4],
        "heads": 2,
        "cond_dim": 6,
    }
    return UNet(**{**options, **changes})


def test_attention_null_is_at_the_smallest_maps():
    """What flow_tiny and ldm ask for: the same net as with that size by name, at any size of images."""
    for size in (8, 16):
        null, named = (small(image_size=size, attention=a).state_dict() for a in (None, [size // 2]))
        assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in named.items()}
        assert null.keys() != small(image_size=size, attention=[]).state_dict().keys()


def awake(net):
    """Weights that were zero at the start become random, as after training."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(n=3, size=8):
    torch.manual_seed(0)
    return torch.randn(n, 3, size, size), torch.tensor([0.0, 500.0, 999.0])[:n], Condition(torch.randn(n, 6))


def test_cifar10_net_of_the_paper():
    """35.7M parameters (Ho et al. 2020, appendix B)."""
    net = UNet(
        image_size=32,
        image_channels=3,
        width=128,
        multipliers=[1, 2, 2, 2],
        n_blocks=2,
        attention=[16],
        dropout=0.1,
    )
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert net(torch.randn(1, 3, 32, 32), torch.tensor([5.0])).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"cond_dim": None}, {"attention": []}])
def test_shape_and_zero_at_the_start(changes):
    net = small(**changes)
    x, time, cond = inputs()
    output = net(x, time, cond)
    assert output.shape == (3, 3, 8, 8)
    assert (output == 0).all()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_learned_variance_is_a_second_half_of_the_channels(patch_size):
    """Its first half is what the net without it gives, with the same weights; at 4 a pixel head makes both."""
    torch.manual_seed(0)
    plain = awake(small(patch_size=patch_size, attention=[], image_size=16))
    torch.manual_seed(0)
    net = awake(small(patch_size=patch_size, attention=[], image_size=16, learned_variance=True))
    assert net.shape == plain.shape == (3, 16, 16) and (net.pixels is not None) == (patch_size == 4)
    ours, theirs = net.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        ours[name][: len(value)] = value
    x, time, cond = inputs(size=16)
    both = net(x, time, cond)
    assert both.shape == (3, 6, 16, 16)
    torch.testing.assert_close(both[:, :3], plain(x, time, cond))
    assert (both[:, 3:] - both[:, :3]).abs().mean() > 1e-2
    both.square().sum().backward()
    assert net.pixels is None or net.pixels.embedding.weight.grad.any(1).all()  # each channel says how much is kept


@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_parameter_gets_a_gradient(patch_size):
    net = awake(small(patch_size=patch_size, attention=[4 // patch_size]))
    net(*inputs()).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_gradients_repeat_exactly():
    net = awake(small())
    gradients = []
    for _ in range(2):
        net.zero_grad()
        net(*inputs()).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_image_does_not_depend_on_its_batch(patch_size):
    net = awake(small(patch_size=patch_size, attention=[4 // patch_size], dropout=0.5)).eval()
    x, time, cond = inputs()
    together = net(x, time, cond)
    for i in range(3):
        torch.testing.assert_close(together[i], net(x[i : i + 1], time[i : i + 1], cond.rows([i]))[0])


@pytest.mark.parametrize("part", ["x", "time", "cond"])
def test_output_depends_on(part):
    net = awake(small()).eval()
    x, time, cond = inputs()
    changed = {
        "x": (x + 0.1, time, cond),
        "time": (x, time + 10, cond),
        "cond": (x, time, Condition(cond.vector + 0.1)),
    }[part]
    assert (net(*changed) - net(x, time, cond)).abs().max() > 1e-3


def test_adms_nets_have_the_published_sizes():
    """554M at 256 px and 296M at 64 px, without the labels (Dhariwal & Nichol 2021, table 4)."""
    adm = {"image_channels": 3, "attention": [32, 16, 8], "head_width": 64, "scale_shift": True}
    adm |= {"resample_in_blocks": True, "learned_variance": True}
    with torch.device("meta"):
        large = UNet(image_size=256, width=256, multipliers=[1, 1, 2, 2, 4, 4], n_blocks=2, **adm)
        small = UNet(image_size=64, width=192, multipliers=[1, 2, 3, 4], n_blocks=3, **adm)
    labels = [1000 * 4 * width for width in (256, 192)]
    counts = [sum(p.numel() for p in net.parameters()) for net in (large, small)]
    assert [round((a + b) / 1e6) for a, b in zip(counts, labels, strict=True)] == [554, 296]


@pytest.mark.parametrize("size", ["half", "twice"])
def test_maps_change_their_size_inside_a_block(size):
    """Both branches do, before the first convolution: means of 2x2 pixels, or each pixel four times."""
    torch.manual_seed(0)
    net = awake(small(resample_in_blocks=True, scale_shift=True))
    layers = [layer for layer in (net.down if size == "half" else net.up) if isinstance(layer, ResBlock)]
    assert len(layers) == 1 and layers[0].skip.__class__ is torch.nn.Identity
    block, x, embedding = layers[0], torch.randn(2, 16 if size == "half" else 32, 4, 4), torch.randn(2, 64)

    def resized(h):
        if size == "half":
            return h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = block.conv1(resized(torch.nn.functional.silu(block.norm1(x))))
    scale, shift = block.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
    expected = resized(x) + block.conv2(torch.nn.functional.silu(block.norm2(h) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, embedding), expected)


def test_heads_have_the_width_that_is_asked_for():
    net = small(head_width=8, attention=[8, 4], heads=5)
    found = {m.qkv.in_features: m.heads for m in net.modules() if isinstance(m, SelfAttention)}
    assert found == {16: 2, 32: 4}


def test_norms_are_those_that_are_asked_for():
    for options, groups, eps in (({}, None, 1e-6), ({"norm_groups": 8, "norm_eps": 1e-3}, 8, 1e-3)):
        norms = [m for m in small(**options).modules() if isinstance(m, torch.nn.GroupNorm)]
        assert {m.eps for m in norms} == {eps}
        assert all(m.num_groups == (groups or norm(m.num_channels).num_groups) for m in norms)


def test_a_map_is_halved_as_ddpm_does():
    """TensorFlow pads below and right alone: the last row of pixels is beside the padding, the first is not."""
    for options, seen in (({}, 0), ({"pad_below": True}, 1)):
        half = next(layer for layer in small(**options).down if not isinstance(layer, UNetBlock))
        x = torch.zeros(1, 16, 8, 8)
        x[0, 0, 0, 0] = 1
        middle = half(x)[0, :, 0, 0] - half.conv.bias
        torch.testing.assert_close(middle, half.conv.weight[:, 0, 1 - seen, 1 - seen])


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    gradients, runs = [], []
    forward = UNetBlock.forward
    monkeypatch.setattr(UNetBlock, "forward", lambda self, x, e: runs.append(1) or forward(self, x, e))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = awake(small(checkpointing=checkpointing, dropout=0.3, resample_in_blocks=True))
        net(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(runs) == 8 + 16  # two down, two in the middle, four up; once and twice


def test_dropout_acts_in_training_only():
    net, given = awake(small(dropout=0.5)), inputs()
    assert not torch.equal(net(*given), net(*given))
    net.eval()
    assert torch.equal(net(*given), net(*given))


def test_attention_sits_at_its_map_sizes():
    def count(attention):
        return sum(isinstance(m, SelfAttention) for m in small(attention=attention, n_blocks=2).modules())

    assert [count(sizes) for sizes in ([], [4], [8, 4])] == [1, 6, 11]  # the middle; 2 down and 3 up per level


def test_attention_is_softmax_of_products():
    torch.manual_seed(0)
    layer = awake(SelfAttention(8, heads=2))
    x = torch.randn(2, 8, 3, 3)
    q, k, v = (layer.qkv(layer.norm(x).flatten(2).mT)).view(2, 9, 3, 2, 4).unbind(2)
    weights = torch.einsum("bnkc,bmkc->bknm", q, k).div(2).softmax(-1)
    mixed = torch.einsum("bknm,bmkc->bnkc", weights, v).reshape(2, 9, 8)
    torch.testing.assert_close(layer(x), x + layer.out(mixed).mT.reshape(2, 8, 3, 3))


def test_channels_last_gives_the_same():
    net = awake(small()).eval()
    x, time, cond = inputs()
    plain = net(x, time, cond)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), time, cond), plain)


def test_time_embedding_is_the_published_one():
    time = torch.tensor([0.0, 1.0, 999.0])
    embedding = TimeEmbedding(8)(time)
    angles = time[:, None] * 10_000 ** (-torch.arange(4) / 3)
    torch.testing.assert_close(embedding, torch.cat([angles.sin(), angles.cos()], 1), atol=2e-4, rtol=1e-5)


def test_time_frequencies_end_where_they_are_asked_to():
    """With a shift of 0 the last is one step before 1/10000 (Dhariwal & Nichol 2021; Peebles & Xie 2023)."""
    time = torch.tensor([0.0, 1.0, 999.0])
    angles = time[:, None] * 10_000 ** (-torch.arange(4) / 4)
    expected = torch.cat([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(small(width=8, heads=1, freq_shift=0).time[0](time), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("changes", "key"), [
    ({"attention": [16]}, ".attention="), ({"image_size": 7}, "data.image_size="), ({"heads": 3}, ".heads=3: "),
    ({"head_width": 12}, ".head_width=12: attention over 32 channels"), ({"norm_groups": 3}, ".norm_groups=3: "),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes, key):
    with pytest.raises(UserError, match=key):
        small(**changes)
