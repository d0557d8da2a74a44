"""What the words of a request say of a model and its set, or why these cannot do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from atelier.core.batch import Batch
from atelier.core.errors import UserError, nearest
from atelier.core.ranges import Labels
from atelier.data.base import DataModule
from atelier.models.base import Autoencoder, Generator, Latent, SeesAttributes, StyleBased
from atelier.models.diffusion_model import DiffusionModel
from atelier.requests import masks, prompts

TEXTS = {
    "prompt": "text",
    "prompts": "text",
    "instruction": "instruction",
    "negative": "negative",
}  # word -> Batch field
OF_IMAGES = ("project", "edit", "inpaint", "invert")  # verbs that change an image, of the test split or of a file


def verbs(model: Generator) -> dict[str, Callable]:
    """Verbs that a model can be asked for -> the method whose keyword arguments are the options of that verb."""
    able: dict[str, Callable] = {"sample": model.sample}
    if isinstance(model, Latent):
        able |= {"interpolate": model.generate, "traverse": model.generate, "project": model.generate}
    if isinstance(model, DiffusionModel):
        able |= {"edit": model.edit, "inpaint": model.inpaint, "invert": model.invert}
        able |= {"interpolate": model.sample, "paths": model.denoising}
        able |= {"attention": model.attending} if model.reads_words else {}
    if isinstance(model, StyleBased):
        able |= {"mix": model.generate, "truncate": model.synthesize}
    if isinstance(model, Autoencoder):
        able |= {"reconstruct": model.decode, "resample": model.decode}
    return able


def verb(asked: str | None, model: Generator) -> str:
    """What to do: as asked, or `reconstruct` for autoencoders and else `sample`.

    Raises:
        UserError: the model cannot do that.
    """
    able = list(verbs(model))
    if asked is None:
        return "reconstruct" if "reconstruct" in able else "sample"
    if asked not in able:
        fix = f"do={nearest(asked, able) or able[0]}"
        raise UserError("do", asked, f"{type(model).__name__} can {', '.join(able)}", fix)
    return asked


def _refuse_own(key: str, typed: Any, verb: str, files: bool) -> None:
    """Raises UserError where a verb gives test images back, which have conditions of their own."""
    if verb in ("reconstruct", "resample") or (verb == "project" and not files):
        raise UserError(key, typed, f"do={verb} is of the test images in order", "do=sample")


def named(label: Labels | None, data: DataModule) -> Labels | None:
    """What was typed as `label`, by the names that the set has."""
    if label is None or isinstance(label, list):
        return label and [named(one, data) for one in label]
    return data.names.called(data.names.label(label, data.n_classes))


def items(verb: str, model: Generator, data: DataModule, label: Labels | None, files: bool) -> list[int] | None:
    """Test images with this label, or with each of several in turn, whose condition the pictures take; None: all.

    Args:
        files: whether the request is about image files, whose class only the user knows.

    Raises:
        UserError: nothing here follows a label, no test image has it, or it is not given and must be.
    """
    if label is None:
        if verb == "project" and files and "label" in model.needs:
            raise UserError("label", None, "of which class are the images?", data.names.typed(0))
        return None
    _refuse_own("label", label, verb, files)
    if "label" not in model.needs:
        raise UserError("label", label, f"{type(model).__name__} was trained without labels", "leave label out")
    order = torch.tensor(data.order("test"))
    labels, having = data.split("test").labels[order], []
    for one in label if isinstance(label, list) else [label]:
        having.append(order[labels == data.names.label(one, data.n_classes)].tolist())
        if not having[-1]:
            raise UserError("label", one, f"none of {len(order)} test images has it", data.names.typed(int(labels[0])))
    return [found[k % len(found)] for k in range(max(map(len, having))) for found in having]


def case(asked: str | None, model: Generator) -> str:
    """The direction asked for, or the model's first."""
    if asked is None or asked in model.cases:
        return model.cases[0] if asked is None else asked
    named = [name for name in model.cases if name]
    fix = f"direction={nearest(asked, named) or named[0]}" if named else "leave direction out"
    problem = (
        f"{type(model).__name__} goes {', '.join(named)}" if named else f"{type(model).__name__} has no directions"
    )
    raise UserError("direction", asked, problem, fix)


def refuse_scale(asked: int | None, model: Generator) -> None:
    """Raises UserError where results would be of another size than was asked for."""
    scale_factor = model.scale_factor
    if asked is not None and asked != scale_factor:
        problem = f"{type(model).__name__} of this run makes images {scale_factor} times as wide"
        raise UserError("scale_factor", asked, problem, f"scale_factor={scale_factor}, or another run")


def signs(
    verb: str, model: Generator, data: DataModule, typed: list[str] | str | None, files: bool
) -> list[int] | None:
    """What is to become of each attribute (`SetNames.signs`); None where nothing was typed.

    Raises:
        UserError: no such attribute, nothing here takes attributes, or those that files keep are not known.
    """
    if typed is None:
        return None
    shown = typed if isinstance(typed, str) else ",".join(typed)
    _refuse_own("attributes", shown, verb, files)
    if not model.needs & {"target", "attributes"}:
        raise UserError("attributes", shown, f"{type(model).__name__} takes none", "leave attributes out")
    signs = data.names.signs(typed)
    if files and 0 in signs and not isinstance(model, SeesAttributes):
        whole = ",".join(name for name, sign in zip(data.names.attributes, signs, strict=True) if sign > 0)
        problem = "what else the files show is not known, name all that they are to show"
        raise UserError("attributes", shown, problem, f"attributes={whole or '[]'}")
    return signs


def texts(words: Mapping[str, Any], model: Generator) -> Batch:
    """The texts that were typed, or stand in a file, as Batch fields; one is for all pictures, several come in turn.

    Raises:
        UserError: the model does not read one, or there are two for one thing.
    """
    if words["prompt"] is not None and words["prompts"] is not None:
        raise UserError("prompts", words["prompts"], "prompt says it already", "leave prompt or prompts out")
    found: Batch = {}
    for word, name in TEXTS.items():
        if words[word] is None:
            continue
        if not model.needs & ({"text", "instruction"} if name == "negative" else {name}):
            raise UserError(word, words[word], f"{type(model).__name__} of this run reads none", f"leave {word} out")
        found[name] = prompts.read(words[word]) if word == "prompts" else [str(words[word])]
        model.refuse_long("instruction" if "instruction" in model.needs else "text", found[name], word)
    return found


def refuse_words(words: Mapping[str, Any], model: Generator) -> None:
    """Raises UserError where a word is missing, or is of another verb than the one asked for."""
    verb, able = words["do"], verbs(model)
    for name, its in (("strength", "edit"), ("mask", "inpaint"), ("resamplings", "inpaint")):
        if words[name] is not None and verb != its:
            fix = f"do={its}" if its in able else f"leave {name} out"
            raise UserError(name, words[name], f"do={verb} takes none", fix)
    if verb == "inpaint" and words["mask"] is None:
        fix = f"mask=FILE_OR_FOLDER, or {', '.join(masks.WORDS)}"
        raise UserError("mask", None, "nothing says what is to be filled", fix)
    changes = verb in OF_IMAGES and set(model.source_fields.values()) <= {"image"}
    if changes and verb in ("edit", "invert") and "mask" in model.needs:
        raise UserError("do", verb, f"{type(model).__name__} of this run fills holes", "do=inpaint mask=FILE_OR_FOLDER")
    if words["source"] is not None and not changes and not (model.source_fields and verb == "sample"):
        others = ["sample"] if model.source_fields else [other for other in OF_IMAGES if other in able]
        fix = next((f"do={other}, or leave source out" for other in others), "leave source out")
        raise UserError("source", words["source"], f"do={verb} takes no source images", fix)
