"""Prompts from a file: which lines are prompts, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.core.errors import UserError
from atelier.requests import prompts


def written(folder: Path, content: bytes) -> str:
    (folder / "prompts.txt").write_bytes(content)
    return str(folder / "prompts.txt")


@pytest.mark.parametrize("content", [
    b"a red star\n\na cross\ton  grey\n", b"\xef\xbb\xbfa red star\r\n \t\r\na cross\ton  grey",
    b" a red star\ra cross\ton  grey\r",
])  # fmt: skip
def test_a_prompt_is_a_line(tmp_path, content):
    assert prompts.read(written(tmp_path, content)) == ["a red star", "a cross\ton  grey"]


def test_a_prompt_may_be_any_text_and_come_twice(tmp_path):
    lines = ["\u00e9toile \U0001f31f", "a\u2028b", "a\u2028b"]  # a line separator ends no line
    assert prompts.read(written(tmp_path, "\n".join(lines).encode())) == lines


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "there is no prompt in it"), (b"\xef\xbb\xbf \r\n\n", "there is no prompt in it"),
    (b"one\n\xe9toile\n", "line 2: it is no UTF-8, byte 0xe9"), (b"\xff\xfea\0", "line 1: it is no UTF-8, byte 0xff"),
    (b"a\0b", "a NUL byte is in it"),
])  # fmt: skip
def test_what_holds_no_prompts_is_refused_in_one_line(tmp_path, content, problem):
    with pytest.raises(UserError) as error:
        prompts.read(written(tmp_path, content))
    assert (error.value.key, error.value.problem) == ("prompts", problem)
    assert error.value.line().startswith("error: prompts=") and "\n" not in error.value.line()


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    for name, problem in (("none.txt", "No such file or directory"), ("", "Is a directory")):
        with pytest.raises(UserError) as error:
            prompts.read(str(tmp_path / name))
        assert error.value.problem == problem
