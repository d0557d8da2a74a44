"""No attention holds a number for each pair of places: 64 x 64 latents would make 17 M of each head and image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from atelier.core.condition import Condition
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.transformers_text import CausalBlock
from atelier.nets.unet import UNet
from tests.nets.lora_ranks import TINY, shaken

SIDE, N_TOKENS = 64, 4096  # and as many tokens of a text, where a published encoder has 77


class Largest(TorchDispatchMode):
    """The most numbers that any tensor holds that is made inside, in `n`."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            self.n = max(self.n, made.numel() if isinstance(made, Tensor) else 0)
        return out


def unet(**options: object) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "multipliers": [1, 1], "attention": [SIDE], "heads": 2}
    net, x = shaken(UNet(**TINY | sizes | options)), torch.randn(1, 4, SIDE, SIDE)
    tokens = torch.randn(1, 5, 16) if "tokens" in net.cond_sizes else None
    return lambda: net(x, torch.tensor([3.0]), Condition(tokens=tokens))


def first_stage() -> Callable[[], Tensor]:
    sizes = {"image_size": 2 * SIDE, "image_channels": 3, "width": 8, "multipliers": [1, 1], "n_blocks": 1}
    net = KLNet(**sizes, attention=[], middle_attention=True, norm_groups=4, dropout=0.0, latent_channels=4)
    x = torch.randn(1, 3, 2 * SIDE, 2 * SIDE)
    return lambda: net.decode(net.encode(x)[0])


def text_encoder() -> Callable[[], Tensor]:
    block, x = CausalBlock(8, 2, 16, "quick_gelu", 1e-5), torch.randn(1, N_TOKENS, 8)
    return lambda: block(x)


NETS = {
    "U-Net": lambda: unet(token_dim=None),
    "U-Net of tokens": unet,
    "first stage": first_stage,
    "text encoder": text_encoder,
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_largest_tensor_is_far_from_all_pairs(name: str, autocast: bool) -> None:
    step = NETS[name]()
    with Largest() as seen, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        step().float().square().mean().backward()
    assert N_TOKENS * 8 <= seen.n < N_TOKENS**2 / 16


def test_all_pairs_would_be_seen() -> None:
    with sdpa_kernel(SDPBackend.MATH), Largest() as seen:
        text_encoder()()
    assert seen.n >= N_TOKENS**2
