"""Samples of a model against the test split: the same code during training and in evaluate.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atelier.core.batch import Batch, Cond, rows_of
from atelier.core.errors import UserError
from atelier.core.ranges import NonNegInt, PositiveInt
from atelier.core.rng import ImageRngs
from atelier.data.base import DataModule
from atelier.evaluation import diagnostics
from atelier.evaluation.gathering import Parts, Progress, all_ranks, out_of_memory, read, shares
from atelier.evaluation.paired import compared
from atelier.evaluation.paired import values as paired_values
from atelier.evaluation.rate_distortion import Curve, rate_distortion
from atelier.evaluation.reconstruction import Context, examined, likelihood, reconstructed
from atelier.images.pixels import to_float, to_uint8
from atelier.metrics.memorisation import Z, thumbnails
from atelier.metrics.shapes import OF_VALID, judge_values, reasons, verdict_of_true, wilson
from atelier.metrics.suite import Suite
from atelier.models.base import (
    Autoencoder,
    Bounded,
    Examined,
    Generator,
    Likelihood,
    Model,
    sampling_mode,
)
from atelier.models.diffusion_model import DiffusionModel
from atelier.shapes.judge import Verdict, judge

ASKED = ("label", "attributes")  # of a condition, what a judge can look for
N_TRAINING = 10_000  # images that a classifier of the set is trained on
READ_AT_ONCE = 256  # of them
PIXELS = 2**18  # of the images that a CPU takes at once, 256 of 32 x 32: no error comes where its memory runs out


@dataclass
class Evaluator:
    """What is judged, and how many of it.

    Args:
        n_samples: generated images; of a translator no more than the fewest sources of a direction.
        n_real: test images they are compared with (all there are, if fewer).
        batch_size: images sampled at once, over all ranks, on a CPU fewer of large ones; changes no image by more than
            a grey level.
        seed: seed of the samples' noise.
        suite: distances and their net.
        n_diagnosed: images of each split that a diffusion model denoises for its diagnostics; 0 = none, None: as many
            as the callback chooses (`callbacks/diagnostics.py`), none outside of training.
    """

    n_samples: PositiveInt
    n_real: PositiveInt
    batch_size: PositiveInt
    seed: NonNegInt
    suite: Suite
    n_diagnosed: NonNegInt | None = 0
    at_once: int = field(init=False)  # images of the last model
    half_widths: dict[str, float] = field(default_factory=dict, init=False)  # of 95 % intervals, of the last figures
    reasons: list[tuple[str, int, int]] = field(default_factory=list, init=False)  # of the judge, for the last samples
    curve: Curve | None = field(default=None, init=False)  # of the last test images, where the bound was measured

    def prepare(self, model: Model, data: DataModule, device: torch.device) -> str | None:
        """Get the feature net ready, unless no distance can be measured; gives one line to tell the user, or None.

        Raises:
            UserError: the bound is asked for, and the model has none.
        """
        if self.suite.rate_distortion and not isinstance(model, Bounded):
            problem = f"{type(model).__name__} does not diffuse pixels, whose grey levels the bound counts"
            raise UserError("metrics", "rate_distortion", problem, "metrics=auto")
        if not isinstance(model, Generator):
            return None
        too_few = self._too_few(model, data)
        if too_few:
            self.suite.names = []
        return (
            self.suite.prepare(_fingerprint(data, "train"), lambda: training_set(data), device, data.judged) or too_few
        )

    def _too_few(self, model: Generator, data: DataModule) -> str | None:
        """One line where the images of a run tell no distance at all, neither of samples nor of what is given back."""
        n, n_real = self._n_samples(model, data), max(self._n_real(model, data, case) for case in model.cases)
        n_back = self._n_test(data) if isinstance(model, Autoencoder) else 0
        suite = self.suite
        if not suite.active or suite.measurable(n_real, n) or suite.measurable(n_back, n_back):
            return None
        return f"no distance is measured: {n} samples beside {n_real} test images are too few"

    def left_out(self, model: Model, data: DataModule) -> str | None:
        """One line that names the distances for which a run has too few images; None where there are enough."""
        if not self.suite.active or not isinstance(model, Generator):
            return None
        n, counts = self._n_samples(model, data), {case: self._n_real(model, data, case) for case in model.cases}
        measured = [set(self.suite.measurable(n_real, n)) for n_real in counts.values()]
        missing = [self.suite.named(name) for name in self.suite.names if not all(name in found for found in measured)]
        if not missing:
            return None
        return f"{', '.join(missing)} left out: {n} samples beside {min(counts.values())} test images are too few"

    def __call__(
        self, model: Model, data: DataModule, options: dict[str, Any], context: Context, progress: Progress
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Values by name and the protocol they hold under; all ranks get all of it.

        What makes no images has none, unless it is `Examined`.

        Args:
            model: in eval mode, holding the weights to judge.
            options: of `model.sample`, beside its defaults.
            context: the precision that sampling runs under.
            progress: called with (what, done, of how many); may raise to stop.
        """
        values: dict[str, float] = {}
        fitting = max(1, PIXELS // data.image_size**2) if model.device.type == "cpu" else self.batch_size
        self.at_once = min(self.batch_size, fitting)
        if isinstance(model, Examined):
            n, rngs = self._n_test(data), partial(ImageRngs, self.seed)
            with torch.inference_mode():
                values = examined(model, data, rngs, n, self.at_once, context, progress)
            return values, self._tested(data) | {"n_test": n}
        self.half_widths = {}
        if not isinstance(model, Generator):
            return values, {}
        with sampling_mode(model, options):
            for case in () if self._bounds(model) and self.suite.rate_distortion else model.cases:
                prefix = f"{case}/" if case else ""
                found = self._judge_case(model, data, case, options, context, progress)
                values |= {prefix + name: value for name, value in found.items()}
            n = self._n_test(data)
            if isinstance(model, Autoencoder):
                real = self._real(model, data, "", "test", n, progress)["features"] if self.suite.active else None
                values |= reconstructed(model, data, self.suite, real, n, self.at_once, context, progress)
            rngs = partial(ImageRngs, self.seed)
            if self._bounds(model):
                drawn = self._drawn_levels(model)
                self.curve = rate_distortion(model, data, rngs, n, drawn, self.at_once, context, progress)
                values |= self.curve.values
            elif isinstance(model, Likelihood) and not isinstance(model, Bounded):
                values |= likelihood(model, data, rngs, n, self.at_once, context, progress)
            if self._diagnosed(model):
                n = diagnostics.count(data, self.n_diagnosed)
                found = diagnostics.denoised(model, data, self.seed, n, self.at_once, context, progress)
                values |= self._with_widths(found)
        return values, self.protocol(model, data, options)

    def _bounds(self, model: Model) -> bool:
        """Whether the bound is measured: where it is asked for, or trained by."""
        return isinstance(model, Bounded) and bool(self.suite.rate_distortion or model.trained_by_bound)

    def _drawn_levels(self, model: Bounded) -> int:
        return self.suite.rate_distortion or model.drawn_levels

    def _judge_case(
        self,
        model: Generator,
        data: DataModule,
        case: str,
        options: dict[str, Any],
        context: Context,
        progress: Progress,
    ) -> dict[str, float]:
        parts = Parts()
        n = self._n_samples(model, data)
        for numbers in shares(n, self.at_once):
            progress("samples", numbers.stop, n)
            batch = data.test_batch(numbers.start, len(numbers))
            cond = model.condition(batch, case)
            with context():
                images = sample(model, cond, ImageRngs(self.seed, numbers.start, len(numbers)), options)
            images = to_uint8(images)
            facts = self._facts(model, images, _asked(cond, batch), data)
            if self.suite.clip is not None and "text" in cond:
                true = to_uint8(batch[model.real_fields[case]])
                facts |= {"clip_score": self.suite.clip_score(images, cond["text"])}
                facts |= {"real/clip_score": self.suite.clip_score(true, cond["text"])}
            if model.source_fields:
                facts |= compared(model, images, cond, batch, case, data.judged, self.suite)
            elif data.judged:
                facts |= verdict_of_true(batch[model.real_fields[case]]).rows("true/")
            parts.add(numbers, facts)
        facts = parts.gathered()
        values: dict[str, float] = paired_values(facts, data.image_size) if model.source_fields else {}
        if self.suite.active:
            values |= self._distances(model, data, case, facts, progress)
        if data.judged:
            found, self.reasons = judged(facts)
            values |= found
        values |= {name: facts[name].mean().item() for name in ("clip_score", "real/clip_score") if name in facts}
        if self._diagnosed(model):
            values |= self._memory(model, data, case, facts, progress)
        return values

    def _diagnosed(self, model: Generator) -> bool:
        return bool(self.n_diagnosed) and isinstance(model, DiffusionModel) and not self.suite.rate_distortion

    def _with_widths(self, found: dict[str, diagnostics.Estimate]) -> dict[str, float]:
        """The values alone; the intervals are noted."""
        self.half_widths |= {name: one.half_width for name, one in found.items()}
        return {name: one.value for name, one in found.items()}

    def _memory(
        self, model: Generator, data: DataModule, case: str, facts: dict[str, Tensor], progress: Progress
    ) -> dict[str, float]:
        """`memorisation`, by the features that distances are measured with, else by thumbnails."""
        if self.suite.active:
            real = self._real(model, data, case, "test", self._n_real(model, data, case), progress)["features"]
            n = min(len(facts["features"]), data.count("train", model.real_fields[case]))
            training, samples = self._real(model, data, case, "train", n, progress)["features"], facts["features"]
        else:
            n_test, n = min(len(facts["thumbnails"]), len(data.split("test"))), self._n_looked_at(data)
            real = diagnostics.thumbnails_of(data, "test", n_test, self.at_once, progress)
            training = diagnostics.thumbnails_of(data, "train", n, self.at_once, progress)
            samples = facts["thumbnails"]
        return self._with_widths({"memorisation": diagnostics.memorised(samples, real, training)})

    def _n_looked_at(self, data: DataModule) -> int:
        """Training images of which thumbnails are made."""
        return min(data.n_train, diagnostics.LOOKED_AT * diagnostics.count(data, self.n_diagnosed))

    def _facts(self, model: Generator, images: Tensor, asked: Cond, data: DataModule) -> dict[str, Tensor]:
        """What is kept of a batch of samples: what was asked of it, features, verdicts."""
        facts = {f"asked/{name}": value.cpu() for name, value in asked.items()}
        if self.suite.active:
            facts["features"] = self.suite.features(images).cpu()
        elif self._diagnosed(model):
            facts["thumbnails"] = thumbnails(images)
        if data.judged:
            facts |= judge(to_float(images.cpu())).rows("verdict/")
            facts["images"] = images.cpu()
        return facts

    def _distances(
        self, model: Generator, data: DataModule, case: str, facts: dict[str, Tensor], progress: Progress
    ) -> dict[str, float]:
        real = self._real(model, data, case, "test", self._n_real(model, data, case), progress)
        values = self.suite.compare(real["features"], facts["features"])
        n = min(len(facts["features"]), data.count("train", model.real_fields[case]))
        other = self._real(model, data, case, "train", n, progress)
        values |= {f"real/{name}": v for name, v in self.suite.compare(real["features"], other["features"]).items()}
        if "asked/label" in facts and self.suite.knows_labels:
            values["label/accuracy"] = self.suite.recognised(facts["features"], facts["asked/label"])
            values["label/accuracy_real"] = self.suite.recognised(real["features"], real["label"])
        return values

    def _real(
        self, model: Generator, data: DataModule, case: str, split: str, n: int, progress: Progress
    ) -> dict[str, Tensor]:
        """Features (and labels) of the n images that stand for a split, in order."""

        def compute() -> dict[str, Tensor]:
            parts = Parts()
            for numbers, batch in read(data, split, n, 4 * self.at_once, f"{split} images", progress):
                part = {"features": self.suite.features(to_uint8(batch[model.real_fields[case]])).cpu()}
                parts.add(numbers, part | ({"label": batch["label"]} if "label" in batch else {}))
            return parts.gathered()

        return self.suite.real(f"{_fingerprint(data, split)}{case}{n}", compute, all_ranks)

    def intervals(self, values: dict[str, float], protocol: dict[str, Any]) -> dict[str, tuple[float, float]]:
        """95 % intervals of the shares and of the diagnostics of the last figures."""
        widths = {name: half for name, half in self.half_widths.items() if half == half}
        return intervals(values, protocol) | {name: (values[name] - h, values[name] + h) for name, h in widths.items()}

    def _n_samples(self, model: Generator, data: DataModule) -> int:
        """A source that comes again would be judged twice."""
        if not model.source_fields:
            return self.n_samples
        return min(self.n_samples, *(data.count("test", model.source_fields[case]) for case in model.cases))

    def _n_test(self, data: DataModule) -> int:
        """Test images that are given back, or found probable."""
        return min(self.n_samples, len(data.split("test")))

    def _n_real(self, model: Generator, data: DataModule, case: str) -> int:
        return min(self.n_real, data.count("test", model.real_fields[case]))

    def _tested(self, data: DataModule) -> dict[str, Any]:
        """Which images and noise figures are about."""
        found = {"seed": self.seed, "split": "test", "choice": data.choice("test")}
        return found | {"data": data.fingerprint("test")}

    def protocol(self, model: Generator, data: DataModule, options: dict[str, Any]) -> dict[str, Any]:
        protocol = {"n_samples": self._n_samples(model, data)} | self._tested(data)
        if isinstance(model, Autoencoder | Likelihood) and (self._bounds(model) or not isinstance(model, Bounded)):
            protocol["n_test"] = self._n_test(data)
        if self._bounds(model):
            protocol["drawn_levels"] = self._drawn_levels(model)
        if self._diagnosed(model):
            protocol["n_diagnosed"] = diagnostics.count(data, self.n_diagnosed)
            if not self.suite.active:
                protocol["n_remembered"] = self._n_looked_at(data)
        if self.suite.active:
            counts = {case: self._n_real(model, data, case) for case in model.cases}
            one = len(set(counts.values())) == 1
            protocol |= {"n_real": counts[model.cases[0]] if one else counts}
        protocol |= self.suite.protocol()
        given = {name: value if isinstance(value, float) else str(value) for name, value in options.items()}
        if "sampler" in options:
            given["nfe"] = options["sampler"].nfe
        if "guider" in options:
            given.setdefault("guidance", options["guider"].guidance)
        return protocol | model.protocol() | given


def sample(model: Generator, cond: Cond, rngs: ImageRngs, options: dict[str, Any]) -> Tensor:
    """Images of a model; where memory runs out, half as many at a time."""
    try:
        return model.sample(cond, rngs, **options)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or len(rngs) == 1:
            raise
    half, rngs = len(rngs) // 2, rngs.again()
    parts = (slice(0, half), slice(half, None))
    return torch.cat([sample(model, rows_of(cond, p), rngs[p], options) for p in parts])


def _asked(cond: Cond, batch: Batch) -> Cond:
    """What a judge can look for of a condition; of a caption or an image, what the set says beside it."""
    known = batch if {"text", "image"} & cond.keys() else cond
    return {name: known[name] for name in ASKED if name in known}


def judged(facts: dict[str, Tensor]) -> tuple[dict[str, float], list[tuple[str, int, int]]]:
    """The judge's figures of gathered facts, and why samples were refused."""
    verdict = Verdict.of(facts, "verdict/")
    asked = {name.split("/")[1]: v for name, v in facts.items() if name.startswith("asked/")}
    images = to_float(facts["images"])
    return judge_values(verdict, asked, images, Verdict.of(facts, "true/")), reasons(verdict, images.shape[-1])


def intervals(values: dict[str, float], protocol: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the shares, and of bits per dimension where their standard error was measured.

    `judge/recall` is a share of as many true draws, and its interval says nothing of how the samples would vary.
    """
    among = {name: _among(name, values, protocol) for name, value in values.items() if value == value}
    found = {name: wilson(round(values[name] * n), n) for name, n in among.items() if n is not None}
    if (error := values.get("bpd_error", math.nan)) == error:
        found["bpd"] = (values["bpd"] - Z * error, values["bpd"] + Z * error)
    return found


def _among(name: str, values: dict[str, float], protocol: dict[str, Any]) -> int | None:
    """How many images a figure is a share of; None: it is no share. `judge/<attribute>` is of the valid samples."""
    n, (group, judge, kind) = protocol.get("n_samples", 0), name.rpartition("judge/")
    if name == "recon/valid" or name.startswith("accuracy/"):
        return protocol.get("n_test", n)  # which runs from before there was this number lack
    if name.endswith("label/accuracy") or "answer/" in name or judge and kind in ("valid", "loose", "asked", "recall"):
        return n
    if judge and kind in OF_VALID:
        return round(values[f"{group}judge/valid"] * n)
    return None


def training_set(data: DataModule) -> tuple[Tensor, Tensor | None]:
    """Images (uint8) and labels, attributes or None of chosen training images; for a classifier of the set."""
    images, chosen, parts, targets = data.split("train"), sorted(data.order("train")[:N_TRAINING]), [], []
    for first in range(0, len(chosen), READ_AT_ONCE):  # as float32 all of them would take four times their memory
        batch = images.read(chosen[first : first + READ_AT_ONCE], None)
        parts.append(to_uint8(batch["image"]))
        targets.append(batch.get("label", batch.get("attributes")))
    return torch.cat(parts), None if targets[0] is None else torch.cat(targets)


def _fingerprint(data: DataModule, split: str) -> str:
    """Changes when the images of a split would, or which of them are chosen."""
    return f"{data.fingerprint(split)}{data.choice(split)}"
