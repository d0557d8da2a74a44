"""Running statistics of batch norms, taken anew for weights that no batch was ever normalised under: an average's.

Its activations have other means and variances than those of any net that was averaged, so neither the raw net's
statistics nor their average fit (Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.models.base import Generator, Model

BATCHES = 16
SEED = -1  # of the noise: no run's own


class _Seeing(nn.Module):
    """Batch norms, and what makes them see the images of some numbers."""

    def __init__(self, norms: list[nn.Module], see: Callable[[range], None]) -> None:
        super().__init__()
        self.norms, self.forward = nn.ModuleList(norms), see


def take(model: Model, data: DataModule) -> None:
    """Give the batch norms of the averaged nets the statistics of what they see when the model samples.

    That is for the conditions of the first training images, 16 batches of the run's own size, and noise of its own. It
    depends on the weights and the data alone: not on the ranks, not on what the norms held, and no random state moves.
    A model that makes no images keeps what they hold.
    """
    layers = (layer for name in model.ema_nets for layer in getattr(model, name).modules())
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    if not norms or not isinstance(model, Generator):
        return
    images, training = data.split("train"), model.training

    def see(numbers: range) -> None:
        batch = images.read([k % len(images) for k in numbers], None) if model.needs else {}
        for case in model.cases:
            model.sample(model.condition(batch, case), ImageRngs(SEED, numbers.start, len(numbers)))

    model.eval()
    with torch.compiler.set_stance("force_eager"):  # else each batch, whose weight is its own, were compiled anew
        update_bn((range(data.batch_size * k, data.batch_size * (k + 1)) for k in range(BATCHES)), _Seeing(norms, see))
    model.train(training)
