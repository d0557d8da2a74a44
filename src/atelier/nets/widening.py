"""Images of a condition beside the image that a net denoises: a first layer that looks at both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError


class PlanesConv2d(nn.Conv2d):
    """A convolution that also looks at further channels, behind those of another one, with weights that start at 0.

    The sums over both are taken apart: while the new weights are 0, it gives what the other gives to the bit, whatever
    the new channels hold (Brooks et al. 2023, InstructPix2Pix, section 3.2, start so).

    Args:
        conv: convolution whose weights are taken over, without groups and dilation.
        n_new: number of further channels.
    """

    def __init__(self, conv: nn.Conv2d, n_new: int) -> None:
        n_own, n_out = conv.in_channels, conv.out_channels
        super().__init__(n_own + n_new, n_out, conv.kernel_size, conv.stride, conv.padding, device="meta")
        self.n_own = n_own
        self.weight = nn.Parameter(_wider(conv.weight.detach(), n_own + n_new))
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n_own + n_new, H, W)."""
        own = F.conv2d(x[:, : self.n_own], self.weight[:, : self.n_own], self.bias, self.stride, self.padding)
        return own + F.conv2d(x[:, self.n_own :], self.weight[:, self.n_own :], None, self.stride, self.padding)


def with_planes(conv: nn.Conv2d, n_new: int) -> nn.Conv2d:
    """The convolution, which also looks at so many further channels; itself where there are none."""
    return PlanesConv2d(conv, n_new) if n_new else conv


def widened(state: dict[str, Tensor], net: nn.Module, key: str) -> dict[str, Tensor]:
    """Weights of a net with fewer planes as those of `net`, which then starts as that one.

    Whatever the new planes hold: to the bit from a net without planes, to rounding from one with some, which are summed
    with the new.

    Args:
        state: weights of a net that is otherwise like `net`; not changed.
        net: net whose first layer looks at planes.
        key: option that named where the weights are from.

    Raises:
        UserError: weights that are missing, that the net has not, or that have another size.
    """
    own = net.state_dict()
    stems = {f"{name}.weight": layer for name, layer in net.named_modules() if isinstance(layer, PlanesConv2d)}
    made = dict(state)
    for name, stem in stems.items():
        if name in state and state[name].ndim == 4 and stem.n_own <= state[name].shape[1] < stem.in_channels:
            made[name] = _wider(state[name], stem.in_channels)
    odd = [(name, f"{type(net).__name__} has no such weights") for name in made if name not in own]
    odd += [(name, f"{type(net).__name__} has such weights, and they are missing") for name in own if name not in made]
    for name, value in made.items():
        if name in own and value.shape != own[name].shape:
            theirs, ours = ("x".join(map(str, size)) for size in (state[name].shape, own[name].shape))
            odd.append((name, f"they are {theirs}, those of {type(net).__name__} are {ours}"))
    if odd:
        raise UserError(key, *odd[0], "weights of a net that differs in plane_channels alone")
    return made


def _wider(weight: Tensor, n: int) -> Tensor:
    """A convolution's weight (n_out, m, h, w) for n channels, those from m on with zeros."""
    return torch.cat([weight, weight.new_zeros(len(weight), n - weight.shape[1], *weight.shape[2:])], dim=1)
