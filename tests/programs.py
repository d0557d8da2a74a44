"""Programs as a user starts them, in processes forked from one that has imported everything: 6 seconds less for each.

Threads and the order of imports are not those of a process of its own: what is about them starts one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])


class Program:
    """`python *words` in a folder, begun; a module is asked for by `-m`."""

    def __init__(self, words: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.words, self.outputs = words, [tempfile.NamedTemporaryFile() for _ in range(2)]
        names = [file.name for file in self.outputs]
        self.process = FORKS.Process(target=_become, args=(words, str(folder), dict(environment), *names))
        with contextlib.chdir(ROOT):  # where the process that is forked finds tests.warm
            self.process.start()

    def done(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Its exit code (-9 where it was killed) and what it said."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{self.words} took more than {seconds} s")
        out, err = (file.read().decode() for file in self.outputs)
        return subprocess.CompletedProcess(self.words, self.process.exitcode, out, err)


def python(
    *words: str, folder: Path, environment: Mapping[str, str], seconds: float = 280
) -> subprocess.CompletedProcess[str]:
    return Program([*words], folder, environment).done(seconds)


def forked(work: Callable[[], object]) -> int:
    """The exit code of a child of this process, which may have used one thread only, that does some work.

    It is -9 where the child was killed. An error is its traceback and 1.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(words: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # it was handed the way that it was started
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")
