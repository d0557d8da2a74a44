"""Judge a trained run: python evaluate.py run=last eval.n_samples=1000 sampler=ddim sampler.steps=50."""

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
from atelier.runs import adapted, build, folders, pages, preflight  # noqa: E402


def evaluate(cfg: DictConfig) -> None:
    """Load a run, judge its samples with the code that training used, print one JSON line and keep it."""
    import json
    import sys

    from atelier.callbacks.evaluation import numbers
    from atelier.evaluation.gathering import show_progress
    from atelier.evaluation.naming import of_raw
    from atelier.runs import ledger
    from atelier.runs.trainer import autocast, device, resolved

    preflight.check(cfg)
    run = folders.load_generator(folders.find(cfg.run), cfg.ema, cfg.root)
    if cfg.eval.record:
        ledger.check(run, cfg.eval.n_samples)
    wanted = adapted.asked(cfg)
    adapters_used = adapted.put_on(run.model, *wanted)
    model = run.model.to(device())
    options = build.options(cfg, model, model.sample, run.cfg)
    evaluator = build.evaluator(cfg, run.cfg)
    for notice in (evaluator.prepare(model, run.data, model.device), evaluator.left_out(model, run.data)):
        if notice:
            print(notice, file=sys.stderr, flush=True)
    precision = resolved(cfg.precision or run.cfg.trainer.precision, model.device.type == "cuda")
    raw: dict[str, float] = {}
    if cfg.eval.raw:
        other = folders.load_generator(run.folder, False, cfg.root).model
        adapted.put_on(other, *wanted)
        other = other.to(device())
        raw, _ = evaluator(other, run.data, options, lambda: autocast(other, precision), show_progress)
    values, protocol = evaluator(model, run.data, options, lambda: autocast(model, precision), show_progress)
    intervals = evaluator.intervals(values, protocol)
    values |= of_raw(raw)
    if evaluator.curve and evaluator.suite.rate_distortion:
        print(evaluator.curve.table(), file=sys.stderr, flush=True)
        with folders.kept_where_writable(run.folder):
            evaluator.curve.write(run.folder)
    protocol |= {"ema": run.ema, "precision": precision} | adapters_used
    printed = {"run": str(run.folder), "images_seen": run.images_seen, "metrics": numbers(values), "protocol": protocol}
    printed |= {"intervals": intervals}
    line = json.dumps(printed)
    print(line, flush=True)
    folders.append(run.folder / "evaluations.jsonl", line)
    if cfg.eval.record:
        ledger.record(run, printed, pages.task_words())


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    jobs.command(evaluate, cfg)


if __name__ == "__main__":
    messages.run(main)
