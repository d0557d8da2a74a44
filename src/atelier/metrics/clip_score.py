"""How well images fit their texts, by encoders of both that were trained together (Hessel et al. 2021, CLIPScore)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import Name

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images in [0, 1]
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@runtime_checkable
class ClipEncoder(Protocol):
    """Both encoders of a CLIP; the cosine of their vectors says how well an image fits a text."""

    def encode_texts(self, texts: list[str]) -> Condition:
        """Vectors (B, P)."""
        ...

    def encode_images(self, x: Tensor) -> Condition:
        """Vectors (B, P) of images (B, C, H, W) in [-1, 1]."""
        ...


def clip_score(images: Tensor, texts: list[str], encoder: ClipEncoder) -> Tensor:
    """100 max(cos, 0) of the vectors of each image and its text, (B,) float32.

    Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning, eq. 1, whose factor w is 2.5
    in place of 100 and whose texts begin with "A photo depicts"; torchmetrics has 100 and no such words as well.

    Args:
        images: images (B, C, H, W) in [-1, 1].
        texts: a text of each.
        encoder: trained encoders of both; scores of different ones cannot be compared.
    """
    image, text = encoder.encode_images(images).vector, encoder.encode_texts(texts).vector
    return 100 * F.cosine_similarity(image.float(), text.float(), dim=1).clamp(min=0)


class ClipScore(Metric):
    """The mean of `clip_score` over all images.

    Args:
        encoder: trained encoders of both.
    """

    full_state_update = False
    total: Tensor
    n: Tensor

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, texts: list[str]) -> None:
        """Images (B, C, H, W) in [-1, 1] and a text of each."""
        self.total += clip_score(images, texts, self.encoder).double().sum()
        self.n += len(texts)

    def compute(self) -> Tensor:
        return self.total / self.n


class TransformersClip(nn.Module):
    """A CLIP as transformers keeps it in a folder (Radford et al. 2021), images resized and normed as it wants them.

    Args:
        folder: folder with config.json, model.safetensors and the tokenizer's files.

    Raises:
        UserError: there is none, or transformers is not installed.
    """

    def __init__(self, folder: Name) -> None:
        super().__init__()
        try:
            from transformers import CLIPModel, CLIPTokenizer

            local = {"local_files_only": True}
            self.net = CLIPModel.from_pretrained(str(Path(folder).expanduser()), use_safetensors=True, **local)
            self.tokenizer = CLIPTokenizer.from_pretrained(str(Path(folder).expanduser()), **local)
        except ModuleNotFoundError as error:
            raise UserError(".run", folder, f"{error.name} is not installed", "pip install atelier[latent]") from error
        except (OSError, ValueError) as error:
            fix = ".run=FOLDER of a CLIPModel of transformers with model.safetensors"
            raise UserError(".run", folder, f"it cannot be read ({error})", fix) from error
        self.net.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])

    def encode_texts(self, texts: list[str]) -> Condition:
        """Vectors (B, P); of a text that is too long, the beginning."""
        length = self.net.config.text_config.max_position_embeddings
        given = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found = self.net.text_model(given["input_ids"].to(self.net.device)).pooler_output
        return Condition(self.net.text_projection(found))

    def encode_images(self, x: Tensor) -> Condition:
        """Vectors (B, P) of images (B, 1 or 3, H, W) in [-1, 1], their shorter side resized, their middle cut out."""
        side, x = self.net.config.vision_config.image_size, (x.float() + 1) / 2
        height, width = (round(side * n / min(x.shape[2:])) for n in x.shape[2:])
        if (height, width) != tuple(x.shape[2:]):
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (height - side) // 2, (width - side) // 2
        x = (x[:, :, top : top + side, left : left + side] - self.mean) / self.deviation  # (B, 3, side, side)
        return Condition(self.net.visual_projection(self.net.vision_model(x.to(self.net.device)).pooler_output))


def named(encoder: nn.Module) -> str:
    """What tells these encoders from others in a protocol: their class and a hash of their weights."""
    content = hashlib.sha256()
    for value in encoder.state_dict().values():
        content.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"{type(encoder).__name__} {content.hexdigest()[:12]}"
