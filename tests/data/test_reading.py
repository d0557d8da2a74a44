"""Each kind of file gives the pixels that the rule says, or a BadImage with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atelier.data.reading import BadImage, check, decode, flatten, read, square, upright_size

MAX_PIXELS = 64_000_000
FORMATS = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}


def saved(path: Path, image: Image.Image, format: str = "PNG", **options: object) -> Path:
    image.save(path, format, **options)
    return path


def pixels(path: Path, channels: int = 3, background: str = "white") -> np.ndarray:
    return np.asarray(decode(path, channels, background, MAX_PIXELS))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def refusal(path: Path, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImage) as error:
        decode(path, 3, "white", max_pixels)
    assert check(path, max_pixels) == str(error.value) != ""
    return str(error.value)


def png(header: bytes, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given IHDR and raw scan lines, chunk by chunk."""
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_rgb_comes_back_exactly(tmp_path, format):
    image = noise(5, 7, 3)
    path = saved(tmp_path / "a", Image.fromarray(image), format, **FORMATS[format])
    assert (pixels(path) == image).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 300, 40000, 65535]], dtype=np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    assert pixels(path, 1).tolist() == [[0, 1, 156, 255]]  # round(v / 257)
    assert pixels(path, 3)[0, 2].tolist() == [156, 156, 156]


@pytest.mark.parametrize("kind", ["<i4", ">u2", "<u2"])
def test_wide_grey_modes_of_pillow(kind):
    image = Image.fromarray(np.array([[300, 40000]], dtype=kind).astype(kind))
    assert np.asarray(flatten(image, 1, "white")).tolist() == [[1, 156]]


def test_grey_tiff_of_16_bit_is_scaled_and_of_32_refused(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(np.array([[0, 300, 40000, 65535]], dtype=np.uint16)), "TIFF")
    assert pixels(path, 1).tolist() == [[0, 1, 156, 255]]
    for values, problem in ((np.int32([[70000]]), "pixels of 32 bits"), (np.float32([[0.5]]), "pixels of mode F")):
        assert refusal(saved(path, Image.fromarray(values), "TIFF")) == problem


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_picture_on_its_side_is_turned_and_measured_upright(tmp_path, format):
    """Pillow turns a TIFF by itself, so that it must not be turned twice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (24, 8), (200, 0, 0))
    stored.paste((0, 0, 200), (0, 0, 12, 8))
    path = saved(tmp_path / "a", stored, format, exif=exif)
    assert upright_size(path) == decode(path, 3, "white", MAX_PIXELS).size == (8, 24)
    shown = pixels(path)
    assert shown[2, 4, 2] > 150 > 50 > shown[2, 4, 0] and shown[-3, 4, 0] > 150  # blue, which was left, is above


def test_16_bit_colour_keeps_the_high_byte(tmp_path):
    line = b"\0" + struct.pack(">6H", 300, 40000, 65535, 0, 256, 255)
    (tmp_path / "a.png").write_bytes(png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), line))
    assert pixels(tmp_path / "a.png").tolist() == [[[1, 156, 255], [0, 1, 0]]]


def test_one_declared_transparent_grey_of_16_bit(tmp_path):
    line = b"\0" + struct.pack(">2H", 40000, 300)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, line, (b"tRNS", struct.pack(">H", 300))))
    assert pixels(tmp_path / "a.png", 1).tolist() == [[156, 255]]


@pytest.mark.parametrize(("background", "grey"), [("white", 255), ("grey", 128), ("black", 0)])
def test_alpha_lies_over_the_background(tmp_path, background, grey):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [200, 100, 0, 51]]], dtype=np.uint8)
    got = pixels(saved(tmp_path / "a.png", Image.fromarray(rgba)), 3, background)[0]
    assert got[0].tolist() == [grey] * 3  # fully transparent red
    assert got[1].tolist() == [255, 0, 0]
    assert np.abs(got[2] - (0.2 * np.array([200, 100, 0]) + 0.8 * grey)).max() <= 1


def test_grey_with_alpha(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(np.array([[[100, 255], [100, 0]]], dtype=np.uint8)))
    assert Image.open(path).mode == "LA"
    assert pixels(path, 1, "white").tolist() == [[100, 255]]
    assert pixels(path, 3, "black").tolist() == [[[100] * 3, [0] * 3]]


@pytest.mark.parametrize(("options", "second"), [({}, [0, 255, 0]), ({"transparency": 1}, [0, 0, 0])])
def test_palette_with_and_without_a_transparent_colour(tmp_path, options, second):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path / "a.png", image, **options)
    assert pixels(path, 3, "black").tolist() == [[[255, 0, 0], second]]


def test_palette_with_alpha_for_each_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path / "a.png", image, transparency=b"\x00\xff")
    assert pixels(path, 3, "white").tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_transparent_colour_of_rgb_and_grey(tmp_path):
    image = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8))
    path = saved(tmp_path / "a.png", image, transparency=(9, 8, 7))
    assert pixels(path, 3, "white").tolist() == [[[255, 255, 255], [1, 2, 3]]]
    path = saved(tmp_path / "b.png", Image.fromarray(np.array([[9, 1]], dtype=np.uint8)), transparency=9)
    assert pixels(path, 1, "white").tolist() == [[255, 1]]


def test_one_bit(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(np.array([[True, False]])))
    assert Image.open(path).mode == "1"
    assert pixels(path, 1).tolist() == [[255, 0]]
    assert pixels(path, 3).tolist() == [[[255] * 3, [0] * 3]]


def test_grey_and_colour_to_either_number_of_channels(tmp_path):
    grey = saved(tmp_path / "grey.png", Image.fromarray(np.array([[77]], dtype=np.uint8)))
    assert pixels(grey, 3).tolist() == [[[77, 77, 77]]]
    colour = saved(tmp_path / "colour.png", Image.new("RGB", (1, 1), (200, 100, 50)))
    assert pixels(colour, 1).tolist() == [[round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]]


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_jpeg(tmp_path, channels):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert Image.open(path).mode == "CMYK"
    want = np.array([255, 0, 0] if channels == 3 else [76])  # no cyan, full magenta and yellow: red
    assert np.abs(pixels(path, channels)[4, 4].astype(int) - want).max() <= 3


def test_exif_orientation_is_applied(tmp_path):
    image = noise(8, 4, 3)  # 8 rows, 4 columns
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    path = saved(tmp_path / "a.png", Image.fromarray(image), exif=exif)
    assert (pixels(path) == np.rot90(image, -1)).all()
    path = saved(tmp_path / "a.jpg", Image.fromarray(image), "JPEG", exif=exif)
    assert pixels(path).shape == (4, 8, 3)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_animated_gives_the_first_frame(tmp_path, format, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((10, 20, 30), (200, 100, 50))]
    path = saved(tmp_path / "a", frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    assert pixels(path)[0, 0].tolist() == [10, 20, 30]


def test_first_picture_of_a_multi_picture_jpeg(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((10, 20, 30), (200, 100, 50))]
    path = saved(tmp_path / "a.jpg", frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(path)[0, 0].astype(int) - [10, 20, 30]).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "PPM", "EPS", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, format):
    path = saved(tmp_path / "a.png", Image.new("RGB", (16, 16)), format)
    assert refusal(path) == "not a PNG, JPEG, WebP, BMP or TIFF image"


def test_photoshop_renamed_is_refused(tmp_path):
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 1, 8, 3) + bytes(12) + bytes(2) + bytes(3)
    (tmp_path / "a.png").write_bytes(header)
    assert Image.open(tmp_path / "a.png").format == "PSD"  # it is one Pillow would open
    assert refusal(tmp_path / "a.png") == "not a PNG, JPEG, WebP, BMP or TIFF image"


def test_files_that_are_no_images(tmp_path):
    contents = {b"": "0 bytes", b"<html>404</html>": "not a PNG, JPEG, WebP, BMP or TIFF image"}
    for content, reason in contents.items():
        (tmp_path / "a.jpg").write_bytes(content)
        assert refusal(tmp_path / "a.jpg") == reason
    assert refusal(tmp_path / "gone.jpg") == "No such file or directory"


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    """9,000 x 9,000 pixels in a few kB: below the size at which Pillow itself says anything."""
    header = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, bytes(9000 * 1126)))
    assert (tmp_path / "a.png").stat().st_size < 20_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert refusal(tmp_path / "a.png") == "81000000 pixels, data.max_pixels is 64000000"


def test_the_cap_is_inclusive_and_pillows_own_limit_is_kept(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (10, 10)))
    assert check(path, 100) == ""
    assert refusal(path, 99) == "100 pixels, data.max_pixels is 99"
    assert Image.MAX_IMAGE_PIXELS == 89478485
    (tmp_path / "b.png").write_bytes(png(struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0), b""))
    assert "exceeds limit" in refusal(tmp_path / "b.png", 10**9)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cut", [5, 8, 12, 16, 20, 60, 0.5])
def test_cut_files_are_refused(tmp_path, format, cut):
    path = saved(tmp_path / "a", Image.fromarray(noise(16, 16, 3)), format, **FORMATS[format])
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if isinstance(cut, int) else data[: len(data) // 2])
    refusal(path)


def test_a_changed_pixel_byte_of_a_png_is_refused(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(noise(16, 16, 3)))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 1
    path.write_bytes(data)
    assert "checksum" in refusal(path)


@pytest.mark.parametrize("error", [TypeError("x"), SyntaxError("x"), struct.error("x"), MemoryError(), KeyError(1)])
def test_whatever_pillow_raises_is_a_bad_image(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.png", Image.new("L", (1, 1)))

    def load(self):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    refusal(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL.TiffImagePlugin")
def test_mutated_files_are_read_or_refused(tmp_path):
    """600 damaged files: each gives pixels of the right shape or a reason, nothing else."""
    rng = np.random.default_rng(0)
    path, read_well, refused = tmp_path / "a", 0, 0
    originals = []
    for format, options in FORMATS.items():
        for mode in ("L", "P", "RGB", "CMYK", "RGBA"):
            file = io.BytesIO()
            try:
                Image.fromarray(noise(16, 12, 3)).convert(mode).save(file, format, **options)
            except OSError:  # this format cannot hold this mode
                continue
            originals.append(file.getvalue())
    for k in range(600):
        data = bytearray(originals[k % len(originals)])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data) if rng.random() < 0.5 else 64)] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if k % 5 == 0 else data)
        try:
            assert read(path, 8, 3, "white", 1 << 20).shape == (3, 8, 8)
            read_well += 1
        except BadImage as error:
            assert str(error)
            refused += 1
    assert read_well + refused == 600 and min(read_well, refused) > 50


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_read_gives_channels_first(tmp_path, channels, mode):
    image = Image.fromarray(noise(6, 6, 3))
    path = saved(tmp_path / "a.png", image)
    got = read(path, 6, channels, "white", MAX_PIXELS)
    assert got.dtype == torch.uint8 and got.shape == (channels, 6, 6)
    want = np.asarray(image.convert(mode)).reshape(6, 6, channels).transpose(2, 0, 1)
    assert (got.numpy() == want).all()


def test_square_takes_the_centre():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    assert (np.asarray(square(Image.fromarray(wide), 4)) == 200).all()
    assert (np.asarray(square(Image.fromarray(wide.transpose(1, 0, 2)), 4)) == 200).all()


def test_an_odd_margin_blurs_nothing():
    image = noise(4, 7, 3)
    assert (np.asarray(square(Image.fromarray(image), 4)) == image[:, 1:5]).all()


def test_square_is_antialiased():
    """One-pixel stripes become their mean; without antialiasing they would stay black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(square(Image.fromarray(stripes), 8)).astype(int)
    assert np.abs(small[:, 1:-1] - 127.5).max() < 4


def test_square_equals_resize_then_centre_crop():
    image = Image.fromarray(noise(40, 80, 3))
    whole = image.resize((20, 10), Image.Resampling.BICUBIC).crop((5, 0, 15, 10))
    assert np.abs(np.asarray(square(image, 10)).astype(int) - np.asarray(whole)).max() <= 1


def test_square_after_a_crop():
    image = noise(20, 30, 3)
    assert (np.asarray(square(Image.fromarray(image), 8, (3, 5, 11, 13))) == image[5:13, 3:11]).all()
    with pytest.raises(BadImage, match="too small"):
        square(Image.fromarray(image), 8, (25, 5, 33, 13))


def test_a_very_long_image_costs_nothing():
    assert square(Image.new("L", (1, 1_000_000)), 64).size == (64, 64)
