"""CLIP's text encoder read from folders that transformers wrote: the same states, pooled vectors and tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atelier.checkpoints.transformers_folder import text_encoder
from atelier.core.errors import UserError
from atelier.nets.contracts import TextEncoder, keeps
from atelier.nets.words import too_long

transformers = pytest.importorskip("transformers")
TEXTS = ["a cab", "", "cab bac abc cab cab bac", "it's a 9"]
PARTS = [*"abcdefghijklmnopqrstuvwxyz0123456789!'", "ab", "ab</w>", "cab</w>", "ba"]
ROWS = {part: k for k, part in enumerate(dict.fromkeys(["!", *PARTS, *(f"{p}</w>" for p in PARTS if len(p) == 1)]))}
START, END = len(ROWS), len(ROWS) + 1
ROWS |= {"<|startoftext|>": START, "<|endoftext|>": END}
MERGES = ["c ab</w>", "a b", "a b</w>", "b a"]
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "max_position_embeddings": 10}


def config(**options: object) -> object:
    own = SIZES | {"vocab_size": END + 1, "num_hidden_layers": 3, "projection_dim": 7, "bos_token_id": START}
    return transformers.CLIPTextConfig(**(own | {"eos_token_id": END, "pad_token_id": END} | options))


def written(folder: Path, kind: str = "CLIPTextModel", pad: str | None = None, **options: object) -> object:
    """A tiny model of random weights, saved by transformers with a tokenizer beside it."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(**options)).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(ROWS))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES))
    if pad is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    return model


def rows_of(folder: Path) -> Tensor:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, padding="max_length", max_length=10, truncation=True, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("options", [
    {}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"eos_token_id": 2}, {"pad": "!"},
], ids=str)  # fmt: skip
def test_states_and_vectors_are_transformers_own(options: dict, tmp_path: Path) -> None:
    model = written(tmp_path, **options)
    rows = rows_of(tmp_path)
    with torch.no_grad():
        theirs = model(rows, output_hidden_states=True)
        found = text_encoder(str(tmp_path)).encode_texts(TEXTS)
    torch.testing.assert_close(found.tokens, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.vector, theirs.pooler_output, atol=1e-5, rtol=1e-5)
    assert found.mask.all() and rows[1].tolist() == [START, END, *[ROWS["!"] if "pad" in options else END] * 8]
    for final_norm in (True, False):
        encoder = text_encoder(str(tmp_path), "penultimate", final_norm)
        with torch.no_grad():
            state, found = theirs.hidden_states[-2], encoder.encode_texts(TEXTS)
            wanted = model.final_layer_norm(state) if final_norm else state
        torch.testing.assert_close(found.tokens, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.vector, theirs.pooler_output, atol=1e-5, rtol=1e-5)


def test_a_projection_makes_the_vector(tmp_path: Path) -> None:
    model = written(tmp_path, "CLIPTextModelWithProjection")
    encoder = text_encoder(str(tmp_path), "penultimate", final_norm=False)
    with torch.no_grad():
        theirs, found = model(rows_of(tmp_path), output_hidden_states=True), encoder.encode_texts(TEXTS)
    torch.testing.assert_close(found.vector, theirs.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.tokens, theirs.hidden_states[-2], atol=1e-5, rtol=1e-5)
    assert (encoder.vector_dim, encoder.token_dim, encoder.max_tokens) == (7, 12, 10)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def test_the_text_half_of_a_whole_clip_is_read(tmp_path: Path) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    written(tmp_path)  # the tokenizer's files
    whole = transformers.CLIPConfig(text_config=config().to_dict(), vision_config=vision, projection_dim=5)
    torch.manual_seed(1)
    model = transformers.CLIPModel(whole).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = model.get_text_features(rows_of(tmp_path))
        found = text_encoder(str(tmp_path)).encode_texts(TEXTS)
    torch.testing.assert_close(found.vector, getattr(theirs, "pooler_output", theirs), atol=1e-5, rtol=1e-5)


def test_the_tokenizer_may_lie_beside_it_in_one_file(tmp_path: Path) -> None:
    """As diffusers keeps them; half precision is read as float32."""
    folder = tmp_path / "text_encoder_2"
    written(folder)
    whole = text_encoder(str(folder)).encode_texts(TEXTS)
    transformers.CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "tokenizer_2").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer_2" / "tokenizer.json")
    (folder / "vocab.json").unlink()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, folder / "model.safetensors")
    encoder = text_encoder(str(folder))
    torch.testing.assert_close(encoder.encode_texts(TEXTS).tokens, whole.tokens, atol=0.02, rtol=0.02)
    assert encoder.norm.weight.dtype == torch.float32


def test_it_keeps_the_contract_and_counts(tmp_path: Path) -> None:
    written(tmp_path)
    encoder = text_encoder(str(tmp_path))
    keeps(encoder, TextEncoder, "text")
    lengths = [len(ids) for ids in transformers.CLIPTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"]]
    assert encoder.n_tokens(TEXTS) == lengths and encoder.encode_texts(TEXTS).sizes() == {"vector": 12, "tokens": 12}
    assert too_long(encoder, TEXTS) == [(t, n) for t, n in zip(TEXTS, lengths, strict=True) if n > 10] != []


def spoil(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    match what:
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "lacking":
            kept = {name: v for name, v in load_file(weights).items() if "layers.1.self_attn.k_proj.bias" not in name}
            save_file(kept, weights)
        case "wider" | "act" | "bert":
            change = {"wider": {"hidden_size": 24}, "act": {"hidden_act": "relu"}, "bert": {"model_type": "bert"}}
            found = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(found | change[what]))
        case "nothing":
            shutil.rmtree(folder)
        case _:
            (folder / what).unlink()


@pytest.mark.parametrize(("what", "problem"), {
    "pickled": "it has no model.safetensors; pickled weights (.bin) are not read",
    "cut": "model.safetensors is cut",
    "lacking": "model.safetensors lacks encoder.layers.1.self_attn.k_proj.bias",
    "wider": "has another shape than config.json says",
    "act": "hidden_act=relu is not supported, only quick_gelu and gelu",
    "bert": "it holds a bert, no CLIP text encoder",
    "config.json": "it has no readable config.json",
    "vocab.json": "it has no vocab.json and merges.txt, and no tokenizer.json",
    "nothing": "there is no such folder",
}.items())  # fmt: skip
def test_what_cannot_be_read_is_one_line(what: str, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    written(folder)
    spoil(folder, what)
    with pytest.raises(UserError) as caught:
        text_encoder(str(folder))
    line = caught.value.line()
    assert line.startswith("error: .folder=") and "Fix: .folder=FOLDER with a CLIP text encoder of tr" in line
    assert problem in str(caught.value)


def test_the_hub_is_asked_only_where_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache on disk is looked at first; what is in it needs no network."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[bool] = []
    written(tmp_path / "made")

    def snapshot(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        assert name == "some/clip" and "model.safetensors" in allow_patterns and "vocab.json" in allow_patterns
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not there")
        return str(tmp_path / "made")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(UserError) as caught:
        text_encoder("some/clip")
    assert asked == [True] and "the hub's cache on disk lacks it. Fix: .fetch=true downloads it" in caught.value.line()
    assert text_encoder("some/clip", fetch=True).token_dim == 12 and asked == [True, True, False]
    monkeypatch.setattr(hub, "snapshot_download", lambda *names, **how: str(tmp_path / "made"))
    assert text_encoder("some/clip").token_dim == 12
