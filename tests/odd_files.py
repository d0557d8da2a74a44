"""Image files as people have them, drawn by a generator: whole ones of every kind, damaged ones, and other files.

A kind is a function of a generator and of what the file is to show, (H, W, 3) uint8; it gives a suffix, the bytes of
the file, and what it shows in fact, upright and on white, or None where it must be refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

Rng = np.random.Generator
Drawn = tuple[str, bytes, np.ndarray | None]
Kind = Callable[[Rng, np.ndarray], Drawn]

BACK = {  # EXIF's orientation -> what a stored picture was before a viewer turns it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LUMA = np.array([0.299, 0.587, 0.114])


def picture(rng: Rng, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a colour that hardly another picture has, lighter towards one corner."""
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in (height, width))
    slope = rng.choice([-1, 1], 2) * rng.uniform(8, 16, 2)
    colour = rng.integers(45, 211, 3) + (slope[0] * y[:, None] + slope[1] * x)[..., None]
    return colour.round().astype(np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG that Pillow does not write; `rows` begin with their filter byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows_of(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def on_white(x: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) under an alpha (H, W) of 0 .. 255."""
    part = opaque[..., None] / 255
    return x * part + 255 * (1 - part)


def luma(x: np.ndarray) -> np.ndarray:
    return (x @ LUMA).round().astype(np.uint8)


def grey3(x: np.ndarray) -> np.ndarray:
    return x[..., None].repeat(3, -1)


# ---- whole


def plain(suffix: str, format: str, **options: object) -> Kind:
    return lambda rng, x: (suffix, encoded(Image.fromarray(x), format, **options), x)


def grey(rng: Rng, x: np.ndarray) -> Drawn:
    return ".png", encoded(Image.fromarray(luma(x)), "PNG"), grey3(luma(x))


def grey_alpha(rng: Rng, x: np.ndarray) -> Drawn:
    opaque = luma(picture(rng, x.shape[1], x.shape[0]))
    image = Image.merge("LA", (Image.fromarray(luma(x)), Image.fromarray(opaque)))
    return str(rng.choice([".png", ".tif"])), encoded(image, "PNG"), on_white(grey3(luma(x)), opaque)


def colour_alpha(rng: Rng, x: np.ndarray) -> Drawn:
    opaque = luma(picture(rng, x.shape[1], x.shape[0]))
    format, suffix = [("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tiff")][rng.integers(3)]
    image = Image.fromarray(np.concatenate([x, opaque[..., None]], -1))
    return suffix, encoded(image, format, **({"lossless": True} if format == "WEBP" else {})), on_white(x, opaque)


def palette(rng: Rng, x: np.ndarray) -> Drawn:
    image = Image.fromarray(x).quantize(16)
    return ".png", encoded(image, "PNG"), np.asarray(image.convert("RGB"))


def palette_transparent(rng: Rng, x: np.ndarray) -> Drawn:
    """One index of a palette, or an alpha for each of them."""
    image = Image.fromarray(x).quantize(4)
    index = np.asarray(image)
    alphas = [0, 255, 255, 255] if rng.random() < 0.5 else [0, 80, 160, 255]
    told = 0 if alphas[1] == 255 else bytes(alphas)
    shown = on_white(np.asarray(image.convert("RGB")), np.array(alphas)[index.clip(0, 3)])
    return ".png", encoded(image, "PNG", transparency=told), shown


def grey16(rng: Rng, x: np.ndarray) -> Drawn:
    deep = luma(x).astype(np.uint16) * 257
    format, suffix = [("PNG", ".png"), ("TIFF", ".tif")][rng.integers(2)]
    return suffix, encoded(Image.fromarray(deep), format), grey3(luma(x))


def colour16(rng: Rng, x: np.ndarray) -> Drawn:
    return ".png", raw_png(x.shape[1], x.shape[0], 16, 2, rows_of((x.astype(np.uint16) * 257).astype(">u2"))), x


def few_bits(rng: Rng, x: np.ndarray) -> Drawn:
    """Grey of 1, 2 or 4 bits, perhaps with one level that is transparent."""
    depth = int(rng.choice([1, 2, 4]))
    level = luma(x) >> (8 - depth)
    shown = grey3(level.astype(float) * 255 / (2**depth - 1))
    bits = np.unpackbits(level[..., None], axis=-1)[..., 8 - depth :].reshape(len(level), -1)
    more = []
    if rng.random() < 0.5:
        clear = int(level[0, 0])
        more = [chunk(b"tRNS", struct.pack(">H", clear))]
        shown = on_white(shown, np.where(level == clear, 0, 255))
    return ".png", raw_png(x.shape[1], x.shape[0], depth, 0, rows_of(np.packbits(bits, axis=-1)), *more), shown


def one_colour_transparent(rng: Rng, x: np.ndarray) -> Drawn:
    """8 or 16 bits of each channel, one colour of them transparent."""
    corner = x[0, 0]
    shown = on_white(x, np.where((x == corner).all(-1), 0, 255))
    if rng.random() < 0.5:
        clear = chunk(b"tRNS", struct.pack(">HHH", *(int(v) for v in corner)))
        return ".png", raw_png(x.shape[1], x.shape[0], 8, 2, rows_of(x), clear), shown
    clear = chunk(b"tRNS", struct.pack(">HHH", *(int(v) * 256 + 7 for v in corner)))
    return (
        ".png",
        raw_png(x.shape[1], x.shape[0], 16, 2, rows_of((x.astype(np.uint16) * 256 + 7).astype(">u2")), clear),
        shown,
    )


def cmyk(rng: Rng, x: np.ndarray) -> Drawn:
    format, suffix = [("JPEG", ".jpg"), ("TIFF", ".tif")][rng.integers(2)]
    return (
        suffix,
        encoded(Image.fromarray(x).convert("CMYK"), format, **({"quality": 95} if format == "JPEG" else {})),
        x,
    )


def one_bit(rng: Rng, x: np.ndarray) -> Drawn:
    image = Image.new("1", x.shape[1::-1], int(rng.integers(2)))
    format, suffix = [("PNG", ".png"), ("TIFF", ".tif"), ("BMP", ".bmp")][rng.integers(3)]
    return suffix, encoded(image, format), grey3(np.asarray(image).astype(np.uint8) * 255)


def frames(rng: Rng, x: np.ndarray) -> Drawn:
    """Several pictures in a file, of which the first counts."""
    format, suffix = [("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif"), ("PNG", ".apng.png")][rng.integers(4)]
    others = [Image.fromarray(255 - x), Image.fromarray(x // 2)]
    options = {"lossless": True} if format == "WEBP" else {}
    return suffix, encoded(Image.fromarray(x), format, save_all=True, append_images=others, **options), x


def turned(rng: Rng, x: np.ndarray) -> Drawn:
    """Stored on its side, with the EXIF tag that says so."""
    orientation = int(rng.integers(2, 9))
    image = Image.fromarray(x).transpose(BACK[orientation])
    format, suffix = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")][rng.integers(4)]
    if format == "TIFF":
        return suffix, encoded(image, format, tiffinfo={274: orientation}), x
    exif = Image.Exif()
    exif[274] = orientation
    return suffix, encoded(image, format, exif=exif, **{"JPEG": {"quality": 95}}.get(format, {})), x


def odd_exif(rng: Rng, x: np.ndarray) -> Drawn:
    """EXIF that says nonsense, which is no reason to refuse the pixels."""
    exif = Image.Exif()
    exif[274] = int(rng.choice([0, 9, 255]))
    exif[315] = "näme\0" * 3
    return ".jpg", encoded(Image.fromarray(x), "JPEG", quality=95, exif=exif), x


def appended(rng: Rng, x: np.ndarray) -> Drawn:
    """Bytes behind the end, as some phones and mailers leave them."""
    suffix, content, _ = plain_kind(rng)(rng, x)
    return suffix, content + rng.bytes(int(rng.integers(1, 400))), x


def other_suffix(rng: Rng, x: np.ndarray) -> Drawn:
    """One of the formats under the name of another."""
    suffix, content, _ = plain_kind(rng)(rng, x)
    return str(rng.choice([one for one in (".png", ".jpg", ".webp", ".bmp", ".tiff") if one != suffix])), content, x


def upper(rng: Rng, x: np.ndarray) -> Drawn:
    suffix, content, _ = plain_kind(rng)(rng, x)
    return suffix.upper() if rng.random() < 0.5 else suffix.title(), content, x


PLAIN: list[Kind] = [
    plain(".png", "PNG"),
    plain(".jpg", "JPEG", quality=95),
    plain(".jpeg", "JPEG", quality=95, progressive=True),
    plain(".jfif", "JPEG", quality=95),
    plain(".webp", "WEBP", lossless=True),
    plain(".webp", "WEBP", quality=95),
    plain(".bmp", "BMP"),
    plain(".tif", "TIFF"),
    plain(".tiff", "TIFF", compression="tiff_lzw"),
]
WHOLE: list[Kind] = [
    *PLAIN, grey, grey_alpha, colour_alpha, palette, palette_transparent, grey16, colour16, few_bits,
    one_colour_transparent, cmyk, one_bit, frames, turned, odd_exif, appended, other_suffix, upper,
]  # fmt: skip


def plain_kind(rng: Rng) -> Kind:
    return PLAIN[rng.integers(len(PLAIN))]


# ---- damaged, or no image in spite of its name


def cut(rng: Rng, x: np.ndarray) -> Drawn:
    """Cut at any byte. Where nothing of the pixels is missing it may still be read: see `may_be_read`."""
    suffix, content, _ = [*PLAIN, frames, palette, grey16][rng.integers(len(PLAIN) + 3)](rng, x)
    return suffix, content[: int(rng.integers(1, len(content)))], None


def empty(rng: Rng, x: np.ndarray) -> Drawn:
    return ".png", b"", None


def text(rng: Rng, x: np.ndarray) -> Drawn:
    what = [b"<!DOCTYPE html><html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 300]
    return ".jpg", what[rng.integers(3)], None


def other_format(rng: Rng, x: np.ndarray) -> Drawn:
    """A format that is not read under the name of one that is."""
    format = str(rng.choice(["GIF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"]))
    image = ImageOps.pad(Image.fromarray(x), (16, 16))
    return str(rng.choice([".png", ".jpg"])), encoded(image, format), None


def numbers32(rng: Rng, x: np.ndarray) -> Drawn:
    """TIFF of floats, or of integers of 32 bits."""
    kind = np.float32 if rng.random() < 0.5 else np.int32
    return ".tif", encoded(Image.fromarray(luma(x).astype(kind)), "TIFF"), None


def bomb(rng: Rng, x: np.ndarray) -> Drawn:
    """A header of very many pixels, and hardly any behind it."""
    side = int(rng.choice([9_500, 12_000, 16_000]))  # Pillow warns of the first two, and refuses the last by itself
    kind = rng.integers(4)
    if kind == 0:
        return ".png", raw_png(side, side, 8, 2, b"\0" * 100), None
    if kind == 1:
        content = bytearray(encoded(Image.fromarray(x), "JPEG"))
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", side, side)
        return ".jpg", bytes(content), None
    if kind == 2:
        content = bytearray(encoded(Image.fromarray(x), "BMP"))
        content[18:26] = struct.pack("<ii", side, side)
        return ".bmp", bytes(content), None
    content = bytearray(encoded(Image.fromarray(x), "WEBP", lossless=True))
    at = content.index(b"VP8L") + 9
    content[at : at + 4] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    return ".webp", bytes(content), None


DAMAGED: list[Kind] = [cut, cut, cut, cut, empty, text, other_format, numbers32, bomb]


# ---- what is called like no image


def of_no_suffix(rng: Rng, x: np.ndarray) -> tuple[str, bytes]:
    """(end of the name, bytes) of a file of a format that is not read."""
    image = encoded(Image.fromarray(x), "PNG")
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - x)]}
    kinds = [
        (".gif", encoded(Image.fromarray(x), "GIF", **frames)), (".heic", b"\0\0\0\x18ftypheic"), (".txt", b"a note\n"),
        (".svg", b"<svg/>"), ("_none", image), (".png.part", image[:40]), (".JPG_original", image),
        (".md", b"# a set\n"), (".pdf", b"%PDF-1.4"), (".csv", b"a,b\n"), (".png~", image), (".avif", b""),
    ]  # fmt: skip
    return kinds[rng.integers(len(kinds))]


def stem(rng: Rng, k: int) -> str:
    """A name that no other file has, as odd as file systems allow; `k` tells it from others."""
    odd = [
        "{}", "img_{:04d}", "with space {}", " lead {}", "trail {} ", "größe 画像 {}", "\U0001f3a8{}", "line\nbreak {}",
        "-{}", "--flag={}", "a'b\"c{}", "{} (1), [2]=3", "{}.tar", "{}.jpg", "%41{}", "$(x){}", "{};rm", "b\\s{}",
        "e\u0301{}", "\udcff{}", "CASE{}", "case{}", "null{}", "{}\u202e", "{}.", "#{}", "*{}?", "~{}", "\x07{}",
    ]  # fmt: skip
    if rng.random() < 0.05:
        return f"{k}".ljust(240, "x")
    return odd[rng.integers(len(odd))].format(k)
