"""Texts to numbers of rows in a table: hashed words, which need no vocabulary, or CLIP's byte pairs, which have one."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from atelier.core.errors import UserError
from atelier.core.ranges import Name, PositiveInt
from atelier.nets.contracts import TextEncoder

WORD = re.compile(r"[^\W_]+")  # letters and digits
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
N_PUBLISHED = 49_152 - 256 - 2  # merges of CLIP's vocabulary that it uses, after a first line
KEPT_WORDS = 1 << 16  # words whose byte pairs are remembered


class Tokenizer(Protocol):
    """A text to numbers below `n_rows`, `start` before and `end` behind them; `pad` fills what is shorter."""

    n_rows: int
    start: int
    end: int
    pad: int

    def __call__(self, text: str) -> list[int]:
        """All tokens of a text, however many, `start` and `end` among them."""
        ...


class HashedWords:
    """Words in lower case, runs of letters or digits, each to the row that CRC-32 of it says; no vocabulary is kept.

    Words whose remainders are equal share a row: of n words, about n^2 / (2 n_rows) pairs do.

    Args:
        n_rows: rows of the table, three of which are pad, start and end.

    Raises:
        UserError: there is no row for a word.
    """

    pad, start, end = 0, 1, 2

    def __init__(self, n_rows: PositiveInt) -> None:
        if n_rows < 4:
            raise UserError(".n_rows", n_rows, "three rows are pad, start and end, none is left", ".n_rows=4096")
        self.n_rows = n_rows

    def __call__(self, text: str) -> list[int]:
        words = WORD.findall(unicodedata.normalize("NFC", text).lower())
        return [self.start, *(3 + zlib.crc32(word.encode()) % (self.n_rows - 3) for word in words), self.end]


class BytePairs:
    """CLIP's byte-pair encoding of texts in lower case (Sennrich et al. 2016; Radford et al. 2021, CLIP, section 2.4).

    Of a word, the two neighbouring parts whose merge comes first in the list become one, until no pair is in it. Texts
    are not mended first, as OpenAI's program does where it finds broken characters and HTML.

    Args:
        rows: part of a word, its bytes as printable letters, `</w>` behind the last -> row of the table.
        merges: pairs of parts, the first to be merged first.
        pad: row that fills what is shorter; None: that of `end`.

    Raises:
        UserError: the rows lack a start or an end.
    """

    def __init__(self, rows: dict[str, int], merges: list[tuple[str, str]], pad: int | None = None) -> None:
        missing = [mark for mark in ("<|startoftext|>", "<|endoftext|>") if mark not in rows]
        if missing:
            fix = "rows of CLIP's vocab.json"
            raise UserError(".rows", f"{len(rows)} parts", f"{missing[0]} is not among them", fix)
        self.rows, self.order = rows, {pair: k for k, pair in enumerate(merges)}
        self.start, self.end = rows["<|startoftext|>"], rows["<|endoftext|>"]
        self.n_rows, self.pad = max(rows.values()) + 1, self.end if pad is None else pad
        self._letters, self._kept = _letters(), {}

    @classmethod
    def published(cls, vocabulary: Name) -> BytePairs:
        """The encoding of bpe_simple_vocab_16e6.txt.gz, whose rows are numbered as OpenAI's tokenizer does; pad is 0.

        Args:
            vocabulary: path of that file.

        Raises:
            UserError: the file is not there, or is another.
        """
        fix = ".vocabulary=PATH of bpe_simple_vocab_16e6.txt.gz, or null"
        try:
            with gzip.open(Path(vocabulary).expanduser(), "rt", encoding="utf-8") as file:
                lines = [line.split() for line in file][1 : N_PUBLISHED + 1]
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UserError(".vocabulary", vocabulary, f"it cannot be read ({type(error).__name__})", fix) from error
        merges = [(line[0], line[1]) for line in lines if len(line) == 2]
        if len(merges) != N_PUBLISHED:
            raise UserError(".vocabulary", vocabulary, f"it has no {N_PUBLISHED:,} pairs", fix)
        letters = list(_letters().values())
        names = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
        names += ["<|startoftext|>", "<|endoftext|>"]
        return cls({name: k for k, name in enumerate(names)}, merges, pad=0)

    def __call__(self, text: str) -> list[int]:
        text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        return [self.start, *(row for word in _words(text) for row in self._rows_of(word)), self.end]

    def _rows_of(self, word: str) -> tuple[int, ...]:
        if word not in self._kept:
            if len(self._kept) >= KEPT_WORDS:
                self._kept.clear()
            self._kept[word] = self._merged(word)
        return self._kept[word]

    def _merged(self, word: str) -> tuple[int, ...]:
        """The rows of one word; a part that has none, which a cut vocabulary may lack, is the end's."""
        letters = [self._letters[byte] for byte in word.encode()]
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while len(parts) > 1:
            known = [(self.order[pair], pair) for pair in zip(parts, parts[1:], strict=False) if pair in self.order]
            if not known:
                break
            first, second = min(known)[1]
            whole, k = [], 0
            while k < len(parts):
                joined = parts[k : k + 2] == [first, second]
                whole.append(first + second if joined else parts[k])
                k += 1 + joined
            parts = whole
        return tuple(self.rows.get(part, self.end) for part in parts)


def padded(tokens: list[list[int]], length: int, end: int, pad: int) -> Tensor:
    """Rows (B, length) int64 of the tokens of B texts; of what is longer the first, and `end` in the last place."""
    rows = [own if len(own) <= length else [*own[: length - 1], end] for own in tokens]
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def too_long(encoder: TextEncoder, texts: list[str]) -> list[tuple[str, int]]:
    """The texts of which an encoder reads a part alone, in their order, with how many tokens each is."""
    counted = zip(texts, encoder.n_tokens(texts), strict=True)
    return [(text, n) for text, n in counted if n > encoder.max_tokens]


def refuse_long(encoder: TextEncoder, texts: list[str], key: str, fix: str) -> None:
    """Raises UserError where an encoder reads a part alone of some texts.

    Args:
        encoder: encoder that reads them.
        texts: all texts of a set or of a request.
        key: option that they are from.
        fix: remedy, beside shorter ones.
    """
    if found := too_long(encoder, texts):
        shown = ", ".join(f"{text[:60]!r} ({n})" for text, n in found[:3])
        many, read = f"{len(found)} of {len(texts)} texts", f"the {encoder.max_tokens} tokens that are read"
        problem = f"{many} have more than {read}: {shown}"
        if len(texts) == 1:
            problem = f"it has {found[0][1]} tokens, of which {encoder.max_tokens} are read"
        raise UserError(key, found[0][0][:30], problem, f"shorter ones, or {fix}")


def _letters() -> dict[int, str]:
    """A printable letter for each byte: itself, or where it is none the next one from 256 on; in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}


def _kind(letter: str) -> str:
    """ "L" a letter, "N" a number, " " space, else "." """
    kind = unicodedata.category(letter)[0]
    return " " if letter.isspace() else kind if kind in "LN" else "."


def _words(text: str) -> list[str]:
    """English endings, runs of letters, single numerals, runs of other signs, as CLIP's pattern finds them."""
    words, k = [], 0
    while k < len(text):
        ending, end, kind = CONTRACTION.match(text, k), k + 1, _kind(text[k])
        if ending:
            end = ending.end()
        while not ending and kind != "N" and end < len(text) and _kind(text[end]) == kind:
            end += 1
        if kind != " ":
            words.append(text[k:end])
        k = end
    return words
