"""A run in the files that others read: python export.py run=last layout=diffusers out=FOLDER."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import folders, preflight  # noqa: E402


def export(cfg: DictConfig) -> None:
    """Load a run or what others published, write it in the layout that was asked for, with a model card beside it."""
    from pathlib import Path

    from atelier.runs import exporting, model_card

    preflight.check(cfg)
    run = folders.load_generator(exporting.located(cfg.run, cfg.vocabulary), cfg.ema, None)
    parts = exporting.parts(run)
    out = Path(cfg.out or run.place / "exported" / cfg.layout)
    with exporting.new_folder(out) as folder:
        match cfg.layout:
            case "diffusers":
                made = exporting.diffusers(parts, folder)
            case "single_file":
                made = exporting.single_file(parts, folder)
        model_card.write(folder, run, made, exporting.origin(cfg.run, run))
    for line in made.notes:
        print(line, flush=True)
    print(f"{', '.join(made.names)} and {model_card.CARD} in {folders.shorter(out)}", flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    jobs.command(export, cfg)


if __name__ == "__main__":
    messages.run(main)
