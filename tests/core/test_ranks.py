"""Two ranks of one machine: rows gathered with their gradients give what one rank with all rows gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from atelier.callbacks.checkpoint import Checkpoints
from atelier.callbacks.clock import Clock
from atelier.core import ranks
from atelier.losses.contrastive import symmetric

SAME = torch.tensor([0, 1, 2, 0, 3, 1])


def told(rows: slice) -> list[Tensor]:
    """The loss of six pairs on a layer for each side, of which this process has some, and the layers' gradients."""
    torch.manual_seed(0)
    image, text, scale = nn.Linear(5, 4), nn.Linear(3, 4), nn.Parameter(torch.tensor(1.5))
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    pair = (nn.functional.normalize(own, dim=1) for own in (image(x[rows]), text(y[rows])))
    first, second = (ranks.gathered_learned(own) for own in pair)
    names = ranks.gathered(SAME[rows])
    loss = symmetric(first, second, scale.exp(), names[:, None] == names)
    loss.backward()
    return [loss.detach(), *(p.grad for p in (*image.parameters(), *text.parameters(), scale))]


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = told(slice(3 * rank, 3 * rank + 3))
    loss, gradients = found[0], [ranks.mean(gradient.clone()) for gradient in found[1:]]  # as DDP does
    torch.save([loss, *gradients], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    mp.start_processes(one_of_two, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_have_the_loss_and_the_gradients_of_one(two: list[list[Tensor]]) -> None:
    one = told(slice(0, 6))
    assert all(value.abs().max() > 1e-3 for value in one)
    for rank in two:
        for mine, expected in zip(rank, one, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_one_rank_gathers_itself() -> None:
    x = torch.randn(2, 3)
    assert ranks.gathered_learned(x) is x


def a_batch_ends(rank: int, folder: str) -> None:
    """The second of two ranks gets a signal; both say what they saw, and how often they spoke."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/batch", rank=rank, world_size=2)
    said, reduce, left = [], dist.all_reduce, []
    dist.all_reduce = lambda *given, **more: (said.append(given[0].device.type), reduce(*given, **more))
    clock = Clock(1000, None, 0)
    clock.leave = lambda trainer: left.append(clock.images_seen)
    checkpoints = Checkpoints(1000, None, folder, clock, SimpleNamespace())
    checkpoints.save = lambda *_: None
    strategy = SimpleNamespace(reduce_boolean_decision=lambda *_, **__: said.append("strategy"))
    data = SimpleNamespace(batch_size=8)
    trainer = SimpleNamespace(datamodule=data, strategy=strategy, should_stop=False)
    model = SimpleNamespace(device=torch.device("meta"), reported={})  # no CPU, whose losses are looked at each time
    for k in range(1, 4):
        clock.signal = 15 if (k, rank) == (3, 1) else None
        for callback in (clock, checkpoints):
            callback.on_train_batch_end(trainer, model, None, None, k)
    torch.save({"said": said, "left": left}, f"{folder}/batch_{rank}.pt")
    dist.destroy_process_group()


def test_ranks_speak_once_a_batch_and_between_cpus(tmp_path: Path) -> None:
    mp.start_processes(a_batch_ends, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"batch_{rank}.pt", weights_only=True)
        assert found == {"said": ["cpu"] * 3, "left": [24]}
