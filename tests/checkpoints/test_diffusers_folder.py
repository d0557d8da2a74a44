"""diffusers' folders: what they write we read, what we write they read, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atelier.checkpoints import diffusers_folder
from atelier.core.errors import UserError
from atelier.nets.autoencoder_kl import KLNet
from atelier.nets.quantizers import FSQ, VectorQuantizer
from atelier.nets.vqgan import VQGANNet

CLOSE = {"rtol": 0, "atol": 1e-5}
LAYOUT = {
    "image_size": 16,
    "image_channels": 3,
    "width": 8,
    "multipliers": [1, 2, 4],
    "n_blocks": 1,
    "attention": [],
    "middle_attention": True,
    "norm_groups": 4,
    "dropout": 0.0,
}
LAYOUTS = {  # name -> what differs, in our words and in theirs
    "plain": ({}, {}),
    "no attention": ({"middle_attention": False}, {"mid_block_add_attention": False}),
    "attention at 16": (
        {"attention": [16], "n_blocks": 2},
        {
            "layers_per_block": 2,
            "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        },
    ),
    "grey, uneven widths": (
        {"image_channels": 1, "multipliers": [2, 3, 3]},
        {"in_channels": 1, "out_channels": 1, "block_out_channels": [16, 24, 24]},
    ),
}


def shaken(net: nn.Module) -> nn.Module:
    """Weights that keep maps at about unit size, none of them 0, and codes that lie among the latents."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=1.5 * layer.weight[0].numel() ** -0.5)
            nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, 1, 0.1)
            nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.Embedding | VectorQuantizer):
            nn.init.normal_(layer.weight if isinstance(layer, nn.Embedding) else layer.codebook)
    return net.eval()


def images(channels: int = 3, size: int = 16) -> Tensor:
    return 2 * torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(1)) - 1


def ours_kl(layout: dict[str, Any], **changes: Any) -> KLNet:
    return shaken(KLNet(**(LAYOUT | layout | {"latent_channels": 4} | changes)))


def ours_vq(layout: dict[str, Any]) -> VQGANNet:
    options = {
        "update": "gradient",
        "ema_decay": 0.99,
        "commitment_weight": 0.25,
        "kmeans_init": False,
        "dead_code_threshold": 0.0,
    }
    quantizer = VectorQuantizer(n_codes=32, dim=4, **options)
    return shaken(VQGANNet(**(LAYOUT | layout), latent_channels=6, quantizer=quantizer))


THEIRS = {
    "block_out_channels": [8, 16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "latent_channels": 4,
}
CODES = {"latent_channels": 6, "vq_embed_dim": 4, "num_vq_embeddings": 32}


@torch.no_grad()
def same_kl(ours: KLNet, theirs: AutoencoderKL, x: Tensor) -> None:
    mean, logvar = ours.encode(x)
    posterior = theirs.encode(x).latent_dist
    torch.testing.assert_close(mean, posterior.mean, **CLOSE)
    torch.testing.assert_close(logvar, posterior.logvar, **CLOSE)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, **CLOSE)
    assert mean.std() > 0.1 and logvar.std() > 0.1 and ours.decode(mean).std() > 0.1


@torch.no_grad()
def same_vq(ours: VQGANNet, theirs: VQModel, x: Tensor) -> None:
    z = ours.encode(x)[0]
    torch.testing.assert_close(z, theirs.encode(x).latents, **CLOSE)
    codes = ours.codes(x)
    assert torch.equal(codes.flatten(), theirs.quantize(z)[2][2]) and len(codes.unique()) > 3
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, **CLOSE)
    looked_up = theirs.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, 4))
    torch.testing.assert_close(ours.quantizer.embed(codes), looked_up, **CLOSE)
    there = theirs.decode(looked_up, force_not_quantize=True).sample
    torch.testing.assert_close(ours.decode_codes(codes), there, **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_they_write_we_read(name: str, tmp_path: Path) -> None:
    layout, config = LAYOUTS[name]
    channels = layout.get("image_channels", 3)
    theirs = shaken(AutoencoderKL(**(THEIRS | config)))
    theirs.save_pretrained(tmp_path)
    net = diffusers_folder.read(tmp_path)
    assert net.latent_shape == (4, 4, 4) and not net.training
    same_kl(net, theirs, images(channels))
    theirs = shaken(VQModel(**(THEIRS | CODES | config)))
    theirs.save_pretrained(tmp_path)
    same_vq(diffusers_folder.read(tmp_path), theirs, images(channels))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_we_write_they_read(name: str, tmp_path: Path) -> None:
    layout, _ = LAYOUTS[name]
    x = images(layout.get("image_channels", 3))
    for net, kind, same in ((ours_kl(layout), AutoencoderKL, same_kl), (ours_vq(layout), VQModel, same_vq)):
        diffusers_folder.write(net, tmp_path / "new" / kind.__name__, scaling_factor=0.5)
        theirs, told = kind.from_pretrained(tmp_path / "new" / kind.__name__, output_loading_info=True)
        assert not [names for names in told.values() if names]
        same(net, theirs, x)
        assert theirs.config.scaling_factor == 0.5
        again = diffusers_folder.read(tmp_path / "new" / kind.__name__)
        assert again.layout == net.layout
        state = net.state_dict()
        assert all(torch.equal(value, state[n]) for n, value in again.state_dict().items() if "sums" not in n)


def test_a_net_without_quant_convolutions_goes_both_ways(tmp_path: Path) -> None:
    theirs = shaken(AutoencoderKL(**THEIRS, use_quant_conv=False, use_post_quant_conv=False))
    theirs.save_pretrained(tmp_path)
    same_kl(diffusers_folder.read(tmp_path), theirs, images())
    net = ours_kl({}, quant_conv=False)
    diffusers_folder.write(net, tmp_path)
    same_kl(net, AutoencoderKL.from_pretrained(tmp_path), images())


def test_log_variances_are_cut_as_theirs(tmp_path: Path) -> None:
    theirs = shaken(AutoencoderKL(**THEIRS))
    with torch.no_grad():
        theirs.quant_conv.weight.mul_(100)
    theirs.save_pretrained(tmp_path)
    _, logvar = diffusers_folder.read(tmp_path).encode(images())
    assert logvar.min() == -30 and logvar.max() == 20
    torch.testing.assert_close(logvar, theirs.encode(images()).latent_dist.logvar, rtol=0, atol=1e-3)


def test_earlier_names_of_attention_and_half_precision_are_read(tmp_path: Path) -> None:
    theirs = shaken(AutoencoderKL(**THEIRS)).half().float()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / diffusers_folder.WEIGHTS
    earlier = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in load_file(path).items():
        for now, then in earlier.items():
            name = name.replace(now, then)
        state[name] = value.half()
    assert any(".proj_attn." in name for name in state)
    save_file(state, path)
    net = diffusers_folder.read(tmp_path)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    same_kl(net, theirs, images())


def test_latents_are_those_of_the_images_at_hand(tmp_path: Path) -> None:
    """A net of convolutions works at any size; attention stays at its level."""
    theirs = shaken(AutoencoderKL(**(THEIRS | LAYOUTS["attention at 16"][1] | {"sample_size": [64, 48]})))
    theirs.save_pretrained(tmp_path)
    assert diffusers_folder.read(tmp_path).latent_shape == (4, 16, 16)
    net = diffusers_folder.read(tmp_path, image_size=24)
    assert net.latent_shape == (4, 6, 6) and net.layout.attention == [24]
    same_kl(net, theirs, images(size=24))


def changed(folder: Path, **config: Any) -> None:
    path = folder / diffusers_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def without(name: str) -> Any:
    def drop(folder: Path) -> None:
        state = load_file(folder / diffusers_folder.WEIGHTS)
        del state[name]
        save_file(state, folder / diffusers_folder.WEIGHTS)

    return drop


@pytest.mark.parametrize(("break_it", "problem"), [
    (lambda f: (f / "config.json").unlink(), "no readable config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    (lambda f: changed(f, _class_name="UNet2DModel"), "it holds a UNet2DModel"),
    (lambda f: changed(f, act_fn="relu"), "act_fn=relu is not supported"),
    (lambda f: changed(f, down_block_types=["Odd", *["DownEncoderBlock2D"] * 2]), "it has a Odd"),
    (lambda f: changed(f, up_block_types=["UpDecoderBlock2D"] * 2), "its decoder is not its encoder"),
    (lambda f: changed(f, out_channels=1), "different channels"),
    (lambda f: changed(f, use_quant_conv=False), "on one side of the latent"),
    (lambda f: changed(f, latent_channels=8), "has another shape"),
    (lambda f: changed(f, layers_per_block=2), "lacks decoder.up_blocks.0.resnets.2"),
    (lambda f: changed(f, mid_block_add_attention=False), "also holds decoder.mid_block.attentions.0"),
    (without("encoder.conv_in.bias"), "lacks encoder.conv_in.bias"),
    (lambda f: (f / diffusers_folder.WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), "weights (.bin) are not"),
    (lambda f: (f / diffusers_folder.WEIGHTS).write_bytes(b"12345678"), "is cut"),
], ids=lambda part: part if isinstance(part, str) else "")  # fmt: skip
def test_what_cannot_be_read_is_one_line(break_it: Any, problem: str, tmp_path: Path) -> None:
    diffusers_folder.write(ours_kl({}), tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as caught:
        diffusers_folder.read(tmp_path)
    line = caught.value.line()
    assert line.startswith("error: model.first_stage.run=") and problem in str(caught.value)


def test_another_quantiser_cannot_be_written(tmp_path: Path) -> None:
    net = VQGANNet(**LAYOUT, latent_channels=4, quantizer=FSQ(levels=[4, 4]))
    with pytest.raises(UserError, match="diffusers has no FSQ"):
        diffusers_folder.write(net, tmp_path)
    assert not list(tmp_path.iterdir())
