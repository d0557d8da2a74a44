"""A run in the files that others read: python export.py run=last layout=diffusers out=FOLDER."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()
    usage.say_loading()
usage.listed_values("adapters", "adapter_weights")

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import adapted, folders, preflight  # noqa: E402


def export(cfg: DictConfig) -> None:
    """Load a run or what others published, write it in the layout that was asked for, with a model card beside it."""
    from pathlib import Path

    from atelier.runs import exporting, model_card

    preflight.check(cfg)
    run = folders.load_generator(exporting.located(cfg.run, cfg.vocabulary), cfg.ema, None)
    used = adapted.put_on(run.model, *adapted.asked(cfg))
    out = Path(cfg.out or run.place / "exported" / cfg.layout)
    with exporting.new_folder(out) as folder:
        match cfg.layout:
            case "diffusers":
                made = exporting.diffusers(exporting.parts(run), folder)
            case "single_file":
                made = exporting.single_file(exporting.parts(run), folder)
            case "onnx":
                made = exporting.onnx(run, folder)
            case "kohya" | "comfyui":
                made = exporting.lora(run, folder, cfg.layout)
        made.notes += [f"adapters are part of the weights: {used['adapters']}"] if used else []
        model_card.write(folder, run, made, exporting.origin(cfg.run, run))
    for line in made.notes:
        print(line, flush=True)
    print(f"{', '.join(made.names)} and {model_card.CARD} in {folders.shorter(out)}", flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    jobs.command(export, cfg)


if __name__ == "__main__":
    messages.run(main)
