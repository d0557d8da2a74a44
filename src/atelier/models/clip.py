"""Images and their texts in one space, learned by telling which belong together (Radford et al. 2021, CLIP)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from atelier.core import ranks
from atelier.core.batch import Batch
from atelier.core.ranges import PositiveFloat
from atelier.core.rng import ImageRngs
from atelier.losses.contrastive import symmetric
from atelier.models.base import Examined, Model
from atelier.nets.clip import ClipNet
from atelier.nets.words import refuse_long

MOST_SCALE = math.log(100)
SEARCHES = {"accuracy/1_of_64": (1, 64), "accuracy/5_of_100": (5, 100)}  # figure -> among the first k of n texts


class Clip(Model, Examined):
    """A text encoder and an image encoder, trained by the symmetric contrastive loss; it makes no images.

    The factor of the cosines stays in [1, 100], and no weight decays but matrices.

    Args:
        net: the two encoders.
        optimizer: parameters -> optimizer.
        grad_clip: global gradient norm; None = off.
    """

    idea = (
        "A text encoder and an image encoder learn to give an image and its own caption the same direction. "
        "It makes no images: it says how well a text fits one, and its text encoder reads prompts."
    )
    formula = "L = -1/2 E [log softmax_texts(s cos(image, text)) + log softmax_images(s cos(image, text))]"
    ema_nets = ("net",)
    needs = frozenset({"text"})
    figures = tuple(SEARCHES)

    def __init__(self, net: ClipNet, optimizer: Callable, grad_clip: PositiveFloat | None) -> None:
        super().__init__()
        self.net, self.optimizer, self.grad_clip = net, optimizer, grad_clip

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of the batch of all ranks, which is the same on each."""
        image, text = (ranks.gathered_learned(part) for part in self.net(batch["image"], batch["text"]))
        names = ranks.gathered(_numbered(batch["text"]).to(image.device))
        scale = self.net.log_scale.exp()
        loss = symmetric(image, text, scale, names[:, None] == names)
        self.report("loss", loss)
        self.report("scale", scale)
        return loss

    def refuse_long(self, name: str, texts: list[str], key: str) -> None:
        refuse_long(self.net, texts, key, "a larger model.net.max_tokens")

    def configure_optimizers(self) -> Optimizer:
        weights = list(self.trained().values())
        optimizer = self.optimizer([weight for weight in weights if weight.ndim > 1])
        rest = [weight for weight in weights if weight.ndim <= 1]  # biases, norms, the factor of the cosines
        optimizer.add_param_group({"params": rest, "weight_decay": 0.0})
        optimizer.register_step_post_hook(lambda *_: self.net.log_scale.data.clamp_(0, MOST_SCALE))
        return optimizer

    def examined(self, batch: Batch, rngs: ImageRngs) -> dict[str, Tensor]:
        """Vectors of images and of their texts, the number of each text, and a seed of each image's candidates."""
        image, text = self.net(batch["image"].to(self.device), batch["text"])
        seed = rngs.randint(1 << 31)
        return {"image": image, "text": text, "name": _numbered(batch["text"]), "seed": seed}

    def concluded(self, facts: dict[str, Tensor]) -> dict[str, float]:
        """How often an image's text is among the first k of n different ones, drawn for each image by its seed.

        The others are texts of other test images; where too few are different, nobody knows (nan).
        """
        different = {int(name): k for k, name in enumerate(facts["name"])}  # number of a text -> an image that has it
        place = {name: k for k, name in enumerate(different)}
        own = torch.tensor([place[int(name)] for name in facts["name"]])  # (N,)
        likeness = facts["image"] @ facts["text"][list(different.values())].T  # (N, different texts)
        found: dict[str, list[bool]] = {name: [] for name in SEARCHES}
        for row, mine, seed in zip(likeness, own.tolist(), facts["seed"].tolist(), strict=True):
            order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
            better = row[order[order != mine]] >= row[mine]
            for name, (k, n) in SEARCHES.items():
                found[name].append(int(better[: n - 1].sum()) < k)
        enough = {name: len(different) >= n for name, (_, n) in SEARCHES.items()}
        return {name: sum(right) / len(right) if enough[name] else math.nan for name, right in found.items()}


def _numbered(texts: list[str]) -> Tensor:
    """A number for each text, (B,) int64, the same for the same text in any process."""
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(found, "little", signed=True) for found in hashes])
