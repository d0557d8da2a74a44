"""The condition of Stable Diffusion XL: a text as two encoders read it, and six sizes of its image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import PositiveInt
from atelier.nets.conditions import Texts
from atelier.nets.contracts import TextEncoder, keeps
from atelier.nets.frozen import Frozen
from atelier.nets.layers import TimeEmbedding

N_SIZES = 6  # height and width of the original, top and left of the crop, height and width that are asked for


class TwoTexts(Texts):
    """Texts as two frozen encoders read them (Podell et al. 2023, SDXL, section 2.1 and 2.2).

    Tokens of both stand beside one another, number by number; the vector is that of the second, and behind it sines of
    six sizes: those of an image that was neither cut nor made smaller.

    Args:
        encoder: first encoder, of which the tokens are read.
        second: second encoder, of which tokens and vector are read.
        field: name of the texts.
        image_size: height and width in pixels.
        size_dim: numbers for each of the six sizes.
        null_kind: stand-in for no text, "zeros" (SDXL) or "empty", the empty prompt (SDXL turbo's has no guidance).
        cut: whether of a longer text than is read its beginning will do.

    Raises:
        UserError: an encoder is none, or the two read different numbers of tokens.
    """

    def __init__(
        self,
        *,
        encoder: TextEncoder,
        second: TextEncoder,
        field: Literal["text", "instruction"],
        image_size: PositiveInt,
        size_dim: PositiveInt = 256,
        null_kind: Literal["zeros", "empty"] = "zeros",
        cut: bool = False,
    ) -> None:
        super().__init__(encoder, field, null_kind, cut)
        keeps(second, TextEncoder, ".second")
        if encoder.max_tokens != second.max_tokens:
            problem = f"it reads {second.max_tokens} tokens, the first {encoder.max_tokens}"
            raise UserError(".second", type(second).__name__, problem, ".second.run=FOLDER of the same model")
        self.second = Frozen(second)
        tokens, vector = encoder.token_dim + second.token_dim, second.vector_dim + N_SIZES * size_dim
        self.cond_sizes = {"vector": vector, "tokens": tokens}
        self.register_buffer("sizes", _sizes(image_size, size_dim), persistent=False)  # (6 * size_dim,)

    @property
    def encoders(self) -> list[TextEncoder]:
        return [self.frozen.net, self.second.net]

    def _encoded(self, texts: list[str]) -> Condition:
        first, second = (one.net.encode_texts(texts) for one in (self.frozen, self.second))
        tokens = torch.cat([first.tokens, second.tokens], dim=2)           # (B, T, E)
        return Condition(self._with_sizes(second.vector), tokens, second.mask)

    def _nothing(self, n: int) -> Condition:
        """Zeros, but for the sizes, which stay."""
        vector, tokens = self.cond_sizes["vector"], self.cond_sizes["tokens"]
        zeros = self.sizes.new_zeros(n, vector - len(self.sizes))
        there = torch.ones(n, self.max_tokens, dtype=torch.bool, device=zeros.device)
        return Condition(self._with_sizes(zeros), zeros.new_zeros(n, self.max_tokens, tokens), there)

    def _with_sizes(self, vector: Tensor) -> Tensor:
        return torch.cat([vector, self.sizes.expand(len(vector), -1)], dim=1)


def _sizes(image_size: int, dim: int) -> Tensor:
    """Cosines and sines of the six sizes of a whole image, one size behind the other."""
    sizes = torch.tensor([image_size, image_size, 0, 0, image_size, image_size])
    return TimeEmbedding(dim, shift=0)(sizes).roll(dim // 2, dims=1).flatten()
