"""Captions of image files, in one of three layouts, as UTF-8 (a byte order mark and any line ends are passed over).

captions.tsv     a line is FILE<tab>CAPTION; or its first line names the columns, `file` and `caption` among them;
                 there may be further columns, as many in each line as in the first
metadata.jsonl   a line is {"file_name": FILE, "text": CAPTION}, as Hugging Face's imagefolder has it
FILE.txt         beside each image, its suffix put in place of the image's; a line is a caption

FILE is a path from the folder that the table lies in. A file of several lines has several captions, an empty line none.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from atelier.core.errors import UserError
from atelier.data.finding import CAPTIONS, is_image, printable, visible_files

TSV, JSONL, TXT = CAPTIONS, "metadata.jsonl", ".txt files beside the images"
MOST_CHARACTERS = 10_000  # of a caption; a longer one is another file by mistake


class Captions(NamedTuple):
    """What is said of the images under a root.

    `texts` has the captions of each image, by its path, in the order of their lines; `files` are those that they were
    read from, `nameless` the paths that have a caption and are no file.
    """

    texts: dict[str, list[str]]
    files: set[str]
    nameless: list[str]


def captions_under(root: str) -> Captions:
    """The captions of all images under a folder.

    Raises:
        UserError: there are none, they are in two layouts at once, or a line cannot be read.
    """
    there = visible_files(Path(root))
    beside = {os.path.splitext(name)[0] for name in there if is_image(name)}
    layouts = {
        TSV: [name for name in there if os.path.basename(name) == TSV],
        JSONL: [name for name in there if os.path.basename(name) == JSONL],
        TXT: [name for name in there if os.path.splitext(name)[1].lower() == ".txt" and name[:-4] in beside],
    }
    found = {layout: files for layout, files in layouts.items() if files}
    if not found:
        problem = f"no captions: no {TSV}, no {JSONL}, no {TXT}"
        raise UserError("data.root", printable(root), problem, f"lines FILE<tab>CAPTION in {TSV}, or data.text=TEXT")
    if len(found) > 1:
        problem = f"captions in {' and in '.join(found)}"
        raise UserError("data.root", printable(root), problem, "leave one of them, move the others away")
    (layout, files), texts = next(iter(found.items())), {}
    for name, text in _beside(root, there, files) if layout == TXT else _tables(root, files):
        texts.setdefault(name, []).append(text)
    known = set(there)
    said = {name: [text for text in some if text] for name, some in texts.items() if name in known}
    nameless = [name for name in texts if name not in known]
    return Captions({name: some for name, some in said.items() if some}, set(files), nameless)


Line = tuple[int, bytes]  # its number, and what it says


def _beside(root: str, there: list[str], files: list[str]) -> Iterator[tuple[str, str]]:
    """Paths of images, and a caption of each, of text files beside them."""
    images: dict[str, list[str]] = {}
    for name in there:
        if is_image(name):
            images.setdefault(os.path.splitext(name)[0], []).append(name)
    for file in files:
        path = os.path.join(root, file)
        captions = [_caption(path, number, _utf8(path, number, line)) for number, line in _lines(path)]
        yield from ((name, text) for name in images[os.path.splitext(file)[0]] for text in captions)


def _tables(root: str, files: list[str]) -> Iterator[tuple[str, str]]:
    """Paths from `root`, and a caption of each, of tables."""
    for table in files:
        path = os.path.join(root, table)
        for name, text in (_tsv if os.path.basename(table) == TSV else _jsonl)(path, _lines(path)):
            yield os.path.normpath(os.path.join(os.path.dirname(table), name)), text


def _tsv(path: str, lines: Iterator[Line]) -> Iterator[tuple[str, str]]:
    """FILE may be any bytes that the name of a file may be."""
    file, caption, width = 0, 1, 0
    for number, line in lines:
        columns = line.split(b"\t")
        first, width = width == 0, width or len(columns)
        if first and {b"file", b"caption"} <= set(columns):
            file, caption = columns.index(b"file"), columns.index(b"caption")
        elif len(columns) <= max(file, caption):
            raise _bad(path, number, "no tab between a file and its caption")
        elif len(columns) > width:  # else a caption with a tab in it would lose its end
            raise _bad(path, number, f"{len(columns)} columns, the first line has {width}")
        else:
            yield os.fsdecode(columns[file]), _caption(path, number, _utf8(path, number, columns[caption]))


def _jsonl(path: str, lines: Iterator[Line]) -> Iterator[tuple[str, str]]:
    for number, line in lines:
        try:
            said = json.loads(_utf8(path, number, line))
        except (ValueError, RecursionError):  # brackets within brackets, without end
            raise _bad(path, number, "it is no JSON") from None
        name, text = (said.get(key) if isinstance(said, dict) else None for key in ("file_name", "text"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise _bad(path, number, 'no {"file_name": FILE, "text": CAPTION}')
        yield name, _caption(path, number, text)


def _lines(path: str) -> Iterator[Line]:
    """The lines of a text file that are not empty, with their numbers from 1."""
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError("data.root", printable(path), str(error.strerror), f"chmod u+r {printable(path)}") from error
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _utf8(path: str, number: int, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _bad(path, number, f"it is no UTF-8, byte {text[error.start]:#x}") from None


def _caption(path: str, number: int, text: str) -> str:
    """The text without spaces around it. Raises UserError where it can be no caption."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _bad(path, number, "a character that is in no text")
    if len(text) > MOST_CHARACTERS:
        raise _bad(path, number, f"a caption of {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    return text.strip()


def _bad(path: str, number: int, problem: str) -> UserError:
    return UserError("data.root", printable(path), f"line {number}: {problem}", "mend the line, or remove it")
