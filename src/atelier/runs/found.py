"""What `doctor=true` tells of a machine: what it is, and which optional parts, weights and credentials it has.

Nothing is imported, downloaded or written to find out, and of a credential it is told that it is there.
"""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from omegaconf import OmegaConf

from atelier.callbacks.memory import gigabytes
from atelier.core import machine, room
from atelier.core.peaks import peak
from atelier.core.precision import Precision
from atelier.metrics.features import INCEPTION_FILE
from atelier.runs.pages import CONF
from atelier.runs.trainer import resolved

Rows = list[tuple[str, str]]  # a name, and what is said of it
SECONDS = 1.0  # in which convolutions are timed
NOTABLE = 1.2  # how many times as fast another number format must be to be named


class Extra(NamedTuple):
    """What `pip install -e ".[NAME]"` adds: modules and what asks for them."""

    modules: tuple[str, ...]
    asked_by: str


EXTRAS = {
    "latent": Extra(("diffusers", "transformers", "huggingface_hub"), "published first stages, text encoders, nets"),
    "sweep": Extra(
        (
            "hydra_plugins.hydra_optuna_sweeper",
            "hydra_plugins.hydra_joblib_launcher",
            "hydra_plugins.hydra_submitit_launcher",
        ),
        "hparams_search=optuna, hydra/launcher=joblib and submitit_slurm",
    ),
    "data": Extra(("datasets",), "data=hugging_face"),
    "tensorboard": Extra(("tensorboard",), "logger=tensorboard"),
    "demo": Extra(("gradio",), "demo.py, a page to play with"),
    "onnx": Extra(("onnx", "onnxscript", "onnxruntime"), "export.py layout=onnx"),
}


def the_device(accelerator: str) -> torch.device:
    """Where training would work."""
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def of_machine(device: torch.device, rates: dict[str, float], asked: Precision, folder: Path) -> Rows:
    """What the machine is and can do.

    Args:
        device: device that training would use.
        rates: operations a second of convolutions by number format, as `machine.convolution_rates` measures them.
        asked: precision that the config asks for.
        folder: run folder, whose disk is told.
    """
    allowed, used = machine.cores(), torch.get_num_threads()
    named = f" ({machine.processor()})" if machine.processor() else ""
    rows = [("cores", f"{allowed:g}{named}; torch uses {used} thread{'s' * (used != 1)}")]
    if busy := machine.busy():
        rows.append(("busy", f"a load of {busy:.2g}: others work here too, so what is measured is slower than alone"))
    there = room.there(torch.device("cpu"))
    rows.append(("memory", "the system does not say" if there is None else f"{gigabytes(there)} are free"))
    rows.append(("GPU", _gpu(device)))
    free, total = map(gigabytes, _on_disk(folder))
    rows.append(("disk", f"{free} of {total} are free at {folder.absolute()}"))
    told = ", ".join(f"{name} {value / 1e9:,.3g}" for name, value in rates.items())
    where = "the GPU" if device.type == "cuda" else f"{used} thread{'s' * (used != 1)}"
    rows.append(("GFLOP/s", f"{told}: a convolution, forward and backward, on {where}"))
    rows.append(("precision", precision(asked, device, rates)))
    rows.append(("Python", f"{platform.python_version()}, torch {torch.__version__}"))
    return rows


def _gpu(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "torch sees none"
    name, n = torch.cuda.get_device_name(0), torch.cuda.device_count()
    memory = f"{gigabytes(room.there(torch.device('cuda', 0)))} of its memory are free"
    most = peak(name, "bf16-mixed")
    told = f"{name}, {memory}" + (f", at most {most:g} TFLOP/s in bf16" if most else "")
    return told + (f"; {n} of them" if n > 1 else "") + ("" if device.type == "cuda" else "; not used (trainer=cpu)")


def _on_disk(folder: Path) -> tuple[int, int]:
    """Free bytes, and all, on the disk of a folder that may not be there yet."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    disk = shutil.disk_usage(place)
    return disk.free, disk.total


def precision(asked: Precision, device: torch.device, rates: dict[str, float]) -> str:
    """Which number format training would use, and why; a note where the other was faster."""
    on_gpu = device.type == "cuda"
    taken = resolved(asked, on_gpu)
    has = resolved("auto", on_gpu) == "bf16-mixed"
    owner = "the GPU" if on_gpu else "the CPU"
    why = f"trainer.precision={asked} asks for it"
    if asked == "auto":
        why = f"trainer.precision=auto, and {owner} {'has' if has else 'has no'} bf16 instructions"
    half = taken == "bf16-mixed"
    told = f"{'bf16' if half else 'float16' if taken == '16-mixed' else 'float32'} ({taken}): {why}"
    if other := faster(taken, rates):
        name, gain = "float32" if half else "bf16", other[1]
        return f"{told}, but {name} was {gain:.2g} times as fast: trainer.precision={other[0]}"
    return told


def faster(taken: Precision, rates: dict[str, float]) -> tuple[Precision, float] | None:
    """Another precision than the one that is taken, and how many times as fast it was; None where that is not much."""
    gain = rates["bf16"] / rates["float32"]
    others = {"bf16-mixed": ("32-true", 1 / gain), "32-true": ("bf16-mixed", gain)}
    return others[taken] if taken in others and others[taken][1] > NOTABLE else None


def of_extras() -> Rows:
    """Which optional parts are installed, and where others were looked for."""
    rows, owners = [], importlib.metadata.packages_distributions()
    for name, extra in EXTRAS.items():
        missing = [module for module in extra.modules if not _installed(module)]
        if missing:
            what = ", ".join(module.rpartition(".")[2] for module in missing)
            rows.append((name, f"not there: {what}. Needed for {extra.asked_by}"))
        else:
            rows.append((name, ", ".join(_version(module, owners) for module in extra.modules)))
    return [*rows, ("looked in", _path(sysconfig.get_paths()["purelib"]))]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def _version(module: str, owners: dict[str, list[str]]) -> str:
    """`diffusers 0.36.0`; the name alone where several packages share its first word, or none says it."""
    of = owners.get(module, [])
    return f"{module} {importlib.metadata.version(of[0])}" if of else module.rpartition(".")[2]


def of_weights() -> Rows:
    """Which published weights lie where they are looked for."""
    perceptual = {page: OmegaConf.load(CONF / "perceptual" / f"{page}.yaml") for page in ("lpips", "vgg")}
    inception = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    rows = [("Inception", _files([inception], "FID; metrics=inception metrics.fetch=true downloads it, 91 MB"))]
    lpips = [perceptual["lpips"].vgg, perceptual["lpips"].heads]
    rows.append(("LPIPS", _files(lpips, "perceptual@metrics.lpips=lpips; conf/perceptual/lpips.yaml says from where")))
    rows.append(("VGG19", _files([perceptual["vgg"].vgg], "model=srgan; conf/perceptual/vgg.yaml says from where")))
    vae = OmegaConf.load(CONF / "first_stage" / "sd_vae.yaml").run
    cached = hub_cache() / f"models--{vae.replace('/', '--')}"
    by = "first_stage@model.first_stage=sd_vae; model.first_stage.fetch=true downloads it, 335 MB"
    return [*rows, ("sd_vae", _files([cached], by))]


def hub_home() -> Path:
    """The folder of the Hugging Face hub on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()


def hub_cache() -> Path:
    """Where the hub keeps what was downloaded."""
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()


def _files(places: Iterable[str | Path], asked_by: str) -> str:
    """Whether all of some files or folders are there; each is told."""
    paths = [Path(place).expanduser() for place in places]
    there = [_path(path) for path in paths if path.exists()]
    missing = [_path(path) for path in paths if not path.exists()]
    told = [f"there: {', '.join(there)}"] if there else []
    told += [f"not there: {', '.join(missing)}. Needed for {asked_by}"] if missing else []
    return "; ".join(told)


def _path(path: str | Path) -> str:
    """A path, with ~ for the home folder."""
    home, text = str(Path.home()), str(path)
    return f"~{text[len(home) :]}" if text.startswith(f"{home}{os.sep}") else text


def of_credentials() -> Rows:
    """Whether there are credentials, in which places; of what stands there nothing is told."""
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or "api.wandb.ai"
    names = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    of_wandb = {"WANDB_API_KEY": bool(os.environ.get("WANDB_API_KEY")), _path(names): _in_netrc(names, server)}
    token = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    of_hub = {name: bool(os.environ.get(name)) for name in variables} | {_path(token): token.is_file()}
    return [("W&B", _places(of_wandb, "logger=wandb")), ("the hub", _places(of_hub, "gated weights"))]


def _in_netrc(path: Path, server: str) -> bool:
    try:
        return netrc.netrc(str(path)).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _places(there: dict[str, bool], asked_by: str) -> str:
    found = [place for place, is_there in there.items() if is_there]
    if found:
        return f"there: {found[0]}"
    return f"not there: {', '.join(there)}. Needed for {asked_by}"
