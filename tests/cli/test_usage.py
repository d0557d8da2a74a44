"""What `--help` says, of the whole and of a group."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atelier.cli import usage
from atelier.runs.pages import CONF, members, offered

SCRIPTS = ("train", "sample", "evaluate", "export", "demo")


@pytest.fixture(autouse=True)
def a_terminal_of_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen_and_names_every_page(script: str) -> None:
    lines = usage.help_lines(script, ["--help"])
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    text = "\n".join(lines).rpartition("groups and their pages")[2]
    for group in offered(script):
        told = text[re.search(rf"\b{group}[@=:]", text).start() :].split("\n\n")[0]
        for page in members(group):
            images, sign, recipe = page.partition("_")
            rows = rf"experiment={images}{sign}[^=]*?[ \n]{recipe}\b" if group == "experiment" else rf"[ \n]{page}\b"
            assert re.search(rows, told), (group, page)


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = usage.help_lines("train", ["--help", "model", "data", "keys"])
    assert max(len(line) for line in lines if "$" not in line) <= 80  # a key and its value are never cut


@pytest.mark.parametrize("group", ["model", "data"])
def test_a_group_says_what_each_page_is_and_needs(group: str) -> None:
    told = "\n".join(usage.help_lines("train", ["--help", group]))
    assert told.startswith(f"{group}=\n")
    for page in (CONF / group).glob("*.yaml"):
        text = page.read_text()
        first = " ".join(text.splitlines()[0].lstrip("# ").split()[:5])
        assert f"\n  {page.stem:<26}{first}" in told, page
        stands = ("root", "first_stage", "  - /first_stage@first_stage")
        needs = any(f"\n{key}:" in text for key in stands) or re.search("\n  - (ldm|stable_diffusion|sdxl)\n", text)
        assert bool(needs) == ("\n# Needs: " in text), page
    if group == "data":
        assert "[needs: its files, 170 MB (data.download=true fetches them)]" in " ".join(told.split())


def test_a_part_of_a_page_is_shown_as_it_is_typed() -> None:
    assert usage.help_lines("train", ["--help", "quantizer"])[0] == "quantizer@model.net.quantizer="
    first = usage.help_lines("sample", ["sampler=ddim", "--help", "n=4"])[0]
    assert first == "sampler="
    assert usage.help_lines("train", ["--help", "n=4", "seed=1"])[0].startswith("usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_keys_of_a_command_are_listed(script: str) -> None:
    told = "\n".join(usage.keys(script))
    page = OmegaConf.to_container(OmegaConf.load(CONF / f"{script}.yaml"))
    for key in [key for key in page if key not in ("defaults", "hydra", "choices", "evaluator")]:
        section = page[key] if isinstance(page[key], dict) else {}
        assert f"  {key}:" in told and all(f"    {inner}:" in told for inner in section), key


@pytest.mark.parametrize(
    ("script", "word", "fix"),
    [
        ("train", "modle", "python train.py --help model"),
        ("train", "ddpm", "python train.py --help model"),
        ("sample", "samplers", "python sample.py --help sampler"),
        ("export", "zebra", "python export.py --help"),
    ],
)
def test_an_unknown_group_is_one_line(
    script: str, word: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path("any", f"{script}.py")), "--help", word])
    with pytest.raises(SystemExit) as leaving:
        usage.answer_help()
    told = capsys.readouterr()
    assert (leaving.value.code, told.out) == (2, "")
    assert told.err == f"error: --help={word}: it is the name of no group of pages. Fix: {fix}\n"


@pytest.mark.parametrize(("terminal", "rank", "said"), [(True, "0", "loading...\n"), (False, "0", ""), (True, "1", "")])
def test_loading_is_said_at_once_and_to_a_terminal_alone(
    terminal: bool, rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    usage.say_loading()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", said)
