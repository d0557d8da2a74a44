"""Each figure that is shown has a sentence, and only those that are shown have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from atelier.evaluation.meanings import MEANINGS, WIDTH, meanings

RESULTS = Path(__file__).parents[2] / "results"
OTHERS = [  # that no row of results/ has
    "a2b/answer/changed", "a2b/answer/kept", "fid", "recon/fid", "real/kid", "kid_mobilenet", "is", "is_classifier",
    "precision", "recall_classifier", "clip_score", "pair/psnr_y", "pair/bicubic_ssim", "b2a/pair/lpips",
    "codes/used", "codes/perplexity", "accuracy", "accuracy/0.3", "accuracy/5_of_100", "raw/judge/valid",
    "refused: border", "refused: iou", "refused: rms",
]  # fmt: skip


def names() -> list[str]:
    rows = (json.loads(line) for path in RESULTS.glob("*.jsonl") for line in path.open())
    return sorted({name for row in rows for name in row["values"]} | set(OTHERS))


def labels(shown: list[str]) -> list[str]:
    return [line[2 : 2 + WIDTH].strip() for line in meanings(shown, 80)]


@pytest.mark.parametrize("name", names())
def test_every_figure_has_a_sentence(name: str) -> None:
    found = labels([name])
    assert len(found) == 1 or "bicubic" in name and len(found) == 2, found


def test_no_sentence_is_of_nothing_and_each_is_a_line_of_80_columns() -> None:
    assert labels(names()) == list(MEANINGS)
    assert max(map(len, meanings(names(), 80))) <= 80


def test_a_narrow_terminal_takes_more_lines() -> None:
    lines = meanings(["a2b/judge/loose", "b2a/judge/loose"], 40)
    assert max(map(len, lines)) <= 40 and len(lines) > 1
    assert re.sub(r"\s+", " ", " ".join(lines)).strip() == f"judge/loose {MEANINGS['judge/loose'][1]}"


def test_what_is_not_known_is_passed_over() -> None:
    assert meanings(["valid: circle", "loss"], 80) == []
