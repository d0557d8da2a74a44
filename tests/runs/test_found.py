"""What a machine is said to have: each missing thing is a line with where it was looked for, and no secret is told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from atelier.core import machine
from atelier.metrics.features import INCEPTION_FILE
from atelier.runs import found

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CANARY = "canary-5d1f-token"
RATES = {"float32": 40e9, "bf16": 100e9}
SLOW = {"float32": 50e9, "bf16": 10e9}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no variable that names another place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path


def test_extras_are_those_of_the_project() -> None:
    """By the names of their packages, whose dashes are no part of a module's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {
        name: {re.match(r"[\w-]+", package)[0].replace("-", "_") for package in packages} - {"sqlalchemy"}
        for name, packages in extras.items()
        if name != "dev"
    }
    assert packages == {
        name: {module.rpartition(".")[2] for module in extra.modules} for name, extra in found.EXTRAS.items()
    }


def test_a_package_that_is_missing_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = found.find_spec
    monkeypatch.setattr(found, "find_spec", lambda name: None if name == "datasets" else there(name))
    rows = dict(found.of_extras())
    assert rows["data"] == "not there: datasets. Needed for data=hugging_face"
    assert rows["tensorboard"].startswith("tensorboard 2.") and "site-packages" in rows["looked in"]


def test_a_part_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(found.EXTRAS, "sweep", found.Extra(("no_such_package.part", "json"), "anything"))
    assert dict(found.of_extras())["sweep"] == "not there: part. Needed for anything"


def test_weights_that_are_missing_and_there(home: Path) -> None:
    rows = dict(found.of_weights())
    place = "~/.cache/torch/hub/checkpoints"
    assert rows["Inception"].startswith(f"not there: {place}/{INCEPTION_FILE}. Needed for FID")
    assert rows["LPIPS"].startswith(f"not there: {place}/vgg16-397923af.pth, {place}/lpips_v0.1_vgg.pth. Needed for")
    assert rows["sd_vae"].startswith("not there: ~/.cache/huggingface/hub/models--stabilityai--sd-vae-ft-mse.")
    folder = home / ".cache" / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (INCEPTION_FILE, "vgg16-397923af.pth"):
        (folder / name).touch()
    rows = dict(found.of_weights())
    assert rows["Inception"] == f"there: {place}/{INCEPTION_FILE}"
    assert rows["LPIPS"].startswith(f"there: {place}/vgg16-397923af.pth; not there: {place}/lpips_v0.1_vgg.pth. Needed")


def test_without_credentials_every_place_is_told(home: Path) -> None:
    assert dict(found.of_credentials()) == {
        "W&B": "not there: WANDB_API_KEY, ~/.netrc. Needed for logger=wandb",
        "the hub": "not there: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, ~/.cache/huggingface/token. Needed for gated weights",
    }


@pytest.mark.parametrize("where", ["variables", "files", "moved"])
def test_credentials_are_there_and_not_told(where: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the address of a server too, which may have a password."""
    if where == "variables":
        monkeypatch.setenv("WANDB_API_KEY", CANARY)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        expected = "there: WANDB_API_KEY", "there: HF_TOKEN"
    else:
        server, names = "api.wandb.ai", home / ".netrc"
        if where == "moved":
            monkeypatch.setenv("WANDB_BASE_URL", f"https://me:{CANARY}@wandb.example.org:8080/x")
            monkeypatch.setenv("NETRC", str(home / "names"))
            server, names = "wandb.example.org", home / "names"
        names.write_text(f"machine {server}\nlogin user\npassword {CANARY}\n")
        (home / ".cache" / "huggingface").mkdir(parents=True)
        (home / ".cache" / "huggingface" / "token").write_text(CANARY)
        expected = f"there: ~/{names.name}", "there: ~/.cache/huggingface/token"
    rows = found.of_credentials()
    assert tuple(text for _, text in rows) == expected and CANARY not in str(rows)


def test_a_netrc_of_another_server_or_a_broken_one(home: Path) -> None:
    for text in ("machine example.org\nlogin a\npassword b\n", "machine", "\x00"):
        (home / ".netrc").write_text(text)
        assert dict(found.of_credentials())["W&B"].startswith("not there")


@pytest.mark.parametrize(
    ("asked", "has", "rates", "told"),
    [
        ("auto", True, RATES, "bf16 (bf16-mixed): trainer.precision=auto, and the CPU has bf16 instructions"),
        ("auto", False, SLOW, "float32 (32-true): trainer.precision=auto, and the CPU has no bf16"),
        (
            "bf16-mixed",
            False,
            SLOW,
            "bf16 (bf16-mixed): trainer.precision=bf16-mixed asks for it, but float32 was",
        ),
        ("32-true", True, RATES, "float32 (32-true): trainer.precision=32-true asks for it, but bf16 was 2.5 times"),
    ],
)
def test_the_precision_and_why(
    asked: str, has: bool, rates: dict[str, float], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atelier.runs import trainer

    monkeypatch.setattr(trainer, "_cpu_has_bf16", lambda: has)
    text = found.precision(asked, CPU, rates)
    assert text.startswith(told)
    slower = (text.startswith("bf16")) == (rates["bf16"] < rates["float32"])
    assert ("times as fast: trainer.precision=" in text) == slower


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1.5)
    monkeypatch.setattr(machine, "processor", lambda: "Some CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(found.os, "getloadavg", lambda: (1.4, 0.0, 0.0))
    rows = dict(found.of_machine(CPU, RATES, "32-true", tmp_path / "not" / "yet"))
    assert "busy" not in rows
    monkeypatch.setattr(found.os, "getloadavg", lambda: (6.22, 0.0, 0.0))
    assert dict(found.of_machine(CPU, RATES, "32-true", tmp_path))["busy"].startswith("a load of 6.2: others work")
    n = torch.get_num_threads()
    assert rows["cores"] == f"1.5 (Some CPU); torch uses {n} thread{'s' * (n != 1)}"
    assert rows["GPU"] == "torch sees none" and rows["GFLOP/s"].startswith("float32 40, bf16 100: a convolution")
    assert rows["disk"].endswith(f"free at {tmp_path}/not/yet") and not list(tmp_path.iterdir())


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(found.room, "there", lambda device: 79 * 10**9)
    assert found.the_device("auto").type == "cuda" and found.the_device("cpu").type == "cpu"
    told = "NVIDIA A100-SXM4-80GB, 79 GB of its memory are free, at most 312 TFLOP/s in bf16; 2 of them"
    assert found._gpu(torch.device("cuda")) == told
    assert found._gpu(CPU) == f"{told}; not used (trainer=cpu)"
