"""The convolutions of VGG (Simonyan & Zisserman 2015, table 1), which perceptual distances look through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]


def vgg(parts: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    """Convolutions and ReLUs up to the last of the five parts, numbered as torchvision's; halved between parts."""
    layers: list[nn.Module] = []
    n = 3
    for widths in parts:
        layers += [nn.MaxPool2d(2)] if layers else []
        for width in widths:
            layers += [nn.Conv2d(n, width, 3, padding=1), nn.ReLU()]
            n = width
    return nn.Sequential(*layers)


def both(features: Callable[[Tensor], list[Tensor]], a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Features of two batches (B, 3, H, W), a pair for each depth.

    In one pass, unless one of the two alone takes gradients, as what a net made beside true images: of those nothing is
    kept then, and nothing goes back through them.
    """
    if a.requires_grad == b.requires_grad or not torch.is_grad_enabled():
        return [tuple(h.chunk(2)) for h in features(torch.cat([a, b]))]
    return list(zip(features(a), features(b), strict=True))


class VGG54(nn.Module):
    """Features of VGG19's conv5_4, before its ReLU (Simonyan & Zisserman 2015, table 1, E), divided by 12.75.

    Args:
        state: state dict of torchvision's vgg19 (its classifier is not used).

    Raises:
        RuntimeError: it holds other layers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = vgg(VGG19)[:-1]
        own = self.features.state_dict()
        self.features.load_state_dict({name: state[f"features.{name}"] for name in own if f"features.{name}" in state})
        shift, scale = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
        self.register_buffer("shift", 2 * shift - 1)                       # (3, 1, 1)
        self.register_buffer("scale", 2 * scale)                           # (3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 512, H / 16, W / 16) of images (B, 1 or 3, H, W) in [-1, 1], grey as RGB, 16 px a side or more."""
        return self.features((x - self.shift) / self.scale) / 12.75
