"""Parts and arrows of tiny models: against what their families are, FlopCounterMode and the samplers' own counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atelier.reporting import diagram, structure
from atelier.reporting.structure import Part, Structure
from atelier.runs import folders


def seen(folder: Path) -> tuple[Structure, Structure, folders.LoadedRun]:
    """Of a step of training and of an image; the run afterwards."""
    run = folders.load(folder, ema=True)
    sampling = structure.of_sampling(run.model, run.model.condition(run.data.test_batch(0, 1), run.model.cases[0]))
    return structure.of_training(run.model, run.data.split("train").read([0, 1, 2, 3], None)), sampling, run


def test_a_vae_decodes_noise_and_is_trained_through_both_halves(finished: dict[str, Path]) -> None:
    training, sampling, run = seen(finished["vae"])
    assert set(training.arrows) == {
        ("image", "net.encoder"), ("net.encoder", "net.decoder"), ("noise", "net.decoder"),
        ("net.encoder", "loss"), ("net.decoder", "loss"),
    }  # fmt: skip
    assert sampling.arrows == [("noise", "net.decoder"), ("net.decoder", "result")] and sampling.evaluations == 1
    decoder = run.model.net.decoder
    (part,) = sampling.parts
    assert part.parameters == sum(p.numel() for p in decoder.parameters()) and not part.frozen
    with FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, *run.model.net.latent_shape))
    assert part.gflop * 1e9 == pytest.approx(counter.get_total_flops())
    assert diagram.sentence(training).startswith("image -> net.encoder -> net.decoder -> loss")


def test_a_discriminator_sees_both_kinds_and_what_they_are_of(finished: dict[str, Path]) -> None:
    training, sampling, _ = seen(finished["pix2pix"])
    into = {a for a, b in training.arrows if b == "discriminator"}
    assert {"source", "image", "generator"} <= into and "discriminator" not in {part.name for part in sampling.parts}
    assert ("source", "generator") in sampling.arrows


def test_evaluations_are_those_of_the_sampler(finished: dict[str, Path]) -> None:
    for family in ("ddpm", "ldm"):
        _, sampling, run = seen(finished[family])
        assert sampling.evaluations == run.model.protocol()["nfe"] > 1
        assert ("embedder", "net") in sampling.arrows and ("label", "embedder") in sampling.arrows
    frozen = {part.name for part in sampling.parts if part.frozen}
    assert frozen == {"codec.decoder"}
    _, sampling, run = seen(finished["vqprior"])
    assert sampling.evaluations == run.model.codes(run.data.test_batch(0, 1)["image"]).shape[1]


def test_two_translators_feed_each_other(finished: dict[str, Path]) -> None:
    training, _, _ = seen(finished["cyclegan"])
    assert {("generator_a2b", "generator_b2a"), ("generator_b2a", "generator_a2b")} <= set(training.arrows)
    drawn = diagram.svg(training, "CycleGAN")
    assert drawn.count('class="arrow"') == len(training.arrows)


def test_texts_feed_what_reads_them(finished: dict[str, Path]) -> None:
    run = folders.load(finished["clip"], ema=True)
    training = structure.of_training(run.model, run.data.split("train").read([0, 1, 2, 3], None))
    assert {("text", "net.text"), ("image", "net.image")} <= set(training.arrows)
    assert "text" in training.sources


def test_columns_of_a_drawing_go_with_the_arrows() -> None:
    """Sources just before what they feed, the end last; an arrow back keeps its place."""
    parts = [Part(name, 10, False, 0.0, 1) for name in ("a", "b", "c")]
    arrows = [("x", "a"), ("a", "b"), ("b", "c"), ("n", "c"), ("c", "a"), ("c", "loss")]
    assert diagram._columns(Structure(parts, arrows)) == [["x"], ["a"], ["b", "n"], ["c"], ["loss"]]


def test_sizes_in_words() -> None:
    assert diagram.size(Part("net", 857_000, False, 0.0312, 50)) == "0.86 M, 0.031 GFLOP, 50 x"
    assert diagram.size(Part("embedder", 1_728, False, 1e-6, 1)) == "1,728 weights"
    assert diagram.size(Part("net.quantizer", 0, False, 0.0, 1)) == "no trained weights"
