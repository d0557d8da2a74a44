"""A report of runs, written: a page, its Markdown twin and the pictures of that."""

from __future__ import annotations

from pathlib import Path

from atelier.core.errors import UserError
from atelier.reporting import contents, markdown, page
from atelier.reporting.facts import Told


def write(out: Path, found: list[Told], title: str, introduction: list[str], name: str, ledger: str = "") -> None:
    """Write `name`.html, `name`.md and its pictures into a folder, which is made if need be.

    Args:
        out: folder.
        found: runs.
        title: heading.
        introduction: paragraphs that stand first.
        name: name of the two files.
        ledger: as in `markdown.text`.

    Raises:
        UserError: it cannot be written.
    """
    drawn = {name: contents.drawn(name, runs) for name, runs in contents.sets(found).items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.html").write_text(page.html(title, introduction, found, drawn))
        (out / f"{name}.md").write_text(markdown.text(title, introduction, found, drawn, ledger))
        markdown.write_pictures(out, found, drawn)
    except OSError as error:
        raise UserError("out", out, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error
