"""What the fields of the sets do not decide, beside the lists as they were kept by hand."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hydra.utils import get_class

from atelier.data.base import Role, with_role
from atelier.runs import build
from tests.compose import CONF, composed

KEPT = {
    Role.NOT_PIXELS: "batch_size seed limit num_workers flip jitter conditions budget label_factors masks source root"
    " download memory_mb cache max_pixels on_bad_image text prior prior_text prior_weight shapes",
    Role.MAY_CHANGE: "budget num_workers root download memory_mb on_bad_image cache prior",
    Role.OWN: "batch_size budget flip jitter turn num_workers seed conditions label_factors masks source prior_weight"
    " shapes",
    Role.DRAWN: "jitter turn",
    Role.NOT_PART: "seed budget num_workers root download memory_mb cache conditions label_factors masks source"
    " n_test_scenes test_split text prior prior_text prior_weight shapes",
}


@pytest.mark.parametrize("role", KEPT, ids=lambda role: role.name)
@pytest.mark.parametrize("page", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_each_field_says_what_it_does_not_decide(page: str, role: Role) -> None:
    cfg = composed(f"data={page}", "data.root=x") if page != "shapes" else composed()
    kind = get_class(cfg.data._target_)
    assert with_role(kind, role) == {f.name for f in fields(kind)} & set(KEPT[role].split())
    assert build.data_fields(cfg, role.name) == with_role(kind, role)
