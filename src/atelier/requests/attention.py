"""Where a net looks while it draws each word of a caption, as pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.batch import Cond
from atelier.core.rng import ImageRngs
from atelier.images.pictures import labelled
from atelier.images.pixels import to_uint8
from atelier.models.base import DiffusionModel
from atelier.nets.attention_maps import AttentionMap, attention_maps
from atelier.nets.conditions import TextEmbedder
from atelier.nets.contracts import TextEncoder

CELL = 64  # pixels a side of a map in a picture


def reader(model: nn.Module) -> TextEmbedder | None:
    """What of a model reads captions as tokens, alone; None where nothing does, or other tokens stand beside them."""
    embedder = getattr(model, "embedder", None)
    sources = getattr(embedder, "sources", None)
    with_tokens = [source for source in (sources.values() if sources else [embedder]) if _gives_tokens(source)]
    return with_tokens[0] if len(with_tokens) == 1 and isinstance(with_tokens[0], TextEmbedder) else None


def _gives_tokens(source: nn.Module | None) -> bool:
    return "tokens" in getattr(source, "cond_sizes", {})


def word_spans(encoder: TextEncoder, text: str) -> list[tuple[str, range]]:
    """The words of a text that an encoder reads, and the numbers of each one's tokens, behind one that marks the start.

    A word's tokens are those that a text has more with it than without, as is so where words are encoded one by one.
    """
    words = text.split()
    lengths = encoder.n_tokens([" ".join(words[:k]) for k in range(len(words) + 1)])
    ends = [min(length - 1, encoder.max_tokens) for length in lengths]
    spans = [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [(word, span) for word, span in zip(words, spans, strict=True) if len(span)]


def sheets(
    model: DiffusionModel, cond: Cond, texts: list[str], rngs: ImageRngs, n_frames: int, options: dict
) -> list[Tensor]:
    """For each image a picture (3, H, W) uint8: the denoised image over the steps, and below it where each word is.

    A map is the mean over the cross-attentions of the net, and over the steps since the column before; bright is where
    a place looks most at that word, over all steps.

    Args:
        model: model whose `reader` is there.
        cond: condition of B images.
        texts: captions of them.
        rngs: noise of them.
        n_frames: columns, at most as many as there are steps.
        options: arguments of `denoising`.
    """
    frames, maps = zip(*_frames(model, cond, rngs, n_frames, options), strict=True)
    encoder, made = reader(model).frozen.net, []
    for k, text in enumerate(texts):
        rows = [("", torch.stack([large(frame[k : k + 1])[0] for frame in frames]))]
        for word, span in word_spans(encoder, text):
            heat = torch.stack([over[k, span.start : span.stop].mean(0) for over in maps])  # (frames, h, w)
            grey = (255 * heat / heat.max().clamp(min=1e-12)).round().to(torch.uint8)
            rows.append((word, large(grey[:, None].expand(-1, 3, -1, -1))))
        made.append(labelled(rows))
    return made


def large(images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 at CELL pixels a side."""
    return F.interpolate(images.cpu(), size=(CELL, CELL), mode="nearest")


def _frames(
    model: DiffusionModel, cond: Cond, rngs: ImageRngs, n_frames: int, options: dict
) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoised images (B, C, H, W) uint8 and maps of each token (B, T, h, w), after so many of the steps."""
    with attention_maps(model.net) as found:
        for _, denoised in model.denoising(cond, rngs, n_frames, **options):
            yield to_uint8(denoised), joined(found, len(rngs))
            found.clear()


def joined(found: list[AttentionMap], n: int) -> Tensor:
    """The mean of maps of several sizes at that of the largest, of the last n of their images: those with a condition,
    which guidance puts behind those without; (n, T, h, w)."""
    size = max((one.height, one.width) for one in found)
    maps = (one.weights[-n:].transpose(1, 2).unflatten(2, (one.height, one.width)) for one in found)
    return torch.stack([F.interpolate(one, size=size, mode="bilinear") for one in maps]).mean(0).cpu()
