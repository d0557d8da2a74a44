"""The convolutions of VGG (Simonyan & Zisserman 2015, table 1), which perceptual distances look through."""

from __future__ import annotations

from torch import nn

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


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
