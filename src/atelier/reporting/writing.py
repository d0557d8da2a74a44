"""A report of runs, written: a page, and its Markdown twin with pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atelier.core.errors import UserError
from atelier.reporting import contents, markdown, page
from atelier.reporting.contents import Plot
from atelier.reporting.facts import Told


def plots(found: list[Told]) -> dict[str, list[Plot]]:
    """The plots of each set."""
    return {name: contents.drawn(name, runs) for name, runs in contents.sets(found).items()}


def write_page(path: Path, found: list[Told], title: str, introduction: list[str]) -> None:
    """Write the HTML file.

    Args:
        path: file, in a folder that is made if need be.
        found: runs.
        title: heading.
        introduction: paragraphs that stand first.

    Raises:
        UserError: it cannot be written.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.html(title, introduction, found, plots(found)))


def write_markdown(path: Path, found: list[Told], title: str, introduction: list[str], ledger: str = "") -> None:
    """Write the Markdown file, and its pictures into the folder of the same name beside it.

    Args:
        path: file, as in `write_page`, with the same runs, title and introduction.
        found: runs.
        title: heading.
        introduction: paragraphs that stand first.
        ledger: file of results/ that its tables name, as in `markdown.text`.

    Raises:
        UserError: it cannot be written.
    """
    drawn, pictures = plots(found), path.with_suffix("")
    with _told(path):
        pictures.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown.text(title, introduction, found, drawn, pictures.name, ledger))
        markdown.write_pictures(pictures, found, drawn)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError("out", path, f"it cannot be written ({error.strerror})", "out=A_FOLDER_OF_YOURS") from error
