"""From an image file to pixels: one rule for each kind of file; a refusal is a `BadImage` with its reason.

format    PNG, JPEG, WebP, BMP and TIFF by content, whatever the name says; nothing else is even tried
pixels    more than max_pixels in the header: refused before decoding
animated  the first frame; of several pages or pictures the first
EXIF      turned upright
16 bit    grey: v / 257 rounded, so 65535 is 255; colour: the high byte; never clipped; 32 bit: refused
alpha     (RGBA, LA, palette or one transparent colour) laid over `background`
colour    CMYK, palette, 1 bit to RGB; to one channel by 0.299 R + 0.587 G + 0.114 B; grey to RGB by repeating
profile   colour profiles are not applied
damage    every pixel is decoded and every PNG checksum compared, so a file that was cut is refused
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from atelier.core.ranges import PositiveInt

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16B"}

Background = Literal["white", "grey", "black"]
GREYS = {"white": 255, "grey": 128, "black": 0}
SCALES = {"L;2": 85, "L;4": 17}  # of the grey levels in a PNG of 2 or 4 bits to those of 8
ON_ITS_SIDE = range(5, 9)  # EXIF's orientations where width and height change places
Decoded = TypeVar("Decoded")
Source = Path | BytesIO  # a file, or what one holds
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom outside


class BadImage(Exception):
    """A file that is no image of the rule above; the text says why."""


def read(
    path: Source,
    size: PositiveInt,
    channels: Literal[1, 3],
    background: Background,
    max_pixels: PositiveInt,
    crop: Box | None = None,
) -> Tensor:
    """The file as (channels, size, size) uint8: `decode`, then `square`. Raises BadImage."""
    return pixels(square(decode(path, channels, background, max_pixels), size, crop))


def read_with_alpha(
    path: Path, size: PositiveInt, channels: Literal[1, 3], background: Background, max_pixels: PositiveInt
) -> Tensor:
    """The file as (channels + 1, size, size) uint8: as `read` gives it, then how opaque it is, 255 where wholly.

    Raises BadImage.
    """
    both = _opened(path, max_pixels, lambda image: (flatten(image, channels, background), opacity(image)))
    return torch.cat([pixels(square(one, size)) for one in both])


def has_alpha(path: Path) -> bool:
    """Whether an image file says of its pixels how opaque they are, from its header."""
    with Image.open(path, formats=FORMATS) as image:
        return image.has_transparency_data


def pixels(image: Image.Image) -> Tensor:
    """A decoded image as (1 or 3, H, W) uint8."""
    return pil_to_tensor(image).contiguous()


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file once it is turned upright, from its header."""
    with Image.open(path, formats=FORMATS) as image:
        turned = image.format == "TIFF"  # by Pillow itself
        on_its_side = not turned and image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
        return (image.height, image.width) if on_its_side else image.size


def check(path: Path, max_pixels: PositiveInt) -> str:
    """Why the file cannot be read, after decoding it whole; "" where it can."""
    try:
        decode(path, 3, "white", max_pixels)
    except BadImage as error:
        return str(error)
    return ""


def decode(path: Source, channels: Literal[1, 3], background: Background, max_pixels: PositiveInt) -> Image.Image:
    """The file as an upright image of mode L or RGB, by the rules at the head of this file; or BadImage."""
    return _opened(path, max_pixels, lambda image: flatten(image, channels, background))


def flatten(image: Image.Image, channels: Literal[1, 3], background: Background) -> Image.Image:
    """Any mode to L (one channel) or RGB (three), alpha laid over the background. Raises BadImage."""
    image = _known(image)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (GREYS[background],) * 3 + (255,))
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def opacity(image: Image.Image) -> Image.Image:
    """Any mode to its alpha as L, 255 = opaque, which all of it is where it has none. Raises BadImage."""
    image = _known(image)
    if image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    return Image.new("L", image.size, 255)


def square(image: Image.Image, size: PositiveInt, crop: Box | None = None) -> Image.Image:
    """The central square, resized to size x size.

    Antialiased bicubic resize (Pillow: the filter widens with the reduction) of the shorter side to `size`,
    then the centre; an image of size x size stays as it is, a smaller one is enlarged. Only the square is
    computed, so that a 1 x 10,000,000 image costs nothing. `crop` is cut out before; BadImage where it
    reaches outside.
    """
    if crop is not None:
        if crop[2] > image.width or crop[3] > image.height:
            raise BadImage(f"{image.width} x {image.height} pixels, too small for the crop {crop}")
        image = image.crop(crop)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Inside, Pillow does not warn of many pixels, which are for max_pixels to refuse; in all threads at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _opened(path: Source, max_pixels: int, change: Callable[[Image.Image], Decoded]) -> Decoded:
    """What is made of the upright image of a file; anything that goes wrong is a BadImage."""
    n_bytes = None if isinstance(path, Path) else path.getbuffer().nbytes
    try:
        with path.open("rb") if isinstance(path, Path) else path as file:
            return change(ImageOps.exif_transpose(_checked(file, max_pixels)))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        empty = path.stat().st_size == 0 if isinstance(path, Path) else not n_bytes
        raise BadImage("0 bytes" if empty else "not a PNG, JPEG, WebP, BMP or TIFF image") from error
    except Exception as error:  # damaged files make Pillow raise TypeError, SyntaxError and more
        strerror = getattr(error, "strerror", None)
        raise BadImage(strerror or str(error) or type(error).__name__) from error


def _checked(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The image, not yet decoded; of a PNG every checksum is compared, which decoding does not do."""
    image = Image.open(file, formats=FORMATS)
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        raise BadImage(f"{pixels} pixels, data.max_pixels is {max_pixels}")
    if image.format == "TIFF" and image.mode == "I":
        raise BadImage("pixels of 32 bits")
    if image.format != "PNG":
        return image
    image.verify()
    file.seek(0)
    return _rescaled(Image.open(file, formats=FORMATS))


def _rescaled(image: Image.Image) -> Image.Image:
    """A PNG, not yet decoded, whose transparent colour is on the scale of the pixels that Pillow makes: 8 bits."""
    clear, how = image.info.get("transparency"), image.tile[0].args if image.tile else ""
    if how in SCALES and clear is not None:
        image.info["transparency"] = clear * SCALES[how]
    if how == "RGB;16B" and clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image


def _known(image: Image.Image) -> Image.Image:
    """An image of one of the MODES, of 8 bits. Raises BadImage."""
    if image.mode not in MODES:
        raise BadImage(f"pixels of mode {image.mode}")
    return _eight_bits(image) if image.mode.startswith("I") else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to L, or to LA where one value is declared transparent."""
    values = np.asarray(image).astype(np.float64)
    grey = Image.fromarray(np.floor(values / 257 + 0.5).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
