"""Each family as small as it goes: 8 px, nets of a few hundred weights, seconds a run.

What makes a family small is the list `TINY` of its test, tests/models/test_<family>.py, which is read and not imported:
plain strings. `FIRST/vae` there is the run of another family that this one stands on.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent / "models"
COMMON = [
    "data=shapes",
    "data.image_size=8",
    "data.batch_size=8",
    "data.n_train_scenes=20",
    "data.n_test_scenes=16",
    "budget.images=96",
    "eval.every_images=32",
    "eval.n_samples=8",
    "eval.n_real=8",
    "eval.batch_size=4",
    "eval.n_diagnosed=8",
    "checkpoint.every_images=24",
    "callbacks.table.every_images=8",
    "callbacks.grids.every_images=1000",
    "callbacks.grids.n=4",
    "callbacks.ema.half_lives=[16,64]",
    "callbacks.ema.ramp=1.0",
    "metrics=none",
    "trainer=cpu",
    "trainer.precision=32-true",
]
UNET = [
    "model.net.width=4",
    "model.net.multipliers=[1,2]",
    "model.net.attention=[]",
    "model.net.cond_dim=8",
    "model.embedder.dim=8",
]
PICTURELESS = ("noisy_classifier", "clip")  # families that make no images
FOUR = ("ddpm", "gan", "vae", "ldm")  # the shapes of module: one optimizer, two, an autoencoder, one on another run


def _listed(test: Path) -> list[str] | None:
    """The list `TINY` of a test; None where it has none, which is then not about a family."""
    for node in ast.parse(test.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TINY":
            return ast.literal_eval(node.value)
    return None


_OWN = {path.stem.removeprefix("test_"): _listed(path) for path in sorted(TESTS.glob("test_*.py"))}
STANDS_ON = {  # a family -> the one whose run it needs
    family: found.group(1) for family, words in _OWN.items() if (found := re.search(r"FIRST/(\w+)", str(words)))
}
TINY: dict[str, list[str]] = {  # what others stand on comes first
    family: [*COMMON, *(re.sub(r"FIRST/\w+", "FIRST", word) for word in words)]
    for family, words in sorted(_OWN.items(), key=lambda item: item[0] in STANDS_ON)
    if words is not None
}


def tiny(family: str, root: Path | str = "unused") -> list[str]:
    """The words of a family's run, which stands on a run in `root`."""
    return [word.replace("FIRST", f"{root}/{STANDS_ON.get(family)}") for word in TINY[family]]


def task(page: Path) -> list[str]:
    """The word that chooses what a page of conf/model needs beside images of the shapes world, if anything.

    A page whose model is another's says so in its header; all others need what their family does.
    """
    text = page.read_text()
    family = re.search(r"^_target_: atelier\.models\.(\w+)\.", text, re.MULTILINE)
    if family is None:
        return re.findall(r"^# Needs:.*\((data\.task=\w+)", text, re.MULTILINE)
    return [word for word in TINY[family.group(1)] if word.startswith("data.task=")]
