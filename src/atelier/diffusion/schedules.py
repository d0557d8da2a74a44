"""How much image and how much noise there is at time t: x_t = alpha_t x + sigma_t eps, eps ~ N(0, I).

t runs over [0, 1], 0 = data, 1 = noise. All numbers are float64, whatever the net computes in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.ranges import PositiveFloat, PositiveInt, Probability

Spacing = Literal["trailing", "leading", "linspace"]
FAINTEST = 80.0  # sigma / alpha beyond which an image is lost in its noise (Karras et al. 2022, EDM, table 1)


class NoiseLevel(NamedTuple):
    """A time and what the schedule says of it: float64 tensors of one shape."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    scale: Tensor

    @property
    def ratio(self) -> Tensor:
        """sigma / scale, in which the path of one (x, eps), divided by scale, is a straight line."""
        return self.sigma / self.scale

    @property
    def half_logsnr(self) -> Tensor:
        """lambda = log(alpha / sigma): inf at t = 0, -inf where nothing is left of the image."""
        return (self.alpha / self.sigma).log()


class Schedule(nn.Module, ABC):
    """alpha_t and sigma_t as functions of a float tensor t of any shape; both come back in float64."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the image, 1 at t = 0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, 0 at t = 0."""

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), falling in t, inf at t = 0."""

    @abstractmethod
    def time(self, logsnr: Tensor) -> Tensor:
        """The t that has this log-SNR: the inverse of `logsnr`."""

    @abstractmethod
    def net_time(self, t: Tensor) -> Tensor:
        """What the net gets instead of t: float32, about 0 .. 1000."""

    @abstractmethod
    def snap(self, t: Tensor) -> Tensor:
        """The training time that t in (0, 1] stands for: on a grid, the point at or above it."""

    @abstractmethod
    def times(self, steps: int, spacing: Spacing = "trailing", offset: int = 0) -> Tensor:
        """Sampling times, (steps + 1,) float64 on the CPU, falling to 0, evenly spaced."""

    @abstractmethod
    def prior_std(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise that sampling starts from at time t."""

    def levels(self, device: torch.device | None = None) -> Tensor:
        """Levels on which a likelihood is bounded, (T,) float64, rising to 1 from the first that an eye may see."""
        faintest = torch.tensor(-2 * math.log(0.01), dtype=torch.float64)
        return torch.linspace(self.time(faintest).item(), 1, 1000, dtype=torch.float64, device=device)

    def input_scale(self, t: Tensor) -> Tensor:
        """What x_t is multiplied by before the net sees it: 1 where x_t is of about unit size already."""
        return torch.ones_like(t, dtype=torch.float64)

    def scale(self, t: Tensor) -> Tensor:
        """What x_t is divided by to straighten the path of one (x, eps): alpha_t, where it is never 0."""
        return self.alpha(t)

    def level(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(t, self.alpha(t), self.sigma(t), self.scale(t))

    def pair(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for t (B,) as (B, 1, ...) in the type of `like` (B, ...)."""
        column = (-1,) + (1,) * (like.ndim - 1)
        return self.alpha(t).to(like.dtype).view(column), self.sigma(t).to(like.dtype).view(column)


class DiscreteSchedule(Schedule):
    """A table of T = n_steps noise levels with alpha^2 + sigma^2 = 1 (Ho et al. 2020, DDPM, eq. 4).

    Entry i lies at t = (i + 1) / T and is met exactly; between two entries the log-SNR is linear in t, below
    the first one sigma^2 is linear in t down to sigma = 0 at t = 0. The net gets T t - 1, the index.
    """

    logsnrs: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        self.n_steps = len(betas)
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        self.register_buffer("logsnrs", torch.log(alpha_bar / (1 - alpha_bar)), persistent=False)

    def alpha(self, t: Tensor) -> Tensor:
        return self.logsnr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.logsnr(t)).sigmoid().sqrt()

    def logsnr(self, t: Tensor) -> Tensor:
        place = t.double() * self.n_steps - 1
        i = place.floor().clamp(0, self.n_steps - 2).long()
        first, second, weight = self.logsnrs[i], self.logsnrs[i + 1], place - i
        between = torch.lerp(first, second, weight)
        to_nothing = first + 2 * torch.log1p(-weight.clamp(max=1))  # alpha / sigma falls evenly to a last level of 0
        between = torch.where(second.isinf(), to_nothing, between)
        first_variance = (-self.logsnrs[0]).sigmoid()
        below = -torch.logit(first_variance * (place + 1))
        return torch.where(place < 0, below, between)

    def time(self, logsnr: Tensor) -> Tensor:
        i = (torch.searchsorted(-self.logsnrs, -logsnr) - 1).clamp(0, self.n_steps - 2)
        first, second = self.logsnrs[i], self.logsnrs[i + 1]
        weight = torch.where(second.isinf(), -torch.expm1((logsnr - first) / 2), (first - logsnr) / (first - second))
        below = (-logsnr).sigmoid() / (-self.logsnrs[0]).sigmoid()
        return torch.where(logsnr > self.logsnrs[0], below, i + weight + 1) / self.n_steps

    def net_time(self, t: Tensor) -> Tensor:
        return (t.double() * self.n_steps - 1).float()

    def snap(self, t: Tensor) -> Tensor:
        return (t.double() * self.n_steps - 1e-6).ceil().clamp(min=1) / self.n_steps  # itself, if it is on the grid

    def times(self, steps: int, spacing: Spacing = "trailing", offset: int = 0) -> Tensor:
        """Times on the table's grid (Lin et al. 2024, Common Diffusion Noise Schedules are Flawed, table 2).

        trailing: from t = 1 down to 0 in equal strides, rounded. leading: every (T // steps)-th entry counted
        from the first, as in DDIM, or from `offset` entries further; starts below t = 1. linspace: last to first entry,
        then t = 0.
        """
        n = self.n_steps
        if steps > n:
            raise UserError(".sampler.steps", steps, f"the schedule has {n} levels", f".sampler.steps={n}")
        if offset and (steps - 1) * (n // steps) + 1 + offset > n:
            raise UserError(
                ".sampler.offset", offset, f"the first step would leave the {n} levels", ".sampler.offset=0"
            )
        match spacing:
            case "trailing":
                entries = (n - torch.arange(steps, dtype=torch.float64) * (n / steps)).round()
            case "leading":
                entries = torch.arange(steps, dtype=torch.float64).flip(0) * (n // steps) + 1 + offset
            case "linspace":
                entries = torch.linspace(0, n - 1, steps, dtype=torch.float64).round().flip(0) + 1
        return torch.cat([entries, torch.zeros(1)]) / n

    def levels(self, device: torch.device | None = None) -> Tensor:
        return torch.arange(1, self.n_steps + 1, dtype=torch.float64, device=device) / self.n_steps

    def prior_std(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Linear(DiscreteSchedule):
    """beta_i evenly spaced (Ho et al. 2020, DDPM, section 4)."""

    def __init__(
        self, n_steps: PositiveInt = 1000, beta_min: PositiveFloat = 1e-4, beta_max: PositiveFloat = 0.02
    ) -> None:
        super().__init__(torch.linspace(beta_min, beta_max, n_steps, dtype=torch.float64))


class ScaledLinear(DiscreteSchedule):
    """sqrt(beta_i) evenly spaced: the "linear" of latent diffusion (Rombach et al. 2022)."""

    def __init__(
        self, n_steps: PositiveInt = 1000, beta_min: PositiveFloat = 0.00085, beta_max: PositiveFloat = 0.012
    ) -> None:
        super().__init__(torch.linspace(beta_min**0.5, beta_max**0.5, n_steps, dtype=torch.float64) ** 2)


class Cosine(DiscreteSchedule):
    """alpha_bar_i = f(i) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2), with beta_i cut at max_beta.

    Nichol & Dhariwal 2021, Improved DDPM, eq. 17.
    """

    def __init__(self, n_steps: PositiveInt = 1000, s: PositiveFloat = 0.008, max_beta: Probability = 0.999) -> None:
        t = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
        f = torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=max_beta))


class Sigmoid(DiscreteSchedule):
    """alpha_bar falls as sigmoid(-(start + (end - start) t) / tau), scaled to 1 .. 0 (Jabri et al. 2023, algorithm 1).

    Args:
        n_steps: number of noise levels.
        start: place on the sigmoid of t = 0.
        end: place of t = 1.
        tau: width of the sigmoid.
    """

    def __init__(
        self, n_steps: PositiveInt = 1000, start: float = -3.0, end: float = 3.0, tau: PositiveFloat = 1.0
    ) -> None:
        if end <= start:
            raise UserError(".end", end, f"it must lie above start, {start}", f".end={start + 6}")
        t = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
        falling = torch.sigmoid(-(start + (end - start) * t) / tau)
        alpha_bar = ((falling - falling[-1]) / (falling[0] - falling[-1])).clamp(min=1e-9)
        super().__init__(1 - alpha_bar[1:] / alpha_bar[:-1])


class ZeroTerminal(DiscreteSchedule):
    """Another table, shifted and scaled in sqrt(alpha_bar) so that its last level is pure noise.

    (Lin et al. 2024, Common Diffusion Noise Schedules are Flawed, algorithm 1.) The first level stays as it is.

    Args:
        schedule: table of levels.
    """

    def __init__(self, schedule: DiscreteSchedule) -> None:
        root = schedule.logsnrs.sigmoid().sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        super().__init__(1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]))


class ContinuousSchedule(Schedule):
    """Any t in (0, 1] is a training time. There is no grid: every spacing of `times` is the uniform one."""

    def snap(self, t: Tensor) -> Tensor:
        return t

    def times(self, steps: int, spacing: Spacing = "trailing", offset: int = 0) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def prior_std(self, t: Tensor) -> Tensor:
        return self.sigma(t)


class EDM(ContinuousSchedule):
    """Noise is added and the image kept: alpha = 1, sigma = sigma_max t^7   (Karras et al. 2022, EDM, section 5).

    Even steps of t are those of their sampler, which are even in the 7th root of sigma. The net sees x_t divided by its
    deviation, c_in, and as time 250 ln sigma, which is c_noise in thousandths (table 1).

    Args:
        sigma_max: noise at t = 1, in which an image of deviation `sigma_data` is lost.
        sigma_data: deviation of the images.
    """

    def __init__(self, sigma_max: PositiveFloat = 80.0, sigma_data: PositiveFloat = 0.5) -> None:
        super().__init__()
        self.sigma_max, self.sigma_data = sigma_max, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t.double() ** 7

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * self.sigma(t).log()

    def time(self, logsnr: Tensor) -> Tensor:
        return ((-logsnr / 2).exp() / self.sigma_max) ** (1 / 7)

    def net_time(self, t: Tensor) -> Tensor:
        return (250 * self.sigma(t).log()).float()

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.sigma(t) ** 2 + self.sigma_data**2).rsqrt()


class Flow(ContinuousSchedule):
    """The straight path x_t = (1 - t) x + t eps (Liu et al. 2023, Rectified Flow, eq. 1, time reversed).

    The net gets 1000 t.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.logit(t.double())

    def time(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).sigmoid()

    def net_time(self, t: Tensor) -> Tensor:
        return (1000 * t.double()).float()

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)
