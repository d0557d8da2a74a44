"""A causal transformer over codes. B batch, N places, V codes, D width, K heads, E size of the condition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt, Probability
from atelier.nets.layers import attended, zeroed

Seen = tuple[Tensor, Tensor]  # a block's keys and values of the places so far, (B, K, N, D / K) each


class CausalTransformer(nn.Module):
    """The codes of places 0 .. k - 1 and a condition to logits of the code at place k, for every k at once.

    Pre-norm blocks and learned positions (Radford et al. 2019, GPT-2, section 2.3). The condition stands before the
    first code, as others' start token does, and scales and shifts the norms of every block (Peebles & Xie 2023,
    section 3.2, adaptive norm), which start as plain ones. All logits start equal.

    Args:
        n_codes: V.
        n_places: N.
        width: D.
        n_layers: number of blocks.
        heads: K.
        dropout: share of values left out on the embeddings and at the end of each residual branch.
        cond_dim: E.

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        n_codes: PositiveInt,
        n_places: PositiveInt,
        width: PositiveInt,
        n_layers: PositiveInt,
        heads: PositiveInt,
        dropout: Probability,
        cond_dim: PositiveInt,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(".heads", heads, f"it does not divide the width {width}", ".heads=1")
        self.n_places = n_places
        self.codes = nn.Embedding(n_codes, width)
        self.positions = nn.Embedding(n_places, width)
        for table in (self.codes, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.start = nn.Linear(cond_dim, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, dropout, cond_dim) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = zeroed(nn.Linear(width, n_codes))

    def forward(self, codes: Tensor, cond: Condition) -> Tensor:
        """Codes (B, N) int64, the last of which is not looked at, and vectors (B, E) to logits (B, N, V) float32."""
        h = torch.cat([self.start(cond.vector)[:, None], self.codes(codes[:, :-1])], dim=1)    # (B, N, D)
        return self._logits(h + self.positions.weight, cond, None)[0]

    def step(self, code: Tensor | None, cond: Condition, seen: list[Seen] | None) -> tuple[Tensor, list[Seen]]:
        """Logits (B, V) of one place, and what the next step needs of this one and those before.

        Args:
            code: (B,) of the place before; None at the first.
            cond: condition with a vector (B, E).
            seen: state that the step before gave; None at the first.
        """
        place = seen[0][0].shape[2] if seen else 0
        h = self.start(cond.vector) if code is None else self.codes(code)         # (B, D)
        logits, seen = self._logits((h + self.positions.weight[place])[:, None], cond, seen)
        return logits[:, 0], seen

    def _logits(self, h: Tensor, cond: Condition, seen: list[Seen] | None) -> tuple[Tensor, list[Seen]]:
        h, activated, now = self.dropout(h), F.silu(cond.vector), []
        for i, block in enumerate(self.blocks):
            h, pair = block(h, activated, seen[i] if seen else None)       # (B, N, D)
            now.append(pair)
        return self.head(self.norm(h)).float(), now                        # (B, N, V)


class TransformerBlock(nn.Module):
    """Attention to this place and those before, then a perceptron, each behind a norm that hears the condition."""

    def __init__(self, width: int, heads: int, dropout: float, cond_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.conditioning = zeroed(nn.Linear(cond_dim, 4 * width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = zeroed(nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), zeroed(nn.Linear(4 * width, width)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cond: Tensor, seen: Seen | None) -> tuple[Tensor, Seen]:
        """x (B, N, D), cond (B, E) activated; with `seen`, x is the one place after those."""
        scale1, shift1, scale2, shift2 = self.conditioning(cond)[:, None].chunk(4, dim=2) # (B, 1, D) each
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)              # (B, N, 3 D)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (B, K, N, D / K) each
        if seen is not None:
            k, v = torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2)
        h = attended(q, k, v, causal=seen is None)                         # (B, K, N, D / K)
        x = x + self.dropout(self.out(h.transpose(1, 2).flatten(2)))       # (B, N, D)
        return x + self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2)), (k, v)
