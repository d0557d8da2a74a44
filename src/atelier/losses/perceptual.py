"""Differences between images that count structure, not pixels one by one, in float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.errors import UserError
from atelier.core.precision import float32
from atelier.core.ranges import Name, PositiveInt
from atelier.nets.frozen import Frozen
from atelier.nets.lpips import LPIPSNet
from atelier.nets.vgg import VGG54, both

LEAST_SIZE = 16  # of images that four halvings leave something of
LPIPS_PAGE, VGG_PAGE = "conf/perceptual/lpips.yaml", "conf/perceptual/vgg.yaml"


class LPIPS(nn.Module):
    """The learned distance of Zhang et al. 2018 on VGG16 (`nets.lpips`), its weights frozen and saved nowhere.

    Args:
        vgg: file of torchvision's vgg16 state dict.
        heads: file of the LPIPS v0.1 heads for VGG.

    Raises:
        UserError: a file is absent, cut, or holds other layers.
    """

    def __init__(self, *, vgg: Name, heads: Name) -> None:
        super().__init__()
        states = [_state_dict(key, path, LPIPS_PAGE) for key, path in (("vgg", vgg), ("heads", heads))]
        try:
            self.net = Frozen(LPIPSNet(*states))
        except RuntimeError as error:
            key, path = ("heads", heads) if "ModuleList" in str(error) else ("vgg", vgg)
            raise _unreadable(key, path, "it holds other layers", LPIPS_PAGE) from error
        self._checked = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of real images x and y, (B, 1 or 3, H, W) in [-1, 1], 16 px a side or more.

        Raises:
            UserError: the images are smaller.
            ValueError: x of the first call exceeds [-1, 1]; where it is nowhere negative, a warning says so.
        """
        if not self._checked:  # one look at the device, not one in every step
            self._checked = True
            _check_images(x, "LPIPS")
        with float32(x.device):
            return self.net.net(x.float(), y.float())


class VGGFeatures(nn.Module):
    """mean (phi(x) - phi(y))^2, phi the features of VGG19's conv5_4 divided by 12.75, its weights saved nowhere.

    The VGG loss of Ledig et al. 2017, SRGAN, eq. 5 and section 3.2, with the mean over channels too, and with features
    before their ReLU as in Wang et al. 2018, ESRGAN, section 3.3.

    Args:
        vgg: file of torchvision's vgg19 state dict.

    Raises:
        UserError: the file is absent, cut, or holds other layers.
    """

    def __init__(self, *, vgg: Name) -> None:
        super().__init__()
        state = _state_dict("vgg", vgg, VGG_PAGE)
        try:
            self.net = Frozen(VGG54(state))
        except RuntimeError as error:
            raise _unreadable("vgg", vgg, "it holds other layers", VGG_PAGE) from error
        self._checked = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of real images x and y, (B, 1 or 3, H, W) in [-1, 1], 16 px a side or more.

        Raises:
            UserError: the images are smaller.
            ValueError: x of the first call exceeds [-1, 1]; where it is nowhere negative, a warning says so.
        """
        if not self._checked:
            self._checked = True
            _check_images(x, "VGG19")
        with float32(x.device):
            ((first, second),) = both(lambda images: [self.net.net(images)], x.float(), y.float())
            return (first - second).square().mean(dim=(1, 2, 3))


class Pyramid(nn.Module):
    """sum_j mean |L_j(x) - L_j(y)|, L_j the levels of the Laplacian pyramid (Burt & Adelson 1983): needs no weights.

    The Lap_1 distance of Bojanowski et al. 2018, Optimizing the Latent Space of Generative Networks: its weights 4^j
    make each level count as the mean over its own pixels. Each level is blurred by (1, 3, 3, 1) / 8 and halved, what
    linear interpolation back does not give is the band; the last term is what is left of the image.

    Args:
        n_levels: halvings; as many as keep 2 px a side.
    """

    kernel: Tensor

    def __init__(self, *, n_levels: PositiveInt) -> None:
        super().__init__()
        self.n_levels = n_levels
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", (line[:, None] * line)[None, None], persistent=False)  # (1, 1, 4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of images (B, C, H, W) in [-1, 1]."""
        with float32(x.device):
            rest = x.float() - y.float()  # the pyramid is linear
            total = rest.new_zeros(len(rest))
            for _ in range(self.n_levels):
                if min(rest.shape[2:]) < 4:
                    break
                low = self._halved(rest)
                band = rest - F.interpolate(low, size=rest.shape[2:], mode="bilinear")
                total, rest = total + band.abs().mean(dim=(1, 2, 3)), low
            return total + rest.abs().mean(dim=(1, 2, 3))

    def _halved(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


def _check_images(x: Tensor, name: str) -> None:
    """One look at a first batch: large enough, and in [-1, 1]."""
    if min(x.shape[2:]) < LEAST_SIZE:
        problem = f"{name} needs {LEAST_SIZE} px a side"
        raise UserError("data.image_size", min(x.shape[2:]), problem, f"data.image_size={LEAST_SIZE}")
    low, high = x.min().item(), x.max().item()
    if max(-low, high) > 1.01:
        raise ValueError(f"{name} wants images in [-1, 1], got [{low:.2f}, {high:.2f}]")
    if low >= 0:
        warnings.warn(f"{name} wants images in [-1, 1]; these are nowhere negative, as in [0, 1]", stacklevel=3)


def _state_dict(key: str, path: str, page: str) -> dict[str, Tensor]:
    try:
        return torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(key, path, f"there is no such file to read ({error.strerror})", page) from error
    except Exception as error:  # torch has a different one for each way in which a file is broken
        raise _unreadable(key, path, "it is cut or no state dict", page) from error


def _unreadable(key: str, path: str, problem: str, page: str) -> UserError:
    return UserError(f".{key}", path, problem, f".{key}=PATH, see {page}, or another page of that folder")
