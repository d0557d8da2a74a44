"""Command lines that are wrong somewhere, drawn by a seed: each goes the way of a user's, and so does what is offered.

`python -m tests.fuzz_lines 2000 SEED` prints how they ended and each that was told of badly; a folder behind it, which
holds the finished tiny runs of conftest.py, adds sample.py, evaluate.py and export.py on them, and training up to fit.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from lightning import Trainer
from omegaconf import DictConfig
from omegaconf._utils import get_yaml_loader

from atelier.core import job
from atelier.core.errors import UserError
from atelier.runs import folders, meeting, preflight, pretrained
from atelier.runs.pages import chosen, key_of, known_keys
from tests import (
    fixes,
    warm,  # noqa: F401  (or each child would import as much)
)
from tests.compose import a_finished_run
from tests.drawn_lines import Drawer, Line
from tests.programs import ROOT, forked

LINE = re.compile(r"error: (\S+?)=(.*?): .+\. Fix: .+")
THERE = {"a_file", "a_folder", "cache"}  # in the folder that commands are typed in
ROUNDS = 12  # of fixes, one upon the other, beside one for each word: of another model each may be wrong
SECONDS = 30
MEMORY = 4 * 2**30  # bytes that a child may take beside what it was forked with


@dataclass
class Told:
    """How a command ended: its exit code, what it printed as an error, the mistakes that it reported."""

    code: int
    err: str
    errors: list[UserError]


# How it ends


def ended(line: Line) -> Told:
    """The command, done: within this process as far as preflight, else in a child."""
    if not line.whole:
        return _done(line)
    with tempfile.NamedTemporaryFile() as file:
        code = forked(lambda: _limited(line, Path(file.name)))
        told = Path(file.name).read_bytes()
    at_work = code == -signal.SIGALRM  # on numbers that are large, not wrong
    return pickle.loads(told) if told else Told(0 if at_work else code, f"the process ended with {code}", [])


def _limited(line: Line, told: Path) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.alarm(SECONDS)
    Trainer.fit = pretrained._train = lambda *_, **__: sys.exit(0)
    told.write_bytes(pickle.dumps(_done(line)))


def _done(line: Line) -> Told:
    errors, err, code = [], io.StringIO(), 0
    for name in set(os.listdir()) - THERE:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    folders.stamp.cache_clear()
    with (
        contextlib.chdir(Path.cwd()),
        _heard(errors, line),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / f"{line.script}.py"), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    return Told(code, err.getvalue(), errors)


@contextlib.contextmanager
def _heard(errors: list[UserError], line: Line) -> Iterator[None]:
    """Inside, the mistakes that are reported are noted, and a command that is not `whole` ends with preflight."""
    tell, check, argv, left = meeting.tell, preflight.check, sys.argv, job.seconds_left

    def told(error: UserError) -> bool:
        errors.append(error)
        return tell(error)

    def checked(cfg: DictConfig) -> None:
        check(cfg)
        cfg.check = True

    job.seconds_left = lambda: 60.0  # of budget.until=job_end
    meeting.tell, sys.argv = told, [f"{line.script}.py", *line.words]
    preflight.check = check if line.whole else checked
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        meeting.tell, preflight.check, sys.argv, job.seconds_left = tell, check, argv, left
        for number, handler in handlers.items():
            signal.signal(number, handler)


# What is wrong with how it ends


def complaint(line: Line, told: Told) -> str:
    """What a user would complain of; "" where there is nothing, also where the command was right."""
    many = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(line.words)
    if told.code not in (0, 2, *([1] if many else [])) or "Traceback" in told.err:
        return "traceback"
    if told.code == 0:
        return ""
    lines = [one for one in told.err.splitlines() if "A new study created" not in one]  # Optuna's own
    if not told.errors or not many and sum("error:" in one for one in lines) != 1:
        return "no line"
    if not line.whole and any(not LINE.fullmatch(one) or len(one) > 200 for one in lines):
        return "several lines"
    for error in told.errors:
        if error.key in ("", "config"):
            return "no key"
        if error.fix == f"{error.key}={error.value}" and error.key != "KEY" or error.fix == " ".join(line.words):
            return "the fix is what was typed"
        short = error.fix.replace(f"leave {error.key} out", "leave it out")
        same = error.fix.replace(str(error.value), "...")  # under another key
        if not error.line().endswith((" ".join(error.fix.split()), short, same)) and "|" not in error.fix:
            return "the fix is cut"
    left = (set(os.listdir()) ^ THERE) - {"x"}  # of hydra.run.dir=x
    return f"something is left behind: {', '.join(left)}" if left and not many else ""


def followed(line: Line, error: UserError) -> str:
    """Type what the fixes say, one after the other, until the command passes; gives what is wrong with one of them."""
    seen = set()
    for _ in range(ROUNDS + len(line.words)):
        if (error.key, error.problem, error.fix) in seen:
            return f"the fix does not help: {error.line()}"
        seen.add((error.key, error.problem, error.fix))
        try:
            ways = typed(line, error)
        except (ValueError, KeyError) as wrong:
            return f"the fix cannot be typed: {error.line()} ({wrong})"
        if not ways:
            return ""
        ends = [(way, ended(way)) for way in ways]
        for way, told in ends:
            if wrong := complaint(way, told):
                return f"the fix leads to {wrong}: {error.line()}\n    {way}\n{told.err[-3000:]}"
            if told.errors and unhelpful(line, way, error, told.errors[0]):
                return f"the fix does not help: {error.line()}\n    {way}\n    {told.errors[0].line()}"
        line, told = ends[0]
        if not told.errors:
            return ""
        error = told.errors[0]
    return f"the fixes have no end: {error.line()}"


def unhelpful(line: Line, way: Line, error: UserError, after: UserError) -> bool:
    """Whether what is told after a fix is about the fix: not about a value that was typed before, beside a wrong key,
    nor about one of several that the reader chooses from. Of what lies behind preflight a fix may know a part."""
    before = {value_of(word) for word in line.words}
    new = [word for word in set(way.words) - set(line.words) if f"{word}|" not in error.fix]
    own = {key_of(word) for word in new if value_of(word) not in before}
    return after.key in own and (not line.whole or after.problem == error.problem)


def value_of(word: str) -> str:
    return re.sub(r"[\"'\[\]]", "", word.partition("=")[2])


def typed(line: Line, error: UserError) -> list[Line]:
    """The line with each alternative of a fix in place of the word that was refused; of prose there is none."""
    if found := re.search(r"leave (\S+) out", error.fix):
        gone = {error.key, error.key.lstrip("+~"), found[1]}
        kept = [word for word in line.words if not gone & {word.partition("=")[0], key_of(word).lstrip("+~")}]
        out = [[word for word in kept if not key_of(word).startswith(f"{found[1]}.")]]
    else:
        lacking = {"data.download=true", *(["data.root=FOLDER"] if line.whole else [])}  # here: a network, and files
        commands = [one for one in fixes.commands(error.fix) if not {*one} & lacking]
        out = [fixes.instead(line.words, error.key, command) for command in commands]
    ways = [replace(line, words=tuple(_filled(line, words))) for words in out]
    return [way for way in ways if way.words != line.words]  # what is left is for the reader to fill in


def _filled(line: Line, words: list[str]) -> Iterator[str]:
    """What a fix leaves to the reader, filled in: a finished run, a name, or by what a page ships."""
    for word in words:
        key, _, value = word.partition("=")
        if not fixes.PLACEHOLDER.fullmatch(value):
            yield word
        elif key == "start_from":
            if not line.whole:  # its weights are empty
                yield f"{key}={a_finished_run()}"
        elif key == "mask":
            yield "mask=center"
        elif not key.startswith("hydra"):
            known = known_keys() | chosen(line.script, tuple(words))
            if "???" in str(known.get(key_of(key))):
                yield word


parsed = functools.cache(functools.partial(yaml.load, Loader=get_yaml_loader()))


@contextlib.contextmanager
def in_haste() -> Iterator[None]:
    """Inside, a page is parsed once, and a command is composed once where nothing says that it is a sweep."""
    parse, mode = yaml.load, Hydra.get_mode
    yaml.load = lambda file, Loader: parsed(file.read())
    Hydra.get_mode = lambda self, **asked: mode(self, **asked) if "hydra" in "".join(asked["overrides"]) else None
    try:
        yield
    finally:
        yaml.load, Hydra.get_mode = parse, mode


@contextlib.contextmanager
def somewhere() -> Iterator[None]:
    """Inside, the folder is a new one, which holds what lines name."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("a_file").write_text("x")
        Path("a_folder").mkdir()
        Path("cache").mkdir()
        yield


def judged(line: Line) -> tuple[Told, str]:
    """How a line ends, and what is wrong with that or with what it is offered."""
    told = ended(line)
    return told, complaint(line, told) or next(filter(None, (followed(line, error) for error in told.errors)), "")


def main() -> int:
    """Draw, type, follow, print; 1 where there is a complaint."""
    n, seed, *rest = sys.argv[1:]
    drawer, ends, complaints = Drawer(int(seed), Path(rest[0]).resolve() if rest else None), Counter(), Counter()
    with somewhere(), in_haste():
        os.environ |= {"HOME": os.getcwd(), "ATELIER_CACHE": f"{os.getcwd()}/cache", "COLUMNS": "120"}
        for k in range(int(n)):
            if k % 100 == 0:
                print(f"{k} of {n}", file=sys.stderr, flush=True)
            line = drawer.line()
            told, wrong = judged(line)
            ends["complained of" if wrong else "refused" if told.errors else "passed"] += 1
            if wrong:
                complaints[wrong.partition(":")[0]] += 1
                print(f"{line}\n  {wrong}\n  {told.err[-3000:]}", flush=True)
    print("\n".join(f"{count:6} {name}" for name, count in (*ends.items(), *complaints.items())))
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
