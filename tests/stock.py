"""Lightning's own parts on a model with two optimizers, for the tests that show why they are replaced."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class TwoPlayers(LightningModule):
    """Each batch is a step of one net and then of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(1, 1), nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> None:
        for net, optimizer in zip((self.generator, self.discriminator), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch).mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.discriminator)]


def fit(folder: Path, n_batches: int, *callbacks: Callback) -> TwoPlayers:
    model = TwoPlayers()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(torch.ones(n_batches, 1)))
    return model
