"""A distribution over all code maps, sampled exactly, on a first stage whose codes can be read off the pixels."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.rng import ImageRngs
from atelier.models import vqprior
from atelier.models.vqprior import VQPrior, inverted
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.transformer import CausalTransformer
from atelier.nets.vae import VAENet

TINY = [  # beside tests/tiny.py:COMMON
    "model=vqprior",
    "model.first_stage.run=FIRST/vqvae",
    "model.net.width=8",
    "model.net.n_layers=1",
    "model.net.heads=2",
    "model.net.dropout=0.1",
    "model.embedder.dim=4",
]


class Bits(nn.Module):
    """Each pixel is a code: 0 below zero, 1 above; given back as -1 and 1."""

    n_codes, latent_shape = 2, (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[tuple[bool, bool, torch.dtype]] = []

    def codes(self, x: Tensor) -> Tensor:
        product = self.scale.view(1, 1) @ torch.ones(1, 1)
        self.modes.append((self.training, torch.is_grad_enabled(), product.dtype))
        return (x[:, 0] > 0).long()

    def decode_codes(self, codes: Tensor) -> Tensor:
        return 4.0 * codes[:, None] - 2


def made(
    conditions: Any = ("label",), cond_dropout: float = 0.1, guidance: float = 1.0, temperature: float = 1.0
) -> VQPrior:
    """A net with weights that do something, told one of three labels."""
    torch.manual_seed(0)
    net = partial(CausalTransformer, width=16, n_layers=2, heads=2, dropout=0.0, cond_dim=8)
    embedder = ConditionEmbedder(dim=8, conditions=list(conditions), n_classes=3, label_factors=[], n_attributes=0)
    model = VQPrior(net, embedder, cond_dropout, guidance, temperature, torch.optim.SGD, None, Bits())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


EVERY = torch.tensor(list(itertools.product([0, 1], repeat=4)))  # all 16 maps, row by row


def chances(model: VQPrior, label: int) -> Tensor:
    """The probability of each of them, (16,)."""
    cond = model.embedder({"label": torch.full((16,), label)}, 16)
    logp = model.net(EVERY, cond).log_softmax(2)
    return logp.gather(2, EVERY[:, :, None]).sum((1, 2)).exp().detach()


def told(n: int, label: int | None = None) -> dict[str, Tensor]:
    return {"label": torch.arange(n) % 3 if label is None else torch.full((n,), label)}


def drawn(model: VQPrior, n: int, label: int | None = None, **options: float) -> Tensor:
    """Codes (n, 4) of samples."""
    return (model.sample(told(n, label), ImageRngs(1, 0, n), **options).flatten(1) > 0).long()


def shares(codes: Tensor) -> Tensor:
    return (codes @ torch.tensor([8, 4, 2, 1])).bincount(minlength=16) / len(codes)


def test_the_chances_of_all_maps_sum_to_one() -> None:
    model = made()
    for label in range(3):
        assert chances(model, label).sum().item() == pytest.approx(1, abs=1e-6)
        assert chances(model, label).std() > 0.01


def test_samples_are_as_frequent_as_they_are_probable() -> None:
    model = made()
    for label in range(2):
        torch.testing.assert_close(shares(drawn(model, 4000, label)), chances(model, label), atol=0.025, rtol=0)
    assert (chances(model, 0) - chances(model, 1)).abs().max() > 0.05


def test_the_loss_is_nats_a_code() -> None:
    model = made(cond_dropout=0.0)
    maps = torch.tensor([3, 9, 14])
    x = 2.0 * EVERY[maps].view(3, 1, 2, 2) - 1
    loss = model.training_step({"image": x, "label": torch.arange(3)})
    expected = -torch.stack([chances(model, k)[maps[k]].log() for k in range(3)]).mean() / 4
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.reported["nats_per_code"], expected)


def test_codes_are_written_row_by_row() -> None:
    model = made()
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
    assert model.codes(x).tolist() == [[1, 0, 0, 1]]
    model._drawn = lambda *given: torch.tensor([[1, 0, 0, 1]])
    assert torch.equal(model.sample(told(1), ImageRngs(0, 0, 1)), x)  # 2 and -2, clamped


def test_guidance_one_is_off() -> None:
    model = made(guidance=1.0)
    plain = drawn(model, 40)
    nn.init.constant_(model.embedder.null_embedding, torch.nan)  # what is not told is not asked
    assert torch.equal(drawn(model, 40), plain)
    assert torch.equal(drawn(model, 40, guidance=1.0), plain)


def test_temperature_zero_takes_the_likeliest_codes() -> None:
    model = made()
    assert torch.equal(drawn(model, 40, temperature=0.0), drawn(model, 40, temperature=1e-3))


def test_guidance_zero_is_without_condition() -> None:
    model = made()
    assert torch.equal(drawn(model, 40, 0, guidance=0.0), drawn(model, 40, 1, guidance=0.0))
    assert not torch.equal(drawn(model, 40, 0), drawn(model, 40, 1))
    plain = drawn(model, 40, guidance=0.0)
    nn.init.constant_(model.embedder.label[0].weight, torch.nan)  # what was asked is not looked at
    assert torch.equal(drawn(model, 40, guidance=0.0), plain)


def test_guidance_stretches_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """l_u + g (l_c - l_u), divided by the temperature."""
    model, seen = made(), []
    monkeypatch.setattr(vqprior, "inverted", lambda logits, u: seen.append(logits) or (u > 0.5).long())
    codes = drawn(model, 3, guidance=2.5, temperature=0.5)
    known, null = model.embedder(told(3), 3), model.embedder.null(3)
    expected = model.net(codes, null) + 2.5 * (model.net(codes, known) - model.net(codes, null))
    torch.testing.assert_close(torch.stack(seen, dim=1), expected / 0.5, atol=1e-4, rtol=1e-4)


def test_options_stand_in_for_the_models_own() -> None:
    assert torch.equal(drawn(made(guidance=3.0, temperature=0.7), 40), drawn(made(), 40, guidance=3.0, temperature=0.7))
    assert not torch.equal(drawn(made(), 40, temperature=0.7), drawn(made(), 40))


def test_a_low_temperature_takes_the_likeliest() -> None:
    model = made()
    codes = drawn(model, 20, 1, temperature=1e-4)
    logits = model.net(codes, model.embedder(told(20, 1), 20))
    assert torch.equal(codes, logits.argmax(2))


def test_shuffled_conditions_change_samples() -> None:
    model, rngs = made(), ImageRngs(0, 0, 60)
    label = torch.arange(60) % 3
    first, second = model.sample({"label": label}, rngs.again()), model.sample({"label": label.roll(1)}, rngs.again())
    assert (first != second).flatten(1).any(1).float().mean() > 0.2


def test_image_k_is_that_of_any_batch() -> None:
    model = made(guidance=2.0)
    together = model.sample(told(30), ImageRngs(4, 0, 30))
    alone = model.sample({"label": told(30)["label"][5:17]}, ImageRngs(4, 5, 12))
    assert torch.equal(together[5:17], alone)
    assert not torch.equal(together[2:14], alone)


def test_samples_are_drawn_in_float32_under_bf16() -> None:
    model, seen = made(guidance=2.0), []
    plain = drawn(model, 60)
    model.net.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(model, 60), plain)
    assert seen == 4 * [torch.float32]


def test_the_loss_is_float32_and_the_codes_are_read_outside_autocast() -> None:
    model, seen = made().train(), []
    model.net.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.rand(5, 1, 2, 2) - 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step({"image": x, **told(5)})
    assert seen == [torch.bfloat16]  # autocast was on
    assert loss.dtype == torch.float32
    assert model.first.net.modes == [(False, False, torch.float32)]  # eval mode, no gradient, float32


def test_dropped_conditions_are_not_heard() -> None:
    x = torch.rand(5, 1, 2, 2) - 0.5
    losses = [made(cond_dropout=1.0).training_step({"image": x, **told(5, label)}) for label in range(2)]
    assert losses[0] == losses[1]
    told_of = [made(cond_dropout=0.0).training_step({"image": x, **told(5, label)}) for label in range(2)]
    assert told_of[0] != told_of[1]


def test_without_conditions_nothing_is_guided() -> None:
    model, rows = made(conditions=(), guidance=5.0), []
    assert model.needs == frozenset() and model.protocol()["guidance"] == 1.0
    model.net.head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.sample({}, ImageRngs(0, 0, 4))
    assert rows == [4] * 4  # each place once


def test_the_first_stage_stays_as_it_is() -> None:
    model = made().train()
    assert not model.first.net.training and not model.first.net.scale.requires_grad
    assert not [name for name in [*model.state_dict(), *dict(model.named_parameters())] if "scale" in name]


def test_a_first_stage_without_codes_is_refused() -> None:
    stage = VAENet(image_size=8, image_channels=3, width=4, n_downs=1, latent_channels=2, patch_size=1)
    embedder = ConditionEmbedder(dim=8, conditions=[], n_classes=0, label_factors=[], n_attributes=0)
    with pytest.raises(UserError, match=r"\.first_stage=VAENet: its latents are no codes"):
        VQPrior(lambda n_codes, n_places: nn.Identity(), embedder, 0.1, 1.0, 1.0, torch.optim.SGD, None, stage)


def test_a_code_is_where_the_distribution_function_passes() -> None:
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(6, 4)
    u = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, 1 - 2**-24])
    assert inverted(logits, u).tolist() == [0, 0, 1, 1, 3, 3]
    assert inverted(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2), u[[0, -1]]).tolist() == [1, 2]
