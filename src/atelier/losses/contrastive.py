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
