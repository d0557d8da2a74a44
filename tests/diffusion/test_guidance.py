"""Guidance on a denoiser whose answer is the condition itself."""

import pytest
import torch

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.diffusion.guidance import Asked, ClassifierFree, Dual, clipped
from atelier.diffusion.schedules import Flow

X, T = torch.randn(4, 3, 2, 2), torch.full((4,), 0.5)
COND, NULL = Condition(torch.arange(8.0).view(4, 2)), Condition(torch.full((4, 2), -1.0))
ASKED = Asked(COND, NULL, {}, Flow())


class Spy:
    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        return x_t * t.view(-1, 1, 1, 1) + cond.vector.sum(1).view(-1, 1, 1, 1)


def test_one_equals_unguided_and_is_one_plain_call():
    spy = Spy()
    assert torch.equal(ClassifierFree(guidance=1)(spy, ASKED)(X, T), spy(X, T, COND))
    assert spy.calls[0][2] is COND
    assert len(spy.calls[0][0]) == 4


@pytest.mark.parametrize("guidance", [0.5, 3.0])
def test_line_through_both_answers_in_one_call(guidance):
    spy = Spy()
    result = ClassifierFree(guidance=guidance)(spy, ASKED)(X, T)
    assert [len(x_t) for x_t, _, _ in spy.calls] == [8]
    free, asked = spy(X, T, NULL), spy(X, T, COND)
    torch.testing.assert_close(result, free + guidance * (asked - free))


def test_nothing_is_known_at_guidance_0_and_one_call_is_enough():
    spy = Spy()
    assert torch.equal(ClassifierFree(guidance=0)(spy, ASKED)(X, T), spy(X, T, NULL))
    assert len(spy.calls[0][0]) == 4


def test_what_is_said_of_the_variance_is_not_cut():
    both = torch.tensor([-3.0, 0.5, 2.0, 1.5]).view(1, 4, 1, 1)
    assert clipped(lambda x_t, t: both)(torch.zeros(1, 2, 1, 1), T).flatten().tolist() == [-1, 0.5, 2.0, 1.5]


def test_clipped_cuts_at_the_pixel_range():
    assert clipped(lambda x_t, t: x_t)(torch.tensor([[-3.0, 0.5, 2.0]]), T).tolist() == [[-1, 0.5, 1]]


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (1.0, 1.5), (3.0, 1.0), (0.0, 0.0)])
def test_text_and_image_each_have_a_weight_of_their_own(text, image):
    """A net that gives 1 for a text and 10 for an image, so that the three answers can be told apart."""

    def net(x, t, cond):
        return x + cond.vector.sum(1).view(-1, 1, 1, 1) + 10 * cond.planes.sum((1, 2, 3)).view(-1, 1, 1, 1)

    known = Condition(torch.ones(2, 1), planes=torch.ones(2, 1, 1, 1))
    asked = Asked(known, known.null(), {}, None)
    x, t = torch.zeros(2, 1, 3, 3), torch.full((2,), 0.5)
    made = Dual(guidance=text, image_guidance=image)(net, asked)(x, t)
    torch.testing.assert_close(made, x + 10 * image + text)
    off = Dual(guidance=1.0, image_guidance=1.0)(net, asked)(x, t)
    torch.testing.assert_close(off, net(x, t, known))


def test_guidance_by_an_image_that_the_net_does_not_see_is_refused():
    class Blind:
        shape, cond_sizes = (3, 8, 8), {"vector": 4}

    with pytest.raises(UserError, match="sees no image beside what it denoises"):
        Dual(guidance=3.0, image_guidance=1.5).fits(Blind())
