"""Files of adapters: what diffusers and peft write we read, what we write they read, with the same outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atelier.checkpoints import lora_files, transformers_folder
from atelier.checkpoints.lora_files import Known, by_tensors
from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.nets import lora
from atelier.nets.unet import UNet
from tests.checkpoints import test_transformers_folder as clip
from tests.nets.test_lora import moved
from tests.nets.test_spatial_transformer import CROSS, PLAIN, TINY, shaken, their_names

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
SDXL = "StableDiffusionXLPipeline"
LINEAR = {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)}
EVERY_KIND = ["to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv"]
EVERY_KIND += ["conv_shortcut", "time_emb_proj"]
SD1 = {"convolutions": ("proj_in", "proj_out"), "cosines_first": ("time_embedding.linear_1",)}
CLOSE = {"rtol": 0, "atol": 1e-5}


def their_unet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
    return shaken(diffusers.UNet2DConditionModel(**{
        **sizes,
        "attention_head_dim": 2,
        "down_block_types": (CROSS.format("Down"), PLAIN.format("Down")),
        "up_block_types": (PLAIN.format("Up"), CROSS.format("Up")),
        **options,
    }).eval())  # fmt: skip


def ours_like(theirs: nn.Module) -> UNet:
    """Our U-Net with their weights."""
    ours, weights = UNet(**TINY, multipliers=[1, 2], attention=[8], heads=2).eval(), theirs.state_dict()
    made = {
        name: torch.cat([weights[part] for part in their_names(name)]).reshape(value.shape)
        for name, value in ours.state_dict().items()
    }
    made["time.1.weight"] = made["time.1.weight"].roll(4, dims=1)
    ours.load_state_dict(made)
    return ours


def original(place: str) -> str:
    """Where a single file has a layer of a U-Net of two levels of two blocks, by its name in diffusers."""
    table = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    table |= {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    }
    table |= {"mid_block.attentions.0": "middle_block.1", "mid_block.resnets.0": "middle_block.0"}
    table |= {"mid_block.resnets.1": "middle_block.2", "up_blocks.0.upsamplers.0.conv": "output_blocks.2.UP.conv"}
    for i in range(2):
        for j in range(3):
            for k, kind in enumerate(("resnets", "attentions")):
                table[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{1 + 3 * i + j}.{k}"
                table[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{3 * i + j}.{k}"
    front = next(name for name in table if place == name or place.startswith(f"{name}."))
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inside |= {"conv_shortcut": "skip_connection"}
    rest = place.removeprefix(front)
    name = table[front] + (f".{inside.get(rest[1:], rest[1:])}" if rest else "")
    return name.replace("UP", "1")  # there is no attention in that block


def output(net: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    time = torch.tensor([3, 700])
    with torch.no_grad():
        if isinstance(net, UNet):
            return net(x, time.float(), Condition(tokens=tokens))
        return net(x, time, encoder_hidden_states=tokens).sample


def adapted_by_peft(net: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    """Adapters of theirs with B off its 0; alpha is not r, and both differ between layers."""
    config = {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"proj_in": 7, "to_v": 1}}
    torch.manual_seed(2)
    net.add_adapter(peft.LoraConfig(**config | {"target_modules": targets} | options))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return net


def loaded_by_diffusers(path: Path, net: nn.Module, pipeline: str = "StableDiffusionPipeline") -> nn.Module:
    """Their net with the file, as their pipeline loads it."""
    kind = getattr(diffusers, pipeline)
    state, alphas, described = kind.lora_state_dict(path, unet_config=net.config, return_lora_metadata=True)
    kind.load_lora_into_unet(state, network_alphas=alphas, unet=net, metadata=described)
    return net


def peft_keys(net: nn.Module) -> dict[str, Tensor]:
    return {
        key: value.contiguous() for key, value in peft.get_peft_model_state_dict(net, adapter_name="default").items()
    }


def as_peft(net: nn.Module, path: Path) -> None:
    state = {f"unet.{key}": value for key, value in peft_keys(net).items()}
    diffusers.StableDiffusionPipeline.write_lora_layers(
        state_dict=state, save_directory=path.parent, is_main_process=True, weight_name=path.name,
        save_function=None, safe_serialization=True,
        lora_adapter_metadata={f"unet.{k}": v for k, v in described(net).items()},
    )  # fmt: skip


def described(net: nn.Module) -> dict[str, Any]:
    config = net.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def as_save_lora_weights(net: nn.Module, path: Path) -> None:
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft_keys(net))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        path.parent, layers, weight_name=path.name, unet_lora_adapter_metadata=net.peft_config["default"].to_dict()
    )


def as_save_lora_adapter(net: nn.Module, path: Path) -> None:
    net.save_lora_adapter(path.parent, weight_name=path.name)


def as_kohya(net: nn.Module, path: Path) -> None:
    """What diffusers makes of it, with the alphas that it should have written."""
    state = {f"unet.{key}": value for key, value in peft_keys(net).items()}
    made = diffusers.utils.convert_state_dict_to_kohya(state)
    layers = {name.replace(".", "_"): m for name, m in net.named_modules() if hasattr(m, "lora_A")}
    for key in [key for key in made if key.endswith(".alpha")]:
        layer = layers[key.removeprefix("lora_unet_").removesuffix(".alpha")]
        made[key] = torch.tensor(layer.scaling["default"] * layer.r["default"])
    save_file({key: value.contiguous() for key, value in made.items()}, path)


def as_model_of_peft(net: nn.Module, path: Path) -> None:
    """The folder of peft's own `save_pretrained`: alpha is in a file beside it."""
    save_file({f"base_model.model.{key}": value for key, value in peft_keys(net).items()}, path)
    (path.parent / "adapter_config.json").write_text(json.dumps(described(net)))


WRITERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "peft": as_peft,
    "save_lora_weights": as_save_lora_weights,
    "save_lora_adapter": as_save_lora_adapter,
    "kohya": as_kohya,
    "model_of_peft": as_model_of_peft,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_they_write_gives_the_same_on_their_net_and_ours(writer: str, tmp_path: Path) -> None:
    theirs, path = their_unet(), tmp_path / "adapter_model.safetensors"
    ours, plain = ours_like(theirs), output(theirs)
    fresh = their_unet()
    expected = output(adapted_by_peft(theirs, [*EVERY_KIND, "time_embedding.linear_1", "conv_in"]))
    WRITERS[writer](theirs, path)
    if "kohya" not in writer:
        assert len(load_file(path)) == len(peft_keys(theirs)) > 100
    lora_files.read(path, {"unet": Known(fresh)}, "style")
    lora_files.read(path, {"unet": Known(ours, by_tensors(their_names), **SD1)}, "style")
    torch.testing.assert_close(output(fresh), expected, **CLOSE)
    torch.testing.assert_close(output(ours), expected, **CLOSE)
    lora.merge(ours)
    torch.testing.assert_close(output(ours), expected, **CLOSE)
    assert (expected - plain).abs().mean() > 0.05
    assert {b.rank for b in lora.adapters(ours, "style").values()} == {2, 4}
    assert {b.alpha for b in lora.adapters(ours, "style").values()} == {1, 3, 7}


def adapted_unet(theirs: nn.Module, alpha_of_values: int) -> UNet:
    """Ours, with adapters on every kind of layer, of several ranks and alphas."""
    ours = ours_like(theirs)
    torch.manual_seed(2)
    lora.add(ours, name="style", targets=["qkv.q", "qkv.k", "cross.q", "cross.kv.k", "out", "proj"], rank=4, alpha=3)
    lora.add(ours, name="style", targets=["qkv.v", "cross.kv.v"], rank=2, alpha=alpha_of_values)
    lora.add(ours, name="style", targets=["mlp.1", "time.1"], rank=2, alpha=5)
    lora.add(ours, name="style", targets=["proj_in", "proj_out", r".*\.conv\d?", "skip", "stem"], rank=5, alpha=3)
    return moved(ours, "style")


@pytest.mark.parametrize(("layout", "alpha"), [("diffusers", 7), ("kohya", 3)])
def test_what_we_write_gives_the_same_in_diffusers(layout: str, alpha: int, tmp_path: Path) -> None:
    """In kohya's, diffusers loses an alpha of attention that is not the most common one."""
    theirs, path = their_unet(), tmp_path / "new" / "style.safetensors"
    ours, plain = adapted_unet(theirs, alpha), output(theirs)
    lora_files.write(path, {"unet": Known(ours, by_tensors(their_names), original, **SD1)}, "style", layout)
    expected = output(ours)
    torch.testing.assert_close(output(loaded_by_diffusers(path, theirs)), expected, **CLOSE)
    assert (expected - plain).abs().mean() > 0.05
    n = sum("lora_A" in name for name, _ in theirs.named_parameters())
    assert n == len(lora.adapters(ours, "style")) > 80


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_every_layout_comes_back_as_it_was(layout: str, tmp_path: Path) -> None:
    theirs, path = their_unet(), tmp_path / "style.safetensors"
    ours, again = adapted_unet(theirs, 7), ours_like(theirs)
    known = {"original": lambda place: original(by_tensors(their_names)(place)), **SD1}
    lora_files.write(path, {"unet": Known(ours, by_tensors(their_names), **known)}, "style", layout)
    lora_files.read(path, {"unet": Known(again, by_tensors(their_names), **known)}, "other")
    before, after = lora.adapters(ours, "style"), lora.adapters(again, "other")
    assert list(before) == list(after)
    for place, block in before.items():
        assert (block.rank, block.alpha) == (after[place].rank, after[place].alpha)
        assert torch.equal(block.down.weight, after[place].down.weight)
        assert torch.equal(block.up.weight, after[place].up.weight)


def test_names_of_a_single_file_are_those_of_diffusers(tmp_path: Path) -> None:
    """The layout of ComfyUI, which diffusers does not place, with kohya's spelling, which it does for SDXL."""
    options = {"down_block_types": (PLAIN.format("Down"), CROSS.format("Down"))}
    options |= {"up_block_types": (CROSS.format("Up"), PLAIN.format("Up")), **LINEAR}
    theirs, fresh, path = their_unet(**options), their_unet(**options), tmp_path / "style.safetensors"
    targets = [*EVERY_KIND[:-2], "conv_shortcut", "time_emb_proj"]
    known = Known(theirs, original=lambda place: original(place).replace("2.1.conv", "2.2.conv"))
    lora.add(theirs, name="style", targets=targets, rank=4, alpha=3)
    expected = output(moved(theirs, "style"))
    lora_files.write(path, {"unet": known}, "style", "comfyui")
    state = load_file(path)
    assert "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight" in state
    spelt = {"lora_A": "lora_down", "lora_B": "lora_up"}
    kohya = {}
    for key, value in state.items():
        stem, kind, rest = re.fullmatch(r"diffusion_model\.(.+)\.(lora_.|alpha)(.*)", key).groups()
        kohya[f"lora_unet_{stem.replace('.', '_')}.{spelt.get(kind, kind)}{rest}"] = value
    save_file(kohya, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(
        output(loaded_by_diffusers(tmp_path / "kohya.safetensors", fresh, SDXL)), expected, **CLOSE
    )
    again = their_unet(**options)
    lora_files.read(tmp_path / "kohya.safetensors", {"unet": Known(again, original=known.original)}, "style")
    torch.testing.assert_close(output(again), expected, **CLOSE)


# ---- text encoders


def their_text(folder: Path) -> nn.Module:
    return clip.written(folder)


TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TEXT = by_tensors(transformers_folder.their_names)


def test_adapters_of_a_text_encoder_come_from_and_go_to_diffusers(tmp_path: Path) -> None:
    model = their_text(tmp_path)
    rows = clip.rows_of(tmp_path)
    ours, again = (transformers_folder.text_encoder(str(tmp_path)) for _ in range(2))
    plain = model(rows).last_hidden_state
    adapted_by_peft(model, TEXT_TARGETS, rank_pattern={"k_proj": 2}, alpha_pattern={})
    with torch.no_grad():
        expected = model(rows).last_hidden_state
    assert (expected - plain).abs().mean() > 0.02
    layers = diffusers.utils.convert_state_dict_to_diffusers(model.get_adapter_state_dict())
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, text_encoder_lora_layers=layers, weight_name="theirs.safetensors",
        text_encoder_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )  # fmt: skip
    lora_files.read(tmp_path / "theirs.safetensors", {"text_encoder": Known(ours, TEXT)}, "style")
    with torch.no_grad():
        torch.testing.assert_close(ours(rows).tokens, expected, **CLOSE)
    for layout in ("diffusers", "kohya", "comfyui"):
        path = tmp_path / f"{layout}.safetensors"
        lora_files.write(path, {"text_encoder": Known(ours, TEXT)}, "style", layout)
        lora_files.read(path, {"text_encoder": Known(again, TEXT)}, layout)
        lora.weigh(again, {layout: 1})
        with torch.no_grad():
            torch.testing.assert_close(again(rows).tokens, expected, **CLOSE)
        if layout == "comfyui":
            continue  # it has no names for diffusers
        kind, fresh = diffusers.StableDiffusionPipeline, their_text(tmp_path)
        state, alphas, told = kind.lora_state_dict(path, return_lora_metadata=True)
        kind.load_lora_into_text_encoder(state, alphas, fresh, metadata=told)
        with torch.no_grad():
            torch.testing.assert_close(fresh(rows).last_hidden_state, expected, **CLOSE)


def test_two_text_encoders_are_told_apart(tmp_path: Path) -> None:
    """By their prefix; a key that only names a layer can mean either."""
    their_text(tmp_path)
    first, second = (transformers_folder.text_encoder(str(tmp_path)) for _ in range(2))
    for net, rank in ((first, 1), (second, 2)):
        lora.add(net, name="style", targets=["mlp_in"], rank=rank, alpha=1)
    nets = {"text_encoder": Known(first, TEXT), "text_encoder_2": Known(second, TEXT)}
    fc1 = "text_model.encoder.layers.0.mlp.fc1"
    for layout, stem in (
        ("diffusers", f"text_encoder.{fc1}"),
        ("kohya", f"lora_te1_{fc1.replace('.', '_')}"),
        ("comfyui", f"text_encoder.{fc1}"),
    ):
        lora_files.write(tmp_path / "a.safetensors", nets, "style", layout)
        assert any(key.startswith(f"{stem}.lora_") for key in load_file(tmp_path / "a.safetensors"))
        lora_files.read(tmp_path / "a.safetensors", nets, layout)
        assert [{b.rank for b in lora.adapters(net, layout).values()} for net in (first, second)] == [{1}, {2}]
    state = load_file(tmp_path / "a.safetensors")
    assert {key.split(".")[0] for key in state} == {"text_encoder", "text_encoder_2"}
    bare = {key.removeprefix("text_encoder."): value for key, value in state.items()}
    save_file(bare, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"can mean blocks.0.mlp_in and blocks.0.mlp_in"):
        lora_files.read(tmp_path / "b.safetensors", nets, "new")


# ---- what is refused


class Toy(nn.Module):
    """Three layers, of which two have one name in kohya's spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(3, 5), nn.Conv2d(3, 5, 3)
        self.a, self.a_b = nn.ModuleDict({"b": nn.Linear(3, 5)}), nn.Linear(3, 5)


A, B = torch.ones(2, 3), torch.ones(5, 2)
WHOLE = {"unet.to_q.lora_A.weight": A, "unet.to_q.lora_B.weight": B}
META = "lora_adapter_metadata"


@pytest.mark.parametrize(("state", "said", "problem"), [
    (WHOLE | {"unet.to_x.lora_A.weight": A}, {}, "unet.to_x.lora_A.weight fits no layer of unet"),
    (WHOLE | {"unet.to_q.bias": B}, {}, "unet.to_q.bias is no A, B or alpha of low rank"),
    (WHOLE | {"unet.to_q.lora_magnitude_vector.weight": B}, {}, "vector.weight is no A, B or alpha of low rank"),
    ({"unet.to_q.lora_A.weight": A}, {}, "unet.to_q.lora_A.weight lacks its B"),
    ({"lora_unet_to_q.lora_up.weight": B, "lora_unet_to_q.alpha": torch.tensor(1.0)}, {}, "lora_up.weight lacks its A"),
    ({"lora_unet_to_q.alpha": torch.tensor(1.0)}, {}, "lora_unet_to_q.alpha lacks its A"),
    (WHOLE | {"unet.to_q.lora_A.weight": B}, {}, "unet.to_q.lora_A.weight is 5x2, this net takes 5x3"),
    (WHOLE | {"unet.to_q.lora_B.weight": B[:4]}, {}, "unet.to_q.lora_B.weight is 4x2, this net takes 5x2"),
    (WHOLE | {"unet.to_q.lora_B.weight": B[:, :1]}, {}, "unet.to_q.lora_B.weight is 5x1, this net takes 5x2"),
    (WHOLE | {"unet.to_q.lora_A.weight": A[:0], "unet.to_q.lora_B.weight": B[:, :0]}, {}, "is 0x3, this net takes rx3"),
    (WHOLE | {"unet.conv.lora_A.weight": A, "unet.conv.lora_B.weight": B}, {}, "is 2x3, this net takes 2x3x3x3"),
    (WHOLE | {"unet.to_q.lora_B.weight": B / 0}, {}, "unet.to_q.lora_B.weight is not finite"),
    (
        WHOLE | {"lora_unet_to_q.lora_up.weight": B}, {},
        "unet.to_q.lora_B.weight and lora_unet_to_q.lora_up.weight are of one",
    ),
    (WHOLE | {"lora_unet_a_b.lora_down.weight": A}, {}, "lora_unet_a_b.lora_down.weight can mean a.b and a_b"),
    (WHOLE | {"unet.to_q.alpha": torch.tensor(torch.nan)}, {}, "unet.to_q.alpha is no number"),
    (WHOLE | {"unet.to_q.alpha": torch.ones(2)}, {}, "unet.to_q.alpha is no number"),
    (WHOLE | {"text_encoder.to_q.lora_A.weight": A}, {}, "text_encoder.to_q.lora_A.weight fits no layer of unet"),
    (WHOLE | {"diffusion_model.to_q.lora_A.weight": A}, {}, "diffusion_model.to_q.lora_A.weight fits no layer of unet"),
    (WHOLE, {META: "{"}, "lora_adapter_metadata is no JSON"),
    (WHOLE, {META: '{"unet.use_rslora": true}'}, "its lora_adapter_metadata says use_rslora, which is not supported"),
    (WHOLE, {META: '{"use_dora": true}'}, "its lora_adapter_metadata says use_dora, which is not supported"),
    (WHOLE, {META: '{"lora_alpha": "much"}'}, "the alphas of its lora_adapter_metadata cannot be read"),
    (WHOLE, {META: '{"alpha_pattern": {"(": 1}}'}, "the alphas of its lora_adapter_metadata cannot be read"),
    (WHOLE, {META: '{"alpha_pattern": [1]}'}, "the alphas of its lora_adapter_metadata cannot be read"),
    (WHOLE, {META: '{"lora_alpha": NaN}'}, "the alpha of to_q in its lora_adapter_metadata is not finite"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_whole(
    state: dict[str, Tensor], said: dict[str, str], problem: str, tmp_path: Path
) -> None:
    net, path = Toy(), tmp_path / "odd.safetensors"
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, metadata=said)
    with pytest.raises(UserError) as caught:
        lora_files.read(path, {"unet": Known(net)}, "style")
    assert problem in str(caught.value) and caught.value.key == "adapters"
    assert len(caught.value.line()) <= 200 and caught.value.fix == "adapters=FILE for this net"
    assert not lora.names(net)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    net, path = {"unet": Known(Toy())}, tmp_path / "a.safetensors"
    save_file({}, tmp_path / "empty.safetensors")
    torch.save(WHOLE, tmp_path / "pickled.safetensors")
    save_file(WHOLE, path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
    for name, problem in {
        "absent": "no such file",
        "empty": "it holds no adapters",
        "pickled": "no whole file of safetensors; pickled files are not read",
        "cut": "no whole file of safetensors; pickled files are not read",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"{name}.safetensors: {problem}")):
            lora_files.read(tmp_path / f"{name}.safetensors", net, "style")
    lora_files.read(path, net, "style")
    with pytest.raises(UserError, match=r"an adapter has this name already. Fix: .name=style_2"):
        lora_files.read(path, net, "style")
    with pytest.raises(UserError, match=r".name=stile: no adapter is called so. Fix: .name=style"):
        lora_files.write(tmp_path / "b.safetensors", net, "stile", "kohya")
    with pytest.raises(UserError, match=r".layout=comfyui: its names for this net are not known"):
        lora_files.write(tmp_path / "b.safetensors", net, "style", "comfyui")


def test_alpha_is_the_rank_where_a_file_has_none(tmp_path: Path) -> None:
    """And what a key says counts before what the header says."""
    path, header = tmp_path / "a.safetensors", {META: json.dumps({"unet.lora_alpha": 7, "unet.r": 2})}
    for state, said, alpha in (
        (WHOLE, {}, 2),
        (WHOLE, {META: json.dumps({"text_encoder.lora_alpha": 7})}, 2),
        (WHOLE, header, 7),
        (WHOLE | {"unet.to_q.alpha": torch.tensor([0.5])}, header, 0.5),
    ):
        net = Toy()
        save_file(state, path, metadata=said)
        lora_files.read(path, {"unet": Known(net)}, "style")
        assert lora.adapters(net, "style")["to_q"].alpha == alpha


def test_the_keys_of_each_layout_are_these(tmp_path: Path) -> None:
    net, path = Toy(), tmp_path / "a.safetensors"
    known = {"unet": Known(net, original=lambda place: f"input_blocks.1.{place}")}
    lora.add(net, name="style", targets=["a.b"], rank=2, alpha=3)
    found = {}
    for layout in ("diffusers", "kohya", "comfyui"):
        lora_files.write(path, known, "style", layout)
        found[layout] = sorted(load_file(path))
        with safe_open(path, "pt") as file:
            assert (META in file.metadata()) == (layout == "diffusers")
    assert found == {
        "diffusers": ["unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight"],
        "kohya": ["lora_unet_a_b.alpha", "lora_unet_a_b.lora_down.weight", "lora_unet_a_b.lora_up.weight"],
        "comfyui": [f"diffusion_model.input_blocks.1.a.b.{end}" for end in ("alpha", "lora_A.weight", "lora_B.weight")],
    }
