"""Models of diffusers, through target_modules: transformers of images (Stable Diffusion 3, Flux) and a U-Net."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import layers_of
from peft import PeftModel, get_peft_model
from reference import edited
from torch import nn

from peft_reft import ReftConfig

diffusers = pytest.importorskip("diffusers", reason="bash tests/run.sh diffusers makes an environment with it")


def sd3() -> tuple[nn.Module, dict]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    pixels, texts = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    return model, {
        "hidden_states": pixels,
        "encoder_hidden_states": texts,
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 7]),
    }


def flux() -> tuple[nn.Module, dict]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def unet() -> tuple[nn.Module, dict]:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }


MODELS = {"sd3": sd3, "flux": flux, "unet": unet}
# The last projections of the attentions, and of the MLPs.
TARGETS = ["to_out.0", "ff.net.2"]


@pytest.fixture(params=MODELS)
def model_and_inputs(request) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    for parameter in model.parameters():
        if not parameter.any():  # projections that start with zeros, and would hide all edits before them
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs


def adapted(base: nn.Module) -> nn.Module:
    return get_peft_model(base, ReftConfig(r=2, positions="all", target_modules=TARGETS, init_weights=False)).eval()


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def test_every_place_is_edited_by_the_equation(model_and_inputs):
    base, inputs = model_and_inputs
    model, found = adapted(base), []
    layer = layers_of(model)[0]
    layer.host.register_forward_hook(lambda module, args, hidden: found.append(hidden))
    output(model, inputs)
    with model.disable_adapter():
        output(model, inputs)
    after, before = (hidden.flatten(0, -2) for hidden in found)
    params = {name: p[0] for name, p in layer.reft_intervention["default"].named_parameters()}
    assert len(before) > 2
    for edited_place, place in zip(after, before, strict=True):
        torch.testing.assert_close(edited_place, edited("loreft", place, params), rtol=1e-4, atol=1e-5)


def test_all_of_it_is_trained_and_nothing_else(model_and_inputs):
    base, inputs = model_and_inputs
    model = adapted(base).train()
    found = output(model, inputs)
    (found * torch.randn_like(found)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("reft_" in name), name
        assert parameter.grad is None or parameter.grad.any(), name


@torch.no_grad()
def test_it_is_saved_loaded_and_taken_off(model_and_inputs, tmp_path):
    base, inputs = model_and_inputs
    fresh, plain = copy.deepcopy(base), output(base, inputs)
    model = adapted(base)
    wanted = output(model, inputs)
    assert not torch.equal(wanted, plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(output(loaded, inputs), wanted)
    assert torch.equal(output(loaded.unload(), inputs), plain)
    assert torch.equal(output(model.unload(), inputs), plain)
