"""Sets of so few images that not all can be measured: they train all the same, and the start says what is not."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from atelier.core.errors import UserError
from atelier.metrics import suite
from atelier.metrics.classifier import classifier_of
from tests.compose import composed

SMALL = [
    "model=ae", "model.net.width=4", "model.net.n_downs=1", "model.net.latent_channels=2", "data=images",
    "data.image_size=8", "data.batch_size=4", "data.num_workers=0", "budget.images=8", "eval.batch_size=4",
    "callbacks.grids.n=4", "metrics=classifier", "metrics.names=[fid,kid,precision]",
    "trainer=cpu", "trainer.precision=32-true",
]  # fmt: skip


def words(tmp_path: Path, n: int, *more: str) -> list[str]:
    (tmp_path / "set").mkdir()
    for k in range(n):
        noise = np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "set" / f"{k}.png")
    return [*SMALL, f"data.root={tmp_path / 'set'}", f"data.cache={tmp_path / 'cache'}", *more]


@pytest.mark.parametrize(("n", "more", "measured"), [
    (2, ["eval.n_samples=12"], set()),
    (3, ["data.holdout=0", "eval.n_samples=12"], {"fd", "kid"}),
    (5, ["data.holdout=0", "eval.n_samples=1"], set()),
    (5, ["data.holdout=0", "eval.n_samples=12"], {"fd", "kid", "precision"}),
])  # fmt: skip
def test_what_cannot_be_measured_is_left_out_and_told_at_the_start(tmp_path, monkeypatch, capsys, n, more, measured):
    """Of n images a set with a share held out has one to test on, and one at least to train on."""
    trained = partial(classifier_of, steps=2)
    monkeypatch.setattr(suite, "classifier_of", trained if measured else lambda *_: pytest.fail("trained for nothing"))
    train.train(composed(*words(tmp_path, n, *more), run_dir=tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    found = {name for name in metrics if name.endswith("_classifier") and "/" not in name}
    assert found == {f"{name}_classifier" for name in measured}
    told = "".join(capsys.readouterr())
    missing = ", ".join(f"{name}_classifier" for name in ("fd", "kid", "precision") if name not in measured)
    line = f"{missing} left out" if measured else "no distance is measured"
    assert told.count("too few") == told.count(line) == bool(missing)
    if missing:
        assert told.index(line) < told.index("after 8 images")


@pytest.mark.parametrize("holdout", [0.1, 1.0])
def test_one_image_is_not_enough_to_hold_out_from(tmp_path, holdout):
    with pytest.raises(UserError) as error:
        train.train(composed(*words(tmp_path, 1, f"data.holdout={holdout}"), run_dir=tmp_path / "run"))
    assert error.value.problem == "no readable image is left to test" and error.value.fix.startswith("data.holdout=0 ")


def test_a_run_goes_on_with_a_copied_set_and_not_with_other_pixels(tmp_path):
    """The files keep their names and lengths; those of the copy are new."""
    given = [*words(tmp_path, 4, "metrics=none", "data.holdout=0"), "eval.n_samples=4"]
    root, run = tmp_path / "set", tmp_path / "run"
    for path in root.iterdir():
        Image.open(path).save(path, "BMP")
    train.train(composed(*given, run_dir=run))
    shutil.copytree(root, tmp_path / "copy")
    moved = [f"data.root={tmp_path / 'copy'}", "budget.images=12"]
    train.train(composed(*given, *moved, run_dir=run))
    assert json.loads((run / "summary.json").read_text())["images_seen"] == 12
    content = bytearray((tmp_path / "copy" / "2.png").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / "2.png").write_bytes(content)
    with pytest.raises(UserError, match="was started on other images"):
        train.train(composed(*given, *moved, run_dir=run))
