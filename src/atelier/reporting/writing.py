"""A report of runs, written: a page, and its Markdown twin with pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atelier.core.errors import UserError
from atelier.reporting import contents, markdown, page
from atelier.reporting.contents import Around
from atelier.reporting.facts import Told


def write(path: Path, document: Path, found: list[Told], title: str, around: Around, ledger: str = "") -> None:
    """Write the HTML file, and the Markdown with its pictures in the folder of the same name beside it.

    Args:
        path: HTML file, in a folder that is made if need be.
        document: Markdown file likewise.
        found: runs.
        title: heading.
        around: paragraphs that stand first, and those that stand last.
        ledger: file of results/ that the tables of the Markdown name, as in `markdown.text`.

    Raises:
        UserError: one of them cannot be written.
    """
    drawn = {name: contents.drawn(name, runs) for name, runs in contents.sets(found).items()}
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.html(title, around, found, drawn))
    pictures = document.with_suffix("")
    with _told(document):
        pictures.mkdir(parents=True, exist_ok=True)
        document.write_text(markdown.text(title, around, found, drawn, pictures.name, ledger))
        markdown.write_pictures(pictures, found, drawn)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError("out", path, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error
