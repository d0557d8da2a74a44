"""What published sets share: the line when files are not there, one download at a time, fitting to size."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from atelier.core.errors import UserError

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's


def absent(root: str, missing: str, source: str, download: bool) -> UserError:
    """The error for a set that is not on disk.

    Args:
        root: the folder looked in.
        missing: file that is not there, or is not whole, with its path in the layout expected.
        source: origin of the set.
        download: whether a download has been tried already.
    """
    again = "" if download else "data.download=true, "
    fix = f"{again}data.root=FOLDER, or data=shapes (no files)"
    return UserError("data.root", root, f"{missing}, source {source}", fix)


def fetch(root: str, download: Callable[[], object]) -> None:
    """Call `download` with `root` locked, so that of two runs the second waits and finds the files there.

    Whatever it raises (no network, wrong checksum, quota page, full disk, missing package) is one UserError.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with open(Path(root, ".download.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            download()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":. ")
        fix = "the same command again, files put there by hand, or data=shapes"
        raise UserError("data.download", True, f"no download to {root}: {reason}", fix) from error


def with_channels(images: Tensor, channels: int) -> Tensor:
    """(N, 1 or 3, H, W) uint8 to `channels`: grey is repeated, RGB becomes its luma, rounded."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    return _in_parts(images, lambda part: torch.einsum("nchw,c->nhw", part, torch.tensor(GREY))[:, None])


def resized(images: Tensor, size: int) -> Tensor:
    """(N, C, H, H) uint8 to size x size by an antialiased bicubic resize; of that size already, unchanged."""
    if images.shape[-1] == size:
        return images
    return _in_parts(images, lambda part: interpolate(part, (size, size), mode="bicubic", antialias=True))


def _in_parts(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A float32 change of grey levels, rounded and clamped back to uint8, 1024 images at a time."""
    return torch.cat([change(part.float()).round().clamp(0, 255).byte() for part in images.split(1024)])
