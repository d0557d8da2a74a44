"""Command lines that are wrong somewhere, drawn at random from the pages of conf/ (tests/fuzz_lines.py types them)."""

from __future__ import annotations

import functools
import random
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atelier.core.words import typed_value
from atelier.runs.pages import CONF, chosen, members, places
from tests.compose import a_finished_run
from tests.tiny import task, tiny

VALUES = """
abc 0 1 -1 3.5 1e-3 1e400 nan inf -inf 1000000000000 99999999999999999999999 true false null None yes ??? 007 1_000
0x10 1e5 .5 5. +1 - -- 1,000 0.0 16 [] [1,2] [a] [[1]] [1,[2]] [null] [label] [64] {} {a:1} {1:2} {run:auto}
{_target_:os.system} größe 日本 'a b' "x" a=b = ${seed} ${nope} ${oc.env:NOPE} ${data} ${model.net} ${.seed} ${x:1}
${data.image_size ${seed}x $ a,b 1,2 0,-1 (1) [1, {a ] } ' " it's x\\ ~/x ../x /dev/null nothing/here a_file a_folder
choice(1,2) range(1,3) interval(0,1) glob(*) sweep 2026_11_28 a:b @ # % & ; * ! last auto none cuda label adam
hinge linear vq lpips
""".split()
VALUES += ["", " ", "a b", " 1", "1 ", "a\tb", "a\nb", "x" * 300, "[1, 2]", "{a: 1}", "${seed} 1", "\u202e"]
SINGLE = """
vae seed --seed -x -seed=3 = =3 --cfg --cfg=jo model seed:3 -- - --resolve hydra.run.dir=x hydra/launcher=nope
hydra.job.chdir=true hydra.mode=MULTIRUN run_dir=a_file run_dir=a_file/x run_dir=/proc/x run_dir=last check=maybe
model@data=vae -c job
--config-name=nope --config-dir=nope --config-path=nope --info --info=nope --package=x --run --experimental-rerun=x -h
""".split()
SINGLE += ["seed = 3", ""]


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
AT_ROOT = ("trainer", "logger", "callbacks", "metrics", "lora", "debug")


@dataclass(frozen=True)
class Line:
    """A command; `whole`: it goes on behind preflight, in a process of its own."""

    script: str
    words: tuple[str, ...]
    whole: bool = False

    def __str__(self) -> str:
        return f"python {self.script}.py {shlex.join(self.words)}"


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
        model = self.rng.choice(members("model"))
        if draw() < 0.25:
            model = "flow_tiny"
            experiment = self.rng.choice(members("experiment"))
            words = [f"experiment={experiment}"]
            words += [f"start_from={a_finished_run()}"] if "lora" in experiment else []
        else:
            model = model if draw() < 0.8 else "flow_tiny"
            words += [f"model={model}"] if model != "flow_tiny" else []
            words += task(CONF / "model" / f"{model}.yaml")[:1]
            words += [f"data={self.rng.choice(members('data'))}"] if draw() < 0.4 else []
            words += ["model.net.run=FOLDER"] if model.startswith(("stable", "sdxl")) else []
        for _ in range(self.rng.choice((0, 0, 1, 2))):
            words.append(self.swap(model))
        if draw() < 0.15:
            group = self.rng.choice(AT_ROOT)
            words.append(f"{group}={self.rng.choice(members(group))}")
        return Line("train", tuple(words))

    def swap(self, model: str) -> str:
        """Another page of a group at its place, now and then at another's."""
        own = [(group, place) for group, place, page in places() if page == model]
        group, place = self.rng.choice(own or [("perceptual", "metrics.lpips")])
        if self.rng.random() < 0.15:
            group, place, _ = self.rng.choice(places())
        group = self.rng.choice(GROUPS) if self.rng.random() < 0.1 else group
        return f"{group}@{place}={self.rng.choice(members(group))}"

    def whole(self) -> Line:
        """A tiny run up to its fit, now and then on files that are not there."""
        words = tiny(self.family(), self.runs)
        if self.rng.random() < 0.25:
            words = [word for word in words if not word.startswith(("data=", "data.n_", "data.task="))]
            page, root = (
                self.rng.choice(members("data")),
                self.rng.choice(("a_file", "a_folder", "nothing", "a_file/x")),
            )
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
            words += [f"{group}={self.rng.choice(members(group))}"] if self.rng.random() < 0.4 else []
        return Line(script, tuple(words), whole=True)

    def fault(self, words: list[str], line: Line) -> list[str]:
        """The words with one more of them wrong."""
        pick, leaves = self.rng.choice, keys(line.script, tuple(words))
        key, other = pick(sorted(leaves)), pick(sorted(leaves))
        value, shipped, above = self.value(leaves[key]), typed_value(leaves[key]), self.section(key)
        kind, wrong = self.rng.randrange(20), f"{key}={value}"
        if kind == 0 and words:
            k = self.rng.randrange(len(words))
            name, sign, page = words[k].partition("=")
            return [*words[:k], name + sign + self.misspelt(page), *words[k + 1 :]]
        if kind == 1 and line.script == "train" and not line.whole:
            return [*words, *pick((["-m"], ["-m"], [])), pick((f"{key}={value},{shipped}", "model=vae,gan"))]
        added = [
            *[wrong] * 7,
            f"{self.misspelt(key)}={pick((value, shipped))}",
            f"{self.misspelt(key)}={shipped}",
            pick(("+", "++", "~")) + pick((key, f"{key}x", wrong)),
            pick(words or [wrong]),
            pick(SINGLE),
            f"{above}={value}",
            f"{key}.{pick(('x', '0', '_target_', 'lr'))}={value}",
            f"{above}.{pick(('_target_', '_partial_', '_args_'))}={value}",
            f"{pick(GROUPS)}={pick((value, 'none', 'csv', 'vae'))}",
            f"{key}=${{{pick((key, above, other))}}}",
            f"{pick(GROUPS)}@{above}={pick((value, 'linear', 'vq'))}",
        ]
        return [*words, pick(added)]

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
    """The leaves of the pages that the words choose."""
    found = chosen(script, tuple(word for word in words if re.fullmatch(r"[\w@.]+=\w+", word)))
    return {key: value for key, value in found.items() if not isinstance(value, dict) and "_target_" not in key}
