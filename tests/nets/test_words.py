"""Hashed words beside zlib's numbers as they are known, and CLIP's byte pairs beside transformers' tokenizer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from atelier.core.errors import UserError
from atelier.nets.words import BytePairs, HashedWords, padded, refuse_long
from atelier.shapes import world

PUBLISHED = Path(__file__).parents[2].parent / "shared/weights/bpe_simple_vocab_16e6.txt.gz"
GOLDEN = {  # rows as CLIPTokenizer of transformers numbers them, start and end left out
    "a small red striped circle on a navy ground": [320, 2442, 736, 22192, 7117, 525, 320, 5598, 2461],
    "Hello,\tworld!  it's 2024": [3306, 267, 1002, 256, 585, 568, 273, 271, 273, 275],
    "o'star ?'s ½²": [334, 568, 6977, 13610, 338, 33613, 41175],
    "naïve café — 😀": [1097, 35689, 563, 15304, 2005, 7334],
    "": [],
}


def test_a_word_has_the_row_of_its_crc() -> None:
    """crc32("123456789") is 0xCBF43926, the check value of the algorithm."""
    words = HashedWords(4099)
    assert words("123456789") == [1, 3 + 0xCBF43926 % 4096, 2]
    assert words("Red, STAR_on  a\tGround!") == words("red star on a ground") and len(words("red star")) == 4
    assert words("été") == words("E\u0301te\u0301") != words("ete")
    assert words("") == words("?!") == [1, 2]


def test_the_words_of_shapes_have_rows_of_their_own() -> None:
    words = HashedWords(8192)
    spoken = set(" ".join(world.captions(world.scenes(0, range(2000), "train"))).split())
    rows = {words(word)[1] for word in spoken}
    assert len(spoken) == 22 == len(rows) and min(rows) >= 3


def test_what_is_too_long_keeps_its_end() -> None:
    made = padded([[1, 7, 8, 9, 2], [1, 5, 2], [1, 7, 8, 2]], 4, end=2, pad=0)
    assert made.tolist() == [[1, 7, 8, 2], [1, 5, 2, 0], [1, 7, 8, 2]] and made.dtype == torch.int64


def test_the_first_merge_of_the_list_is_made_first() -> None:
    """Whatever stands further left; and a word's last part is another part than the same letters before it."""
    parts = ["a", "b", "c", "a</w>", "b</w>", "ab", "ab</w>", "bc", "abc", "<|startoftext|>", "<|endoftext|>"]
    rows = {part: k for k, part in enumerate(parts)}
    first = BytePairs(rows, [("a", "b"), ("b", "c"), ("a", "b</w>")])
    assert [parts[k] for k in first("ABCAB")[1:-1]] == ["ab", "c", "ab</w>"]
    other = BytePairs(rows, [("b", "c"), ("a", "b"), ("a", "bc"), ("a", "b</w>")])
    assert [parts[k] for k in other("abcab")[1:-1]] == ["abc", "ab</w>"]
    assert (first.n_rows, first.start, first.end, first.pad) == (11, 9, 10, 10)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="CLIP's vocabulary is not there")
@pytest.mark.parametrize("text", GOLDEN)
def test_the_published_vocabulary_gives_the_published_rows(text: str) -> None:
    words = published()
    assert words(text) == [49406, *GOLDEN[text], 49407]
    assert (words.n_rows, words.pad) == (49408, 0)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="CLIP's vocabulary is not there")
def test_the_published_vocabulary_is_read_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps(published().rows))
    merges = "\n".join(map(" ".join, published().order))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    more = ["they'd  WE'LL\n'sup", "x" * 40, "#1 a_b-c... 日本語 Ⅷ", "a&amp;b", "İstanbul ﬁn ẞ"]
    for text in [*GOLDEN, *more]:
        assert published()(text) == theirs(text)["input_ids"], text


KEPT: list[BytePairs] = []


def published() -> BytePairs:
    if not KEPT:
        KEPT.append(BytePairs.published(str(PUBLISHED)))
    return KEPT[0]


@pytest.mark.parametrize(("content", "problem"), [
    (None, "FileNotFoundError"), (b"no gzip", "BadGzipFile"), (gzip.compress(b"a\nb c\n"), "it has no 48,894 pairs"),
], ids=["missing", "no gzip", "short"])  # fmt: skip
def test_another_file_is_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "vocabulary.gz").write_bytes(content)
    with pytest.raises(UserError) as caught:
        BytePairs.published(str(tmp_path / "vocabulary.gz"))
    line = caught.value.line()
    assert line.startswith("error: .vocabulary=") and problem in line
    assert "Fix: .vocabulary=PATH of bpe_simple_vocab_16e6.txt.gz, or null" in line


def test_a_table_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="three rows are pad, start and end"):
        HashedWords(3)


def test_texts_that_are_longer_than_what_is_read_are_counted_and_the_first_shown() -> None:
    class Ten:
        max_tokens = 10

        def n_tokens(self, texts: list[str]) -> list[int]:
            return [2 + len(text.split()) for text in texts]

    long = " ".join(["w"] * 9)
    refuse_long(Ten(), ["a red star"] * 5, "data", "cut")
    with pytest.raises(UserError) as error:
        refuse_long(Ten(), ["a red star", *[f"{k} {long}" for k in range(5)]], "data", "cut")
    shown = ", ".join(repr(f"{k} {long}") + " (12)" for k in range(3))
    problem = f"5 of 6 texts have more than the 10 tokens that are read: {shown}"
    told = f"error: data=0 {long}: {problem}. Fix: shorter ones, or cut"
    assert error.value.line() == told
