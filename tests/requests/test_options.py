"""Options of sample.py and evaluate.py: what the families' `sample` takes by keyword, on the pages of both scripts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.ranges import NonNegFloat, NonNegInt, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.models import normalizing_flow
from atelier.models.base import Cond, Generator
from atelier.runs import build, preflight
from atelier.runs.pages import offered
from tests.compose import CONF, composed


@pytest.mark.parametrize("script", ["sample", "evaluate"])
def test_every_option_is_a_key_or_a_group_of_the_page(script: str) -> None:
    page = OmegaConf.load(CONF / f"{script}.yaml")
    groups = [next(iter(entry)) for entry in page.defaults if entry != "_self_"]
    assert preflight.options().keys() <= {*page, *groups}
    assert {"sampler", "guider", "guidance", "temperature", "truncation"} <= preflight.options().keys()


class Churned(Generator):
    """A family that takes what no other does."""

    needs = frozenset({"label"})

    def sample(
        self, cond: Cond, rngs: ImageRngs, *, churn: NonNegInt | None = None, guidance: NonNegFloat | None = None
    ) -> Tensor: ...


@pytest.fixture
def churned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(normalizing_flow, "Churned", Churned, raising=False)
    preflight.options.cache_clear()
    yield
    preflight.options.cache_clear()


def with_churn(value: object) -> DictConfig:
    cfg = composed("guidance=3", config="sample")
    OmegaConf.set_struct(cfg, False)
    cfg.churn = value
    return cfg


def test_a_new_option_is_checked_and_passed_on_by_the_signature_alone(
    churned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = preflight.known_keys() | {"churn": None}
    monkeypatch.setattr(preflight, "known_keys", lambda: known)  # the one line of the page
    preflight.check(with_churn(2))
    with pytest.raises(UserError, match="churn=-1"):
        preflight.check(with_churn(-1))
    model = Churned.__new__(Churned)
    options = build.options(with_churn(2), model, model.sample)
    assert options == {"churn": 2, "guidance": 3.0} and isinstance(options["guidance"], float)
    with pytest.raises(UserError, match="takes no churn here"):
        build.options(with_churn(2), model, lambda cond, rngs, *, guidance=None: None)


def test_groups_are_those_with_a_page_to_choose() -> None:
    assert offered("sample") == {"sampler": ["sampler"], "guider": ["guider"]}
    assert list(offered("evaluate")) == ["sampler", "guider", "metrics", "perceptual"]
    found = offered("train")
    assert list(found)[:2] == ["data", "model"] and "callbacks" not in found  # of which there is one
    assert found["perceptual"] == ["perceptual@metrics.lpips", "perceptual@model.perceptual"]
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert set(found) == folders - {"callbacks"}


def test_one_option_has_one_kind() -> None:
    """Else a family would be asked with the kind that another has."""

    def first(cond: object, *, steps: PositiveInt | None = None) -> None: ...

    def second(cond: object, *, steps: PositiveInt | None = None, temperature: NonNegFloat | None = None) -> None: ...

    def third(cond: object, *, steps: NonNegFloat | None = None) -> None: ...

    taken = preflight._keywords([first, second])
    assert taken == {"steps": PositiveInt | None, "temperature": NonNegFloat | None}
    with pytest.raises(TypeError, match="third takes steps: "):
        preflight._keywords([first, second, third])
