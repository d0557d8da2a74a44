"""What can be known to fail before anything starts: keys, types, ranges, and what a model needs of its data."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from atelier.checkpoints import renamed
from atelier.core import job, launchers
from atelier.core.errors import UserError, nearest
from atelier.core.words import typed_value, word
from atelier.nets.contracts import BUILT, Upscaler, contract_of
from atelier.runs.fitting import arguments, called, fitted
from atelier.runs.pages import CONF, is_group, key_of, known_keys, task_words
from atelier.runs.typed_keys import PART, TYPES

OBJECTS = (
    "data",
    "model",
    "trainer",
    "logger",
    "metrics",
    "sampler",
    "guider",
    "evaluator",
    "lora",
)  # what is built from a page
MARGIN = 1.2
PROVIDING = {  # Batch fields -> the sets that have all of them
    "text": "data=captioned data.root=FOLDER, or data=shapes",
    "label": "data=classes data.root=FOLDER, data=shapes, or data.conditions=[]",
    "attributes target": "data=celeba data.root=FOLDER, or data=shapes data.task=attribute_transfer",
    "image_a image_b": "data=unpaired data.root=FOLDER, or data=shapes data.task=fill",
    "source": "data=pairs data.root=FOLDER, data=edges data.root=FOLDER, or data=shapes data.task=label_map",
    "mask mask_kind": "data=images data.root=FOLDER data.masks=lama, or data=shapes data.task=inpaint",
    "source instruction": "data=shapes data.task=edit",
}
Plain = dict[str, Any] | list[Any]


def check(cfg: DictConfig) -> None:
    """Check every leaf of a composed config against the annotation of the argument it becomes.

    Raises:
        UserError: the first leaf that does not fit.
        OmegaConfBaseException: a leaf has no value, or refers to what is not there.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    _check_sections(raw)
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    _check_references(cfg)
    _check_keys(values)
    for key, value in raw.get("choices", {}).items():
        if value != f"${{hydra:runtime.choices.{key}}}":
            page = value if (CONF / key / f"{value}.yaml").exists() else "PAGE"
            raise UserError(f"choices.{key}", value, "it only says which page was chosen", f"{key}={page}")
    types = TYPES | (options() if "run" in values else {})
    for key in [key for key in types if key in values]:
        fitted(values[key], key, types[key])
    for flag in ("record", "raw"):
        fitted(values.get("eval", {}).get(flag, False), f"eval.{flag}", bool)
    for key, node in _objects(values, ""):
        _check_call(node, key, raw)
    if "trainer" in values:
        ranks(values["trainer"]["devices"], values["trainer"]["num_nodes"])
        if values.get("accumulate", 1) > 1:
            pieces(values["accumulate"], values)
    if values.get("budget", {}).get("until") and not values["check"] and launchers.rank() == 0:
        job.seconds_left()
    if values.get("start_from") is not None and not _goes_on(values):  # one that does has what it needs of it
        beginning(values["start_from"])
    if values.get("lora") is not None:
        _adaptable(values)


def _goes_on(values: dict[str, Any]) -> bool:
    """Whether the run's folder holds one already."""
    folder = values.get("run_dir")
    return folder is not None and (Path(folder) / "config.yaml").exists()


def beginning(place: str) -> Path:
    """The folder of the finished run that `start_from` names.

    Raises:
        UserError: none lies there, or one of adapters alone.
    """
    folder = Path(place)
    stored = _stored(folder)
    if stored is None or not (folder / "weights.safetensors").exists():
        raise UserError("start_from", place, "no finished run lies there", "start_from=DIR of a finished run")
    if stored.get("lora") is not None:
        whole = f"start_from={stored.start_from or 'RUN'}"
        raise UserError("start_from", place, "it holds adapters, not a whole model", f"{whole}, whose they are")
    return folder


def _stored(folder: Path) -> DictConfig | None:
    """The config of a run as it lies there; None where none does, or what is none."""
    try:
        stored = OmegaConf.load(folder / "config.yaml")
    except (OSError, UnicodeDecodeError, YAMLError):
        return None
    return stored if isinstance(stored, DictConfig) and {"model", "data"} <= stored.keys() else None


def _adaptable(values: dict[str, Any]) -> None:
    """Refuse adapters on weights that nobody has trained, and a cache of what their training changes.

    Raises:
        UserError: they would be.
    """
    net, kind = values["model"].get("net"), called(values["model"]["_target_"], "model")
    if not kind.takes_adapters:
        problem = f"{kind.__name__} takes no adapters, diffusion models do"
        raise UserError("lora", values["choices"]["lora"], problem, "leave lora out")
    if values["start_from"] is None and not (isinstance(net, dict) and "run" in net):
        problem = "adapters would be trained on a net of random weights"
        raise UserError("start_from", "null", problem, "start_from=RUN")
    if values["text_cache"] is not None and values["lora"]["text_targets"]:
        problem = "training changes what the text encoder says"
        raise UserError("text_cache", values["text_cache"], problem, "text_cache=null, or lora.text_targets=[]")


def pieces(n: int, values: dict[str, Any]) -> None:
    """The batches of a config can be taken in n pieces.

    Raises:
        UserError: the family takes them whole, or a rank's share does not divide.
    """
    kind = called(values["model"]["_target_"], "model")
    if not getattr(kind, "takes_pieces", False):
        able = {
            one.__name__ for one in _classes() if getattr(one, "takes_pieces", False) and not inspect.isabstract(one)
        }
        taking = ", ".join(sorted(able))
        raise UserError("accumulate", n, f"{kind.__name__} takes a batch whole; in pieces do {taking}", "accumulate=1")
    share = values["data"]["batch_size"] // (values["trainer"]["devices"] * values["trainer"]["num_nodes"])
    if share % n:
        nearest_one = max(k for k in range(1, n) if share % k == 0)
        problem = f"{share} images, a rank's share of a batch, do not divide by it"
        raise UserError("accumulate", n, problem, f"accumulate={nearest_one}")


@functools.cache
def options() -> dict[str, Any]:
    """What some family's `sample` takes by keyword, with its annotation: keys of conf/sample.yaml and evaluate.yaml."""
    return _keywords(kind.sample for kind in _classes() if hasattr(kind, "sample"))


def _classes() -> list[type]:
    """Every class that a module of models/ knows."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "models").glob("[!_]*.py"))
    modules = [importlib.import_module(f"atelier.models.{name}") for name in names]
    return [kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)]


def _keywords(functions: Iterable[Callable]) -> dict[str, Any]:
    """The keyword-only arguments of all of them, with the annotation that each name has everywhere.

    Raises:
        TypeError: two give one name different annotations.
    """
    found: dict[str, Any] = {}
    for function in functions:
        for name, p in arguments(function).items():
            if p.kind is p.KEYWORD_ONLY and found.setdefault(name, p.annotation) != p.annotation:
                raise TypeError(f"{function.__qualname__} takes {name}: {p.annotation}, another {found[name]}")
    return found


def ranks(devices: int, num_nodes: int) -> None:
    """A launcher has started one process for each device of each node, or none but this one.

    Raises:
        UserError: it started others, each of which would take itself for the whole run.
    """
    n = launchers.started()
    if n is None:
        return _one_process(devices, num_nodes)
    each, nodes = launchers.on_each_node(), launchers.srun_nodes()
    if launchers.by_srun() and each is None:
        even = max(1, n // nodes)
        fix = f"{_srun(even, nodes)} trainer=ddp trainer.devices={even} trainer.num_nodes={nodes}"
        problem = f"srun put {n} processes on {nodes} nodes, not as many on each"
        raise UserError("trainer.devices", devices, problem, fix)
    each = each or n // num_nodes or 1
    if (devices, num_nodes) != (each, n // each):
        fix = f"trainer=ddp trainer.devices={each} trainer.num_nodes={n // each}"
        raise UserError("trainer.devices", devices, f"{n} processes were started, {each} on each node", fix)


def _one_process(devices: int, num_nodes: int) -> None:
    """Refuse to wait for processes on other nodes, which nobody has started."""
    if num_nodes > 1 and not launchers.node_is_named():
        problem = f"nobody has started the processes of the other {num_nodes - 1} nodes, for which this would wait"
        torchrun = f"torchrun --nnodes={num_nodes} --nproc-per-node={devices} ... train.py ..."
        fix = f"{_srun(devices, num_nodes)} ..." if launchers.slurm_job() else torchrun
        raise UserError("trainer.num_nodes", num_nodes, problem, fix)


def _srun(each: int, nodes: int) -> str:
    """The command that starts as many processes on each node, whatever the job asked for."""
    return f"srun -N{nodes} -n{each * nodes} --ntasks-per-node={each} python train.py"


def targets(cfg: DictConfig) -> None:
    """Check what a config read from disk would call.

    Raises:
        UserError: a `_target_` that no page may name.
    """
    for key, node in _objects(OmegaConf.to_container(cfg, resolve=False), ""):
        called(node["_target_"], key)


def _check_sections(raw: dict[str, Any]) -> None:
    """What the pages at the root have as a section is one still: others refer to what stands beneath it."""
    known = known_keys()
    for key in [key for key, value in raw.items() if isinstance(known.get(key), dict) and not isinstance(value, dict)]:
        raise UserError(key, raw[key], "other keys stand beneath it", f"leave {key} out")


def _check_references(cfg: DictConfig) -> None:
    """No typed reference to a section stands for a single value: it would be told of as if it had been typed there."""
    for key, _, value in (one.partition("=") for one in task_words()):
        reference = re.fullmatch(r"\$\{[\w.]+\}", value)
        if reference and OmegaConf.is_dict(OmegaConf.select(cfg, key)) and not isinstance(known_keys().get(key), dict):
            raise UserError(key, value, "it refers to a section, a value is wanted", f"leave {key} out")


def _check_keys(values: dict[str, Any]) -> None:
    """Outside of what becomes a call, the keys are those of the pages at the root; each group has its object."""
    known = known_keys()
    for top, section in values.items():
        inner = section if isinstance(section, dict) and isinstance(known.get(top, {}), dict) else {}
        inner = {} if "_target_" in inner else inner
        for key in [top, *(f"{top}.{name}" for name in inner)]:
            if key not in known and top not in OBJECTS:
                close = nearest(key, known)
                raise UserError(key, "", "there is no such key", f"{close}=VALUE" if close else f"leave {key} out")
    built = {key: values[key] for key in OBJECTS if key in values}
    parts = values.get("callbacks", {})
    built |= (
        {f"callbacks.{name}": part for name, part in parts.items()} if isinstance(parts, dict) else {"callbacks": 0}
    )
    for key, part in built.items():
        if not isinstance(part, dict) or "_target_" not in part:
            raise UserError(f"{key}._target_", "", "it has none", f"{key} as in the pages of conf/")


def _objects(node: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each dictionary with a `_target_` at any depth, and its dotted key."""
    if isinstance(node, dict) and "_target_" in node:
        yield prefix, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from _objects(child, f"{prefix}.{key}" if prefix else str(key))


def _check_call(node: dict[str, Any], prefix: str, raw: Plain) -> None:
    prefix = _origin(raw, prefix)
    target, partial = called(node["_target_"], prefix), node.get("_partial_", False)
    fitted(partial, f"{prefix}._partial_", bool)
    takes = arguments(target)
    for key in node:
        if key not in takes and key not in ("_target_", "_partial_"):
            raise _no_argument(target, f"{prefix}.{key}", node[key])
    for key in [key for key in takes if key in node]:
        if _is_part(takes[key].annotation, node[key]):
            _check_part(node[key], f"{prefix}.{key}")
        else:
            place = _origin(raw, f"{prefix}.{key}")
            _check_word(node, key, place)
            try:
                fitted(node[key], place, takes[key].annotation)
            except UserError as error:
                raise _of_the_set(error, target) from error
    missing = [key for key, p in takes.items() if p.default is p.empty and key not in node]
    if missing and not partial and "_partial_" in node:
        key = f"{prefix}._partial_"
        raise UserError(key, partial, f"{missing[0]} is given to it later", f"{key}=true")
    if missing and not partial:
        raise UserError(f"{prefix}.{missing[0]}", "", "it has no value", f"{prefix}.{missing[0]}=VALUE")


def _of_the_set(error: UserError, target: Callable) -> UserError:
    """What is wrong with a value, said of the set where that has none of what the value counts."""
    if (error.key, error.value) != ("data.n_attributes", 0):
        return error
    problem = f"{target.__name__} needs attributes, and the set has none"
    return UserError("data.n_attributes", 0, problem, PROVIDING["attributes target"])


def _no_argument(target: Callable, key: str, value: Any) -> UserError:
    """What a class does not take: typed, or brought by a page for what another page has exchanged."""
    words, (place, _, last) = task_words(), key.rpartition(".")
    if not any(key_of(word).startswith(key) for word in words):
        pages = [word for word in words if is_group(word.partition("=")[0].partition("@")[0])]
        above = [word for word in pages if key.startswith(f"{key_of(word)}.") or word.startswith("experiment=")]
        if len(above) > 1:  # of which one has exchanged what another sets
            closest = max(above, key=lambda word: (key.startswith(key_of(word)), len(key_of(word))))
            name, _, page = closest.partition("=")
            problem = f"{target.__name__} would get {key}, which it does not take"
            return UserError(name, page, problem, f"leave {name} out")
    close = nearest(last, arguments(target))
    fix = f"{place}.{close}=VALUE" if close else f"leave {key} out"
    return UserError(key, value, f"{target.__name__} has no such argument", fix)


def _is_part(annotation: Any, given: Any) -> bool:
    """Whether an argument is to be lent by another run, which no `_target_` builds."""
    asked = contract_of(annotation)
    if asked in BUILT:
        return isinstance(given, dict) and "_target_" not in given
    return asked is not None


def contract(target: str, argument: str) -> type | None:
    """The contract that an argument of a class names, by the class's path; None where it names none."""
    return contract_of(arguments(called(target, argument))[argument].annotation)


def _check_word(node: dict[str, Any], key: str, place: str) -> None:
    """No value that has another name since."""
    _, today = renamed.argument(node["_target_"], key, node[key])
    if today is not node[key]:
        raise UserError(place, typed_value(node[key]), f"it is called {today} now", word(place, today))


def _check_part(given: Any, prefix: str) -> None:
    """What `pretrained.link_pretrained` turns into a net: which run, or which experiment to train, and how long."""
    if not isinstance(given, dict) or "run" not in given:
        raise UserError(prefix, given, "it needs a run", f"{prefix}.run=auto")
    if given["run"] == "auto" and "experiment" not in given:
        raise UserError(f"{prefix}.run", "auto", "what is published is not trained", f"{prefix}.run=FOLDER")
    for key, value in given.items():
        if key not in PART:
            raise UserError(f"{prefix}.{key}", value, "there is no such key", f"leave {key} out")
        try:
            fitted(value, f"{prefix}.{key}", PART[key])
        except UserError as error:
            fix = f"{prefix}.run=FOLDER" if key == "run" and "experiment" not in given else error.fix
            raise UserError(error.key, error.value, error.problem, fix) from error


def _origin(raw: Plain, key: str) -> str:
    """The key that a user can change for the value at `key`: interpolations of the pages followed to their end."""
    node: Any = raw
    parts = key.split(".")
    for i, part in enumerate(parts):
        node = node[int(part)] if isinstance(node, list) else node[part]
        found = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if found and ".".join(parts[: i + 1]) in map(key_of, task_words()):
            return key
        if found:
            return _origin(raw, ".".join([found.group(1), *parts[i + 1 :]]))
    return key


def texts_of(split: Any, name: str, indices: Iterable[int] | None = None) -> list[str]:
    """All texts of a split under a name, of those images that have several all; none where it keeps no such list.

    Args:
        split: images that they are of.
        name: Batch field.
        indices: numbers of the images that they are of; None: all.
    """
    values = getattr(split, "fields", {}).get(name, [])
    if indices is not None and values:
        values = [values[index] for index in indices]
    return [text for value in values for text in ([value] if isinstance(value, str) else value)]


def match(model: Any, data: Any) -> None:
    """A model trains on what a set provides.

    Raises:
        UserError: a field is missing.
    """
    provided(model.needs, type(model), data)
    for name in sorted(model.needs & {"text", "instruction"}):
        model.refuse_long(name, texts_of(data.split("train"), name) + texts_of(data.split("test"), name), "data")


def provided(needs: frozenset[str], family: type, data: Any) -> None:
    """A set has what a family needs, which many say by their class: their nets need not be built to refuse it.

    Raises:
        UserError: a field is missing.
    """
    missing = needs - data.provides - {"image", "index"}
    if not missing:
        return
    has = ", ".join(sorted(data.provides)) or "images alone"
    problem = f"{family.__name__} needs {', '.join(sorted(missing))}, {type(data).__name__} has {has}"
    tasks = [name for name, fields in getattr(data, "tasks", {}).items() if missing <= fields]
    fixes = [fix for names, fix in PROVIDING.items() if missing <= set(names.split())]
    if "source" in missing and any(contract_of(p.annotation) is Upscaler for p in arguments(family).values()):
        fixes = ["data=superres data.root=FOLDER, or data=shapes data.task=low_resolution"]
    fix = f"data.task={'|'.join(tasks)}" if tasks else next(iter(fixes), "data=shapes, or data.conditions=[]")
    raise UserError("model", family.__name__, problem, fix)


def writable(folder: Path) -> None:
    """The run folder can be made and written.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = f"the folder cannot be written ({error.strerror}{of_link(folder)})"
        raise UserError("run_dir", folder, problem, "run_dir=A_FOLDER_OF_YOURS") from error


def of_link(path: str | Path | None) -> str:
    """Words about the link to nothing that a path is or leads through; "" where there is none."""
    dead = [one for one in (Path(path), *Path(path).parents) if one.is_symlink() and not one.exists()] if path else []
    return f"; {dead[-1]} is a link to {os.readlink(dead[-1])}, which is not there" if dead else ""


def checkpoint_bytes(model: Any, n_averages: int) -> float:
    """Room for three checkpoints: all that they hold, and of what is trained the averages and two moments."""
    from atelier.core.room import size  # torch, for which a mistake in a config need not wait

    weights, trained = map(size, (model.kept_state().values(), model.trained().values()))
    return MARGIN * 3 * (weights + trained * (2 + n_averages))


def fits_on_disk(model: Any, n_averages: int, folder: Path) -> None:
    """There is room for checkpoints.

    Raises:
        UserError: there is not.
    """
    needed = checkpoint_bytes(model, n_averages) / 2**20
    free = shutil.disk_usage(folder).free / 2**20
    if free < needed:
        problem = f"{needed:.0f} MB are needed for checkpoints, {free:.0f} MB are free"
        raise UserError("run_dir", folder, problem, "run_dir=A_FOLDER_ON_A_LARGER_DISK")
