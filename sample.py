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
from atelier.runs import adapted, build, folders, like, preflight  # noqa: E402


def sample(cfg: DictConfig) -> None:
    """Load a run, make what was asked for, write it with the request beside it."""
    import sys
    from pathlib import Path

    from atelier.core.errors import UserError
    from atelier.models.base import sampling_mode
    from atelier.requests import files
    from atelier.requests.folder import Folder
    from atelier.requests.request import Request, named, verb, verbs
    from atelier.runs.trainer import autocast, device

    cfg = like.request(cfg)
    preflight.check(cfg)
    words = build.plain(cfg)
    run = folders.load_generator(folders.find(words["run"]), words["ema"], words["root"])
    adapted.put_on(run.model, words["adapters"], words["adapter_weights"])
    model = run.model.to(device())
    build.by_tiles(model, words["tile"])
    words["do"] = verb(words["do"], model)
    options = build.options(cfg, model, verbs(model)[words["do"]], run.cfg)
    precision = autocast(model, words["precision"] or run.cfg.trainer.precision)
    request = Request.of(model, run.data, options, words)
    words["label"] = named(words["label"], run.data)
    path = Path(words["out"] or folders.unused(run.pictures, folders.time_stamp()))
    sources = [] if words["source"] is None else files.sources(words["source"], path)
    n = {"n": len(sources)} if sources else {}
    out = Folder(path, words | {"run": str(run.folder), "images_seen": run.images_seen} | n)
    with sampling_mode(model, options), precision:
        if not sources:
            pictures = request.pictures(words["do"], words["first"], words["n"], words["batch_size"])
        else:
            pictures = request.of_files(words["do"], sources, words["first"])
        for made in pictures:
            out.add(made)
    if sources and len(request.unread) == len(sources):
        raise UserError("source", words["source"], "none of its files can be read", "source=OTHER_FILES")
    out.finish()
    if request.unread:
        print(f"{len(request.unread)} of {len(sources)} files could not be read", file=sys.stderr, flush=True)
        sys.exit(1)


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    jobs.command(sample, cfg)


if __name__ == "__main__":
    messages.run(main)
