"""What the families share that train a generator against a discriminator: turns, optimizers, penalties, one view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from atelier.core.precision import float32
from atelier.losses.adversarial import Adversarial
from atelier.losses.regularizers import gradient_penalty, r1_penalty
from atelier.models.base import Model
from atelier.nets.augment import ADA, DiffAugment


@contextmanager
def no_weight_grads(*nets: nn.Module) -> Iterator[None]:
    """Gradients go through these nets and none are kept for their weights: where another player learns from them."""
    weights = [p for net in nets for p in net.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


class TwoPlayers(Model):
    """A generator and a discriminator, each with its nets and its optimizer, which are stepped by hand.

    `players` names the nets of either, in the order of their optimizers; `lazy_every` says for either how many batches
    lie between two penalty steps of its own, 0 where there are none.

    Args:
        loss: losses of the two players; None: the generator is trained alone.
        generator_optimizer: (parameters of the first player, lazy_every) -> optimizer.
        discriminator_optimizer: maker of the second player's optimizer; None: there is none.
        grad_clip: global gradient norm of either player.
        augment: change of all that the discriminator sees; None: nothing.
    """

    players: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("generator",), ("discriminator",))
    ddp_options = {"find_unused_parameters": True}
    divergence_limits: ClassVar[dict[str, float]] = {"real_logit": 1e4, "fake_logit": 1e4}
    lazy_every: tuple[int, int] = (0, 0)

    def __init__(
        self,
        loss: Adversarial | None,
        generator_optimizer: Callable,
        discriminator_optimizer: Callable | None,
        grad_clip: float | None,
        augment: DiffAugment | ADA | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss, self.augment, self.grad_clip = loss, augment, grad_clip
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer for each player that there is, the generator's first."""
        makers = self.generator_optimizer, self.discriminator_optimizer
        return [
            make(list(self.trained(*nets).values()), lazy_every=lazy)
            for nets, make, lazy in zip(self.players, makers, self.lazy_every, strict=True)
            if make is not None
        ]

    def seen(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as the discriminator sees them, real and generated alike: augmented."""
        return x if self.augment is None else self.augment(x)

    def compared(self, discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor | None:
        """Logits of real images for the generator's loss; None unless the loss is relativistic.

        Args:
            discriminator: images (B, C, H, W) -> logits.
            real: images (B, C, H, W), not yet augmented.
        """
        return discriminator(self.seen(real)) if self.loss.needs_real_logits else None

    def step(self, optimizer: Optimizer, loss: Tensor, name: str, penalised: bool = False) -> None:
        """One step of this optimizer down this loss, `penalised` as in `descend`."""
        optimizer.zero_grad()
        self.descend(loss, penalised)
        self.take(optimizer, name)

    def descend(self, loss: Tensor, penalised: bool = False) -> None:
        """Gradients of a loss, each in the precision of what it is the gradient of.

        Autocast is off: of a penalty, whose backward pass multiplies anew, it would make bf16 of float32.

        Args:
            loss: scalar.
            penalised: whether there is such a penalty in it: TF32 is off too then, as it is when its gradient is taken.
        """
        with torch.autocast(self.device.type, enabled=False), float32(self.device, penalised):
            self.manual_backward(loss)

    def take(self, optimizer: Optimizer, name: str) -> None:
        """A step down the gradients that are there; their norm before they are clipped is `<name>_gradient`."""
        self._stepping = name
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clipping, where gradients are no longer scaled."""
        self.report(f"{self._stepping}_gradient", self.clip(optimizer))

    def report_adversarial(self, loss: Tensor, real: Tensor, fake: Tensor) -> None:
        """Log a discriminator's loss and its mean logits of real and of generated images; ADA hears of the real ones.

        Args:
            loss: scalar.
            real, fake: logits.
        """
        self.report("discriminator", loss)
        self.report("real_logit", real.mean())
        self.report("fake_logit", fake.mean())
        if self.augment is not None:
            for name, value in self.augment.observe(real.detach()).items():
                self.report(name, value)

    def zero_centred_penalty(self, name: str, gamma: float, logits: Tensor | None, x: Tensor) -> Tensor:
        """gamma / 2 times the penalty of `r1_penalty`, which is logged as `name`; 0 and not logged at gamma 0.

        Args:
            logits: (B,) of x; None at gamma 0 will do.
            x: images (B, C, H, W) that require grad.
        """
        if gamma == 0:
            return x.new_zeros(())
        penalty = r1_penalty(logits, x)
        self.report(name, penalty)
        return gamma / 2 * penalty

    def one_centred(
        self, weight: float, discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor
    ) -> Tensor:
        """Weight times the penalty of `gradient_penalty` (WGAN-GP), which is logged; 0 and not logged at weight 0.

        Args:
            discriminator: images (B, C, H, W) -> logits (B,).
            real, fake: images (B, C, H, W), no gradients.
        """
        if weight == 0:
            return real.new_zeros(())
        penalty = gradient_penalty(discriminator, real, fake)
        self.report("gradient_penalty", penalty)
        return weight * penalty
