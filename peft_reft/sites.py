"""Where a model can be edited: from layers and a component, or from module names, to modules and their widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peft_reft.components import DECODER, ENCODER, OUTPUT, find_component, has_output
from peft_reft.config import ReftConfig
from peft_reft.interventions import INTERVENTIONS
from peft_reft.modules import named_base_modules, named_modules


@dataclass(frozen=True)
class Site:
    """A module whose output (or input) is edited.

    Attributes:
        name: its dotted name in the model.
        module: the module.
        features: size of the last axis of what is edited.
        stream: the stream of tokens that passes through it, `"decoder"` or, in the encoder of an encoder-decoder
            model, `"encoder"`.
        side: whether its `"output"` or its `"input"` is edited.
        index: number of the block that it is, or is in.
        depth: number of blocks there.
    """

    name: str
    module: nn.Module
    features: int
    stream: str = DECODER
    side: str = OUTPUT
    index: int | None = None
    depth: int = 0

    @property
    def is_block(self) -> bool:
        """Whether the module is a block itself, rather than in one."""
        return self.index is not None and self.name.endswith(f".{self.index}")


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
    `nn.ModuleList`s of blocks, and of those in one stream the one that holds the most parameters (two, if they hold
    equally many). Empty for anything but a Transformers model.
    """
    names = {module: name for name, module in named_modules(model)}
    lists: list[BlockList] = []
    seen: set[nn.Module] = set()
    for stream, part in _streams(model).items():
        sizes = {b: _parameter_count(b) for b in _text_lists(model, names, part) if b not in seen}
        largest = [blocks for blocks, size in sizes.items() if size == max(sizes.values())]
        lists += [BlockList(names[b], b, _owner(model, names[b]), stream) for b in largest]
        # Some decoders (Florence-2) hold the encoder too.
        seen.update(module for _, module in named_modules(part))
    return lists


def only_block_list(model: nn.Module) -> BlockList:
    """The stack of blocks of a model that has one.

    Raises:
        ValueError: it has none, or two.
    """
    found = block_lists(model)
    if len(found) != 1:
        names = ", ".join(repr(block_list.name) for block_list in found) or "none"
        raise ValueError(
            f"Layers are numbered here in the one stack of blocks of a model, but {type(model).__name__} has {names}. "
            "Encoder-decoder models and models without a stack are not supported for this."
        )
    return found[0]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether tokens pass through the model in two streams."""
    return ENCODER in _streams(model)


def _streams(model: nn.Module) -> dict[str, nn.Module]:
    """The part of the model that each stream of tokens passes through; empty for anything but a Transformers model."""
    text = _text_part(model) if isinstance(model, PreTrainedModel) else None
    if text is None:
        return {}
    if not getattr(text.config, "is_encoder_decoder", False) or (encoder := text.get_encoder()) is text:
        # Decoder-only classes of encoder-decoder families return themselves as encoder.
        return {DECODER: text}
    return {ENCODER: encoder, DECODER: text.get_decoder()}


def _text_part(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a model that has its text configuration: all of it, or one tower of a multimodal model."""
    text_config = model.config.get_text_config()
    # Composite encoder-decoder models call their decoder's configuration the text configuration.
    if text_config is model.config or getattr(model.config, "is_encoder_decoder", False):
        return model
    parts = (module for _, module in named_modules(model) if isinstance(module, PreTrainedModel))
    return next((part for part in parts if type(part.config) is type(text_config)), None)


def _text_lists(model: PreTrainedModel, names: Mapping[nn.Module, str], part: nn.Module) -> Iterator[nn.ModuleList]:
    text = _text_part(part) if isinstance(part, PreTrainedModel) else part
    if text is None:
        return
    config_type = type(_owner(model, names[text])[1].config)
    for blocks in _outermost_lists(text):
        if type(_owner(model, names[blocks])[1].config) is config_type:
            yield blocks


def _outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of modules whose parts have parts themselves: blocks, rather than projections or experts."""
    inside: tuple[str, ...] = ()
    for name, module in named_modules(model):
        if name.startswith(inside) or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(any(_has_parts(part) for part in block.children()) for block in module):
            inside += (f"{name}.",)
            yield module


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for _, part in named_modules(module) for p in part.parameters(recurse=False))


def _owner(model: PreTrainedModel, name: str) -> tuple[str, PreTrainedModel]:
    """The innermost Transformers model that is, or holds, the module of this name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        owner = model.get_submodule(".".join(parts[:length]))
        if isinstance(owner, PreTrainedModel):
            return ".".join(parts[:length]), owner
    return "", model


def find_sites(model: nn.Module, config: ReftConfig) -> list[Site]:
    """The modules that a config asks to edit.

    Raises:
        ValueError: the model has no blocks to find, a layer does not exist, nothing matches, a width cannot be told,
            or `r` is larger than a width.
    """
    find = _block_sites if config.target_modules is None else _named_sites
    sites = _without_left_out(_reached(model, find(model, block_lists(model), config), config), config)
    for site in sites:
        if INTERVENTIONS[config.intervention].low_rank and config.r > site.features:
            raise ValueError(f"r={config.r} is larger than the hidden size {site.features} of {site.name!r}.")
        _check_is_called(model, site)
    return sites


def _check_is_called(model: nn.Module, site: Site) -> None:
    parent = model.get_submodule(site.name.rpartition(".")[0])
    fused = isinstance(parent, nn.MultiheadAttention) or (hasattr(parent, "A_log") and hasattr(parent, "conv1d"))
    if fused and site.name.endswith(".out_proj"):
        raise ValueError(
            f"{site.name!r} cannot be edited: {type(parent).__name__} uses its weight without calling it. Target "
            f"{site.name.rpartition('.')[0]!r} instead."
        )


def _reached(model: nn.Module, sites: list[Site], config: ReftConfig) -> list[Site]:
    """Those sites where `positions` can select a token."""
    edited, streams = _edited_streams(model, config), _streams_by_module(model)
    reached = [site for site in sites if streams.get(site.module) in (None, *edited)]
    if not reached:
        raise ValueError(
            f"positions={config.positions!r} selects no token in {', '.join(repr(site.name) for site in sites)}: in an "
            "encoder-decoder model the encoder's tokens are the prompt and the decoder's the completion."
        )
    return reached


def _without_left_out(sites: list[Site], config: ReftConfig) -> list[Site]:
    excluded = [site for site in sites if matches(config.exclude_modules, site.name)]
    saved = [site for site in sites if _holds_any(site.name, config.modules_to_save)]
    kept = [site for site in sites if site not in excluded and site not in saved]
    if not kept:
        raise ValueError(
            f"Nothing is left to edit: exclude_modules={config.exclude_modules!r} removed {len(excluded)} and "
            f"modules_to_save={config.modules_to_save!r} {len(saved)} of the matching modules."
        )
    return kept


def _streams_by_module(model: nn.Module) -> dict[nn.Module, str]:
    # The encoder last: some decoders hold it too.
    parts = reversed(_streams(model).items())
    return {module: stream for stream, part in parts for _, module in named_modules(part)}


def _edited_streams(model: nn.Module, config: ReftConfig) -> set[str]:
    if not is_encoder_decoder(model):
        return {DECODER}
    positions = config.parsed_positions
    words = {
        ENCODER: positions.only(prompt=True, completion=False).words,
        DECODER: positions.only(prompt=False, completion=True).words,
    }
    return {stream for stream in words if words[stream]}


def _block_sites(model: nn.Module, lists: list[BlockList], config: ReftConfig) -> list[Site]:
    if not lists:
        raise ValueError(
            f"component={config.component!r} needs the blocks of a Transformers model, but none were found in "
            f"{type(model).__name__}. Name the modules to edit in target_modules."
        )
    lists = _by_pattern(lists, config)
    _check_layers(lists, config)
    return [site for component in config.components for site in _component_sites(lists, component, config)]


def _component_sites(lists: list[BlockList], component: str, config: ReftConfig) -> list[Site]:
    sites, blocks = [], []
    for block_list in lists:
        for index in sorted(_indices(len(block_list.blocks), config)):
            block = block_list.blocks[index]
            blocks.append(block)
            found = find_component(block, component)
            if found is not None:
                name, module, side = found
                name = f"{block_list.name}.{index}" + (f".{name}" if name else "")
                sites.append(
                    Site(name, module, block_list.hidden_size, block_list.stream, side, index, len(block_list.blocks))
                )
    # Hybrid models have attention in some blocks only.
    if not sites:
        raise ValueError(
            f"component={component!r} was not found in any of the asked blocks "
            f"({', '.join(sorted({type(block).__name__ for block in blocks}))}). Name the modules to edit in "
            "target_modules."
        )
    return sites


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
            f"layers_to_transform={config.layers_to_transform!r}: there is no layer {wrong[0]}. The model has {stacks};"
            f" allowed are 0 to {most - 1}, or -1 to {-most} counted from the end."
        )


def _named_sites(model: nn.Module, lists: list[BlockList], config: ReftConfig) -> list[Site]:
    homes = lists
    if restricted := bool(config.layers_pattern) or _layers(config) is not None:
        if not lists:
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} need "
                f"the blocks of a Transformers model, but none were found in {type(model).__name__}. Name each module "
                "in target_modules instead."
            )
        homes = _by_pattern(lists, config)
        _check_layers(homes, config)
    streams = _streams_by_module(model)
    sites = []
    for name, module in named_base_modules(model):
        if not matches(config.target_modules, name) or not has_output(module):
            continue
        home = next((bl for bl in homes if name.startswith(f"{bl.name}.")), None)
        index = None if home is None else _index_in(home, name)
        if restricted and (home is None or index not in _indices(len(home.blocks), config)):
            continue
        width = _features(model, name, module, home)
        sites.append(
            Site(name, module, width, streams.get(module, DECODER), index=index, depth=len(home.blocks) if home else 0)
        )
    if not sites:
        layers = f" in layers_to_transform={config.layers_to_transform!r}" if _layers(config) is not None else ""
        layers += f" in layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module{layers}. A list matches whole names and their "
            "endings, a string is a regular expression for the whole name. Containers such as nn.ModuleList have no "
            "output to edit."
        )
    return sites


def _index_in(home: BlockList, name: str) -> int:
    return int(name[len(home.name) + 1 :].split(".")[0])


def matches(patterns: str | Iterable[str] | None, name: str) -> bool:
    """Whether a name is what a regular expression, or one of a list of names and endings, asks for."""
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
        # DeepSpeed's ZeRO-3 holds none of it here and keeps the shape beside it.
        return getattr(weight, "ds_shape", weight.shape)[0]
    return None
