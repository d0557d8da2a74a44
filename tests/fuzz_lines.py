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
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from lightning import Trainer
from omegaconf import DictConfig
from omegaconf._utils import get_yaml_loader

from atelier.core import job
from atelier.core.errors import UserError
from atelier.core.words import typed_value
from atelier.runs import folders, meeting, preflight, pretrained
from atelier.runs.pages import CONF, chosen, key_of, known_keys, places
from tests import (
    fixes,
    warm,  # noqa: F401  (or each child would import as much)
)
from tests.compose import a_finished_run
from tests.programs import ROOT, forked
from tests.tiny import task, tiny

LINE = re.compile(r"error: (\S+?)=(.*?): .+\. Fix: .+")
VALUES = """
abc 0 1 -1 3.5 1e-3 1e400 nan inf -inf 1000000000000 99999999999999999999999 true false null None yes ??? 007 1_000
0x10 1e5 .5 5. +1 - -- 1,000 0.0 16 [] [1,2] [a] [[1]] [1,[2]] [null] [label] [64] {} {a:1} {1:2} {run:auto}
{_target_:os.system} größe 日本 'a b' "x" a=b = ${seed} ${nope} ${oc.env:NOPE} ${data} ${model.net} ${.seed} ${x:1}
${data.image_size ${seed}x $ a,b 1,2 0,-1 (1) [1, {a ] } ' " it's x\\ ~/x ../x /dev/null nothing/here a_file a_folder
choice(1,2) range(1,3) interval(0,1) glob(*) sweep 2026_11_28 a:b @ # % & ; * ! last auto none cuda label adam
hinge linear vq lpips
""".split()
VALUES += ["", " ", "a b", " 1", "1 ", "a\tb", "a\nb", "x" * 300, "[1, 2]", "{a: 1}", "${seed} 1", "\u202e", "\x00"]
SINGLE = """
vae seed --seed -x -seed=3 = =3 --cfg --cfg=jo model seed:3 -- - --resolve hydra.run.dir=x hydra/launcher=nope
hydra.job.chdir=true hydra.mode=MULTIRUN run_dir=a_file run_dir=a_file/x run_dir=/proc/x run_dir=last check=maybe
model@data=vae -c job
--config-name=nope --config-dir=nope --config-path=nope --info --info=nope --package=x --run --experimental-rerun=x -h
""".split()
SINGLE += ["seed = 3", ""]
THERE = {"a_file", "a_folder", "cache"}  # in the folder that commands are typed in
ROUNDS = 12  # of fixes, one upon the other
SECONDS = 30
MEMORY = 4 * 2**30  # bytes that a child may take beside what it was forked with


@dataclass(frozen=True)
class Line:
    """A command; `whole`: it goes on behind preflight, in a process of its own."""

    script: str
    words: tuple[str, ...]
    whole: bool = False

    def __str__(self) -> str:
        return f"python {self.script}.py {shlex.join(self.words)}"


@dataclass
class Told:
    """How a command ended: its exit code, what it printed as an error, the mistakes that it reported."""

    code: int
    err: str
    errors: list[UserError]


# What is typed


def pages(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
AT_ROOT = ("trainer", "logger", "callbacks", "metrics", "lora", "debug")


class Drawer:
    """Draws lines; `runs` holds finished tiny runs, None: train.py alone."""

    def __init__(self, seed: int, runs: Path | None) -> None:
        self.rng, self.runs = random.Random(seed), runs

    def line(self) -> Line:
        kind = self.rng.random() if self.runs else 1
        line = self.request() if kind < 0.2 else self.whole() if kind < 0.3 else self.config()
        words, n = list(line.words), self.rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3))
        for _ in range(n):
            words = self.fault(words, line)
        return replace(line, words=tuple(words))

    def config(self) -> Line:
        """A command of train.py on any pages, which goes as far as preflight."""
        draw, words = self.rng.random, []
        model = self.rng.choice(pages("model"))
        if draw() < 0.25:
            model = "flow_tiny"
            experiment = self.rng.choice(pages("experiment"))
            words = [f"experiment={experiment}"]
            words += [f"start_from={a_finished_run()}"] if "lora" in experiment else []
        else:
            model = model if draw() < 0.8 else "flow_tiny"
            words += [f"model={model}"] if model != "flow_tiny" else []
            words += task(CONF / "model" / f"{model}.yaml")[:1]
            words += [f"data={self.rng.choice(pages('data'))}"] if draw() < 0.4 else []
            words += ["model.net.run=FOLDER"] if model.startswith(("stable", "sdxl")) else []
        for _ in range(self.rng.choice((0, 0, 1, 2))):
            words.append(self.swap(model))
        if draw() < 0.15:
            group = self.rng.choice(AT_ROOT)
            words.append(f"{group}={self.rng.choice(pages(group))}")
        return Line("train", tuple(words))

    def swap(self, model: str) -> str:
        """Another page of a group at its place, now and then at another's."""
        own = [(group, place) for group, place, page in places() if page == model]
        group, place = self.rng.choice(own or [("perceptual", "metrics.lpips")])
        if self.rng.random() < 0.15:
            group, place, _ = self.rng.choice(places())
        group = self.rng.choice(GROUPS) if self.rng.random() < 0.1 else group
        return f"{group}@{place}={self.rng.choice(pages(group))}"

    def whole(self) -> Line:
        """A tiny run up to its fit, now and then on files that are not there."""
        words = tiny(self.family(), self.runs)
        if self.rng.random() < 0.25:
            words = [word for word in words if not word.startswith(("data=", "data.n_", "data.task="))]
            page, root = self.rng.choice(pages("data")), self.rng.choice(("a_file", "a_folder", "nothing", "a_file/x"))
            words += [f"data={page}", *([f"data.root={root}"] if page != "shapes" else [])]
        return Line("train", tuple(words), whole=True)

    def family(self) -> str:
        """One that has a finished tiny run."""
        return self.rng.choice(sorted(path.parent.name for path in self.runs.glob("*/weights.safetensors")))

    def request(self) -> Line:
        script, family = self.rng.choice(("sample", "sample", "evaluate", "export")), self.family()
        words = [f"run={self.runs / family}"]
        if script != "export":
            words += ["n=2"] if script == "sample" else ["eval.n_samples=4", "eval.n_real=4", "metrics=none"]
            group = self.rng.choice(("sampler", "guider"))
            words += [f"{group}={self.rng.choice(pages(group))}"] if self.rng.random() < 0.4 else []
        return Line(script, tuple(words), whole=True)

    def fault(self, words: list[str], line: Line) -> list[str]:
        leaves = keys(line.script, tuple(words))
        key = self.rng.choice(sorted(leaves))
        value, shipped = self.value(leaves[key]), typed_value(leaves[key])
        match self.rng.randrange(20):
            case 0 | 1:
                return [*words, f"{self.misspelt(key)}={self.rng.choice((value, shipped, shipped))}"]
            case 2 if words:
                k = self.rng.randrange(len(words))
                name, sign, page = words[k].partition("=")
                return [*words[:k], name + sign + self.misspelt(page), *words[k + 1 :]]
            case 3:
                return [*words, self.rng.choice(("+", "++", "~")) + self.rng.choice((key, f"{key}x", f"{key}={value}"))]
            case 4 if words:
                return [*words, self.rng.choice(words)]
            case 5 if line.script == "train" and not line.whole:
                many = [f"{key}={value},{shipped}"] if self.rng.random() < 0.7 else ["model=vae,gan"]
                return [*words, *self.rng.choice((["-m"], ["-m"], [])), *many]
            case 6:
                return [*words, self.rng.choice(SINGLE)]
            case 7:
                return [*words, f"{self.section(key)}={value}"]
            case 8:
                return [*words, f"{key}.{self.rng.choice(('x', '0', '_target_', 'lr'))}={value}"]
            case 9:
                return [*words, f"{self.section(key)}.{self.rng.choice(('_target_', '_partial_', '_args_'))}={value}"]
            case 10 if line.script == "train":
                return [
                    *words,
                    f"{self.rng.choice(GROUPS)}@{self.section(key)}={self.rng.choice((value, 'linear', 'vq'))}",
                ]
            case 11:
                return [*words, f"{self.rng.choice(GROUPS)}={self.rng.choice((value, 'none', 'csv', 'vae'))}"]
            case 12:
                return [
                    *words,
                    f"{key}=${{{self.rng.choice((key, self.section(key), self.rng.choice(sorted(leaves))))}}}",
                ]
        return [*words, f"{key}={value}"]

    def value(self, shipped: Any) -> str:
        if isinstance(shipped, (int, float)) and self.rng.random() < 0.3:
            return self.rng.choice((str(-shipped), f"{shipped}.5", f"[{shipped}]", f"{shipped}0000000", f"'{shipped}'"))
        return self.rng.choice(VALUES)

    def misspelt(self, text: str) -> str:
        """One letter dropped, doubled, changed or exchanged with its neighbour."""
        if not text:
            return "x"
        k = self.rng.randrange(len(text))
        ends = (text[k + 1 :], text[k] + text[k:], self.rng.choice("aexz_.=") + text[k + 1 :])
        return text[:k] + self.rng.choice((*ends, text[k + 1 : k + 2] + text[k] + text[k + 2 :]))

    def section(self, key: str) -> str:
        parts = key.split(".")
        return ".".join(parts[: self.rng.randrange(1, len(parts))]) if len(parts) > 1 else key


@functools.cache
def keys(script: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The leaves of the pages that the words choose; those of all pages where they choose none that fit."""
    found = chosen(script, tuple(word for word in words if re.fullmatch(r"[\w@.]+=\w+", word))) or known_keys(script)
    return {key: value for key, value in found.items() if not isinstance(value, dict) and "_target_" not in key}


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
    many = {"-m", "--multirun"} & set(line.words)
    if told.code not in (0, 2, *([1] if many else [])) or "Traceback" in told.err:
        return "traceback"
    if told.code == 0:
        return ""
    lines = told.err.splitlines()
    if not told.errors or not many and sum("error:" in one for one in lines) != 1:
        return "no line"
    if not line.whole and any(not LINE.fullmatch(one) or len(one) > 200 for one in lines):
        return "several lines"
    for error in told.errors:
        if error.key in ("", "config"):
            return "no key"
        if error.fix == f"{error.key}={error.value}" and error.key != "KEY" or error.fix == " ".join(line.words):
            return "the fix is what was typed"
    left = (set(os.listdir()) ^ THERE) - {"x"}  # of hydra.run.dir=x
    return f"something is left behind: {', '.join(left)}" if left and not many else ""


def followed(line: Line, error: UserError) -> str:
    """Type what the fixes say, one after the other, until the command passes; gives what is wrong with one of them."""
    seen = set()
    for _ in range(ROUNDS):
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
    return [replace(line, words=tuple(_filled(line.script, words))) for words in out if tuple(words) != line.words]


def _filled(script: str, words: list[str]) -> Iterator[str]:
    """What a fix leaves to the reader, filled in: a finished run, a name, or by what a page ships."""
    for word in words:
        key, _, value = word.partition("=")
        if not fixes.PLACEHOLDER.fullmatch(value):
            yield word
        elif key == "start_from":
            yield f"{key}={a_finished_run()}"
        elif key == "mask":
            yield "mask=center"
        elif not key.startswith("hydra") and "???" in str((known_keys() | chosen(script, tuple(words)))[key_of(key)]):
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
        for _ in range(int(n)):
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
