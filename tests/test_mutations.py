"""Each mutation of tests/mutations.py finds its place in the source; whether tests see it, that script says."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_it_can_be_made(mutation: Mutation) -> None:
    assert (ROOT / "src" / "atelier" / mutation.file).read_text().count(mutation.right) == 1
    assert mutation.wrong != mutation.right
    assert all((ROOT / place).exists() for place in mutation.tests.split())


def test_there_are_twenty() -> None:
    assert len(MUTATIONS) >= 20
