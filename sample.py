"""Images of a trained run: python sample.py run=last n=64 sampler=ddim sampler.steps=20 guidance=3 label=5."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()
usage.listed_value("attributes")

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import build, folders, preflight  # noqa: E402


def sample(cfg: DictConfig) -> None:
    """Load a run, make what was asked for, write it with the request beside it."""
    from pathlib import Path

    from atelier.models.base import sampling
    from atelier.requests import files, studio
    from atelier.runs.trainer import autocast, device

    preflight.check(cfg)
    run = folders.load(folders.find(cfg.run), cfg.ema, cfg.root)
    model = run.model.to(device())
    verb = studio.verb(cfg.do, model)
    options = build.options(cfg, model, studio.maker(verb, model))
    items = studio.items(verb, model, run.data, cfg.label, cfg.source is not None)
    case = files.case(cfg.direction, model)
    given = files.wanted(build.plain(cfg)["attributes"], cfg.scale, model, run.data)
    request = build.plain(cfg) | {"run": str(run.folder), "images_seen": run.images_seen, "do": verb}
    folder = Path(cfg.out or run.folder / "pictures" / folders.stamp())
    found = [] if cfg.source is None else files.files(cfg.source, model, verb, folder)
    out = studio.Folder(folder, request | ({"n": len(found)} if found else {}))
    with sampling(model), autocast(model, cfg.precision or run.cfg.trainer.precision):
        if found:
            if verb == "project":
                made = files.projections(model, run.data, options, cfg.seed, items, found)
            else:
                made = files.Job(model, run.data, case, given, options, cfg.seed).results(found)
            for (name, _), (source, result) in zip(found, made, strict=True):
                out.add(result, len(found), source, [name])
            return out.finish()
        for first in range(0, cfg.n, cfg.batch_size):
            n = min(cfg.batch_size, cfg.n - first)
            made, source = studio.pictures(verb, model, run.data, options, cfg.seed, first, n, items, case, given)
            out.add(made, cfg.n, source)
    out.finish()


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    jobs.command(sample, cfg)


if __name__ == "__main__":
    messages.run(main)
