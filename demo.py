"""A page to play with a trained run: python demo.py run=last, then http://127.0.0.1:7860 in a browser."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()
    usage.say_loading()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import preflight  # noqa: E402


def demo(cfg: DictConfig) -> None:
    """Load a run and serve the page until Ctrl-C."""
    from atelier.core.errors import UserError

    preflight.check(cfg)
    try:
        from atelier.demo import drawing, page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("gradio", "", "it is not installed", 'pip install -c constraints.txt -e ".[demo]"') from error
    runs = drawing.Runs(cfg.run)
    runs[runs.first]  # so that the first picture need not wait for it
    page.serve(runs, cfg.port)


@hydra.main(version_base="1.3", config_path="conf", config_name="demo")
def main(cfg: DictConfig) -> None:
    jobs.command(demo, cfg)


if __name__ == "__main__":
    messages.run(main)
