"""Sources of a condition: texts, images, maps and planes, alone or several at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.condition import Condition, Embedder, dropped_rows
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt, Span
from atelier.nets import lora
from atelier.nets.contracts import ImageEncoder, KeptTexts, TextEncoder, keeps
from atelier.nets.dit import sines_of_places
from atelier.nets.frozen import Frozen

Read = Literal["vector", "tokens"]
NEGATIVE = "negative"  # texts that stand in place of the null, by name in a `Cond`


class Texts(nn.Module, ABC):
    """Texts that a frozen encoder reads, and what stands for none: what all embedders of texts share.

    Args:
        encoder: encoder of texts.
        field: name of the texts.
        null_kind: stand-in for no text: "empty", the empty prompt (Rombach et al. 2022), or another of the embedder's.
        cut: whether of a text with more tokens than the encoder reads its beginning will do; else it is refused.

    Raises:
        UserError: the encoder is none.
    """

    def __init__(self, encoder: TextEncoder, field: str, null_kind: str, cut: bool) -> None:
        super().__init__()
        keeps(encoder, TextEncoder, ".encoder")
        self.conditions, self.frozen, self.null_kind, self.cut = (field,), Frozen(encoder), null_kind, cut
        self.adapters = nn.ModuleDict()  # of the encoders' layers, by encoder and layer, where they are trained

    @property
    def encoder(self) -> TextEncoder:
        """What it reads texts by."""
        return self.frozen.net

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that are read."""
        return self.encoder.max_tokens

    @property
    def encoders(self) -> list[TextEncoder]:
        """All that reads the texts, in order."""
        return [self.encoder]

    def adapt(self, recipe: lora.Recipe) -> None:
        """Train adapters of the encoders from here on, if it names any: they become weights of this embedder."""
        if not recipe.text_targets:
            return
        for encoder in self.encoders:
            recipe.on_text(encoder)
        with torch.enable_grad():
            recipe.keep_reached(self.encoders, self._looked_at())
        for k, encoder in enumerate(self.encoders):
            own = {layer: module.lora for layer, module in encoder.named_modules() if hasattr(module, "lora")}
            self.adapters.update({f"{k}-{layer.replace('.', '-')}": adapters for layer, adapters in own.items()})

    def _looked_at(self) -> list[Tensor]:
        """All that is used of a text."""
        known = self._encoded([""])
        return [value for value in (known.vector, known.tokens) if value is not None]

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """What `cond_sizes` names, of n texts; tokens are (n, `max_tokens`, E), with their mask."""
        known = self._encoded(cond[self.conditions[0]])
        return known if drop is None else without(self, known, dropped_rows(n, drop, known.device))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """That of n images without text, or with the texts that are named `negative`."""
        if cond is not None and NEGATIVE in cond:
            return self._encoded(cond[NEGATIVE])
        if self.null_kind == "empty":
            return self._encoded([""]).rows([0] * n)
        return self._nothing(n)

    @abstractmethod
    def _encoded(self, texts: list[str]) -> Condition:
        """The condition of texts."""

    @abstractmethod
    def _nothing(self, n: int) -> Condition:
        """That of n images without text, where it is not the empty prompt."""


class TextEmbedder(Texts):
    """Texts as a frozen encoder reads them: a map of its vector, its tokens, or both.

    Texts that are all in `kept` are looked up there, where it is set; others are encoded.

    Args:
        encoder: encoder of texts.
        field: name of the texts.
        reads: fields of the condition that are made.
        dim: size D of the vector.
        null_kind: stand-in for no text: "empty", the empty prompt (Rombach et al. 2022); "learned"; or "zeros".
        cut: whether of a text with more tokens than the encoder reads its beginning will do; else it is refused.

    Raises:
        UserError: the encoder is none, or nothing is read.
    """

    def __init__(
        self,
        *,
        encoder: TextEncoder,
        field: Literal["text", "instruction"],
        reads: list[Read],
        dim: PositiveInt,
        null_kind: Literal["empty", "learned", "zeros"],
        cut: bool = False,
    ) -> None:
        super().__init__(encoder, field, null_kind, cut)
        self.read = Reader(reads, encoder.vector_dim, dim, encoder.token_dim, null_kind == "learned")
        self.kept: KeptTexts | None = None

    @property
    def cond_sizes(self) -> dict[str, int]:
        """Of a vector, D, and of tokens, the encoder's E, as far as they are read."""
        return self.read.sizes

    def encode(self, texts: list[str]) -> Condition:
        """What the encoder gives of B texts: vectors (B, P), tokens (B, `max_tokens`, E) and their mask."""
        known = self.encoder.encode_texts(texts)
        missing = self.max_tokens - known.tokens.shape[1]
        tokens, mask = F.pad(known.tokens, (0, 0, 0, missing)), F.pad(known.mask, (0, missing))
        return replace(known, tokens=tokens, mask=mask)

    def _encoded(self, texts: list[str]) -> Condition:
        if self.kept is None or not all(text in self.kept for text in texts):
            return self.read(self.encode(texts))
        return self.read(self.kept.read(texts).to(next(self.encoder.parameters()).device))

    def _nothing(self, n: int) -> Condition:
        return self.read.null(n, self.max_tokens)


class ImageEmbedder(nn.Module):
    """Images as a frozen encoder sees them: a map of its vector, its tokens, or both.

    Args:
        encoder: encoder of images.
        field: name of the images.
        reads: fields of the condition that are made.
        dim: size D of the vector.
        null_kind: stand-in for no image, "learned" or "zeros".

    Raises:
        UserError: the encoder is none, or nothing is read.
    """

    def __init__(
        self,
        *,
        encoder: ImageEncoder,
        field: Literal["image", "source"],
        reads: list[Read],
        dim: PositiveInt,
        null_kind: Literal["learned", "zeros"],
    ) -> None:
        super().__init__()
        keeps(encoder, ImageEncoder, ".encoder")
        self.conditions, self.frozen = (field,), Frozen(encoder)
        self.read = Reader(reads, encoder.vector_dim, dim, encoder.token_dim, null_kind == "learned")

    @property
    def cond_sizes(self) -> dict[str, int]:
        """Of a vector, D, and of tokens, the encoder's E, as far as they are read."""
        return self.read.sizes

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """Vector (n, D) and tokens (n, T, E) of images (n, C, H, W)."""
        with torch.no_grad():
            known = self.frozen.net.encode_images(cond[self.conditions[0]])
        known = self.read(known)
        return known if drop is None else without(self, known, dropped_rows(n, drop, known.device))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """That of n images of which none is shown, with as many tokens as an image has."""
        return self.read.null(n, self.frozen.net.n_places)


class Reader(nn.Module):
    """What is taken of a condition that an encoder gives, and what stands in its place where there is none.

    Args:
        reads: fields that are taken.
        vector_dim: size of the encoder's vector, which is mapped to `dim` numbers.
        dim: size D of the vector.
        token_dim: size E of the encoder's tokens, which are taken as they are.
        learned: whether the null is learned; else zeros, with one token that is there.

    Raises:
        UserError: nothing is taken.
    """

    def __init__(self, reads: list[Read], vector_dim: int, dim: int, token_dim: int, learned: bool) -> None:
        super().__init__()
        if not reads:
            raise UserError(".reads", reads, "nothing would be read", ".reads=[vector,tokens]")
        self.sizes = {name: size for name, size in (("vector", dim), ("tokens", token_dim)) if name in reads}
        self.vector = nn.Linear(vector_dim, dim) if "vector" in reads else None
        for name, field, size in (("null_vector", "vector", dim), ("null_token", "tokens", token_dim)):
            zeros = torch.zeros(size) if field in reads else None
            if learned and zeros is not None:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros, persistent=False)

    def forward(self, known: Condition) -> Condition:
        """Vector (B, D), tokens (B, T, E) and mask of a condition with all three."""
        vector = None if self.vector is None else self.vector(known.vector)     # (B, D)
        return Condition(vector) if self.null_token is None else replace(known, vector=vector)

    def null(self, n: int, n_tokens: int) -> Condition:
        """The same of nothing, of which the first of so many tokens is there: attention looks at one at least."""
        vector = None if self.null_vector is None else self.null_vector.expand(n, -1)
        if self.null_token is None:
            return Condition(vector)
        return Condition(vector, *first_alone(self.null_token, n, n_tokens))


class MapTokens(nn.Module):
    """The source, as a label map, as tokens that an encoder of its own makes of it: one for each place of a grid.

    Args:
        field: name of the source.
        source_size: height and width of the source.
        source_channels: channels of it.
        token_dim: size E of a token.
        n_downs: halvings from the source to the grid of tokens.

    Raises:
        UserError: the source does not halve evenly.
    """

    def __init__(
        self,
        *,
        field: Literal["source"],
        source_size: PositiveInt,
        source_channels: PositiveInt,
        token_dim: PositiveInt,
        n_downs: PositiveInt,
    ) -> None:
        super().__init__()
        if source_size % 2**n_downs:
            problem = f"{n_downs} halvings need a multiple of {2**n_downs}"
            raise UserError(".source_size", source_size, problem, ".n_downs=1")
        self.conditions, self.cond_sizes = (field,), {"tokens": token_dim}
        widths = [source_channels, *(token_dim // 2 ** (n_downs - 1 - k) for k in range(n_downs))]
        pairs = zip(widths, widths[1:], strict=False)
        layers = [layer for n_in, n_out in pairs for layer in (nn.Conv2d(n_in, n_out, 4, 2, 1), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Conv2d(token_dim, token_dim, 1))
        self.norm = nn.LayerNorm(token_dim)
        self.register_buffer("positions", sines_of_places(token_dim, source_size // 2**n_downs), persistent=False)
        self.null_token = nn.Parameter(torch.zeros(token_dim))

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """Tokens (n, T, E) of sources (n, C, H, W)."""
        h = rearrange(self.layers(cond[self.conditions[0]]), "b e h w -> b (h w) e")     # (n, T, E)
        known = Condition(tokens=self.norm(h) + self.positions)
        return known if drop is None else without(self, known, dropped_rows(n, drop, known.device))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """The learned token alone."""
        return Condition(None, *first_alone(self.null_token, n, len(self.positions)))


class Planes(nn.Module):
    """The planes that a model has made of its sources (`nets/planes.py`), named `planes`; zeros where there are none.

    Args:
        channels: number of planes C.
        size: height and width of the planes.
    """

    conditions = ("planes",)

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.cond_sizes = {"planes": channels}
        self.register_buffer("zeros", torch.zeros(channels, size, size), persistent=False)

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """Planes (n, C, h, w)."""
        known = Condition(planes=cond["planes"])
        return known if drop is None else without(self, known, dropped_rows(n, drop, known.device))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """Planes of zeros."""
        return Condition(planes=self.zeros.expand(n, -1, -1, -1))


class Several(nn.Module):
    """Several sources at once: their vectors added, their tokens one behind the other, their planes too.

    Args:
        sources: name -> embedder of it.
        dropped: name of a source -> [low, high): in training each image draws one number from [0, 1), and a source is
            left out where it lies there, so that those of several may overlap (Brooks et al. 2023, InstructPix2Pix,
            section 3.2.1); [0, 0]: never left out, also not where guidance leaves out the rest; sources without one:
            from 0 up to the model's own `cond_dropout`.
        plane_channels: planes that the model makes of its sources, which are the source "planes"; 0: none.
        plane_size: height and width of those.

    Raises:
        UserError: there is no source, one to leave out does not exist, or vectors or tokens have different sizes.
    """

    def __init__(
        self,
        *,
        sources: dict[str, Embedder],
        dropped: dict[str, Span],
        plane_channels: NonNegInt = 0,
        plane_size: NonNegInt = 0,
    ) -> None:
        super().__init__()
        planes = {"planes": Planes(plane_channels, plane_size)} if plane_channels else {}
        self.sources = nn.ModuleDict({**sources, **planes})
        for name, span in dropped.items():
            if name not in self.sources:
                has = ", ".join(self.sources) or "none"
                raise UserError(f".dropped.{name}", span, f"there is no such source, but {has}", f"~.dropped.{name}")
        self.dropped = dropped
        self.conditions = tuple(name for source in self.sources.values() for name in source.conditions)
        self.cond_sizes = _sizes_of_all(self.sources)

    def forward(self, cond: Cond, n: int, drop: float | None = None) -> Condition:
        """All fields that a source gives, of n images."""
        parts = {name: source(cond, n) for name, source in self.sources.items()}
        if drop is not None:
            luck = torch.rand(n, device=next(iter(parts.values())).device)   # (n,)
            for name, known in parts.items():
                low, high = self.dropped.get(name, (0.0, drop))
                parts[name] = without(self.sources[name], known, (luck >= low) & (luck < high))
        return _together(list(parts.values()))

    def null(self, n: int, cond: Cond | None = None) -> Condition:
        """That of n images of which nothing is known but what is never left out."""
        parts = []
        for name, source in self.sources.items():
            low, high = self.dropped.get(name, (0.0, 1.0))
            kept = low == high and cond is not None
            parts.append(source(cond, n) if kept else source.null(n, cond))
        return _together(parts)


def first_alone(token: Tensor, n: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    """A token (E,) as the only one of T that is there: tokens (n, T, E) and their mask (n, T)."""
    mask = torch.arange(n_tokens, device=token.device) == 0                # (T,)
    return token.expand(n, n_tokens, -1), mask.expand(n, -1)


def without(source: Embedder, known: Condition, rows: Tensor) -> Condition:
    """What a source knows of images, but the null in the `rows` (B,) that are true.

    On a CPU the empty prompt, which has no weights of its own, is not encoded for a batch that keeps all of its texts.
    """
    if rows.device.type == "cpu" and isinstance(source, Texts) and source.null_kind == "empty" and not rows.any():
        return known
    return known.drop(rows, source.null(len(rows)))


def _together(parts: list[Condition]) -> Condition:
    """The sum of vectors, the tokens behind one another, the planes too."""
    vectors = [part.vector for part in parts if part.vector is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    planes = [part.planes for part in parts if part.planes is not None]
    return Condition(
        torch.stack(vectors).sum(0) if vectors else None,                  # (n, D)
        torch.cat(tokens, dim=1) if tokens else None,                      # (n, T, E)
        torch.cat([part.mask for part in parts if part.mask is not None], dim=1) if tokens else None,
        torch.cat(planes, dim=1) if planes else None,                      # (n, C, h, w)
    )


def _sizes_of_all(sources: nn.ModuleDict) -> dict[str, int]:
    """`Condition.sizes` of what all sources give together."""
    found: dict[str, int] = {}
    for name, source in sources.items():
        for field, size in source.cond_sizes.items():
            if field == "planes":
                size += found.get(field, 0)
            elif found.setdefault(field, size) != size:
                key = f".sources.{name}.{'dim' if field == 'vector' else 'token_dim'}"
                raise UserError(key, size, f"the other sources have {field} of {found[field]}", f"{key}={found[field]}")
            found[field] = size
    if not found:
        raise UserError(".sources", {}, "there is nothing to be conditional on", "model=ldm")
    return found


def text_reader(embedder: Embedder) -> TextEmbedder | None:
    """What gives a net its tokens, if that is texts alone."""
    sources = embedder.sources.values() if isinstance(embedder, Several) else [embedder]
    found = [source for source in sources if "tokens" in source.cond_sizes]
    return found[0] if len(found) == 1 and isinstance(found[0], TextEmbedder) else None


def readers(embedder: Embedder, field: str) -> list[Texts]:
    """What reads the texts of a field."""
    sources = embedder.sources.values() if isinstance(embedder, Several) else [embedder]
    return [source for source in sources if isinstance(source, Texts) and source.conditions == (field,)]


def word_spans(encoder: TextEncoder, text: str) -> list[tuple[str, range]]:
    """The words of a text that an encoder reads, and the numbers of each one's tokens.

    Those are the tokens that a text has more with the word than without, behind one that marks the start.
    """
    words = text.split()
    lengths = encoder.n_tokens([" ".join(words[:k]) for k in range(len(words) + 1)])
    ends = [min(length, encoder.max_tokens) - 1 for length in lengths]
    spans = [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [(word, span) for word, span in zip(words, spans, strict=True) if len(span)]
