"""How different two images look, learned from human judgements on features of VGG16 (Zhang et al. 2018, LPIPS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atelier.nets.vgg import VGG16, both, vgg

TAPS = (3, 8, 15, 22, 29)  # layers relu1_2, 2_2, 3_3, 4_3, 5_3
EPS = 1e-8  # under the root of a feature's length, whose gradient is infinite where all channels are 0


class LPIPSNet(nn.Module):
    """d(a, b) = sum_l mean_hw w_l . (y_l(a) - y_l(b))^2, a distance learned from human judgements.

    Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, eq. 1; y_l the features
    behind the last ReLU of each of VGG16's five parts, at every place divided by their length over channels.

    Args:
        state: state dict of torchvision's vgg16 (its classifier is not used).
        heads: w_l, state dict of LPIPS v0.1 for VGG: lin0.model.1.weight (1, 64, 1, 1) to lin4.

    Raises:
        RuntimeError: one of them holds other layers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, state: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = vgg(VGG16)
        self.heads = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in VGG16)
        prefix = "features."
        self.features.load_state_dict({name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)})
        self.heads.load_state_dict({name.replace("lin", "").replace("model.1.", ""): v for name, v in heads.items()})
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])    # (3, 1, 1)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])    # (3, 1, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images (B, 1 or 3, H, W) in [-1, 1], grey repeated to RGB, 16 px a side or more."""
        total, taps = a.new_zeros(len(a)), both(self._taps, a, b)          # (B,)
        for head, (first, second) in zip(self.heads, taps, strict=True):
            total = total + head((first - second) ** 2).mean(dim=(1, 2, 3))
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        """Features of length 1 behind each of the taps, (B, C, H', W') each."""
        h, found = (x - self.shift) / self.scale, []                       # (B, 3, H, W)
        for k, layer in enumerate(self.features):
            h = layer(h)                                                   # (B, C, H', W')
            if k in TAPS:
                found.append(unit(h))
        return found


def unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their length over channels."""
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()
