"""A page about runs, side by side: python report.py RUN... [out=FOLDER].

RUN is a run folder, `last`, or a folder of runs as a sweep leaves; without one, the newest run of each family under
outputs/. FOLDER, outputs/report unless it is named, gets report.html, which opens from disk, and report.md.
What takes long, asking each model once, is kept beside the run.
"""

import sys
from pathlib import Path

from atelier.cli.usage import say_loading
from atelier.core import stopping

OUT, TITLE = "outputs/report", "What the families do"
INTRODUCTION = (
    "Figures are those of each run's last evaluation (summary.json), under the protocol at the end of the page; "
    "structure, parameters, and work and time for an image are of the built models."
)


def report(words: list[str]) -> Path:
    """Write the report that these words ask for; gives its page.

    Raises:
        UserError: a word is no run, or the folder cannot be written.
    """
    from atelier.core.errors import UserError
    from atelier.core.lines import say
    from atelier.reporting import chosen, contents, facts, writing
    from atelier.runs import folders

    folders.register()
    keys = dict(word.split("=", 1) for word in words if "=" in word and not Path(word).exists())
    for key, value in keys.items():
        if key != "out":
            raise UserError(key, value, "report.py has no such key", "out=FOLDER, and run folders by their paths")
    runs = chosen.runs([word for word in words if word.partition("=")[0] not in keys])
    found = facts.told(runs, lambda line: say(line, error=True))
    page = Path(keys.get("out", OUT)) / "report.html"
    document = page.with_suffix(".md")
    writing.write(page, document, found, TITLE, contents.Around([INTRODUCTION], []))
    print(page, document, sep="\n", flush=True)
    return page


def main() -> None:
    from atelier.cli.messages import one_line

    with stopping.piped(), one_line():
        report(sys.argv[1:])


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit()
    stopping.listen()
    say_loading()
    main()
