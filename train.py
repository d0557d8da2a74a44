"""Train a model and judge its samples: python train.py model=flow data=shapes (python train.py --help)."""

from atelier.cli import usage
from atelier.core import stopping

usage.answer_help()
if __name__ == "__main__":
    stopping.listen()
    usage.say_loading()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier.cli import jobs, messages  # noqa: E402
from atelier.runs import build, folders, meeting, preflight, resume, starting  # noqa: E402

folders.register()


def train(cfg: DictConfig) -> float | None:
    """One run from its config to judged images; gives the metric that `objective` names."""
    import signal

    from lightning import seed_everything

    from atelier.callbacks.pieces import take_in_pieces
    from atelier.checkpoints.store import newest
    from atelier.runs import doctor, latents, report, texts

    meeting.begin(cfg.trainer)
    preflight.check(cfg)
    latents.refuse_planes(cfg)
    if cfg.check:
        return print("ok: every key, type and range fits; the set was not read", flush=True)
    if cfg.doctor:
        return doctor.examine(cfg)
    with folders.open_run(cfg) as folder:
        build.metrics(cfg).check()
        cfg = resume.reconcile_config(cfg, folder)
        seed_everything(cfg.seed, verbose=False)
        data = build.data(cfg)
        meeting.in_turn(data.prepare_data)
        resume.check_same_data(cfg, folder, data)
        preflight.provided(build.family(cfg).needs, build.family(cfg), data)
        model = build.model(cfg, folder)
        preflight.match(model, data)
        latents.keep(cfg, model, data)
        texts.keep(cfg, model, data)
        callbacks = build.callbacks(cfg)
        callbacks.evaluation.asked["objective"] = cfg.objective
        with build.loggers(cfg) as loggers:
            trainer = build.trainer(cfg, model, callbacks, loggers)
            preflight.fits_on_disk(model, len(callbacks.ema.half_lives), folder)
            if cfg.compile:
                build.compile_nets(model)
            if cfg.accumulate > 1:
                take_in_pieces(model, cfg.accumulate)
            report.announce(callbacks.progress, cfg, model, data)
            checkpoint = newest(folder / "checkpoints")
            if checkpoint is None:
                starting.start_from(model, cfg)
            meeting.ready(cfg.trainer.timeout_minutes)
            if trainer.world_size > 1:
                stopping.listen(signal.SIG_DFL)  # they meet in C, where no handler of Python is called
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        value = report.finish(callbacks, trainer, model, folder, cfg.objective)
        if callbacks.clock.signal:  # it came with the last batch: no other job begins
            callbacks.clock.leave(trainer)
        return value


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return jobs.job(train, cfg)


if __name__ == "__main__":
    messages.run(main)
