"""Where a model can be edited: from layers and a component, or from module names, to modules and their widths."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_reft.config import ReftConfig
from peft_reft.positions import Positions
from peft_reft.prompts import DECODER, ENCODER


@dataclass(frozen=True)
class Site:
    """A module whose output is edited.

    Attributes:
        name: its dotted name in the model.
        module: the module.
        features: size of its output's last axis.
        stream: the stream of tokens that passes through it, `"decoder"` or, in the encoder of an encoder-decoder
            model, `"encoder"`.
    """

    name: str
    module: nn.Module
    features: int
    stream: str = DECODER


@dataclass(frozen=True)
class BlockList:
    """The stack of blocks of a (part of a) model.

    Attributes:
        name: dotted name of the `nn.ModuleList`.
        blocks: the list.
        owner: name and module of the Transformers model that it belongs to.
        stream: see `Site`.
    """

    name: str
    blocks: nn.ModuleList
    owner: tuple[str, PreTrainedModel]
    stream: str

    @property
    def hidden_size(self) -> int:
        return _hidden_size(self.owner[1])


def _hidden_size(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    raise ValueError(
        f"{type(config).__name__} does not tell a hidden size; name the modules to edit in target_modules."
    )


def block_lists(model: nn.Module) -> list[BlockList]:
    """The stacks of blocks of a Transformers model's text part: one, or an encoder's and a decoder's.

    They are found by structure: within the part of the model that has the text configuration, the outermost
    `nn.ModuleList`s of compound modules, and of those in one stream the one that holds the most parameters.
    Empty for anything but a Transformers model.
    """
    found = _text_model(model)
    if found is None:
        return []
    prefix, text = found
    encoder = _encoder_of(text)
    best: dict[str, tuple[int, BlockList]] = {}
    for name, blocks in _outermost_lists(text):
        owner_name, owner = _owner(text, name)
        if type(owner.config) is not type(text.config):
            continue
        inside_encoder = encoder is not None and any(module is blocks for module in encoder.modules())
        stream = ENCODER if inside_encoder else DECODER
        size = sum(parameter.numel() for parameter in blocks.parameters())
        if stream not in best or size > best[stream][0]:
            owner_name = _join(prefix, owner_name)
            best[stream] = (size, BlockList(_join(prefix, name), blocks, (owner_name, owner), stream))
    return [block_list for _, block_list in best.values()]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether tokens pass through the model in two streams."""
    found = _text_model(model)
    return found is not None and _encoder_of(found[1]) is not None


def _text_model(model: nn.Module) -> tuple[str, PreTrainedModel] | None:
    if not isinstance(model, PreTrainedModel):
        return None
    text_config = model.config.get_text_config()
    if text_config is model.config:
        return "", model
    return next(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, PreTrainedModel) and type(module.config) is type(text_config)
        ),
        None,
    )


def _encoder_of(model: PreTrainedModel) -> nn.Module | None:
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()
    # Decoder-only classes of encoder-decoder families return themselves.
    return None if encoder is model else encoder


def _outermost_lists(model: nn.Module) -> Iterable[tuple[str, nn.ModuleList]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        compound = isinstance(module, nn.ModuleList) and len(module) > 0
        if compound and all(next(block.children(), None) is not None for block in module):
            inside.append(f"{name}.")
            yield name, module


def _owner(model: PreTrainedModel, name: str) -> tuple[str, PreTrainedModel]:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:length]))
        if isinstance(owner, PreTrainedModel):
            return ".".join(parts[:length]), owner
    return "", model


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def find_sites(model: nn.Module, config: ReftConfig) -> list[Site]:
    """The modules that a config asks to edit.

    Raises:
        ValueError: the model has no blocks to find, a layer does not exist, nothing matches, a width cannot be told,
            or `r` is larger than a width.
    """
    lists = block_lists(model)
    find = _block_sites if config.target_modules is None else _named_sites
    sites = find(model, lists, config)
    excluded = [site for site in sites if _matches(config.exclude_modules, site.name)]
    saved = [site for site in sites if _holds_any(site.name, config.modules_to_save)]
    sites = [site for site in sites if site not in excluded and site not in saved]
    if not sites:
        raise ValueError(_nothing_matched(config, lists, excluded, saved))
    for site in sites:
        if config.r > site.features:
            raise ValueError(f"r={config.r} is larger than the hidden size {site.features} of {site.name!r}.")
    return sites


def _block_sites(model: nn.Module, lists: list[BlockList], config: ReftConfig) -> list[Site]:
    if not lists:
        raise ValueError(
            f"component={config.component!r} needs the blocks of a Transformers model, but none were found in "
            f"{type(model).__name__}. Name the modules to edit in target_modules."
        )
    lists = _by_pattern(lists, config)
    wanted = {block_list.name: _indices(len(block_list.blocks), config) for block_list in lists}
    _check_layers(lists, config)
    positions = config.parsed_positions
    return [
        Site(f"{block_list.name}.{index}", block, block_list.hidden_size, block_list.stream)
        for block_list in lists
        if len(lists) == 1 or _reachable(positions, block_list.stream)
        for index, block in enumerate(block_list.blocks)
        if index in wanted[block_list.name]
    ]


def _reachable(positions: Positions, stream: str) -> bool:
    return bool(positions.only(prompt=stream == ENCODER, completion=stream == DECODER).words)


def _by_pattern(lists: list[BlockList], config: ReftConfig) -> list[BlockList]:
    if not config.layers_pattern:
        return lists
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    kept = [bl for bl in lists if any(bl.name == p or bl.name.endswith(f".{p}") for p in patterns)]
    if not kept:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} names no stack of blocks of this model; it has "
            f"{', '.join(repr(bl.name) for bl in lists)}."
        )
    return kept


def _layers(config: ReftConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def _indices(count: int, config: ReftConfig) -> set[int]:
    layers = _layers(config)
    return set(range(count)) if layers is None else {layer % count for layer in layers if -count <= layer < count}


def _check_layers(lists: list[BlockList], config: ReftConfig) -> None:
    most = max(len(block_list.blocks) for block_list in lists)
    wrong = [layer for layer in _layers(config) or [] if not -most <= layer < most]
    if wrong:
        stacks = " and ".join(f"{len(bl.blocks)} layers in {bl.name!r}" for bl in lists)
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r}: there is no layer {wrong[0]}. The model has {stacks}; "
            f"allowed are 0 to {most - 1}, or -1 to {-most} counted from the end."
        )


def _named_sites(model: nn.Module, lists: list[BlockList], config: ReftConfig) -> list[Site]:
    if _layers(config) is not None:
        if not lists:
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} needs the blocks of a Transformers model, but none "
                f"were found in {type(model).__name__}. Name each module in target_modules instead."
            )
        lists = _by_pattern(lists, config)
        _check_layers(lists, config)
    sites = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        if not name or name.startswith(inside) or not _matches(config.target_modules, name):
            continue
        home = next((bl for bl in lists if name.startswith(f"{bl.name}.")), None)
        if _layers(config) is not None:
            if home is None:
                continue
            index = name[len(home.name) + 1 :].split(".")[0]
            if int(index) not in _indices(len(home.blocks), config):
                continue
        stream = home.stream if home is not None else _stream_of(model, module)
        sites.append(Site(name, module, _features(model, name, module, home), stream))
    return sites


def _stream_of(model: nn.Module, module: nn.Module) -> str:
    found = _text_model(model)
    encoder = None if found is None else _encoder_of(found[1])
    inside = encoder is not None and any(child is module for child in encoder.modules())
    return ENCODER if inside else DECODER


def _matches(patterns: str | Iterable[str] | None, name: str) -> bool:
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _holds_any(name: str, modules_to_save: Iterable[str] | None) -> bool:
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules_to_save or ())


def _features(model: nn.Module, name: str, module: nn.Module, home: BlockList | None) -> int:
    """Width of a module's output, as its type tells it; blocks and their direct parts have the hidden size."""
    width = _own_width(module)
    if width is None and home is not None:
        width = home.hidden_size
    if width is None and isinstance(model, PreTrainedModel):
        width = _hidden_size(model)
    if width is None:
        raise ValueError(
            f"The width of the output of {name!r} ({type(module).__name__}) cannot be told. Give it an integer "
            "attribute out_features, or target a module that has one (nn.Linear, nn.Embedding, a normalization layer)."
        )
    return width


def _own_width(module: nn.Module) -> int | None:
    for attribute in ("out_features", "embedding_dim", "nf"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    if isinstance(module, nn.Sequential) and len(module):
        return next((width for child in reversed(module) if (width := _own_width(child)) is not None), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1 and next(module.children(), None) is None:
        return weight.shape[0]
    return None


def _nothing_matched(config: ReftConfig, lists: list[BlockList], excluded: list[Site], saved: list[Site]) -> str:
    if excluded or saved:
        return (
            f"Nothing is left to edit: exclude_modules={config.exclude_modules!r} removed {len(excluded)} and "
            f"modules_to_save={config.modules_to_save!r} {len(saved)} of the matching modules."
        )
    if config.target_modules is None:
        return (
            f"positions={config.positions!r} with layers_to_transform={config.layers_to_transform!r} selects no block of "
            f"{', '.join(repr(bl.name) for bl in lists)}. In an encoder-decoder model the encoder's tokens are the "
            "prompt and the decoder's the completion."
        )
    return (
        f"target_modules={config.target_modules!r} matches no module"
        + (f" in layers_to_transform={config.layers_to_transform!r}." if _layers(config) is not None else ".")
        + " A list matches whole names and their endings, a string is a regular expression for the whole name."
    )
