"""What was typed of labels and attributes as numbers, and back."""

from __future__ import annotations

import shlex

import pytest
import torch

from atelier.cli import given
from atelier.core.errors import UserError
from atelier.core.names import SetNames
from tests.compose import composed

FACES = SetNames(
    [], ["5_o_Clock_Shadow", "Black_Hair", "Blond_Hair", "Male", "Smiling"], [["Black_Hair", "Blond_Hair"]]
)
THINGS = SetNames(["Ankle boot", "T-shirt/top", "Cat", "cat", "1", "a, b [c]", "true"])


@pytest.mark.parametrize(("typed", "number"), {
    "Ankle boot": 0, "ankle_BOOT": 0, "t-shirt/TOP": 1, "Cat": 2, "cat": 3, "1": 4, 1: 1, 0: 0, "true": 6,
}.items())  # fmt: skip
def test_a_label_is_found_by_name_or_number(typed: int | str, number: int) -> None:
    """A name that is a number is found too where it is typed in quotes."""
    assert THINGS.label(typed, 7) == number
    assert THINGS.label(THINGS.called(number), 7) == number


@pytest.mark.parametrize(("names", "typed", "line"), [
    (THINGS, "CAT", "error: label=CAT: the set has Cat, cat. Fix: label=Cat"),
    (THINGS, "ankle bot", "true. Fix: 'label=Ankle boot'"),
    (THINGS, "b [c]", """Fix: 'label="a, b [c]"'"""),
    (THINGS, 7, "error: label=7: the 7 labels are 0 to 6. Fix: label=6"),
    (FACES, "cat", "error: label=cat: the 7 labels are 0 to 6. Fix: label=6"),
])  # fmt: skip
def test_another_label_is_refused_and_the_fix_can_be_typed(names: SetNames, typed: int | str, line: str) -> None:
    with pytest.raises(UserError) as error:
        names.label(typed, 7)
    assert line in error.value.line()
    (fix,) = shlex.split(error.value.fix)
    assert names.label(composed(*given.meant([fix], False), config="sample").label, 7) is not None


@pytest.mark.parametrize(("typed", "signs"), [
    ("Smiling", [-1, -1, -1, -1, 1]),
    (["Blond_Hair", "smiling"], [-1, -1, 1, -1, 1]),
    ("+Smiling", [0, 0, 0, 0, 1]),
    (["+5_O_clock_shadow", "-male"], [1, 0, 0, -1, 0]),
    (["+Blond_Hair", "-Male"], [0, -1, 1, -1, 0]),
    ("-Blond_Hair", [0, 0, -1, 0, 0]),
    ([], [-1] * 5),
])  # fmt: skip
def test_signs_change_these_alone_and_names_are_all_there_is(typed: list[str] | str, signs: list[int]) -> None:
    assert FACES.signs(typed) == signs


def test_a_name_may_begin_with_a_sign() -> None:
    assert SetNames([], ["-1", "+1"]).signs(["-1"]) == [1, -1]
    assert SetNames([], ["-1", "+1"]).signs(["+-1"]) == [1, 0]


@pytest.mark.parametrize(("typed", "line"), [
    (["+Smilng"], "attributes=+Smilng: the set has 5_o_Clock_Shadow, Black_Hair, Blond_Hair, Male, Smiling. Fix: "
     "attributes=+Smiling"),
    (["Smiling", "-Male"], "Fix: attributes=+Smiling,-Male"),
    (["+Black_Hair", "+Blond_Hair"], "an image has one at most of Black_Hair, Blond_Hair. Fix: attributes=+Black_Hair"),
])  # fmt: skip
def test_attributes_that_mean_nothing_are_refused(typed: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        FACES.signs(typed)
    assert line in error.value.line()


def test_what_is_asked_of_each_image_is_told_by_name() -> None:
    own = torch.tensor([[0.0, 1, 0, 1, 0], [0.0, 0, 0, 0, 0]])
    batch = {"label": torch.tensor([3, 0]), "attributes": own, "target": 1 - own}
    changes = ["+5_o_Clock_Shadow +Blond_Hair -Male +Smiling", " ".join(f"+{a}" for a in FACES.attributes)]
    assert FACES.asked(batch, {"attributes", "target"}) == changes
    assert FACES.asked({"target": own}, {"attributes", "target"}) == ["Black_Hair Male", ""]
    assert FACES.asked(batch, {"attributes"}) == ["Black_Hair Male", ""]
    assert THINGS.asked(batch, {"label", "attributes"}) == ["cat", "Ankle boot"]
    assert SetNames().asked(batch, {"label"}) == ["3", "0"]
    assert FACES.asked(batch, {"text"}) is None
    signs = FACES.signs(["+Blond_Hair", "-Male"])  # and so no black hair, which goes without saying
    assert FACES.asked({"label": torch.tensor([1])}, {"label"}, signs) == ["1 +Blond_Hair -Male"]
    assert FACES.signs(FACES.written(signs)) == signs
