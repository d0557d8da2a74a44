"""The text tower of CLIP as it was published. B batch, T tokens, V rows, E width, K heads, P numbers of the vector."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.ranges import NonNegInt, PositiveFloat, PositiveInt
from atelier.nets.contracts import Layer
from atelier.nets.layers import attended
from atelier.nets.words import BytePairs, padded

OLD_END = 2  # what configs of before 2023 call the end token, which then is the highest number of a text


class TransformersText(nn.Module):
    """Texts of CLIP's byte pairs through a causal transformer   (Radford et al. 2021, CLIP, section 2.4).

    `TextEncoder` of `nets/contracts.py`; its weights are read by `checkpoints/transformers_folder.py`. As published,
    all T = `max_tokens` places are tokens, those behind the end too: nothing is masked, and what fills them matters.
    The vector is the state at the end of the text behind the last block and the norm, projected where there is a
    projection; its length is the model's.

    Args:
        words: tokenizer, with its padding.
        width: E.
        n_layers: blocks that the file has.
        heads: K.
        hidden_dim: width within a perceptron.
        max_tokens: T.
        n_rows: V, as many as the file has.
        vector_dim: P of the projection; None: there is none, P = E.
        activation: "quick_gelu", x sigmoid(1.702 x), of OpenAI's weights; "gelu" of OpenCLIP's.
        eps: number that norms add to a variance.
        end: number of the end token that the config tells; 2 means the highest number of a text.
        layer: block whose states are the tokens. Stable Diffusion 1 and 2 (whose file lacks the last block): "last";
            SDXL: "penultimate", without the norm.
        final_norm: whether the last norm follows that block; the vector always has it.
    """

    def __init__(
        self,
        *,
        words: BytePairs,
        width: PositiveInt,
        n_layers: PositiveInt,
        heads: PositiveInt,
        hidden_dim: PositiveInt,
        max_tokens: PositiveInt,
        n_rows: PositiveInt,
        vector_dim: PositiveInt | None,
        activation: Literal["quick_gelu", "gelu"],
        eps: PositiveFloat,
        end: NonNegInt,
        layer: Layer,
        final_norm: bool,
    ) -> None:
        super().__init__()
        self.words, self.end, self.layer, self.final_norm = words, end, layer, final_norm
        self.token_dim, self.vector_dim, self.max_tokens = width, vector_dim or width, max_tokens
        self.rows, self.places = nn.Embedding(n_rows, width), nn.Embedding(max_tokens, width)
        self.blocks = nn.ModuleList([CausalBlock(width, heads, hidden_dim, activation, eps) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width, eps)
        self.out = nn.Linear(width, vector_dim, bias=False) if vector_dim else nn.Identity()

    def n_tokens(self, texts: list[str]) -> list[int]:
        return [len(self.words(text)) for text in texts]

    def encode_texts(self, texts: list[str]) -> Condition:
        """Vectors (B, P) and tokens (B, T, E), all of which are there."""
        tokens = [self.words(text) for text in texts]
        return self(padded(tokens, self.max_tokens, self.words.end, self.words.pad).to(self.rows.weight.device))

    def forward(self, rows: Tensor) -> Condition:
        """The condition of numbers of rows (B, T) int64."""
        h = self.rows(rows) + self.places.weight[: rows.shape[1]]          # (B, T, E)
        states = [h]
        for block in self.blocks:
            states.append(block(states[-1]))
        tokens = states[-1 if self.layer == "last" else -2]
        ends = rows if self.end == OLD_END else rows == self.end
        place = ends.int().argmax(1)                                       # (B,) the first of the greatest
        vector = self.out(self.norm(states[-1][torch.arange(len(rows), device=rows.device), place]))
        return Condition(vector, self.norm(tokens) if self.final_norm else tokens)


class CausalBlock(nn.Module):
    """Attention to a token and those before it, then a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int, hidden_dim: int, activation: str, eps: float) -> None:
        super().__init__()
        self.heads, self.quick = heads, activation == "quick_gelu"
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))    # (B, T, 3, K, E / K)
        h = attended(*qkv.permute(2, 0, 3, 1, 4), causal=True)             # (B, K, T, E / K)
        x = x + self.out(h.transpose(1, 2).flatten(2))                     # (B, T, E)
        h = self.mlp_in(self.norm2(x))                                     # (B, T, hidden)
        return x + self.mlp_out(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
