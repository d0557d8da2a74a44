"""Kullback-Leibler divergences in nats."""

from torch import Tensor


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) of each item, summed over latents, (B,)

    (Kingma & Welling 2014, appendix B): 1/2 sum(mean^2 + exp(logvar) - 1 - logvar) >= 0.
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
