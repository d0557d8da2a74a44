"""What a frozen text encoder says of training texts, kept on disk and read in place of encoding them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from atelier.core.condition import Condition
from atelier.data.kept_rows import ROWS, KeptRows, Wording

KEY = "text_cache"
WORDING = Wording(KEY, stem="texts", rows="encodings", row="an encoding", of="text", maker="text encoder")
N_SHOWN = 30  # letters of a text that an error shows


class TextCache:
    """Vector, tokens and mask that a text encoder gives of texts, by text.

    A row is the vector (P), the tokens (T, E) and their mask (T), one behind the other, as data/kept_rows.py keeps
    rows, in the order of the texts.

    Args:
        folder: place of the files, which all ranks see.
        identity: name to plain value of all that decides the encodings: where one is another, the cache is stale.
        texts: different texts.
        sizes: (P, T, E); T = 0 where the vector alone is read.
        rows: texts of a shard.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        texts: Sequence[str],
        sizes: tuple[int, int, int],
        rows: int = ROWS,
    ) -> None:
        self.folder, self.texts, self.sizes = folder, texts, sizes
        vector_dim, n_tokens, token_dim = sizes
        self._row = {text: row for row, text in enumerate(texts)}
        numbers = vector_dim + n_tokens * (token_dim + 1)
        layout = {"sizes": list(sizes), "texts": len(texts)}
        self.kept = KeptRows(folder, WORDING, identity, layout, len(texts), (numbers,), rows)

    def __deepcopy__(self, _: dict[int, Any]) -> TextCache:
        """The same, which averages of the nets that read it share."""
        return self

    def __contains__(self, text: str) -> bool:
        return text in self._row

    def describe(self) -> str:
        """What it holds, in a few words."""
        return self.kept.describe(f"{len(self.texts):,} texts")

    def check(self) -> bool:
        """As `KeptRows.check`."""
        return self.kept.check()

    def begin(self) -> None:
        """As `KeptRows.begin`."""
        self.kept.begin()

    def fill(self, encode: Callable[[list[str]], Condition], batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        """Write those shards of this rank that are missing; the first rank tells how far it is.

        Args:
            encode: B texts to their condition, with tokens (B, at least T, E), on any device.
            batch_size: texts that are encoded at once.
            rank, ranks: number of this process, and how many share the work.

        Raises:
            UserError: an encoding is not finite, or the disk is full.
        """

        def flat(rows: list[int]) -> Tensor:
            known, n_tokens = encode([self.texts[row] for row in rows]), self.sizes[1]
            tokens = rearrange(known.tokens[:, :n_tokens], "b t e -> b (t e)")
            return torch.cat([known.vector.float(), tokens.float(), known.mask[:, :n_tokens].float()], 1)

        self.kept.fill(flat, lambda row: repr(self.texts[row][:N_SHOWN]), batch_size, rank, ranks)

    def finish(self) -> None:
        """As `KeptRows.finish`."""
        self.kept.finish()

    def read(self, texts: list[str]) -> Condition:
        """Vectors (B, P), tokens (B, T, E) and mask (B, T) of texts that it contains."""
        rows = torch.stack([self.kept.row(self._row[text]) for text in texts])
        vector_dim, n_tokens, token_dim = self.sizes
        vector, tokens, mask = rows.split([vector_dim, n_tokens * token_dim, n_tokens], dim=1)
        return Condition(vector, rearrange(tokens, "b (t e) -> b t e", t=n_tokens, e=token_dim), mask.bool())
