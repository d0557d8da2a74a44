"""Images of a trained run: python sample.py run=last n=64 sampler=ddim sampler.steps=20 guidance=3 label=5."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()
    usage.say_loading()
usage.listed_values("label", "attributes", "adapters", "adapter_weights")

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import build, folders, like, preflight  # noqa: E402


def sample(cfg: DictConfig) -> None:
    """Load a run, make what was asked for, write it with the request beside it."""
    import sys
    from pathlib import Path

    from atelier.core.errors import UserError
    from atelier.requests.folder import Folder
    from atelier.runs import asking

    cfg = like.request(cfg)
    preflight.check(cfg)
    run = asking.ReadyRun(build.plain(cfg))
    path = Path(cfg.out or folders.unused(run.loaded.pictures, folders.time_stamp()))
    asked = run.asked(cfg, path)
    out = Folder(path, asked.words)
    for made in asked.pictures():
        out.add(made)
    unread, n = len(asked.request.unread), len(asked.sources)
    if n and unread == n:
        raise UserError("source", cfg.source, "none of its files can be read", "source=OTHER_FILES")
    out.finish()
    if unread:
        print(f"{unread} of {n} files could not be read", file=sys.stderr, flush=True)
        sys.exit(1)


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    jobs.command(sample, cfg)


if __name__ == "__main__":
    messages.run(main)
