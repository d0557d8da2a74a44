"""Sources of a condition: what they give, what stands for nothing, and how several are left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets.conditioning import ConditionEmbedder
from atelier.nets.conditions import ImageEmbedder, MapTokens, Planes, Several, TextEmbedder

P, E, T, D = 5, 6, 4, 7  # numbers of an encoder's vector, of its tokens, tokens of a text, of our vector


class Letters(nn.Module):
    """A text encoder: a token for each word, its vector their sum."""

    vector_dim, token_dim, max_tokens = P, E, T

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, E)

    def n_tokens(self, texts: list[str]) -> list[int]:
        return [1 + len(text.split()) for text in texts]

    def encode_texts(self, texts: list[str]) -> Condition:
        words = [[0, *(1 + sum(map(ord, word)) % 63 for word in text.split())][:T] for text in texts]
        longest = max(map(len, words))
        numbers = torch.tensor([row + [0] * (longest - len(row)) for row in words])
        mask = torch.tensor([[k < len(row) for k in range(longest)] for row in words])
        tokens = self.table(numbers)
        return Condition((tokens * mask[..., None]).sum(1)[:, :P], tokens, mask)


class Corners(nn.Module):
    """An image encoder: the four corner pixels."""

    vector_dim, token_dim, n_places = P, 3, 4

    def encode_images(self, x: Tensor) -> Condition:
        tokens = x[:, :, ::7, ::7].flatten(2).transpose(1, 2)
        return Condition(tokens.flatten(1)[:, :P], tokens)


def texts(null_kind: str = "empty", reads: tuple[str, ...] = ("vector", "tokens")) -> TextEmbedder:
    torch.manual_seed(0)
    return TextEmbedder(encoder=Letters(), field="text", reads=list(reads), dim=D, null_kind=null_kind)


def test_a_text_is_a_mapped_vector_and_the_encoders_tokens() -> None:
    embedder, told = texts(), {"text": ["a red star", "a cross"]}
    known, encoded = embedder(told, 2), embedder.frozen.net.encode_texts(told["text"])
    torch.testing.assert_close(known.vector, embedder.read.vector(encoded.vector))
    assert torch.equal(known.tokens, encoded.tokens)
    assert known.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert embedder.cond_sizes == known.sizes() == {"vector": D, "tokens": E}
    short = embedder({"text": ["star"]}, 1)
    assert short.tokens.shape == (1, T, E), "shorter texts are filled up, so that all batches can be joined"
    assert short.mask.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("reads", [("vector",), ("tokens",)])
def test_one_of_both_alone(reads: tuple[str, ...]) -> None:
    known = texts(reads=reads)({"text": ["star"]}, 1)
    assert known.sizes() == texts(reads=reads).cond_sizes
    assert (known.vector is None, known.tokens is None) == ("vector" not in reads, "tokens" not in reads)


def test_the_null_is_the_empty_prompt_learned_or_zeros() -> None:
    empty = texts("empty")
    torch.testing.assert_close(empty.null(3).vector, empty({"text": [""] * 3}, 3).vector)
    assert not [name for name, _ in empty.named_parameters() if "null" in name]
    learned, zeros = texts("learned"), texts("zeros")
    assert [name for name, _ in learned.named_parameters() if "null" in name] == ["read.null_vector", "read.null_token"]
    assert not zeros.null(2).vector.any()
    assert not zeros.null(2).tokens.any()
    assert zeros.null(2).mask.tolist() == [[True, False, False, False]] * 2, "attention looks at one token at least"


def test_negative_texts_stand_in_place_of_the_null() -> None:
    embedder = texts()
    told = {"text": ["a star"], "negative": ["a cross"]}
    assert torch.equal(embedder.null(1, told).vector, embedder({"text": ["a cross"]}, 1).vector)
    assert torch.equal(embedder.null(1, {"text": ["a star"]}).vector, embedder({"text": [""]}, 1).vector)


@pytest.mark.parametrize("alone", [True, False])
def test_the_empty_prompt_is_encoded_where_a_text_is_left_out(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, told, asked = texts(), {"text": ["a red star", "a cross"]}, []
    embedder = source if alone else Several(sources={"text": source}, dropped={})
    encode = source.encode
    monkeypatch.setattr(source, "encode", lambda given: asked.append(given) or encode(given))
    kept = embedder(told, 2, 0.0)
    assert asked == [told["text"]] and torch.equal(kept.tokens, embedder(told, 2).tokens)
    asked.clear()
    dropped = embedder(told, 2, 1.0)
    assert asked == [told["text"], [""]] and torch.equal(dropped.vector, embedder.null(2).vector)


def test_an_encoder_is_frozen_and_never_saved() -> None:
    assert all("frozen" not in name for name in texts().state_dict())
    assert not texts().frozen.net.table.weight.requires_grad


def test_images_and_maps_are_tokens() -> None:
    images = ImageEmbedder(encoder=Corners(), field="image", reads=["tokens"], dim=D, null_kind="learned")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(images({"image": x}, 2).tokens[0, 1], x[0, :, 0, 7])
    assert images.null(3).tokens.shape == (3, 4, 3)
    maps = MapTokens(field="source", source_size=8, source_channels=3, token_dim=8, n_downs=2)
    known = maps({"source": x}, 2)
    assert known.tokens.shape == (2, 4, 8)
    assert not torch.equal(known.tokens[0, 0], maps({"source": x.flip(3)}, 2).tokens[0, 0])
    with pytest.raises(UserError, match="halvings"):
        MapTokens(field="source", source_size=6, source_channels=3, token_dim=8, n_downs=2)


def several(dropped: dict[str, list[float]]) -> Several:
    torch.manual_seed(0)
    labels = ConditionEmbedder(dim=D, conditions=["label"], n_classes=4, label_factors=[], n_attributes=0)
    return Several(sources={"label": labels, "text": texts()}, dropped=dropped, plane_channels=2, plane_size=4)


def told(n: int) -> dict[str, Tensor | list[str]]:
    return {"label": torch.arange(n) % 4, "text": ["a star"] * n, "planes": torch.randn(n, 2, 4, 4)}


def test_several_are_added_and_put_behind_one_another() -> None:
    embedder, asked = several({}), told(3)
    known = embedder(asked, 3)
    parts = {name: source(asked, 3) for name, source in embedder.sources.items()}
    torch.testing.assert_close(known.vector, parts["label"].vector + parts["text"].vector)
    assert torch.equal(known.tokens, parts["text"].tokens)
    assert torch.equal(known.planes, asked["planes"])
    assert embedder.conditions == ("label", "text", "planes")
    assert embedder.cond_sizes == known.sizes() == {"vector": D, "tokens": E, "planes": 2}


def test_sources_are_left_out_where_the_number_of_an_image_lies() -> None:
    """Shares of InstructPix2Pix: a twentieth each alone, a twentieth both, the label never."""
    n = 20_000
    embedder, asked = several({"text": [0, 0.1], "planes": [0.05, 0.15], "label": [0, 0]}), told(n)
    with torch.no_grad():
        known = embedder(asked, n, drop=0.5)
        no_text = (known.tokens != embedder(asked, n).tokens).any(2).any(1)
    no_planes = (known.planes == 0).all(3).all(2).all(1)
    shares = [(no_text & ~no_planes), (no_text & no_planes), (~no_text & no_planes)]
    for share in shares:
        assert share.double().mean().item() == pytest.approx(0.05, abs=4 * (0.05 / n) ** 0.5)
    labels = embedder.sources["label"](asked, n).vector
    texts_ = torch.where(
        no_text[:, None], embedder.sources["text"].null(n).vector, embedder.sources["text"](asked, n).vector
    )
    torch.testing.assert_close(known.vector, labels + texts_)


def test_a_source_without_an_interval_is_left_out_as_often_as_the_model_says() -> None:
    n = 20_000
    with torch.no_grad():
        known = several({"label": [0, 0]})(told(n), n, drop=0.3)
    gone = (known.planes == 0).all(3).all(2).all(1)
    assert gone.double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / n) ** 0.5)


def test_guidance_never_leaves_out_what_is_always_there() -> None:
    asked = told(2)
    kept, dropped = several({"planes": [0, 0]}).null(2, asked), several({}).null(2, asked)
    assert torch.equal(kept.planes, asked["planes"])
    assert not dropped.planes.any()
    assert not several({"planes": [0, 0]}).null(2).planes.any(), "of nothing, zeros"


def test_what_does_not_fit_together_is_refused() -> None:
    other = ConditionEmbedder(dim=D + 1, conditions=["label"], n_classes=4, label_factors=[], n_attributes=0)
    with pytest.raises(UserError, match=r"sources.text.dim=7: the other sources have vector of 8"):
        Several(sources={"label": other, "text": texts()}, dropped={})
    with pytest.raises(UserError, match="no such source"):
        several({"mask": [0, 0]})
    with pytest.raises(UserError, match="nothing to be conditional on"):
        Several(sources={}, dropped={})
    assert Planes(2, 4).cond_sizes == {"planes": 2}
