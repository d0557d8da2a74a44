"""Classifier-free guidance within an interval of noise levels, and its rescale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.guidance import Asked, ClassifierFree
from atelier.diffusion.schedules import EDM, Cosine, Flow, Linear, Schedule, ZeroTerminal

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 3, 4, 4, generator=GENERATOR)
FREE, KNOWN = torch.randn(2, 3, 3, 4, 4, generator=GENERATOR)
V_FREE, V_KNOWN = torch.randn(2, 3, 3, 4, 4, generator=GENERATOR)


class TwoAnswers:
    """A net that answers `free` where the condition is 0 and `known` where it is 1, and counts its calls."""

    def __init__(self, free: Tensor = FREE, known: Tensor = KNOWN) -> None:
        self.free, self.known, self.calls = free, known, []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.calls.append(len(x_t))
        told = cond.vector[:, 0].view(-1, 1, 1, 1) == 1
        free, known = (answer.repeat(len(x_t) // 3, 1, 1, 1) for answer in (self.free, self.known))
        return torch.where(told, known, free)


def asked(schedule: Schedule) -> Asked:
    return Asked(Condition(torch.ones(3, 1)), Condition(torch.zeros(3, 1)), {}, schedule)


def times(schedule: Schedule, *noise: float) -> Tensor:
    """The times (3,) of these sigma / alpha."""
    return schedule.time(-2 * torch.tensor(noise * (3 // len(noise)), dtype=torch.float64).log())


@pytest.mark.parametrize("schedule", [Flow(), EDM(), Cosine()], ids=lambda s: type(s).__name__)
def test_guidance_is_on_within_the_interval_alone_and_elsewhere_one_plain_call(schedule: Schedule) -> None:
    """Above the lower end and up to the upper one, in sigma / alpha, whatever the schedule calls that time."""
    guider, line = ClassifierFree(guidance=3.0, interval=[0.25, 2.0]), FREE + 3 * (KNOWN - FREE)
    for noise, on in ((0.2, False), (0.2499, False), (0.2501, True), (1.0, True), (1.9999, True), (2.0001, False)):
        net = TwoAnswers()
        found = guider(net, asked(schedule))(X, times(schedule, noise))
        torch.testing.assert_close(found, line if on else KNOWN, rtol=0, atol=0)
        assert net.calls == ([6] if on else [3])


def test_the_upper_end_belongs_to_the_interval_and_the_lower_does_not() -> None:
    schedule, t = Flow(), torch.full((3,), 0.5, dtype=torch.float64)  # sigma / alpha is 1 exactly
    for interval, on in (([0.5, 1.0], True), ([1.0, 2.0], False)):
        net = TwoAnswers()
        ClassifierFree(guidance=2.0, interval=interval)(net, asked(schedule))(X, t)
        assert net.calls == ([6] if on else [3])


def test_images_at_different_levels_each_follow_their_own() -> None:
    guider = ClassifierFree(guidance=3.0, interval=[0.5, 2.0])
    found = guider(TwoAnswers(), asked(Flow()))(X, times(Flow(), 0.1, 1.0, 9.0))
    line = FREE + 3 * (KNOWN - FREE)
    torch.testing.assert_close(found, torch.stack([KNOWN[0], line[1], KNOWN[2]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("interval", "fix"), [([2.0, 1.0], ".interval=[1,2]"), ([1.0, 1.0], ".interval=null")], ids=str
)
def test_an_empty_interval_is_refused(interval: list[float], fix: str) -> None:
    with pytest.raises(UserError, match="no noise level lies in it") as caught:
        ClassifierFree(guidance=2.0, interval=interval)
    assert caught.value.fix == fix


# ---- rescale


def v_of(denoised: Tensor, x_t: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """alpha eps - sigma x of Salimans & Ho 2022, where alpha^2 + sigma^2 = 1."""
    alpha, sigma = schedule.pair(t, like=x_t)
    return alpha * (x_t - alpha * denoised) / sigma - sigma * denoised


def test_the_whole_rescale_gives_v_the_deviation_that_it_has_without_guidance() -> None:
    """Of each image by itself, and changes v by a factor alone; half of it goes half of the way."""
    schedule = Linear()
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    plain, half, whole = (
        v_of(ClassifierFree(guidance=4.0, rescale=share)(TwoAnswers(), asked(schedule))(X, t), X, schedule, t)
        for share in (0.0, 0.5, 1.0)
    )
    wanted = v_of(KNOWN, X, schedule, t)
    torch.testing.assert_close(whole.flatten(1).std(1), wanted.flatten(1).std(1), rtol=1e-4, atol=1e-5)
    factor = (whole / plain).flatten(1)
    assert (factor.std(1) < 1e-3).all() and factor.mean(1).unique().numel() == 3
    torch.testing.assert_close(half, (plain + whole) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"rescale": 0.0}, {"interval": None}, {"interval": [0.0, 1e9]}], ids=str)
def test_nothing_asked_is_the_plain_line(options: dict) -> None:
    t = torch.full((3,), 0.5, dtype=torch.float64)
    found = ClassifierFree(guidance=3.0, **options)(TwoAnswers(), asked(Flow()))(X, t)
    assert torch.equal(found, FREE + 3 * (KNOWN - FREE))


def test_rescale_without_guidance_changes_nothing() -> None:
    net = TwoAnswers()
    found = ClassifierFree(guidance=1.0, rescale=0.7, interval=[0.1, 2.0])(net, asked(Flow()))(X, torch.ones(3) / 2)
    assert torch.equal(found, KNOWN) and net.calls == [3]


def test_rescale_depends_on_the_noise_level_and_not_on_the_schedule() -> None:
    """One image in one noise, x_t as long as each schedule has it: Flow, Cosine and EDM at sigma / alpha = 0.8."""
    found = []
    for schedule in (Flow(), Cosine(), EDM()):
        t = times(schedule, 0.8)
        alpha, sigma = schedule.pair(t, like=X)
        guider = ClassifierFree(guidance=4.0, rescale=0.7)
        found.append(guider(TwoAnswers(), asked(schedule))(alpha * KNOWN + sigma * X, t))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    assert (found[0] - FREE - 4 * (KNOWN - FREE)).abs().max() > 0.1


def test_at_pure_noise_the_image_itself_gets_the_deviation() -> None:
    """v is -D there, as where schedules end in zero SNR, which the rescale was made for; eps would know nothing."""
    schedule = ZeroTerminal(Linear())
    found = ClassifierFree(guidance=5.0, rescale=1.0)(TwoAnswers(), asked(schedule))(X, torch.ones(3).double())
    torch.testing.assert_close(found.flatten(1).std(1), KNOWN.flatten(1).std(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("guidance", "share"), [(0.0, 0.0), (0.25, 0.25), (7.0, 1.0)])
def test_a_learned_variance_is_taken_no_further_than_the_condition(guidance: float, share: float) -> None:
    net = TwoAnswers(torch.cat([FREE, V_FREE], dim=1), torch.cat([KNOWN, V_KNOWN], dim=1))
    t = torch.full((3,), 0.5, dtype=torch.float64)
    found = ClassifierFree(guidance=guidance, rescale=0.0)(net, asked(Flow()))(X, t)
    torch.testing.assert_close(found[:, :3], FREE + guidance * (KNOWN - FREE), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:, 3:], V_FREE + share * (V_KNOWN - V_FREE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 3.0, 7.5])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_it_is_what_diffusers_does_with_a_net_that_predicts_v(guidance: float, share: float) -> None:
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=guidance, guidance_rescale=share)
    schedule, t = Cosine(), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    theirs.set_state(step=0, num_inference_steps=1, timestep=torch.tensor([1]))
    v = theirs.forward(v_of(KNOWN, X, schedule, t), v_of(FREE, X, schedule, t)).pred
    alpha, sigma = schedule.pair(t, like=X)
    found = ClassifierFree(guidance=guidance, rescale=share)(TwoAnswers(), asked(schedule))(X, t)
    torch.testing.assert_close(found, alpha * X - sigma * v, rtol=1e-5, atol=1e-5)
