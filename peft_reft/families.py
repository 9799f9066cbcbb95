"""Facts about model families that neither their structure nor a protocol of Transformers reveals.

One entry per family, with its reason. The sweep over all architectures (`tests/architectures.py`) finds families that
lack one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_reft.layouts import Among, Axes, Elsewhere, Layout, Repeated

# Class of a model -> the list in it whose modules return the outputs of the layers.
_STACKS = {
    # Bytes are encoded into patches and decoded again: three stacks, the middle one on patches. The decoder is the
    # last stack with a representation of each byte.
    "BltModel": "local_decoder.layers",
    # There are no blocks: the model itself calls the attentions, MLPs and norms of all layers, which are in four
    # lists. A layer ends with its second norm.
    "XLMModel": "layer_norm2",
    "FlaubertModel": "layer_norm2",
}
# In models without blocks: component -> name of its module, by layer number.
_PARTS = {
    "attention_output": "attentions.{}.out_lin",
    "mlp_output": "ffns.{}.lin2",
    "block_output": "layer_norm2.{}",
}
# Class of a block -> component -> the module in it that puts that out, None where none does.
_PARTS_OF_BLOCKS: dict[str, dict[str, str | None]] = {
    # It has an attention for the text and one for the image, and returns the image first.
    "GroundingDinoEncoderLayer": {"attention_output": "deformable_layer.self_attn.output_proj"},
    "MMGroundingDinoEncoderLayer": {"attention_output": "deformable_layer.self_attn.output_proj"},
    # It has an MLP for the text and one for the image, and returns the text first.
    "LxmertXLayer": {"mlp_output": "lang_output.dense"},
    # It has several MLPs one after another, of which this is the last.
    "MobileBertLayer": {"mlp_output": "output.dense"},
    # It has both once more for the layout of the page, and returns the text first.
    "LiltLayer": {"attention_output": "attention.output.dense", "mlp_output": "output.dense"},
    # What it calls gated attention weighs the entries of one axis.
    "PatchTSMixerLayer": {"attention_output": None},
}


@dataclass(frozen=True)
class Placement:
    """Where the tokens are in a block's input and output.

    Attributes:
        layout: the layout, None for the usual one.
        reason: why it is not the usual one, a clause after "because".
        streams: number of vectors of the hidden size that are one token's representation.
        inside: whether the modules within the block have that layout too.
    """

    layout: Layout | None
    reason: str
    streams: int = 1
    inside: bool = False


_TOKENS_FIRST = Placement(Axes("tbd"), "its blocks work on [tokens, batch, features]", inside=True)
_TEXT_FIRST = Placement(Among(), "it appends the patches of an image to the tokens of the text", inside=True)
_PADDED = Placement(Among(), "it pads its input to a multiple of its block size", inside=True)

# model_type of the configuration -> placement
_PLACEMENTS: dict[str, Callable[[PreTrainedConfig], Placement]] = {
    "xlnet": lambda config: _TOKENS_FIRST,
    "fsmt": lambda config: _TOKENS_FIRST,
    "squeezebert": lambda config: Placement(
        Axes("bdt"), "its blocks are convolutions over [batch, features, tokens]", inside=True
    ),
    "cpmant": lambda config: Placement(
        Among(config.prompt_length), "it puts a learned prompt before its input", inside=True
    ),
    "prophetnet": lambda config: Placement(
        Repeated(), "its decoder has each token once more for every future token that it predicts", inside=True
    ),
    # Every other block pads its tokens to shift them by half a block size.
    "pegasus_x": lambda config: replace(_PADDED, inside=False),
    "canine": lambda config: Placement(Elsewhere(), "its blocks see one vector for several characters", inside=True),
    "perceiver": lambda config: Placement(Elsewhere(), "its blocks see latent vectors, not tokens", inside=True),
    "vilt": lambda config: _TEXT_FIRST,
    "visual_bert": lambda config: _TEXT_FIRST,
    "layoutlmv2": lambda config: _TEXT_FIRST,
    "layoutlmv3": lambda config: _TEXT_FIRST,
}
_FRAMES = Placement(Elsewhere(), "the places of its decoder are frames of sound", inside=True)
_POOLED = Placement(Elsewhere(), "it pools tokens between its first blocks and this one", inside=True)


def stack_of(model: PreTrainedModel) -> str | None:
    """Name of the list of blocks in a model, for families in `_STACKS`; None for others."""
    # Subclasses, such as FSDP's, belong to the family.
    stack = next((_STACKS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _STACKS), None)
    # In pre-norm models no module returns the output of a layer.
    norms_first = has_loose_layers(model) and getattr(model.config, "pre_norm", False)
    return None if norms_first else stack


def tokens_of_its_own(model: nn.Module) -> int:
    """Number of tokens that a model adds before its input and keeps in its cache, but not in its input ids."""
    config = getattr(model, "config", None)
    return config.prompt_length if getattr(config, "model_type", None) == "cpmant" else 0


def codebooks_of(model: nn.Module) -> int:
    """How many rows of token ids are one sequence, each with a code of every token (MusicGen)."""
    config = getattr(model, "config", None)
    if not getattr(config, "model_type", "").startswith("musicgen"):
        return 1
    return getattr(config, "decoder", config).num_codebooks


def has_loose_layers(model: PreTrainedModel) -> bool:
    """Whether a model has lists of the parts of its layers in place of blocks."""
    return any(cls.__name__ in ("XLMModel", "FlaubertModel") for cls in type(model).__mro__)


def part_of_layer(component: str, layer: int) -> str | None:
    """Name of the module of a component, in a model without blocks; None if it has none."""
    return _PARTS[component].format(layer) if component in _PARTS else None


def parts_of_block(block: nn.Module) -> Mapping[str, str | None]:
    """Component -> name of its module in a block, None if it has none; only those that structure does not tell."""
    known = (_PARTS_OF_BLOCKS[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in _PARTS_OF_BLOCKS)
    return next(known, {})


def placement_of(owner: PreTrainedModel, block: nn.Module, name: str) -> Placement | None:
    """Where the tokens are in a block's input and output, None for the usual `[batch, tokens, features]`.

    Args:
        owner: the innermost model that holds the block.
        block: the block.
        name: its dotted name in the owner.
    """
    config = owner.config
    if _pads(type(owner)):
        return _PADDED
    if (streams := _streams(config, block)) is not None:
        return streams
    if config.model_type == "funnel":
        return None if name.startswith("encoder.blocks.0.") else _POOLED
    if config.model_type == "fastspeech2_conformer":
        return _FRAMES if name.startswith("decoder.") else None
    placement = _PLACEMENTS.get(config.model_type)
    return None if placement is None else placement(config)


@cache
def _pads(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model has a method that pads its input, as models with block-sparse attention do."""
    return any(name.startswith("_pad_to_") for name in dir(model_class))


def _streams(config: PreTrainedConfig, block: nn.Module) -> Placement | None:
    """The placement of blocks with several residual streams, which their own modules mix."""
    children = [type(child).__name__ for child in block.children()]
    reason = "each token has several residual streams"
    if any(name.endswith("HyperConnection") for name in children) and (count := getattr(config, "hc_mult", None)):
        return Placement(Axes("btsd"), reason, count)
    if any(name.endswith("GatedResidual") for name in children) and (count := getattr(config, "hc_count", None)):
        return Placement(None, reason, count)
    if any(name.endswith("AltUp") for name in children) and (count := getattr(config, "altup_num_inputs", None)):
        return Placement(Axes("sbtd"), reason, count)
    return None
