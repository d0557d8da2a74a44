"""Telling the one that belongs from those that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.core.precision import float32


def patch_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each patch's own place among the S places of its image, a float32 scalar.

    Park et al. 2020, Contrastive Learning for Unpaired Image-to-Image Translation, eq. 2. Places of other images are
    not among the wrong ones.

    Args:
        query, key: embeddings of the places of the result and of the source, (B, S, D), of length 1.
        temperature: divisor of the products.
    """
    with float32(query.device):
        logits = query.float() @ key.float().transpose(1, 2) / temperature  # (B, S, S)
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)  # (B, S)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten())


def symmetric(image: Tensor, text: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """-log p of finding an image's text among B texts, and a text's image among B images, their mean, a float32 scalar.

    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, figure 3. Where several
    texts are the same, each is a right one, p their sum (Miech et al. 2020, End-to-End Learning of Visual
    Representations from Uncurated Instructional Videos, eq. 1): else k of them would keep the loss above ln k.

    Args:
        image, text: embeddings (B, P) of length 1, row i of both belonging together.
        scale: factor of their products, a scalar.
        same: which texts are the same, (B, B) bool; None: each is its own.
    """
    with float32(image.device):
        logits = scale.float() * (image.float() @ text.float().T)  # (B, B)
    right = torch.eye(len(logits), dtype=torch.bool, device=logits.device) if same is None else same
    found = logits.masked_fill(~right, -torch.inf)
    to_text = logits.logsumexp(1) - found.logsumexp(1)  # (B,)
    to_image = logits.logsumexp(0) - found.logsumexp(0)
    return (to_text.mean() + to_image.mean()) / 2
