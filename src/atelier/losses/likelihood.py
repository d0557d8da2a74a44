"""-log p(x | prediction) of images, in nats, summed over pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.ranges import PositiveFloat

LEVEL = 127.5  # grey levels per unit of x: the width of a level is 1 / LEVEL


class Gaussian(nn.Module):
    """N(x; prediction, sigma^2), one sigma for all pixels (Kingma & Welling 2014, appendix C.2).

    Args:
        sigma: standard deviation in units of x.
        learned: sigma is a parameter that starts there (Rybkin et al. 2021, sigma-VAE, section 3.2).
    """

    def __init__(self, sigma: PositiveFloat, learned: bool) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learned)

    def nll(self, x: Tensor, prediction: Tensor) -> Tensor:
        """-log density of each image, (B,): sum (x - m)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2."""
        log_sigma = self.log_sigma.float()
        error = (x.float() - prediction.float()) ** 2 * (-2 * log_sigma).exp() / 2
        return (error + log_sigma + math.log(2 * math.pi) / 2).flatten(1).sum(1)

    def nll_8bit(self, x: Tensor, prediction: Tensor, uniform: Tensor) -> Tensor:
        """A bound of -log P of the 8-bit images, (B,).

        The density at x plus noise within its level, times the level's width (Theis et al. 2016, A note on the
        evaluation of generative models, 3.1).

        Args:
            uniform: noise of x's shape in [0, 1).
        """
        return self.nll(x + (uniform - 0.5) / LEVEL, prediction) + x[0].numel() * math.log(LEVEL)

    def image(self, prediction: Tensor) -> Tensor:
        """The mean as an image."""
        return prediction.float().clamp(-1, 1)


class Bernoulli(nn.Module):
    """Grey levels as probabilities of a white pixel: exact for black-and-white images (Kingma & Welling 2014, C.1)."""

    def nll(self, x: Tensor, prediction: Tensor) -> Tensor:
        """Cross-entropy between (x + 1) / 2 and sigmoid(prediction) of each image, (B,)."""
        target = (x.float() + 1) / 2
        return F.binary_cross_entropy_with_logits(prediction.float(), target, reduction="none").flatten(1).sum(1)

    def nll_8bit(self, x: Tensor, prediction: Tensor, uniform: Tensor) -> Tensor:
        """-log P of the images made black and white by the noise, (B,): a pixel is 1 where uniform < (x + 1) / 2.

        Stochastic binarisation (Salakhutdinov & Murray 2008).
        """
        return self.nll(2 * (uniform < (x + 1) / 2).float() - 1, prediction)

    def image(self, prediction: Tensor) -> Tensor:
        """The mean as an image."""
        return 2 * prediction.float().sigmoid() - 1
