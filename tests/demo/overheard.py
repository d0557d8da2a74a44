"""A program that says whom it calls: `python -m tests.demo.overheard LOG demo.py ...` writes each address to LOG."""

from __future__ import annotations

import runpy
import sys
import tempfile
from typing import Any

log, *sys.argv = sys.argv[1:]


def heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1] if event == "socket.connect" else arguments[0]
        with open(log, "a") as file:
            file.write(f"{event} {host[0] if isinstance(host, tuple) else host}\n")


tempfile.tempdir = None  # what TMPDIR says, whatever this process was forked from
sys.addaudithook(heard)
runpy.run_path(sys.argv[0], run_name="__main__")
