"""Pairs of images: their layouts, what is cut and mirrored together, what is refused; and edges drawn of any images."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from atelier.core.errors import UserError
from atelier.core.rng import generator
from atelier.data.folders import ImageFiles
from atelier.data.pairs import Edges, Pairs, edge_map, upright_size
from atelier.data.reading import SUFFIXES

SHARED = Path(__file__).parents[3] / "shared" / "data"
N = 6


def data(kind: type, root: Path, **changed: object) -> ImageFiles:
    fields = {
        "root": str(root), "holdout": 0.5, "background": "white", "max_pixels": 1 << 20, "jitter": 0,
        "on_bad_image": "error", "memory_mb": 100, "cache": f"{root}.cache",
        "image_size": 4, "image_channels": 3, "batch_size": 2, "seed": 0, "limit": None,
        "num_workers": 0, "flip": False, "n_classes": 0, "n_attributes": 0, "conditions": [],
    }  # fmt: skip
    own = {"direction": "a2b"} if kind is Pairs else {"sigma": 1.0, "threshold": 0.03}
    return kind(**fields | own | changed)


def refusal(root: Path, **changed: object) -> UserError:
    with pytest.raises(UserError) as error:
        data(Pairs, root, **changed).split("train")
    assert "\n" not in error.value.line()
    return error.value


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")


def grey(level: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


def joined(a: Image.Image, b: Image.Image) -> Image.Image:
    both = Image.new("RGB", (a.width + b.width, a.height))
    both.paste(a, (0, 0))
    both.paste(b, (a.width, 0))
    return both


def write(root: Path, layout: str, test: str = "test") -> None:
    """N training pairs with A of grey k and B of grey 100 + k, three test pairs from k = 50 on."""
    for split, numbers in (("train", range(N)), (test, range(50, 53))):
        for k in numbers:
            a, b = grey(k), grey(100 + k)
            match layout:
                case "one file":
                    save(joined(a, b), root / split / f"{k}.png")
                case "trainA":
                    save(a, root / f"{split}A" / f"{k}.png"), save(b, root / f"{split}B" / f"{k}.png")
                case "A/train":
                    save(a, root / "A" / split / "x" / f"{k}.png"), save(b, root / "B" / split / "x" / f"{k}.png")


def levels(images: torch.Tensor) -> torch.Tensor:
    return (images * 127.5 + 127.5).round().int()


@pytest.mark.parametrize("direction", ["a2b", "b2a"])
@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("layout", ["one file", "trainA", "A/train"])
def test_each_layout_gives_image_and_source(tmp_path, layout, test, direction):
    write(tmp_path / "set", layout, test)
    module = data(Pairs, tmp_path / "set", direction=direction)
    assert module.provides == {"source"}
    assert (len(module.split("train")), len(module.split("test"))) == (N, 3)
    for batch, numbers in (
        (module.split("train").read([4, 0], None), [4, 0]),
        (module.split("test").read([0, 1, 2], None), [50, 51, 52]),
    ):
        assert set(batch) == {"image", "source", "index"}
        of_a, of_b = (batch[name] for name in (("source", "image") if direction == "a2b" else ("image", "source")))
        assert of_a.shape == of_b.shape == (len(numbers), 3, 4, 4) and of_a.dtype == torch.float32
        assert levels(of_a)[:, 0, 0, 0].tolist() == numbers
        assert levels(of_b)[:, 2, 3, 3].tolist() == [100 + k for k in numbers]


@pytest.mark.parametrize("layout", ["one file", "trainA", "A/train"])
def test_without_a_test_split_a_share_is_held_out(tmp_path, layout):
    write(tmp_path / "set", layout, test="unused")
    module = data(Pairs, tmp_path / "set")
    sizes = len(module.split("train")), len(module.split("test"))
    assert sum(sizes) == N and min(sizes) > 0
    batch = module.test_batch(0, sizes[1])
    assert torch.equal(levels(batch["image"]), levels(batch["source"]) + 100)


def test_pairs_in_one_channel(tmp_path):
    write(tmp_path / "set", "one file")
    batch = data(Pairs, tmp_path / "set", image_channels=1).split("test").read([0, 1], None)
    assert batch["image"].shape == batch["source"].shape == (2, 1, 4, 4)
    assert levels(batch["source"])[:, 0, 1, 1].tolist() == [50, 51]


def coordinates(root: Path, layout: str = "one file", size: int = 40) -> tuple[Image.Image, Image.Image]:
    """Two noisy images as the pair 0 of a set."""
    rng = np.random.default_rng(0)
    a, b = (Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2))
    if layout == "one file":
        save(joined(a, b), root / "train" / "0.png")
    else:
        save(a, root / "trainA" / "0.png"), save(b, root / "trainB" / "0.png")
    return a, b


def resized(image: Image.Image, size: int) -> torch.Tensor:
    """(3, size, size) in [-1, 1]: Pillow's antialiased bicubic, of this half alone."""
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("layout", ["one file", "trainA"])
def test_jitter_cuts_both_at_the_same_random_place(tmp_path, layout):
    a, b = coordinates(tmp_path / "set", layout)
    images = data(Pairs, tmp_path / "set", image_size=8, jitter=3, holdout=0.0).split("train")
    plain = images.read([0], None)
    torch.testing.assert_close(plain["source"][0], resized(a, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain["image"][0], resized(b, 8), atol=1e-6, rtol=0)
    wide, places = torch.cat([resized(a, 11), resized(b, 11)]), []
    for k in range(60):
        batch = images.read([0], [generator(k)])
        both = torch.cat([batch["source"][0], batch["image"][0]])
        where = [
            (y, x) for y in range(4) for x in range(4) if torch.allclose(both, wide[:, y : y + 8, x : x + 8], atol=1e-6)
        ]
        assert len(where) == 1
        places += where
    assert len(set(places)) > 12 and {y for y, _ in places} == {x for _, x in places} == {0, 1, 2, 3}


def test_both_are_mirrored_together_and_each_image_by_its_own_generator(tmp_path):
    coordinates(tmp_path / "set")
    images = data(Pairs, tmp_path / "set", image_size=8, jitter=2, flip=True, holdout=0.0).split("train")
    straight = data(Pairs, tmp_path / "set", image_size=8, jitter=2, holdout=0.0).split("train")
    batch = images.read([0] * 20, [generator(k) for k in range(20)])
    still = straight.read([0] * 20, [generator(k) for k in range(20)])
    turned = [torch.equal(one, other.flip(-1)) for one, other in zip(batch["image"], still["image"], strict=True)]
    assert 4 < sum(turned) < 16
    for k, flipped in enumerate(turned):
        for name in ("image", "source"):
            assert torch.equal(batch[name][k], still[name][k].flip(-1) if flipped else still[name][k])
            assert torch.equal(images.read([0], [generator(k)])[name][0], batch[name][k])


def test_a_file_without_its_partner_is_named(tmp_path):
    write(tmp_path / "set", "trainA")
    (tmp_path / "set" / "trainB" / "4.png").unlink()
    (tmp_path / "set" / "testA" / "52.png").rename(tmp_path / "set" / "testA" / "53.png")
    assert refusal(tmp_path / "set").problem == "1 files have no partner of the same name, first trainA/4.png"
    (tmp_path / "set" / "trainA" / "4.png").unlink()
    assert refusal(tmp_path / "set").problem == "2 files have no partner of the same name, first testB/52.png"


@pytest.mark.parametrize(("layout", "gone", "problem"), [
    ("trainA", "trainB", "there is a trainA/ but no trainB/"),
    ("A/train", "A", "there is a B/ but no A/"),
    ("A/train", "B/test", "there is a A/test/ but no B/test/"),
    ("trainA", "testA", "there is a testB/ but no testA/"),
])  # fmt: skip
def test_a_missing_side_is_named(tmp_path, layout, gone, problem):
    write(tmp_path / "set", layout)
    (tmp_path / "set" / gone).rename(tmp_path / "gone")
    assert refusal(tmp_path / "set").problem == problem


def test_nothing_there_is_one_line(tmp_path):
    assert refusal(tmp_path / "set").problem == "no such folder"
    (tmp_path / "set").mkdir()
    assert refusal(tmp_path / "set").problem == f"0 images ({' '.join(SUFFIXES)}) under {tmp_path}/set"


def test_an_odd_width_has_no_halves(tmp_path):
    write(tmp_path / "set", "one file")
    save(Image.new("RGB", (17, 8)), tmp_path / "set" / "train" / "3.png")
    for _ in range(2):  # the second time from the cache
        assert refusal(tmp_path / "set").problem == (
            "1 of 9 images cannot be read: train/3.png (17 pixels wide: no two halves)"
        )
    with pytest.warns(UserWarning, match="1 of 9 images cannot be read and are left out"):
        assert len(data(Pairs, tmp_path / "set", on_bad_image="skip").split("train")) == N - 1


def test_what_is_known_of_single_images_is_not_taken_for_halves(tmp_path):
    save(Image.new("RGB", (17, 8)), tmp_path / "set" / "3.png")
    assert len(data(Edges, tmp_path / "set", holdout=0.0).split("train")) == 1
    assert "no two halves" in refusal(tmp_path / "set", holdout=0.0).problem


def test_a_bad_file_takes_its_partner_with_it(tmp_path):
    write(tmp_path / "set", "trainA")
    (tmp_path / "set" / "trainB" / "2.png").write_bytes(b"")
    assert "1 of 18 images cannot be read: trainB/2.png (0 bytes)" in refusal(tmp_path / "set").problem
    with pytest.warns(UserWarning, match="1 of 18"):
        batch = data(Pairs, tmp_path / "set", on_bad_image="skip").split("train").read(list(range(N - 1)), None)
    assert levels(batch["source"])[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5]
    assert torch.equal(levels(batch["image"]), levels(batch["source"]) + 100)


def test_partners_of_other_proportions_are_refused_and_of_other_sizes_are_not(tmp_path):
    write(tmp_path / "set", "trainA")
    save(grey(102, size=16), tmp_path / "set" / "trainB" / "2.png")
    assert len(data(Pairs, tmp_path / "set").split("train")) == N
    save(Image.new("RGB", (8, 9)), tmp_path / "set" / "trainB" / "2.png")
    assert refusal(tmp_path / "set").problem == (
        "1 of 6 pairs differ in proportions, first trainA/2.png (8 x 8) and trainB/2.png (8 x 9)"
    )


def test_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (8, 4)).save(tmp_path / "upright.jpg")
    assert upright_size(tmp_path / "turned.jpg") == (4, 8) and upright_size(tmp_path / "upright.jpg") == (8, 4)


@pytest.mark.parametrize(("image_size", "jitter", "kept"), [(120, 0, True), (120, 60, False), (200, 0, False)])
def test_pairs_are_kept_where_both_sides_fit(tmp_path, image_size, jitter, kept):
    """Nine pairs of 2 x 3 x 120 x 120 bytes are 0.74 of the megabyte; another 180 x 180 are too many."""
    write(tmp_path / "set", "trainA")
    module = data(Pairs, tmp_path / "set", image_size=image_size, jitter=jitter, memory_mb=1)
    assert module.split("train").views.wide.keep == module.split("test").views.plain.keep == kept


def test_direction_changes_the_fingerprint_and_sets_go_to_workers(tmp_path):
    write(tmp_path / "set", "trainA")
    one, other = (data(Pairs, tmp_path / "set", direction=way) for way in ("a2b", "b2a"))
    assert one.fingerprint("test") != other.fingerprint("test")
    images = one.split("train")
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read([2], [generator(1)])["source"], images.read([2], [generator(1)])["source"])


def test_a_changed_partner_changes_the_fingerprint(tmp_path):
    write(tmp_path / "set", "trainA")
    before = data(Pairs, tmp_path / "set").fingerprint("train")
    save(grey(7, size=16), tmp_path / "set" / "trainB" / "2.png")
    assert data(Pairs, tmp_path / "set").fingerprint("train") != before


# ---- edges ----------------------------------------------------------------------------------------------------------


def square(low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """(1, 3, 32, 32): rows 8 to 23 and columns 10 to 19 are bright."""
    image = torch.full((1, 3, 32, 32), low)
    image[:, :, 8:24, 10:20] = high
    return image


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (1.0, -1.0), (0.0, 0.6)])
def test_the_edges_of_a_square_are_lines_of_one_pixel_where_it_ends(low, high):
    edges = edge_map(square(low, high), sigma=1.0, threshold=0.03)
    assert edges.shape == (1, 1, 32, 32) and set(edges.unique().tolist()) == {-1.0, 1.0}
    black = edges[0, 0] < 0
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    beyond = torch.maximum((x - 15).abs() - 5, (y - 16).abs() - 8)  # signed distance from the outline
    assert not black[beyond.abs() > 1.5].any()  # nowhere else
    for rows in black[11:21]:  # away from the corners: one pixel at either side
        assert rows.sum() == 2 and rows[9:11].sum() == rows[19:21].sum() == 1
    for columns in black.T[13:17]:
        assert columns.sum() == 2 and columns[7:9].sum() == columns[23:25].sum() == 1
    assert 40 <= black.sum() <= 60  # the outline is 52 long


def test_no_edge_in_flat_images_slow_ramps_and_at_the_border():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)  # 1/63 of the range a pixel
    for image in (torch.zeros(1, 3, 16, 16), ramp):
        assert (edge_map(image, 1.0, 0.03) == 1).all()


def steepest(sigma: float) -> float:
    """Of a step of height 1 under a discrete Gaussian, over the two pixels around a pixel at the step, by hand."""
    weights = {k: math.exp(-(k**2) / (2 * sigma**2)) for k in range(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)}
    return (weights[0] + weights[1]) / sum(weights.values()) / 2


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_the_threshold_is_a_change_of_luma_a_pixel(sigma):
    step = torch.full((1, 3, 32, 32), -0.5)
    step[..., 16:] = 0.3  # 0.4 of luma
    assert (edge_map(step, sigma, 0.99 * 0.4 * steepest(sigma)) < 0).any()
    assert (edge_map(step, sigma, 1.01 * 0.4 * steepest(sigma)) == 1).all()


def test_luma_weighs_the_colours():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        colour = torch.full((1, 3, 16, 16), -1.0)
        colour[:, channel, :, 8:] = 1
        light = torch.full((1, 1, 16, 16), -1.0)
        light[..., 8:] = 2 * weight - 1
        for image in (colour, light):
            assert (edge_map(image, 1.0, 0.99 * weight * steepest(1.0)) < 0).any()
            assert (edge_map(image, 1.0, 1.01 * weight * steepest(1.0)) == 1).all()


def reference(light: np.ndarray, sigma: float, threshold: float) -> np.ndarray:
    """Where edges are in luma (H, W) of 0 .. 1, by scipy's filters and angles, in float64."""
    smooth = ndimage.gaussian_filter(light, sigma, mode="nearest", radius=math.ceil(3 * sigma))
    across, down = (ndimage.sobel(smooth, axis=axis, mode="nearest") / 8 for axis in (1, 0))
    steep = np.hypot(across, down)
    around, found = np.pad(steep, 1), np.zeros(light.shape, dtype=bool)
    for y, x in np.ndindex(*light.shape):
        eighth = round(math.atan2(down[y, x], across[y, x]) / (math.pi / 4)) % 4
        dy, dx = ((0, 1), (1, 1), (1, 0), (1, -1))[eighth]
        beside = around[1 + y + dy, 1 + x + dx], around[1 + y - dy, 1 + x - dx]
        found[y, x] = steep[y, x] > threshold and steep[y, x] >= max(beside)
    return found


def test_edges_agree_with_another_implementation():
    noise = torch.rand(4, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.nn.functional.interpolate(noise[..., ::4, ::3], (40, 30), mode="bicubic").clamp(-1, 1)
    edges = edge_map(images, 0.8, 0.03)[:, 0] < 0
    luma = (torch.einsum("bchw,c->bhw", images.double(), torch.tensor([0.299, 0.587, 0.114]).double()) + 1) / 2
    wanted = np.stack([reference(one, 0.8, 0.03) for one in luma.numpy()])
    assert 0.05 < wanted.mean() < 0.5
    assert (edges.numpy() != wanted).mean() < 1e-3  # float32 beside float64


def test_a_map_depends_on_its_image_alone():
    images = torch.rand(9, 3, 33, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[0, :, :32, :32] = square()[0]
    whole = edge_map(images, 1.0, 0.03)
    assert torch.equal(torch.cat([edge_map(one[None], 1.0, 0.03) for one in images]), whole)
    assert torch.equal(edge_map(images.flip(-1), 1.0, 0.03).flip(-1)[1:], whole[1:])


def test_edges_are_the_source_of_images_cut_and_mirrored(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(N):
        save(
            Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 40)),
            tmp_path / "set" / f"{k}.png",
        )
    module = data(Edges, tmp_path / "set", image_size=16, jitter=4, flip=True, holdout=0.0)
    assert module.provides == {"source"}
    plain = module.test_batch(0, N)
    moved = module.split("train").read(list(range(N)), [generator(k) for k in range(N)])
    for batch in (plain, moved):
        assert set(batch) == {"image", "source", "index"} and batch["source"].shape == (N, 3, 16, 16)
        assert torch.equal(batch["source"], edge_map(batch["image"], 1.0, 0.03).expand(-1, 3, -1, -1))
        assert 0.02 < (batch["source"] < 0).float().mean() < 0.5
    assert not torch.equal(plain["image"], moved["image"])
    assert torch.equal(
        moved["source"], module.split("train").read(list(range(N)), [generator(k) for k in range(N)])["source"]
    )
    one = data(Edges, tmp_path / "set", image_size=16, image_channels=1, holdout=0.0).test_batch(0, 2)
    assert one["source"].shape == one["image"].shape == (2, 1, 16, 16)


def test_options_of_edges_reach_the_map_and_the_fingerprint(tmp_path):
    write(tmp_path / "set", "one file")
    sets = [data(Edges, tmp_path / "set", image_size=16, **more) for more in ({}, {"threshold": 0.9}, {"sigma": 9.0})]
    dark = [(module.test_batch(0, 3)["source"] < 0).float().mean().item() for module in sets]
    assert dark[0] > 0 and dark[1] == dark[2] == 0
    assert len({module.fingerprint("test") for module in sets}) == 3


@pytest.mark.skipif(not (SHARED / "fluent_emoji128").is_dir(), reason="no ../shared/data/fluent_emoji128")
def test_edges_of_emoji(tmp_path):
    module = data(Edges, SHARED / "fluent_emoji128", cache=str(tmp_path), holdout=0.1, image_size=64, threshold=0.03)
    assert len(module.split("train")) + len(module.split("test")) == 2980
    dark = (module.test_batch(0, 100)["source"] < 0).float().mean((1, 2, 3))
    assert 0.05 < dark.mean() < 0.2 and dark.min() > 0.005 and dark.max() < 0.3
