"""Kullback-Leibler divergences in nats."""

from torch import Tensor


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent of each item, of the arguments' shape.

    (mean^2 + exp(logvar) - 1 - logvar) / 2 >= 0 (Kingma & Welling 2014, appendix B).
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def with_free_bits(kl: Tensor, free: float) -> Tensor:
    """sum_j max(free, mean over items of KL_j), KL_j of channel j: a scalar (Kingma et al. 2016, IAF, eq. 15).

    Args:
        kl: (B, Z, ...) of each latent.
        free: nats a channel; 0 gives the plain KL, summed over latents, mean over items.
    """
    return kl.flatten(2).sum(2).mean(0).clamp(min=free).sum()
