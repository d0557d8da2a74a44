"""The text tower beside torch's own encoder, what a place of an image is, and what both encoders promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.nets.clip import ClipNet
from atelier.nets.contracts import ImageEncoder, TextEncoder, keeps
from atelier.nets.words import too_long

TEXTS = ["a red star", "a large blue ring on a grey ground", "", "star red a"]


def made(**options: object) -> ClipNet:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "image_channels": 3, "width": 4, "multipliers": [1, 2], "n_blocks": 1, "patch_size": 2}
    sizes |= {"token_dim": 8, "n_layers": 2, "heads": 2, "max_tokens": 9, "vector_dim": 6, "n_rows": 100}
    net = ClipNet(**(sizes | {"vocabulary": None} | options)).eval()
    for parameter in net.parameters():
        if parameter.ndim:
            parameter.data += 0.3 * torch.randn_like(parameter)  # norms and biases that do something
    return net


def test_the_text_tower_is_torchs_encoder() -> None:
    net = made()
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, net.text.norm, enable_nested_tensor=False).eval()
    for block, other in zip(net.text.blocks, theirs.layers, strict=True):
        pairs = {"norm1": block.norm1, "norm2": block.norm2, "self_attn.out_proj": block.out}
        pairs |= {"linear1": block.mlp[0], "linear2": block.mlp[2]}
        state = {f"{name}.{k}": v for name, part in pairs.items() for k, v in part.state_dict().items()}
        state |= {f"self_attn.in_proj_{k}": v for k, v in block.qkv.state_dict().items()}
        other.load_state_dict(state)
    with torch.no_grad():
        found = net.encode_texts(TEXTS)
        for row, text in enumerate(TEXTS):
            tokens = torch.tensor(net.words(text)[:9])[None]
            if len(net.words(text)) > 9:
                tokens[0, -1] = net.words.end
            states = theirs(net.text.rows(tokens) + net.text.places.weight[: tokens.shape[1]])[0]
            n = len(states)
            torch.testing.assert_close(found.tokens[row, :n], states, atol=1e-5, rtol=1e-4)
            assert not found.tokens[row, n:].any()
            assert found.mask[row].tolist() == [True] * n + [False] * (9 - n)
            vector = net.text.out.weight @ states[-1]
            torch.testing.assert_close(found.vector[row], vector / vector.norm() * math.sqrt(6), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found.vector[0], found.vector[3], atol=1e-2)  # the order of words counts


def test_tokens_are_counted_beyond_what_is_read() -> None:
    net, long = made(), "one two three four five six seven eight"
    assert net.n_tokens(TEXTS) == [5, 10, 2, 5]
    assert too_long(net, [*TEXTS, long, "one two three four five six seven"]) == [(TEXTS[1], 10), (long, 10)]
    cut, short = net.encode_texts([long]), net.encode_texts(["one two three four five six seven"])
    torch.testing.assert_close(cut.vector, short.vector)
    assert cut.mask.all() and (net.encode_texts(["one two"]).vector - short.vector).abs().max() > 0.01


def test_texts_and_images_are_encoded_alike_in_any_batch() -> None:
    net, x = made(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for whole, one in (
            (net.encode_texts(TEXTS), net.encode_texts(TEXTS[2:3])),
            (net.encode_images(x), net.encode_images(x[2:3])),
        ):
            assert whole.tokens.shape[1:] == one.tokens.shape[1:]
            torch.testing.assert_close(whole.rows([2]).vector, one.vector, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(whole.rows([2]).tokens, one.tokens, atol=1e-5, rtol=1e-5)
        image, text = net(x, TEXTS)
    torch.testing.assert_close(image * math.sqrt(6), net.encode_images(x).vector)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4))


def test_a_token_of_an_image_is_a_place_of_the_smallest_map() -> None:
    """By rows; an image's vector sees every pixel."""
    net = made(patch_size=4, multipliers=[1])
    for layer in net.image.layers[1:2]:
        layer.conv1.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # each place alone
    net.image.layers[0].weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    net.image.layers[1].conv2.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    for layer in [part for part in net.image.modules() if isinstance(part, nn.GroupNorm)]:
        layer.forward = lambda x: x
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    found = net.encode_images(x)
    assert found.tokens.shape == (2, 16, 8) and found.mask.all() and found.vector.shape == (2, 6)
    (seen,) = torch.autograd.grad(found.tokens[0, 6].sum(), x, retain_graph=True)  # row 1, column 2
    where = seen[0].abs().sum(0).nonzero()
    assert where.amin(0).tolist() == [4, 8] and where.amax(0).tolist() == [7, 11] and not seen[1].any()
    (all_of_it,) = torch.autograd.grad(found.vector[0, 0], x)
    assert (all_of_it[0] != 0).any(0).all() and not all_of_it[1].any()


def test_it_keeps_both_contracts() -> None:
    net = made()
    keeps(net, TextEncoder, "text")
    keeps(net, ImageEncoder, "image")
    assert net.encode_texts(TEXTS).sizes() == net.encode_images(torch.zeros(1, 3, 16, 16)).sizes()
    assert net.encode_texts(TEXTS).sizes() == {"vector": net.vector_dim, "tokens": net.token_dim}
    torch.testing.assert_close(net.log_scale.exp().item(), 1 / 0.07)


@pytest.mark.parametrize(("options", "line"), [
    ({"heads": 3}, "error: .heads=3: it does not divide the width 8. Fix: .heads=1"),
    ({"max_tokens": 2}, "error: .max_tokens=2: start and end leave no room for a word. Fix: .max_tokens=16"),
    ({"n_rows": 2}, "error: .n_rows=2: three rows are pad, start and end, none is left. Fix: .n_rows=4096"),
    ({"image_size": 17}, "error: data.image_size=17: 2 levels and patch 2 need a multiple of 4. Fix: "),
    ({"vocabulary": "nowhere"}, "error: .vocabulary=nowhere: it cannot be read (FileNotFoundError)"),
], ids=lambda part: "" if isinstance(part, str) else next(iter(part)))  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        made(**options)
    assert line in caught.value.line()


def test_the_parts_of_a_text_that_are_not_there_have_no_gradient() -> None:
    net = made()
    embedded: list[Tensor] = []
    net.text.rows.register_forward_hook(lambda module, args, out: embedded.append(out))
    found = net.encode_texts(TEXTS)
    (gradient,) = torch.autograd.grad(found.vector[:3].square().sum() + found.tokens[:3].sum(), embedded[0])
    there = gradient.abs().sum(2) > 0
    assert (
        torch.equal(there[:3] & ~found.mask[:3, : there.shape[1]], torch.zeros_like(there[:3])) and not there[3].any()
    )
