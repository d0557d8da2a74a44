"""The flags of Hydra among the words of a command: -m, --cfg job and their like, which may stand anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from atelier.core.errors import UserError

ALONE = ("run", "multirun", "cfg", "info", "shell_completion")  # of which a command takes one
HELP = "python train.py --hydra-help"


def is_unknown_flag(word: str) -> bool:
    """Whether a word before its `=` begins with a dash and is no flag, nor the beginning of a long one."""
    from hydra._internal.utils import get_args_parser

    flags = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    known = any(flag == word or word.startswith("--") and flag.startswith(word) for flag in flags)
    return word.startswith("-") and len(word) > 1 and not known


def flags_last(words: list[str]) -> list[str]:
    """The words with flags behind all others: Hydra's parser takes no word behind a flag that stands behind another.

    Raises:
        UserError: a flag lacks its value, has a wrong one, or does not go with another.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        flag, _, problem = message.partition(": ")
        raise UserError(flag.removeprefix("argument ").partition("/")[0], "", problem or message, HELP)

    parser = get_args_parser()
    parser.error = refuse
    taken = parser.parse_intermixed_args(words)
    if sum(bool(getattr(taken, name)) for name in ALONE) > 1:
        refuse("--multirun: of --run, --multirun, --cfg, --info and --shell-completion one can be given")
    for name in ("config_path", "config_name", "experimental_rerun"):
        if value := getattr(taken, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, value, "a script has its own page in conf/", f"leave {flag} out")
    if taken.config_dir is not None and not Path(taken.config_dir).is_dir():
        raise UserError("--config-dir", taken.config_dir, "there is no such folder", "--config-dir=FOLDER of pages")
    if taken.resolve and not taken.cfg:
        refuse("--resolve: it goes with --cfg job")
    flags = [one for one in words if one not in taken.overrides and one not in ("-m", "--multirun", "--")]
    return [*taken.overrides, *flags, *(["--multirun"] if taken.multirun else [])]
