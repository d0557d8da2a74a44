"""Guidance by a classifier, beside a mixture of two Gaussians of which everything is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.guidance import Asked, ByClassifier, TrainedClassifier, towards
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, ScaledLinear, Schedule, ZeroTerminal

SHAPE = (2, 3, 3)
MEANS = torch.stack([torch.full(SHAPE, 0.4), torch.full(SHAPE, -0.7)]).double()  # of the classes
VARIANCES, SHARES = torch.tensor([0.09, 0.25]).double(), torch.tensor([0.3, 0.7]).double()
SCHEDULES = (Flow(), EDM(), Cosine(), Linear())
NAMES = [type(schedule).__name__ for schedule in SCHEDULES]


def log_joint(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """log p(x_t, class) but for a constant, (B, 2), of x_t (B, C, H, W)."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]  # (B, 1)
    variance = alpha**2 * VARIANCES + sigma**2  # (B, 2)
    away = x_t.flatten(1)[:, None] - alpha[..., None] * MEANS.flatten(1)  # (B, 2, D)
    return SHARES.log() - away.square().sum(2) / (2 * variance) - variance.log() * MEANS[0].numel() / 2


def of_class(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """E[x | x_t, class], (B, 2, C, H, W): Gaussians, class by class."""
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1, 1)
    variance = VARIANCES.view(1, 2, 1, 1, 1)
    return (alpha * variance * x_t[:, None] + sigma**2 * MEANS) / (alpha**2 * variance + sigma**2)


def of_any(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """E[x | x_t]: both, as probable as they are."""
    weight = log_joint(x_t, t, schedule).softmax(1).view(-1, 2, 1, 1, 1)
    return (weight * of_class(x_t, t, schedule)).sum(1)


class Posterior(nn.Module):
    """The exact classifier of the mixture on a schedule of its own; it notes what it is asked."""

    n_classes, shape = 2, SHAPE

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.asked = schedule, []

    def log_probability(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.asked.append((x_t.detach(), t))
        return log_joint(x_t, t, self.schedule).log_softmax(1).gather(1, label[:, None])[:, 0]


def noisy(schedule: Schedule, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t of four images, two of each class, at sigma / alpha, with their times and labels."""
    rng = torch.Generator().manual_seed(3)
    label = torch.tensor([0, 1, 0, 1])
    x = MEANS[label] + VARIANCES[label].sqrt().view(-1, 1, 1, 1) * torch.randn(4, *SHAPE, generator=rng).double()
    t = schedule.time(torch.full((4,), -2.0, dtype=torch.float64) * torch.tensor(noise).double().log())
    alpha, sigma = schedule.pair(t, like=x)
    return alpha * x + sigma * torch.randn(4, *SHAPE, generator=rng).double(), t, label


def guided(classifier: nn.Module, schedule: Schedule, noise: float, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """What guidance towards the other class than its own makes of each, what is right, and what is without."""
    x_t, t, label = noisy(schedule, noise)
    nothing = Condition(torch.zeros(4, 1))
    asked = Asked(nothing, nothing, {"label": 1 - label}, schedule)
    guider = ByClassifier(guidance=guidance, classifier=classifier)
    with torch.no_grad():
        found = guider(lambda x_t, t, cond: of_any(x_t, t, schedule), asked)(x_t, t)
    right = of_class(x_t, t, schedule)[torch.arange(4), 1 - label]
    return found, right, of_any(x_t, t, schedule)


@pytest.mark.parametrize("noise", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_an_exact_classifier_at_scale_1_gives_the_exact_conditional_score(schedule: Schedule, noise: float) -> None:
    found, right, free = guided(Posterior(schedule), schedule, noise, 1.0)
    assert (right - free).abs().max() > 1e-3
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_the_scale_is_that_of_the_line_of_classifier_free_guidance(guidance: float) -> None:
    """By Bayes' rule both go the same way, from D without the condition through D under it."""
    found, right, free = guided(Posterior(Flow()), Flow(), 1.0, guidance)
    torch.testing.assert_close(found, free + guidance * (right - free), rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_a_classifier_serves_every_schedule_at_its_own_time_of_the_same_log_snr(
    schedule: Schedule, own: Schedule
) -> None:
    classifier = Posterior(own)
    found, right, _ = guided(classifier, schedule, 1.7, 1.0)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
    ((x, t),) = classifier.asked
    torch.testing.assert_close(own.logsnr(t), torch.full((4,), -2.0).double() * torch.tensor(1.7).double().log())
    there, here = x / own.alpha(t).view(-1, 1, 1, 1), noisy(schedule, 1.7)
    torch.testing.assert_close(there, here[0] / schedule.alpha(here[1]).view(-1, 1, 1, 1))


def test_noise_that_the_classifier_has_never_seen_is_not_asked_about() -> None:
    """Flow and ZeroTerminal end in pure noise, where alpha is 0, ScaledLinear at sigma / alpha of 14.6."""
    flow, t = Flow(), torch.tensor([1.0, 0.99, 0.94, 0.9, 0.5]).double()
    x_t, label = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(5).long()
    for own, on in ((flow, [False, False, True, True, True]), (ScaledLinear(), [False, False, False, True, True])):
        way = towards(Posterior(own), x_t, t, label, flow)
        assert way.isfinite().all() and way.flatten(1).any(1).tolist() == on
    last = ZeroTerminal(Linear()), torch.ones(1).double()
    assert not towards(Posterior(Cosine()), x_t[:1], last[1], label[:1], last[0]).any()


def test_a_learned_variance_stays_the_nets_own() -> None:
    x_t, t, label = noisy(Flow(), 1.0)
    nothing = Condition(torch.zeros(4, 1))
    guider = ByClassifier(guidance=3.0, classifier=Posterior(Flow()))
    v = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(5)).double()
    found = guider(
        lambda x, t, cond: torch.cat([of_any(x, t, Flow()), v], 1), Asked(nothing, nothing, {"label": label}, Flow())
    )(x_t, t)
    assert torch.equal(found[:, 2:], v) and (found[:, :2] - of_any(x_t, t, Flow())).abs().max() > 1e-3


def test_the_gradient_is_taken_in_float32_and_of_no_weight() -> None:
    seen: list[torch.dtype] = []

    class Net(nn.Conv2d):
        shape, n_classes = SHAPE, 3

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            seen.append((y := super().forward(x)).dtype)
            return y.mean((2, 3))

        def log_probability(self, logits: Tensor, label: Tensor) -> Tensor:
            return logits.log_softmax(1).gather(1, label[:, None])[:, 0]

    net = Net(2, 3, 1)
    guider = ByClassifier(guidance=1.0, classifier=TrainedClassifier(Flow(), net.train()))
    assert not net.training and not net.weight.requires_grad
    x_t, t, label = (value.float() if value.is_floating_point() else value for value in noisy(Flow(), 1.0))
    nothing = Condition(torch.zeros(4, 1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = guider(lambda x, t, cond: x, Asked(nothing, nothing, {"label": label}, Flow()))(x_t, t.double())
    assert seen == [torch.float32] and found.dtype == torch.float32 and not found.requires_grad
    assert guider.needs_grad and guider.conditions == ("label",)


def test_a_protocol_tells_the_weights_of_a_classifier() -> None:
    class Net(nn.Linear):
        shape, n_classes = SHAPE, 2

    torch.manual_seed(0)
    one, other = (ByClassifier(guidance=1.0, classifier=TrainedClassifier(Flow(), Net(2, 2))) for _ in range(2))
    assert str(one) == str(replace(one, guidance=2.0)) != str(other)
    assert str(one).startswith("ByClassifier(classifier=TrainedClassifier(") and len(str(one)) < 60


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="Linear: it tells no labels of noisy images. Fix: .classifier.run=DIR"):
        ByClassifier(guidance=1.0, classifier=nn.Linear(1, 1))
