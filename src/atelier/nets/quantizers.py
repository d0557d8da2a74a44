"""Maps of vectors to maps of codes. B batch, D latent channels, h, w map size, K codes, N = B h w vectors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import NonNegFloat, PositiveInt, Probability

EPS = 1e-5  # of Laplace smoothing (van den Oord et al. 2017, appendix A.1)
LLOYD_STEPS = 10
DETERMINISTIC_LOGVAR = -20.0  # log-variance of a latent that is no draw: a deviation of 5e-5


class Quantized(NamedTuple):
    """What a quantiser makes of a map of latents.

    Args:
        z: (B, D, h, w) float32, the codes' vectors; its gradient goes straight through to the latents.
        codes: (B, h, w) int64.
        loss: scalar float32, to be added to the reconstruction's; 0 where there is nothing to learn.
    """

    z: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """The nearest of K learned vectors (van den Oord et al. 2017, Neural Discrete Representation Learning).

    The vectors z choose codes k = argmin |z - e_k| (eq. 1, 2) and cost, as means over all elements (eq. 3),

        update "ema":      beta (z - sg[e])^2
        update "gradient": beta (z - sg[e])^2 + (sg[z] - e)^2

    With "ema" each entry follows the mean of the vectors that chose it (appendix A.1):
    n <- decay n + (1 - decay) count, m <- decay m + (1 - decay) sum, e = m / n with n smoothed by 1e-5.
    Distances and statistics are float32 whatever autocast says; the statistics are those of all ranks, so that every
    rank holds the same codebook without one being sent. It learns in train mode only, once in every forward pass.

    Args:
        n_codes: K.
        dim: D.
        update: learning rule of the codebook.
        ema_decay: decay of the statistics per step.
        commitment_weight: beta; it moves the encoder, never the codebook.
        kmeans_init: start from k-means of the first training batch.
        dead_code_threshold: an entry that fewer vectors than this choose (running mean per step, over all ranks) is put
            where a vector of the batch is, drawn in proportion to its squared distance from its code; 0 = never.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        *,
        n_codes: PositiveInt,
        dim: PositiveInt,
        update: Literal["ema", "gradient"],
        ema_decay: Probability,
        commitment_weight: NonNegFloat,
        kmeans_init: bool,
        dead_code_threshold: NonNegFloat,
    ) -> None:
        super().__init__()
        self.n_codes, self.dim, self.update = n_codes, dim, update
        self.ema_decay, self.commitment_weight = ema_decay, commitment_weight
        self.dead_code_threshold = dead_code_threshold
        start = torch.empty(n_codes, dim).uniform_(-1 / n_codes, 1 / n_codes)
        if update == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(n_codes))
        self.register_buffer("started", torch.tensor(not kmeans_init))
        self._looked = False  # at the flag: once, not in every step

    def forward(self, z: Tensor) -> Quantized:
        """Latents (B, D, h, w) to their codes and vectors."""
        z = z.float()
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")            # (N, D)
        if self.training:
            self._start(vectors)
        codes = nearest(vectors, self.codebook).unflatten(0, (z.shape[0], *z.shape[2:]))  # (B, h, w)
        e = self.embed(codes)                                              # (B, D, h, w)
        loss = self.commitment_weight * F.mse_loss(z, e.detach())
        if self.update == "gradient":
            loss = loss + F.mse_loss(e, z.detach())
        if self.training:
            self._learn(vectors, codes.flatten())
        return Quantized(straight_through(z, e), codes, loss)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, h, w) of codes (B, h, w)."""
        vectors = rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")
        return vectors.contiguous()                                        # as convolutions want it

    def latents(self, codes: Tensor) -> Tensor:
        """Latents (B, D, h, w) that are quantised to these codes (B, h, w)."""
        return self.embed(codes)

    def usage(self) -> Tensor:
        """How often each code was chosen lately, (K,), sum 1."""
        return self.counts / self.counts.sum()

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        """Where k-means is asked for: once, before the first codes are chosen."""
        if not self._looked and not self.started:
            centres, counts = kmeans(vectors, self.n_codes)
            self.codebook.copy_(centres)
            self.counts.copy_(counts)
            if self.update == "ema":
                self.sums.copy_(centres * counts[:, None])
            self.started.fill_(True)
        self._looked = True

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor) -> None:
        """Statistics of all ranks' vectors, in one exchange together with the places of revived codes."""
        totals = [tallied(vectors, codes, self.n_codes)]                   # (K, D + 1)
        if self.dead_code_threshold > 0:
            far = (vectors - self.codebook[codes]).square().sum(1)         # (N,)
            totals.append(ranks.from_first(drawn(vectors, far, self.n_codes)))  # (K, D)
        totals = ranks.summed(torch.cat(totals, dim=1))
        self.counts.lerp_(totals[:, self.dim], 1 - self.ema_decay)
        if self.update == "ema":
            self.sums.lerp_(totals[:, : self.dim], 1 - self.ema_decay)
            total = self.counts.sum()
            smoothed = (self.counts + EPS) / (total + self.n_codes * EPS) * total
            self.codebook.copy_(self.sums / smoothed[:, None])
        if self.dead_code_threshold > 0:
            self._revive(totals[:, self.dim + 1 :])

    def _revive(self, places: Tensor) -> None:
        """Codes in too little use start anew at `places` (K, D), as if used twice as much as they must be."""
        dead = self.counts < self.dead_code_threshold                      # (K,)
        self.codebook.copy_(torch.where(dead[:, None], places, self.codebook))
        self.counts.masked_fill_(dead, 2 * self.dead_code_threshold)
        if self.update == "ema":
            self.sums.copy_(torch.where(dead[:, None], places * 2 * self.dead_code_threshold, self.sums))


class FSQ(nn.Module):
    """Each channel rounded to a few levels (Mentzer et al. 2024, Finite Scalar Quantization: VQ-VAE Made Simple).

    Channel i is bounded to L_i levels, round(tanh(z + shift) (L - 1) / 2 (1 + eps) - offset), offset 1/2 and
    shift = atanh(offset / bound) for even L (section 3.1, appendix A.1), and divided by L // 2 into [-1, 1].
    The paper has (1 - eps), and in its listing tan for atanh: with (1 + eps) the outermost levels lie inside the bound,
    two levels work, and latents that give a code are finite. Codes number the levels with the first channel counting
    fastest. Nothing is learned.

    Args:
        levels: number of levels of each channel, 2 or more; a channel of 2 has its border far off centre, 3 or more are
            better.

    Raises:
        UserError: a channel of one level.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, *, levels: list[PositiveInt]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            fix = ".levels=[8,6,5]"
            raise UserError(".levels", levels, "each channel needs 2 levels or more", fix)
        self.n_codes, self.dim = math.prod(levels), len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels)[:, None, None], persistent=False)    # (D, 1, 1)
        self.register_buffer("basis", torch.tensor(basis)[:, None, None], persistent=False)      # (D, 1, 1)

    def forward(self, z: Tensor) -> Quantized:
        """Latents (B, D, h, w) to their codes and vectors."""
        bound, offset = self._bounds()
        bounded = torch.tanh(z.float() + torch.atanh(offset / bound)) * bound - offset           # (B, D, h, w)
        level = bounded.round()                                            # (B, D, h, w), from -(L // 2)
        codes = ((level.detach().long() + self.levels // 2) * self.basis).sum(1)                 # (B, h, w)
        z = straight_through(bounded, level) / (self.levels // 2)
        return Quantized(z, codes, z.new_zeros(()))

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, h, w) in [-1, 1] of codes (B, h, w)."""
        return self._level(codes) / (self.levels // 2)

    def latents(self, codes: Tensor) -> Tensor:
        """Latents (B, D, h, w) that are quantised to these codes (B, h, w): where rounding changes nothing."""
        bound, offset = self._bounds()
        return torch.atanh((self._level(codes) + offset) / bound) - torch.atanh(offset / bound)

    def usage(self) -> Tensor:
        """(K,), all the same: it is not counted."""
        return torch.full((self.n_codes,), 1 / self.n_codes, device=self.levels.device)

    def _level(self, codes: Tensor) -> Tensor:
        return codes[:, None] // self.basis % self.levels - self.levels // 2                     # (B, D, h, w)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return (self.levels - 1) * (1 + 1e-3) / 2, (self.levels % 2 == 0) / 2                    # (D, 1, 1) each


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """The value e, exactly, with the gradient of z (Bengio et al. 2013, section 4)."""
    return e.detach() + (z - z.detach())


@torch.no_grad()
def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """Which of `centres` (K, D) is nearest to each of `vectors` (N, D): (N,) int64; of equals the first."""
    with float32(vectors.device):
        far = torch.addmm(centres.square().sum(1), vectors, centres.T, alpha=-2)    # (N, K): |z - e|^2 - |z|^2
    return far.argmin(1)


def tallied(vectors: Tensor, codes: Tensor, n_codes: int) -> Tensor:
    """Sum and number of the vectors (N, D) of each code, (K, D + 1)."""
    ones = vectors.new_ones(len(vectors), 1)
    return vectors.new_zeros(n_codes, vectors.shape[1] + 1).index_add_(0, codes, torch.cat([vectors, ones], dim=1))


def drawn(vectors: Tensor, weights: Tensor, n: int) -> Tensor:
    """n of the vectors (N, D) at random, each as likely as its weight (N,) says, (n, D)."""
    return vectors[torch.multinomial(torch.nan_to_num(weights) + 1e-12, n, replacement=True)]


def kmeans(vectors: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n centres of the vectors (N, D) of all ranks and how many belong to each, (n, D) and (n,).

    Lloyd's algorithm from seeds of rank 0, which are spread by k-means++ (Arthur & Vassilvitskii 2007): each next one
    is drawn with probability proportional to its squared distance from those there are.
    """
    centres = ranks.summed(ranks.from_first(seeds(vectors, n)))               # (n, D)
    for _ in range(LLOYD_STEPS):
        totals = ranks.summed(tallied(vectors, nearest(vectors, centres), n)) # (n, D + 1)
        counts = totals[:, -1]                                             # (n,)
        centres = torch.where(counts[:, None] > 0, totals[:, :-1] / counts.clamp(min=1)[:, None], centres)
    return centres, counts


def seeds(vectors: Tensor, n: int) -> Tensor:
    """n of the vectors (N, D) far from each other, (n, D)."""
    picked = [vectors[torch.randint(len(vectors), (1,), device=vectors.device)]]
    far = (vectors - picked[0]).square().sum(1)                            # (N,)
    for _ in range(n - 1):
        picked.append(drawn(vectors, far, 1))                              # (1, D)
        far = torch.minimum(far, (vectors - picked[-1]).square().sum(1))
    return torch.cat(picked)


def perplexity(codes: Tensor, n_codes: int) -> Tensor:
    """exp of the entropy of the frequencies of codes (...) int64: n_codes where all are as frequent, else less."""
    flat = codes.flatten()
    counts = torch.zeros(n_codes, device=codes.device).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
    shares = counts / len(flat)                                            # (K,)
    return torch.special.entr(shares).sum().exp()
