"""The schedule, the target and the sampler that a scheduler_config.json of diffusers says, and the file for ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atelier.checkpoints import diffusers_files
from atelier.core.errors import UserError
from atelier.diffusion.multistep import PLMS
from atelier.diffusion.samplers import DDIM, Ancestral, Euler, Sampler
from atelier.diffusion.schedules import Cosine, DiscreteSchedule, Linear, ScaledLinear, Schedule, ZeroTerminal
from atelier.diffusion.targets import X0, Epsilon, Target, Velocity

CONFIG = "scheduler_config.json"
TARGETS: dict[str, type[Target]] = {"epsilon": Epsilon, "v_prediction": Velocity, "sample": X0}
NAMED: dict[str, type[DiscreteSchedule]] = {"scaled_linear": ScaledLinear, "linear": Linear}
PAGES = {Epsilon: "eps", Velocity: "v", X0: "x0"}  # of conf/target
SPACINGS = ("trailing", "leading", "linspace")
USUAL = {  # what theirs do where the file does not say; of all of them
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
OWN: dict[str, dict[str, Any]] = {  # of one of them
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "DDIMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"},
    "EulerDiscreteScheduler": {
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
}
NEEDED = {  # the values that ours can be
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "clip_sample": (False,),
    "skip_prk_steps": (True,),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_large"),
}


class Meaning(NamedTuple):
    """How noisy each time is, and what a net answers."""

    schedule: DiscreteSchedule
    target: Target


class Scheduler(NamedTuple):
    """What one of diffusers' schedulers is here."""

    schedule: DiscreteSchedule
    target: Target
    sampler: Sampler


def read(folder: Path | str, steps: int = 50) -> Scheduler:
    """What the scheduler_config.json in a folder says.

    A spacing of Euler's that is linspace is rounded to levels of the table, which theirs is not.

    Args:
        folder: folder that has the file.
        steps: steps of the sampler, which no file says.

    Raises:
        UserError: there is no such file, or it asks for what no sampler here does.
    """
    folder = Path(folder)
    told = config(folder)
    kind = told.get("_class_name")
    if kind not in OWN:
        raise _refused(folder, f"it holds a {kind}, not {', '.join(OWN)}")
    known = OWN[kind] | told
    for name, values in NEEDED.items():
        if name in known and known[name] not in values:
            raise _refused(folder, f"{name} is {known[name]}, not {' or '.join(map(str, values))}")
    return Scheduler(*meaning(folder), _sampler(kind, known, steps))


def meaning(folder: Path | str) -> Meaning:
    """What the net beside a scheduler means by its times and its answer, whatever the sampler.

    Raises:
        UserError: there is no such file, or its levels or its target are none of ours.
    """
    folder = Path(folder)
    told = config(folder)
    if told["prediction_type"] not in TARGETS:
        raise _refused(folder, f"prediction_type is {told['prediction_type']}, not {' or '.join(TARGETS)}")
    return Meaning(_schedule(folder, told), TARGETS[told["prediction_type"]]())


def config(folder: Path | str) -> dict[str, Any]:
    """What the file in a folder says, with theirs for what it leaves out.

    Raises:
        UserError: there is no such file.
    """
    folder = Path(folder)
    told = diffusers_files.told(folder, folder / CONFIG, _refused)
    return USUAL | {name: value for name, value in told.items() if value is not None}


def write(scheduler: Scheduler, folder: Path | str) -> None:
    """The scheduler_config.json that says the same, in a folder that is made if it is not there.

    Raises:
        UserError: diffusers has no scheduler for it.
    """
    config, folder = exported(scheduler, folder), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def exported(scheduler: Scheduler, folder: Path | str) -> dict[str, Any]:
    """What the file of `write` says, for a folder that nothing is written to.

    Raises:
        UserError: diffusers has no scheduler for it.
    """
    folder, sampler = Path(folder), scheduler.sampler
    target = next((name for name, kind in TARGETS.items() if type(scheduler.target) is kind), None)
    if target is None or not isinstance(scheduler.schedule, DiscreteSchedule):
        what = f"{type(scheduler.target).__name__} on {type(scheduler.schedule).__name__}"
        raise _refused(folder, f"no scheduler of diffusers has {what}")
    own = _their_sampler(folder, sampler) | {"prediction_type": target}
    rescales = not isinstance(sampler, PLMS)  # theirs of it has no such option
    return own | _betas(scheduler.schedule, rescales) | {"num_train_timesteps": scheduler.schedule.n_steps}


def check(folder: Path | str, schedule: Schedule, target: Target) -> None:
    """Refuse noise levels or a target that the file in a folder says otherwise.

    Raises:
        UserError: they differ, or as in `read`.
    """
    theirs = meaning(folder)
    if type(target) is not type(theirs.target):
        page = PAGES[type(theirs.target)]
        raise UserError(".target", type(target).__name__, f"its {CONFIG} says {page}", f"target@.target={page}")
    levels = getattr(schedule, "logsnrs", None)
    if levels is None or levels.shape != theirs.schedule.logsnrs.shape or not _alike(levels, theirs.schedule.logsnrs):
        kind = type(theirs.schedule)
        problem = f"its {CONFIG} has other noise levels, {kind.__name__}"
        page = {ZeroTerminal: "zero_terminal", Linear: "linear", Cosine: "cosine"}.get(kind, "scaled_linear")
        fix = (
            f"schedule@.schedule={page}" if kind is not type(schedule) else ".schedule with its beta_start and beta_end"
        )
        raise UserError(".schedule", type(schedule).__name__, problem, fix)


def _alike(levels: Tensor, others: Tensor) -> bool:
    """Whether two tables of log-SNR are the same to float32, a last one of -inf included."""
    return torch.allclose(levels, others, rtol=1e-4, atol=1e-4)


def _schedule(folder: Path, config: dict[str, Any]) -> DiscreteSchedule:
    n, ends = config["num_train_timesteps"], (config["beta_start"], config["beta_end"])
    if config["trained_betas"] is not None:
        made = DiscreteSchedule(torch.tensor(config["trained_betas"], dtype=torch.float64))
    elif config["beta_schedule"] == "linear":
        made = Linear(n, *ends)
    elif config["beta_schedule"] == "scaled_linear":
        made = ScaledLinear(n, *ends)
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        made = Cosine(n)
    else:
        raise _refused(folder, f"beta_schedule is {config['beta_schedule']}")
    return ZeroTerminal(made) if config["rescale_betas_zero_snr"] else made


def _sampler(kind: str, config: dict[str, Any], steps: int) -> Sampler:
    leading = config["timestep_spacing"] == "leading"
    options = {"steps": steps, "spacing": config["timestep_spacing"], "offset": config["steps_offset"] * leading}
    if config["use_karras_sigmas"]:
        options = {"steps": steps, "grid": "karras"}
    match kind:
        case "PNDMScheduler":
            return PLMS(**options, to_image=config["set_alpha_to_one"])
        case "DDIMScheduler":
            return DDIM(**options, to_image=config["set_alpha_to_one"])
        case "DDPMScheduler":
            return Ancestral(**options, variance=config["variance_type"].removeprefix("fixed_"))
        case "EulerAncestralDiscreteScheduler":
            return DDIM(**options, eta=1.0)
        case _:
            return Euler(**options)


def _betas(schedule: DiscreteSchedule, rescales: bool) -> dict[str, Any]:
    """How a table comes about, where a name of theirs gives it, else all of it.

    Args:
        schedule: table.
        rescales: whether the scheduler can end it in pure noise.
    """
    kept = schedule.logsnrs.sigmoid()  # alpha_bar
    betas = 1 - kept / torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    if not schedule.logsnrs[-1].isinf():
        ends = float(f"{betas[0]:.10g}"), float(f"{betas[-1]:.10g}")
        for name, kind in NAMED.items():
            if torch.allclose(kind(len(betas), *ends).logsnrs, schedule.logsnrs, rtol=1e-9, atol=1e-9):
                return {"beta_schedule": name, "beta_start": ends[0], "beta_end": ends[1]}
    for kind in NAMED.values() if rescales else ():
        usual = kind(len(betas))
        if torch.allclose(ZeroTerminal(usual).logsnrs, schedule.logsnrs, rtol=1e-9, atol=1e-9):
            return _betas(usual, rescales) | {"rescale_betas_zero_snr": True}
    return {"trained_betas": betas.tolist()}


def _their_sampler(folder: Path, sampler: Sampler) -> dict[str, Any]:
    """The class of theirs and its options."""
    offset = sampler.offset if sampler.spacing == "leading" else 1  # which their pipelines put there if it is not
    same = {"timestep_spacing": sampler.spacing, "steps_offset": offset}
    if sampler.grid == "karras" and type(sampler) is Euler:
        same |= {"use_karras_sigmas": True}
    elif sampler.grid != "uniform":
        raise _refused(folder, f"no scheduler of diffusers has the grid {sampler.grid} of {type(sampler).__name__}")
    match sampler:
        case PLMS():
            own = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": sampler.to_image}
        case DDIM(eta=0.0):
            own = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": sampler.to_image}
        case DDIM(eta=1.0, to_image=True):
            own = {"_class_name": "EulerAncestralDiscreteScheduler"}
        case Ancestral(variance="small" | "large", to_image=True):
            own = {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": f"fixed_{sampler.variance}"}
        case Euler(to_image=True):
            own = {"_class_name": "EulerDiscreteScheduler"}
        case _:
            raise _refused(folder, f"no scheduler of diffusers is {sampler}")
    return own | same


def _refused(folder: Path, problem: str) -> UserError:
    return UserError("folder", folder, problem, "a scheduler of Stable Diffusion: PNDM, DDIM, Euler")
