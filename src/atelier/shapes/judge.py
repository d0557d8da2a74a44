"""The judge of the shapes world: analysis by synthesis, no learned weights; definition and tolerances are frozen.

An image is explained as a scene (ground, colour, centre, shape, size, fill), the scene is drawn again, and the two
are compared. It separates valid scenes from nearly valid ones, not pretty ones from ugly ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier.shapes import world
from atelier.shapes.world import COLOUR_RGB, GROUND_RGB, N_LABELS, RADII, SHAPES, SIZES, Scenes

BORDER_COLOUR = 0.20  # greatest distance (Euclid, RGB 0..1) of a border pixel from the ground
FAINT = 0.30  # coverage below counts as none
BORDER, RMS = 0.95, 0.11
LOOSE_IOU, LOOSE_RMS = 0.72, 0.14
OUTSIDE = 0.1  # weight of pixels outside the object in rms
REACH = 1.12  # of the widest shape (the triangle's corners), in radii
PIXELS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in N images; every field is (N,).

    Attributes:
        valid, loose: bool; a scene of the world, and nearly one.
        border: share of border pixels that are ground. iou: of the best template. rms: error of the scene redrawn.
        shape, colour, size, fill, ground: int64 numbers of the attributes. cx, cy: centre, float32.
    """

    valid: Tensor
    loose: Tensor
    border: Tensor
    iou: Tensor
    rms: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    fill: Tensor
    ground: Tensor
    cx: Tensor
    cy: Tensor

    def __len__(self) -> int:
        return len(self.valid)

    def rows(self, prefix: str) -> dict[str, Tensor]:
        """Every field under its name behind `prefix`, as `of` takes them back."""
        return {f"{prefix}{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, rows: dict[str, Tensor], prefix: str) -> Verdict | None:
        """The verdict among rows, which may hold others; None where it is not there."""
        own = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
        return cls(**own) if own else None

    @property
    def scenes(self) -> Scenes:
        """The scenes seen, for `world.label`, `world.attributes`, `world.captions`, `world.render`."""
        return Scenes(self.shape, self.colour, self.size, self.fill, self.ground, self.cx, self.cy)


def least_iou(image_size: int) -> float:
    """The soft IoU that a valid scene has at this size: 0.80 at 16 px, 0.84, 0.86 from 64 px."""
    return 0.80 if image_size <= 16 else 0.84 if image_size < 64 else 0.86


@torch.inference_mode()
def judge(images: Tensor) -> Verdict:
    """The verdict on images (N, 3, S, S) in [-1, 1], S from 16 to 256; one that is not finite is not valid."""
    chunks = images.split(max(1, PIXELS_AT_ONCE // images.shape[-1] ** 2))
    verdicts = [_judge(chunk) for chunk in chunks]
    return Verdict(*(torch.cat([getattr(v, field.name) for v in verdicts]) for field in fields(Verdict)))


def coverage(verdict: Verdict) -> float:
    """Share of the 36 labels seen among the valid images, 0 .. 1."""
    return len(world.label(verdict.scenes)[verdict.valid].unique()) / N_LABELS


@torch.inference_mode()
def duplicates(images: Tensor) -> float:
    """Share of images (N, C, H, W) in [-1, 1] with another one nearer than 2 grey levels rms, 0 .. 1."""
    pixels = images.flatten(1).float()
    least = 2 / 127.5 * pixels.shape[1] ** 0.5
    near = 0
    for first in range(0, len(pixels), 1024):
        distance = torch.cdist(pixels[first : first + 1024], pixels)
        near += int(((distance < least).sum(1) > 1).sum())  # each is near itself
    return near / len(pixels)


def _judge(images: Tensor) -> Verdict:
    rgb = (images.float() + 1) / 2  # (N, 3, S, S)
    seen, ground, border = _ground(rgb)
    colour, a = _unmixed(rgb, seen)  # (N,), (N, S, S)
    cx, cy = _centroid(a)
    shape, size, iou = _template(a, cx, cy)
    fill, rms = _fill(rgb, Scenes(shape, colour, size, torch.ones_like(size), ground, cx, cy))
    clear = border >= BORDER
    valid = clear & (iou >= least_iou(rgb.shape[-1])) & (rms <= RMS)
    loose = clear & (iou > LOOSE_IOU) & (rms < LOOSE_RMS)
    return Verdict(valid, loose, border, iou, rms, shape, colour, size, fill, ground, cx, cy)


def _ground(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The median of the border pixels (N, 3), the ground nearest to it (N,), and the share of them near that (N,)."""
    edges = [rgb[:, :, 0], rgb[:, :, -1], rgb[:, :, 1:-1, 0], rgb[:, :, 1:-1, -1]]
    border, grounds = torch.cat(edges, dim=2), GROUND_RGB.to(rgb.device)  # (N, 3, 4S - 4)
    seen = border.median(2).values
    ground = torch.cdist(seen, grounds).argmin(1)
    distance = (border - grounds[ground][:, :, None]).norm(dim=1)
    return seen, ground, (distance <= BORDER_COLOUR).float().mean(1)


def _unmixed(rgb: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The colour that, mixed with white over the ground as seen (N, 3), leaves the least squared residual (N,), and
    its coverage (N, S, S).

    A pixel minus ground, d, is explained as u A + s B with A = colour - ground, B = white - ground: least squares,
    negative shares cut to 0, then u + s to 1. Residuals are compared by |d|^2 - |d - u A - s B|^2.
    """
    d = rgb.flatten(2) - seen[:, :, None]  # (N, 3, P)
    A, B = COLOUR_RGB.to(rgb.device) - seen[:, None], 1 - seen[:, None]  # (N, 6, 3), (N, 1, 3)
    dA, dB = A @ d, B @ d  # (N, 6, P), (N, 1, P)
    AA, AB, BB = ((p * q).sum(2, keepdim=True) for p, q in ((A, A), (A, B), (B, B)))  # (N, 6 or 1, 1)
    det = (AA * BB - AB * AB).clamp(min=1e-6)  # 0 where a ground, colour and white are in line: never near GROUNDS
    u, s = ((dA * BB - dB * AB) / det).clamp_(min=0), ((dB * AA - dA * AB) / det).clamp_(min=0)
    a = u + s
    over = a.clamp(min=1)
    u, s, a = u / over, s / over, a.clamp_(max=1)
    gain = u * (2 * dA - u * AA - 2 * s * AB) + s * (2 * dB - s * BB)
    colour = gain.sum(2).argmax(1)
    a = a[torch.arange(len(a), device=a.device), colour]
    return colour, a.masked_fill_(a < FAINT, 0).view(len(a), *rgb.shape[2:])


def _centroid(a: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of coverage (N, S, S) as cx, cy (N,); the middle of an empty image."""
    axis = (torch.arange(a.shape[-1], device=a.device) + 0.5) * 2 / a.shape[-1] - 1
    mass = a.sum((1, 2)).clamp(min=1e-6)
    return a.sum(1) @ axis / mass, a.sum(2) @ axis / mass


def _template(a: Tensor, cx: Tensor, cy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, size and soft IoU (N,) of the template at the centre that fits coverage (N, S, S) best.

    IoU <= the ratio of the two areas, so the templates of like area are tried first, and of the others only those
    that could still win: the result is that of trying all twelve.
    """
    area, known = a.sum((1, 2)), _areas(a.shape[-1]).to(a.device)  # (N,), (12,)
    ratio = area[:, None] / known
    bound = 1.05 * torch.minimum(ratio, 1 / ratio)  # (N, 12)
    iou = torch.zeros_like(bound)
    first = bound > 0.75
    for tried in (first, ~first):
        tried = tried & (bound > iou.amax(1, keepdim=True))
        for template in range(len(known)):
            rows = tried[:, template].nonzero()[:, 0]
            if len(rows):
                shape, size = divmod(template, len(SIZES))
                iou[rows, template] = _soft_iou(a, area, rows, cx[rows], cy[rows], shape, size)
    best = iou.argmax(1)
    return best // len(SIZES), best % len(SIZES), iou.amax(1)


def _soft_iou(a: Tensor, area: Tensor, rows: Tensor, cx: Tensor, cy: Tensor, shape: int, size: int) -> Tensor:
    """Sum of minima over sum of maxima of coverage a[rows] and a template, (len(rows),), looking only at a window
    that holds the template: outside it the minimum is 0."""
    S, radius = a.shape[-1], RADII[size].item()
    width = min(S, int(REACH * radius * S) + 3)
    offset = torch.arange(width, device=a.device)
    at = [((c - REACH * radius + 1) * S / 2 - 1).long().clamp(0, S - width)[:, None] + offset for c in (cx, cy)]
    points = world.grid(S).to(a.device).view(S, 2)
    x, y = (points[k].flatten(1) - c[:, None] for k, c in zip(at, (cx, cy), strict=True))  # (M, 2 width)
    template = world.coverage_of(shape, x, y, torch.full_like(cx, radius), S)  # (M, width, width)
    seen = a[rows[:, None, None], at[1][:, :, None], at[0][:, None, :]]
    common = torch.minimum(seen, template).sum((1, 2))
    return common / (area[rows] + template.sum((1, 2)) - common)


@lru_cache
def _areas(image_size: int) -> Tensor:
    """(12,) area in pixels of the templates, centred; other centres differ by less than the margin in `_template`."""
    shape, size = torch.cartesian_prod(torch.arange(len(SHAPES)), torch.arange(len(SIZES))).unbind(1)
    none, centre = torch.zeros_like(shape), torch.zeros(len(shape))
    return world.coverage_map(Scenes(shape, none, size, none, none, centre, centre), image_size).sum((1, 2))


def _fill(rgb: Tensor, striped: Scenes) -> tuple[Tensor, Tensor]:
    """Whether the scene redrawn solid (0) or striped (1) is nearer (N,), and the root mean square error of the nearer
    one (N,), weighted by the template grown by one pixel and 0.1 elsewhere."""
    S = rgb.shape[-1]
    a = world.coverage_map(striped, S)
    weight = F.max_pool2d(a, 3, 1, 1).clamp_(min=OUTSIDE)  # (N, S, S)
    ground, colour = GROUND_RGB.to(rgb.device)[striped.ground], COLOUR_RGB.to(rgb.device)[striped.colour]
    error = rgb - torch.addcmul(ground[:, :, None, None], a[:, None], (colour - ground)[:, :, None, None])
    s = a * world.stripe_map(striped.cy, S)[:, :, None]
    white = 1 - colour
    solid = error.square().sum(1)  # (N, S, S)
    change = s * (s * white.square().sum(1)[:, None, None] - 2 * torch.einsum("ncij,nc->nij", error, white))
    total = torch.stack([(weight * solid).sum((1, 2)), (weight * (solid + change)).sum((1, 2))], dim=1)
    least = total.min(1)
    return least.indices, (least.values.clamp(min=0) / (3 * weight.sum((1, 2)))).sqrt()
