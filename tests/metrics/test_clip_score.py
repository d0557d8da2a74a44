"""clip_score beside cosines by hand, a stored pair, and torchmetrics on transformers' CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.images.pixels import to_float
from atelier.metrics.clip_score import ClipScore, TransformersClip, clip_score, named
from atelier.nets.clip import ClipNet
from atelier.shapes import world

TEXTS = ["a red star", "a blue ring", "nothing"]


class Known(nn.Module):
    """Vectors that are the first two grey values of an image, and by text."""

    def encode_images(self, x: Tensor) -> Condition:
        return Condition(7 * x.flatten(1)[:, :2])

    def encode_texts(self, texts: list[str]) -> Condition:
        return Condition(
            torch.tensor([{"a red star": [1.0, 0.0], "a blue ring": [3.0, 3.0]}.get(t, [0.0, -1]) for t in texts])
        )


def test_it_is_a_hundred_cosines_and_never_negative() -> None:
    images = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.1, 0.9]]).view(3, 1, 1, 2)
    told = clip_score(images, TEXTS, Known())
    torch.testing.assert_close(told, torch.tensor([60.0, 100 * 0.5**0.5, 0.0]))
    metric = ClipScore(Known())
    metric.update(images[:1], TEXTS[:1])
    metric.update(images[1:], TEXTS[1:])
    assert metric.compute().item() == pytest.approx(told.mean().item())


def fixed() -> ClipNet:
    """A small net of weights that are the same on every machine: numbers of the shapes world in [-1, 1], scaled."""
    sizes = {"image_size": 16, "image_channels": 3, "width": 4, "multipliers": [1, 2], "n_blocks": 1, "patch_size": 1}
    sizes |= {"token_dim": 8, "n_layers": 1, "heads": 2, "max_tokens": 12, "vector_dim": 8, "n_rows": 64}
    net = ClipNet(**sizes, vocabulary=None).eval().requires_grad_(False)
    for k, (name, weight) in enumerate(net.named_parameters()):
        drawn = 2 * world.uniform(5, torch.arange(weight.numel()), k).view(weight.shape) - 1
        scale = 1 if weight.ndim < 2 or "rows" in name else (6 / weight[0].numel()) ** 0.5
        weight.copy_(scale * drawn)
    return net


def test_a_golden_pair() -> None:
    """Scenes of the shapes world and their captions, by that net: numbers that were stored."""
    scenes = world.scenes(0, range(6), "test")
    told = clip_score(world.render(scenes, 16), world.captions(scenes), fixed())
    assert told.tolist() == pytest.approx(GOLDEN, abs=2e-3)
    assert named(fixed()) == named(fixed()) != named(fixed().double())


GOLDEN = [7.4752, 12.3022, 12.4052, 0.0, 7.6698, 3.8806]


def clip_folder(folder: Path) -> Path:
    """A tiny CLIP of random weights as transformers saves it, for images of 8 px."""
    transformers = pytest.importorskip("transformers")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    rows = {part: k for k, part in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {
        "max_position_embeddings": 16,
        "vocab_size": 54,
        "eos_token_id": 53,
        "bos_token_id": 52,
        "pad_token_id": 53,
    }
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}, projection_dim=6
    )
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(rows))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_a_clip_of_transformers_scores_by_its_own_cosines(tmp_path: Path) -> None:
    """Those of its model and its processor, image by image."""
    transformers = pytest.importorskip("transformers")
    encoder, rng = TransformersClip(str(clip_folder(tmp_path))), torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), generator=rng, dtype=torch.uint8)
    texts = ["red star", "blue ring", "a", "nothing at all", "x", "a very long text that is cut"]
    ours = clip_score(to_float(images), texts, encoder)
    model, processor = (kind.from_pretrained(tmp_path) for kind in (transformers.CLIPModel, transformers.CLIPProcessor))
    given = processor(
        text=texts, images=list(images), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        cosines = model(**given).logits_per_image.diag() / model.logit_scale.exp()
    torch.testing.assert_close(ours, 100 * cosines.clamp(min=0), atol=1e-3, rtol=1e-4)
    assert (ours > 0).any() and ours.std() > 1


def test_images_of_another_size_are_brought_to_that_of_the_clip(tmp_path: Path) -> None:
    """A wide image loses its sides; a large one of repeated pixels scores about as the small one."""
    encoder = TransformersClip(str(clip_folder(tmp_path)))
    images = smooth(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)))
    large = nn.functional.interpolate(images, scale_factor=4, mode="bicubic").clamp(-1, 1)
    own, other = encoder.encode_images(images).vector, encoder.encode_images(large).vector
    assert nn.functional.cosine_similarity(own, other).min() > 0.95
    wide = torch.cat([torch.full((4, 3, 8, 3), 0.5), images, torch.full((4, 3, 8, 3), -0.5)], dim=3)
    torch.testing.assert_close(encoder.encode_images(wide).vector, own)


def smooth(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1).clamp(-1, 1)


def test_a_folder_without_a_clip_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError) as caught:
        TransformersClip(str(tmp_path))
    assert caught.value.line().startswith("error: .run=") and "Fix: .run=FOLDER of a CLIPModel" in caught.value.line()
