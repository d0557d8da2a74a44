"""Signals that ask a process to stop: Ctrl-C, `kill`, SLURM's --signal=USR1, a terminal that was closed.

Where there is nothing to save they end the process at once, without a traceback; the clock of a run that trains
replaces `at_once` by a note to itself (callbacks/clock.py). Standard library only: scripts listen from their first
line.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from atelier.core.launchers import rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CODES = tuple(128 + number for number in SIGNALS)
ECHO = 1.0  # seconds in which a launcher passes on what the whole group has got already
AGAIN = b"\nwhat was learnt is saved, then the run stops; Ctrl-C again stops it now, unsaved\n\n"
Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def listen(handler: Handler | None = None) -> None:
    """From now on each of the signals calls `handler`.

    Those that this process was told to ignore (nohup) stay ignored.

    Args:
        handler: None: `at_once`, and the system's own end of the process on the ranks beside the first: they have
            nothing to tidy up, and wait in C for the others, where no handler of Python is called.
    """
    if handler is None:
        handler = signal.SIG_DFL if rank() else at_once
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def at_once(number: int, frame: FrameType | None) -> None:
    """Leave from where the process is."""
    if not echo():
        leave(number)


_heard = -math.inf


def echo() -> bool:
    """Called in a handler: whether another signal, which counted, came just before."""
    global _heard
    now = time.monotonic()
    again = now - _heard < ECHO
    _heard = _heard if again else now
    mute()
    return again


def promise(number: int) -> None:
    """Called in a handler that has what was learnt saved: tells whoever pressed Ctrl-C what happens now.

    By the system's own call, since a print may be going on; the bar is drawn anew beneath the blank line.
    """
    if number == signal.SIGINT and rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, AGAIN)


def leave(number: int) -> None:
    """End with 128 + the number of the signal; with 0 on the ranks beside the first, which their launcher watches."""
    sys.exit(0 if rank() else 128 + number)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, the signals are ignored: for tidying up, which takes no time."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mute() -> None:
    """Standard output and error that nobody reads any more (the terminal was closed, `tee` ended) fail no print."""
    for handle in (1, 2):
        if unheard(handle):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, handle)
            os.close(nowhere)


def unheard(handle: int) -> bool:
    """Whether the other end of an open file is gone."""
    poll = select.poll()
    poll.register(handle, 0)
    return bool(poll.poll(0))


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Inside, a reader that has left (`| head`) ends the process as it ends others, without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
        sys.exit(128 + signal.SIGPIPE)


def follow_parent(worker: int) -> None:
    """A loader process ignores the signals, which may go to a whole group, but SIGTERM from the process it reads for.

    That one saves what it has first, and then ends its loaders. A DataLoader calls this as `worker_init_fn`.
    """
    sys.excepthook = lambda *error: None  # errors of reading reach the parent; these are of a parent that left
    if sys.platform == "linux":  # elsewhere nobody tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_wait_for, args=(os.getppid(),), daemon=True).start()


def _wait_for(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)
