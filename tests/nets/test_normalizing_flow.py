"""Every layer's log-determinant beside autograd's Jacobian, every inverse beside its forward, whole flows too."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.nets.invertible import (
    EPS,
    ActNorm,
    AffineCoupling,
    Chain,
    InvertibleConv,
    Logit,
    MaskedCoupling,
    Squeeze,
    moments,
)
from atelier.nets.normalizing_flow import (
    GaussianPrior,
    NormalizingFlowNet,
    checkerboard,
    glow,
    half_of_channels,
    realnvp,
)

COND = 3


def awake(net: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights that were zero at the start become random, as after training."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)
    return net.eval()


def known(n: int) -> Tensor:
    return torch.randn(n, COND, generator=torch.Generator().manual_seed(3))


def images(n: int, *shape: int) -> Tensor:
    """In [-1/2, 1/2)."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(2)) - 0.5


def measured(channels: int) -> ActNorm:
    layer = ActNorm(channels)
    layer.measure(3 * torch.randn(8, channels, 4, 4) + 1)
    return layer


def masked(mask: Tensor, channels: int) -> MaskedCoupling:
    coupling = MaskedCoupling(channels, mask, width=8, n_blocks=1, cond_dim=COND)
    coupling.scale.data = torch.linspace(0.5, 1.5, channels)
    return coupling


def two_level(make: str) -> NormalizingFlowNet:
    changes = {"glow": {"steps": 2}, "realnvp": {"n_blocks": 1}}[make]
    build = {"glow": glow, "realnvp": realnvp}[make]
    net = build(image_size=4, image_channels=1, width=8, n_levels=2, cond_dim=COND, **changes)
    net.train()(images(64, 1, 4, 4), known(64))  # measures
    return net


LAYERS = {
    "logit": lambda: Logit(),
    "squeeze": lambda: Squeeze(),
    "actnorm": lambda: measured(2),
    "conv": lambda: InvertibleConv(2),
    "coupling": lambda: AffineCoupling(2, width=8, cond_dim=COND),
    "checkerboard": lambda: masked(checkerboard(4, 0), 2),
    "image_channels": lambda: masked(half_of_channels(2, 1), 2),
    "chain": lambda: Chain([Logit(), measured(2), InvertibleConv(2), AffineCoupling(2, 8, COND), Squeeze()]),
}


def jacobian(layer: nn.Module, x: Tensor, cond: Tensor) -> Tensor:
    """log |det| of autograd's Jacobian at each x, (B,), in float64."""
    found = []
    for k in range(len(x)):
        one = torch.autograd.functional.jacobian(lambda v, k=k: layer(v[None], cond[k : k + 1])[0].flatten(), x[k])
        found.append(torch.linalg.slogdet(one.flatten(1).double())[1])
    return torch.stack(found)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_determinant_is_its_jacobians(name: str) -> None:
    torch.manual_seed(0)
    layer, x, cond = awake(LAYERS[name]()), images(3, 2, 4, 4), known(3)
    claimed = layer(x, cond)[1]
    assert claimed.dtype == torch.float64
    torch.testing.assert_close(claimed.expand(3), jacobian(layer, x, cond), atol=1e-4, rtol=1e-5)
    if name != "squeeze":
        assert claimed.abs().min() > 0.01 or name == "conv"  # a rotation's is 0; that of a learned one stands below


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_undone(name: str) -> None:
    torch.manual_seed(0)
    layer, x, cond = awake(LAYERS[name]()), images(5, 2, 4, 4), known(5)
    y, _ = layer(x, cond)
    assert name == "squeeze" or (y - x.reshape_as(y)).abs().max() > 0.01
    assert (layer.inverse(y, cond) - x).abs().max() <= 1e-5


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_a_whole_flows_determinant_is_its_jacobians(make: str) -> None:
    torch.manual_seed(0)
    net, x, cond = awake(two_level(make)), images(3, 1, 4, 4), known(3)
    torch.testing.assert_close(net(x, cond)[1], jacobian(net, x, cond), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("make", "size", "levels"), [("glow", 32, 3), ("realnvp", 32, 3), ("realnvp", 6, 1)])
def test_a_whole_flow_is_undone(make: str, size: int, levels: int) -> None:
    torch.manual_seed(0)
    changes = {"glow": {"steps": 4}, "realnvp": {"n_blocks": 1}}[make]
    build = {"glow": glow, "realnvp": realnvp}[make]
    net = build(image_size=size, image_channels=3, width=8, n_levels=levels, cond_dim=COND, **changes)
    x, cond = images(16, 3, size, size), known(16)
    with torch.no_grad():
        net.train()(x, cond)
        awake(net, std=0.03)
        noise, _ = net(x, cond)
        assert noise.shape == (16, 3 * size * size)
        assert (net.inverse(noise, cond) - x).abs().max() <= 1e-4


@pytest.mark.parametrize("make", ["glow", "realnvp"])
def test_the_condition_reaches_the_top_and_the_couplings(make: str) -> None:
    net, x = awake(two_level(make)), images(2, 1, 4, 4)
    there, here = (net(x, cond)[0] for cond in (known(2), known(2) + 1))
    n_done = net.sizes[0]
    assert (there - here)[:, :n_done].abs().min() > 0 and (there - here)[:, n_done:].abs().min() > 0
    mean = net.priors[-1].net(known(2)).chunk(2, dim=1)[0]
    assert not torch.allclose(mean, net.priors[-1].net(known(2) + 1).chunk(2, dim=1)[0])


def test_the_convolution_of_its_factors() -> None:
    """Beside F.conv2d with the weight put together by hand, and beside torch.linalg.slogdet."""
    torch.manual_seed(0)
    layer, x = InvertibleConv(6), torch.randn(2, 6, 4, 4)
    rotation = layer.permutation @ torch.stack(layer.factors()).unbind(0)[0] @ layer.factors()[1]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6), atol=1e-5, rtol=0)
    nn.init.normal_(layer.lu, std=0.5)
    p, lu = layer.permutation, layer.lu.detach()
    lower = torch.eye(6) + torch.stack([torch.cat([lu[i, :i], torch.zeros(6 - i)]) for i in range(6)])
    upper = torch.stack([torch.cat([torch.zeros(i + 1), lu[i, i + 1 :]]) for i in range(6)])
    weight = p @ lower @ (upper + torch.diag(layer.sign * lu.diag().exp()))
    y, logdet = layer(x, known(2))
    torch.testing.assert_close(y, F.conv2d(x, weight[:, :, None, None]))
    torch.testing.assert_close(logdet, 16 * torch.linalg.slogdet(weight.double())[1], atol=1e-5, rtol=1e-5)
    assert logdet.abs() > 1
    assert {name for name, _ in layer.named_buffers()} == {"permutation", "sign"}  # what stays is saved, not trained


def test_actnorm_is_measured_once_on_the_first_training_batch() -> None:
    layer, cond = ActNorm(3), known(16)
    first, second = 5 * torch.randn(16, 3, 4, 4) - 2, 9 * torch.randn(16, 3, 4, 4)
    assert torch.equal(layer.eval()(first, cond)[0], first)  # an evaluation measures nothing
    y = layer.train()(first, cond)[0]
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    layer(second, cond)
    assert torch.equal(layer(first, cond)[0], y)


def test_actnorm_survives_a_checkpoint() -> None:
    layer, cond = ActNorm(3), known(16)
    first = 5 * torch.randn(16, 3, 4, 4) - 2
    layer(first, cond)
    resumed = ActNorm(3)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    resumed.train()(9 * torch.randn(16, 3, 4, 4), cond)
    assert torch.equal(resumed(first, cond)[0], layer(first, cond)[0])


def test_an_average_from_before_the_first_batch_follows() -> None:
    """Of its parameters nothing has happened yet; its buffers are copied, as the EMA does."""
    layer, cond, x = ActNorm(3), known(16), 5 * torch.randn(16, 3, 4, 4) - 2
    average = copy.deepcopy(layer)
    y = layer(x, cond)[0]
    for own, buffer in zip(average.buffers(), layer.buffers(), strict=True):
        own.copy_(buffer)
    assert torch.equal(average.eval()(x, cond)[0], y)


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    layer = ActNorm(2)
    y, logdet = layer(torch.full((4, 2, 2, 2), 0.3), known(4))
    assert y.isfinite().all() and (y == 0).all()
    assert logdet.item() == pytest.approx(-8 * math.log(EPS), rel=1e-4)


def test_ranks_agree_on_the_moments_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads with half of a batch each, who meet wherever a statistic is averaged."""
    x, meeting, told = torch.randn(8, 3, 4, 4) * torch.arange(1, 9)[:, None, None, None], threading.Barrier(2), {}

    def mean(mine: Tensor) -> Tensor:
        told[f"sent {threading.current_thread().name}"] = mine
        meeting.wait()
        mean = (told["sent 0"] + told["sent 1"]) / 2
        meeting.wait()
        return mean

    def rank(k: int) -> None:
        told[k] = moments(x[4 * k : 4 * k + 4])

    with monkeypatch.context() as patch:
        patch.setattr(ranks, "mean", mean)
        threads = [threading.Thread(target=rank, args=(k,), name=str(k)) for k in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    whole = x.double().mean((0, 2, 3)), x.double().std((0, 2, 3), correction=0)
    for k in range(2):
        torch.testing.assert_close(told[k], whole)
    assert not torch.allclose(moments(x[:4])[1], whole[1])


def test_a_density_of_one_number_integrates_to_one() -> None:
    """Through the logit, a scale and shift, and a prior that the condition moves."""
    torch.manual_seed(0)
    layers = awake(Chain([Logit(), measured(1)]))
    prior = awake(GaussianPrior(nn.Sequential(nn.Linear(COND, 2), nn.Unflatten(1, (2, 1, 1)))))
    net = NormalizingFlowNet([layers], [prior], [(1, 1, 1)]).eval()
    # the logit's range ends inside the normal's: the tails beyond both ends of the grid are added by hand
    grid = torch.linspace(-0.5, 0.5, 20_001)[:, None, None, None]
    with torch.no_grad():
        noise, logdet = net(grid, known(1).expand(len(grid), -1))
    density = (-(noise[:, 0].double() ** 2) / 2 - math.log(2 * math.pi) / 2 + logdet).exp()
    inside = torch.trapezoid(density, grid.flatten().double())
    normal = torch.distributions.Normal(0.0, 1.0)
    tails = normal.cdf(noise[0, 0]) + 1 - normal.cdf(noise[-1, 0])
    assert (inside + tails).item() == pytest.approx(1, abs=1e-4)
    assert inside > 0.5


def test_a_density_of_two_numbers_integrates_to_one() -> None:
    """Couplings, an ActNorm and a 1x1 convolution, all far from the identity."""
    torch.manual_seed(0)
    layers = [ActNorm(2), InvertibleConv(2), AffineCoupling(2, 16, COND), masked(half_of_channels(2, 1), 2)]
    net = awake(Chain(layers))
    axis = torch.linspace(-12, 12, 601)
    grid = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        y, logdet = net(grid, known(1).expand(len(grid), -1))
    density = (-y.double().flatten(1).square().sum(1) / 2 - math.log(2 * math.pi) + logdet).exp()
    assert density.sum().item() * (24 / 600) ** 2 == pytest.approx(1, abs=1e-3)
    assert logdet.std() > 0.05  # nothing trivial


@pytest.mark.parametrize("make", [glow, realnvp])
def test_a_size_that_does_not_halve_is_refused(make: type) -> None:
    changes = {"steps": 1} if make is glow else {"n_blocks": 1}
    with pytest.raises(UserError, match="data.image_size=32"):
        make(image_size=30, image_channels=1, width=4, n_levels=2 if make is glow else 3, cond_dim=2, **changes)


def test_checkerboards_and_halves() -> None:
    assert checkerboard(4, 0)[0].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(checkerboard(4, 1), 1 - checkerboard(4, 0))
    assert half_of_channels(4, 0).flatten().tolist() == [1, 1, 0, 0]
    assert half_of_channels(4, 1).flatten().tolist() == [0, 0, 1, 1]


def test_squeezed_halves_are_rows_in_all_colours() -> None:
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    y = Squeeze()(x, known(2))[0]
    torch.testing.assert_close(y[:, :3], x[:, :, 0::2, 0::2])
    torch.testing.assert_close(y[:, 3:6], x[:, :, 0::2, 1::2])
    torch.testing.assert_close(y[:, 9:], x[:, :, 1::2, 1::2])


def test_a_flow_stays_float32_under_autocast() -> None:
    """The 1x1 convolution, which autocast would take, above all; the couplings' nets do follow it."""
    net, x, cond = awake(two_level("glow")), images(2, 1, 4, 4), known(2)
    seen = []
    net.levels[0].layers[4].net.conv2.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    exact = InvertibleConv(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noise, logdet = net(x, cond)
        y = exact(torch.randn(1, 4, 2, 2), cond)[0]
    assert seen == [torch.bfloat16]
    assert noise.dtype == y.dtype == torch.float32 and logdet.dtype == torch.float64
    plain = InvertibleConv(4)
    plain.load_state_dict(exact.state_dict())
    same = torch.randn(1, 4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = exact(same, cond)[0]
    assert torch.equal(y, plain(same, cond)[0])
