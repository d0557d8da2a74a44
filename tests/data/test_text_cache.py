"""What a cache of texts keeps beside a closed form, and that nothing cut, stale or not finite is ever read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atelier.core.condition import Condition
from atelier.data.kept_rows import MANIFEST
from atelier.data.text_cache import TextCache
from tests.data.test_latent_cache import Killed, contents, killed_at, line_of

TEXTS = ["", *(f"{word} {k}" for k, word in enumerate("a red star beside the blue ring of".split()))]
P, T, E, ROWS = 5, 4, 6, 4  # numbers of a vector, tokens of a text, numbers of a token, texts of a shard
OF = {"tokens of a text": T, "text encoder": "0123456789abcdef01", "content of the texts": "a"}


def encode(texts: list[str]) -> Condition:
    """Numbers of a text depend on it alone; a token for each of its words, zeros behind them."""
    seeds = torch.tensor([[float(sum(map(ord, text)))] for text in texts])  # (B, 1)
    mask = torch.tensor([[k <= len(text.split()) for k in range(T)] for text in texts])
    tokens = (seeds / 7)[..., None] + torch.arange(T * E).view(T, E) / 3  # (B, T, E)
    return Condition(torch.sin(seeds + torch.arange(P)), tokens * mask[..., None], mask)


def cache(folder: Path, of: dict = OF, n_tokens: int = T) -> TextCache:
    return TextCache(folder, of, TEXTS, (P, n_tokens, E), rows=ROWS)


def made(folder: Path, encoder: Callable[[list[str]], Condition] = encode, n_tokens: int = T) -> TextCache:
    """As one rank makes it, or goes on with it."""
    kept = cache(folder, n_tokens=n_tokens)
    if not kept.check():
        kept.begin()
        kept.fill(encoder, 2)
        kept.finish()
    assert kept.check()
    return kept


def test_rows_are_what_the_encoder_gives_to_the_bit(tmp_path: Path) -> None:
    kept, order = made(tmp_path / "cache"), [TEXTS[k] for k in (7, 0, 8, 3, 3)]
    known, truth = kept.read(order), encode(order)
    for name in ("vector", "tokens", "mask"):
        assert torch.equal(getattr(known, name), getattr(truth, name)), name
    assert known.mask.dtype == torch.bool and known.planes is None and 0 < known.mask.float().mean() < 1
    assert "" in kept and "a  0" not in kept
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*.bin")]
    assert sum(sizes) == kept.kept.n_bytes == 9 * (P + T * E + T) * 4
    assert kept.describe() == f"encodings of 9 texts, 0.0 MB in {tmp_path / 'cache'}"


def test_a_vector_that_is_read_alone_is_kept_alone(tmp_path: Path) -> None:
    kept = made(tmp_path / "cache", n_tokens=0)
    known = kept.read(TEXTS)
    assert torch.equal(known.vector, encode(TEXTS).vector) and kept.kept.n_bytes == 9 * P * 4
    assert known.tokens.shape == (9, 0, E) and known.mask.shape == (9, 0)


def test_copies_of_a_net_share_it(tmp_path: Path) -> None:
    kept = made(tmp_path / "cache")
    assert copy.deepcopy({"net": kept})["net"] is kept


def test_two_ranks_write_what_one_does(tmp_path: Path) -> None:
    made(tmp_path / "one")
    ranks = [cache(tmp_path / "two") for _ in range(2)]
    ranks[0].begin()
    for rank, kept in enumerate(ranks):
        assert not kept.check()
        kept.fill(encode, 2, rank, 2)
        assert len(list((tmp_path / "two").glob("*.bin"))) == (2, 3)[rank]
    ranks[0].finish()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_killed_anywhere_it_goes_on_and_nothing_is_lost_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of 20 moments; the last is after the manifest has called it finished."""
    whole = contents(made(tmp_path / "whole").folder)
    with monkeypatch.context() as patch:
        moments, told = killed_at(patch, None, encode)
        made(tmp_path / "counted", told)
    assert set(moments) == {"half a file", "before a name", "after a name", "encoding"} and len(moments) == 20
    for point in range(len(moments)):
        folder = tmp_path / f"killed_{point}"
        with monkeypatch.context() as patch:
            _, told = killed_at(patch, point, encode)
            with pytest.raises(Killed):
                made(folder, told)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
        assert cache(folder).check() is (point == len(moments) - 1)
        made(folder)
        assert contents(folder) == whole, moments[point]
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}.items()


@pytest.mark.parametrize(
    ("name", "value"), [("text encoder", "fedcba9876543210"), ("tokens of a text", 5), ("content of the texts", "b")]
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_stale_cache_is_refused_by_the_field_that_differs(
    tmp_path: Path, name: str, value: object, finished: bool
) -> None:
    made(tmp_path)
    if not finished:
        (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text().replace('true,\n "of"', 'false,\n "of"'))
    before = contents(tmp_path)
    line = line_of(cache(tmp_path, of=OF | {name: value}).check)
    assert line.startswith("error: text_cache=") and "Fix: text_cache=auto" in line
    assert f"it was made with {name}=" in line and f"this run has {str(value)[:12]}" in line
    assert contents(tmp_path) == before
    assert "it was made with sizes=[5, 4, 6], this run has [5, 0, 6]" in line_of(cache(tmp_path, n_tokens=0).check)


@pytest.mark.parametrize("field", ["vector", "tokens"])
def test_an_encoding_that_is_not_finite_is_refused_with_its_text(tmp_path: Path, field: str) -> None:
    def broken(texts: list[str]) -> Condition:
        known = encode(texts)
        getattr(known, field)[["blue" in text for text in texts]] = torch.nan
        return known

    line = line_of(lambda: made(tmp_path, broken))
    assert "the text encoder gives 'blue 5' an encoding that is not finite" in line
    assert re.search(r"Fix: another text encoder, or leave that text out$", line)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "texts_000000.bin"]
