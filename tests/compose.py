"""A run's config, composed in process as the command line would."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from atelier import runs

CONF = str(Path(__file__).parents[1] / "conf")


def composed(*overrides: str, run_dir: Path | str = "unused", config: str = "train") -> DictConfig:
    """The config of `train.py overrides...` with its folder at run_dir."""
    runs.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(config, overrides=list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.mode = "RUN"
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    if config == "train":
        cfg.run_dir = str(run_dir)
    plain = cfg.copy()
    del plain["hydra"]
    OmegaConf.set_struct(plain, True)
    return plain
