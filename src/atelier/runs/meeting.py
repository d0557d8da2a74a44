"""What the ranks of a run tell one another beside their training: that they are ready for it, or why they end.

Lightning's ranks meet when training begins, and whoever ended before that is waited for. Here they meet first: at the
store of torchrun, at the first node of a SLURM step, or where the process that starts the others says. Ranks that are
started by hand on several nodes do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from atelier.core.errors import RankGone, UserError
from atelier.core.launchers import by_srun, local_rank, rank, started

if TYPE_CHECKING:
    from torch.distributed import Store

FIRST_PORT, N_PORTS = 15_000, 5_000  # of SLURM steps, two each
STEPS_APART = 487  # jobs between the ports of two steps of one job
PLACE = "ATELIER_MEETING"  # set for the ranks that Lightning starts
LINGER = 5.0  # seconds for the ranks to learn why one of them ends
NAP = 0.1

_store: Store | None = None
_place = "", 0
_n = 1


def slurm_place() -> tuple[str, int]:
    """Where the ranks of a SLURM step find one another: on its first node, at a port of its own.

    Lightning takes the first node and the number of the job, which two steps at once share.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    variable = os.environ.get
    nodes = variable("SLURM_STEP_NODELIST") or variable("SLURM_NODELIST") or "127.0.0.1"
    address = variable("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    number = int(variable("SLURM_JOB_ID") or 0) + STEPS_APART * int(variable("SLURM_STEP_ID") or 0)
    return address, int(variable("MASTER_PORT") or FIRST_PORT + 2 * (number % N_PORTS))


def begin(trainer: DictConfig) -> None:
    """Meet, or open the place for the ranks that this process will start; where nobody comes, go on without.

    Args:
        trainer: section of a config that nobody has checked yet.
    """
    global _store, _n
    with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):  # of the numbers; the port is taken
        _n = started() or int(trainer.devices) * int(trainer.num_nodes)
        if _n > 1 and _store is None:
            _store = _opened(timedelta(minutes=float(trainer.timeout_minutes)))


def _opened(patience: timedelta) -> Store | None:
    """The store, at its master or as one of the others; torchrun and rank 0 are its masters."""
    from torch.distributed import PrefixStore, TCPStore

    global _place
    variable, by_torchrun = os.environ.get, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = rank() == 0 and not by_torchrun
    if by_torchrun:
        _place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    elif by_srun():
        address, port = slurm_place()
        _place = address, port + 1
    elif PLACE in os.environ or started() is None and "NODE_RANK" not in os.environ:
        _place = "127.0.0.1", int(variable(PLACE, 0))
    else:
        return None
    if not master and not _listens(patience):
        return None
    try:
        store = TCPStore(*_place, is_master=master, wait_for_workers=False, timeout=patience)
    except RuntimeError as error:
        if master:
            raise
        raise RankGone("trainer.devices", _n, "rank 0 has come and is gone", "see its output") from error
    if started() is None:
        os.environ[PLACE] = str(store.port)
    return PrefixStore(f"atelier/{variable('TORCHELASTIC_RESTART_COUNT')}", store)


def _listens(patience: timedelta) -> bool:
    """Whether rank 0 has come or is there yet; torch tells of a store that is not in a hundred lines."""
    end = time.monotonic() + patience.total_seconds()
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(_place, timeout=1).close()
            return True
        time.sleep(NAP)
    return False


def in_turn(work: Callable[[], object]) -> None:
    """Have one rank of each node do what leaves something on its disk, rank 0 before them all, and the others wait.

    Where ranks do not meet, the first of each node does it at once.
    """
    first, node = rank() == 0, f"done on {os.uname().nodename}"
    if _store is None:
        return work() if local_rank() == 0 else None
    if local_rank() > 0:
        return _wait_for(node)
    if not first:
        _wait_for("done")
    work()
    for key in ["done"] * first + [node]:
        _store.set(key, "")


def ready(minutes: float) -> None:
    """Wait until all that were started are about to train.

    Rank 0 is waited for as long as it lives, since it may train what the run stands on; the others for some minutes.

    Raises:
        UserError: what another has refused, or that one has not come.
    """
    if _store is None or started() is None or PLACE in os.environ:
        return
    _store.set(str(rank()), json.dumps([]))
    if rank():
        return _wait_for("all")
    begun = time.monotonic()
    while others := [other for other in range(1, _n) if _word(other) is None]:
        learn(*range(1, _n))
        if time.monotonic() - begun > 60 * minutes:
            problem = f"rank {others[0]} has not come"
            raise RankGone("trainer.timeout_minutes", minutes, problem, "see its output")
        time.sleep(NAP)
    learn(*range(1, _n))
    _store.set("all", "")


def _wait_for(key: str) -> None:
    """Until somebody has set it, or rank 0 has refused something, or learnt that another has."""
    while not _known(key):
        learn(0)
        time.sleep(NAP)


def learn(*others: int) -> None:
    """Raise what one of the others has refused, if any has."""
    for other in others:
        if word := _word(other):
            raise UserError(*word[:4], said=True)


def _word(other: int) -> list | None:
    """What a rank has told: [] that it is ready, or the parts of an error; None where nothing yet."""
    return json.loads(_store.get(str(other))) if _known(str(other)) else None


def _known(key: str) -> bool:
    try:
        return _store is not None and _store.check([key])
    except RuntimeError as error:
        raise RankGone("trainer.devices", _n, "rank 0 is gone", "see its output") from error


def tell(error: UserError) -> bool:
    """Let the others know why this rank ends; gives whether a line about it is for this one to print.

    Of an error that all of them have, rank 0 speaks; of a rank that is gone, that rank itself, if it could.
    """
    gone = isinstance(error, RankGone)
    if _store is None:
        return not error.said and (rank() == 0 or gone or _trains())
    if rank() and not _listens(timedelta(seconds=NAP)):
        return not error.said
    parts = [error.key, str(error.value), error.problem, error.fix, "gone" if gone else "said" if error.said else ""]
    try:
        _store.set(str(rank()), json.dumps(parts))
        if error.said or gone and any(not word[-1] for word in _refused().values()):
            return False
        return rank() == 0 or not _first_has(error.key) and not gone
    except (RuntimeError, RankGone):  # rank 0 is gone
        return not error.said


def _first_has(key: str) -> bool:
    """Whether rank 0 tells of the same, for which it is given some time."""
    end = time.monotonic() + LINGER
    while not _word(0) and time.monotonic() < end:
        time.sleep(NAP)
    word = _word(0)
    return bool(word) and word[0] == key and not word[-1]


def linger() -> None:
    """Rank 0, with which the place ends, waits for the others to know."""
    if _store is not None and rank() == 0 and started() is not None:
        end = time.monotonic() + LINGER
        while len(_refused()) < _n - 1 and time.monotonic() < end:
            time.sleep(NAP)
        time.sleep(3 * NAP)


def _refused() -> dict[int, list]:
    """The errors of the other ranks so far."""
    words = {other: _word(other) for other in range(_n) if other != rank()}
    return {other: word for other, word in words.items() if word}


def _trains() -> bool:
    """Whether the ranks have met in training."""
    from atelier.core.ranks import many

    return many()
