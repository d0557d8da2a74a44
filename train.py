"""Train a model and judge its samples: python train.py model=flow data=shapes (python train.py --help)."""

from atelier import command_line

command_line.answer_help()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from atelier import errors, runs  # noqa: E402

runs.register()


def train(cfg: DictConfig) -> float | None:
    """One run from its config to judged images; gives the metric that `objective` names."""
    from lightning import seed_everything

    from atelier import ending, preflight
    from atelier.callbacks.store import newest

    preflight.check(cfg)
    if cfg.check:
        return print("ok: every key, type and range fits", flush=True)
    with runs.held(cfg) as folder:
        runs.check_metrics(cfg)
        cfg = runs.settle(cfg, folder)
        seed_everything(cfg.seed, verbose=False)
        data = runs.build_data(cfg)
        runs.same_ground(cfg, folder, data)
        model = runs.build_model(cfg, folder)
        preflight.match(model, data)
        callbacks = runs.build_callbacks(cfg)
        with runs.logging(cfg) as loggers:
            trainer = runs.build_trainer(cfg, model, callbacks, loggers)
            preflight.fits_on_disk(model, len(callbacks.ema.half_lives), folder)
            if cfg.compile:
                for name in model.averaged:
                    getattr(model, name).compile()
            ending.begin(callbacks.progress, cfg, model, data)
            checkpoint = newest(folder / "checkpoints")
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return ending.end(callbacks, trainer, model, folder, cfg.objective)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return runs.job(train, cfg)


if __name__ == "__main__":
    errors.run(main)
