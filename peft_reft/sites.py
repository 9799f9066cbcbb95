"""Finds the modules to edit and their widths, from layers and components or from module names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from peft_reft.components import DECODER, ENCODER, OUTPUT, Part, find_component, has_output, multiplies_itself
from peft_reft.config import ReftConfig
from peft_reft.families import part_of_layer, parts_of_block
from peft_reft.interventions import INTERVENTIONS
from peft_reft.modules import named_base_modules, named_modules
from peft_reft.places import Place, Places, is_called_past_hooks, place_outside
from peft_reft.stacks import BlockList, block_lists, is_encoder_decoder, streams_of


@dataclass(frozen=True)
class Site:
    """A module whose output (or input) is edited.

    Attributes:
        name: its dotted name in the model.
        module: the module.
        place: the width of what is edited, and where the tokens are in it.
        stream: the stream of tokens that passes through it, `"decoder"` or, in the encoder of an encoder-decoder
            model, `"encoder"`.
        side: whether its `"output"` or its `"input"` is edited.
        index: number of the block that it is, or is in.
        depth: number of blocks there.
        is_block: whether it is a block itself, rather than in one.
        past_hooks: whether the model calls its `forward` directly, past its hooks.
    """

    name: str
    module: nn.Module
    place: Place
    stream: str = DECODER
    side: str = OUTPUT
    index: int | None = None
    depth: int = 0
    is_block: bool = False
    past_hooks: bool = False

    @property
    def features(self) -> int:
        return self.place.features


def find_sites(model: nn.Module, config: ReftConfig) -> list[Site]:
    """The modules that a config selects in a model.

    Raises:
        ValueError: the model has no blocks, a layer does not exist, nothing matches, a width is unknown, `r` is larger
            than a width, or `positions` can select no token at a module.
    """
    find = _block_sites if config.target_modules is None else _named_sites
    sites = _each_once(find(model, block_lists(model), config), model)
    sites = _without_left_out(_reached(model, sites, config), config)
    for site in sites:
        if INTERVENTIONS[config.intervention].low_rank and config.r > site.features:
            raise ValueError(f"r={config.r} is larger than the hidden size {site.features} of {site.name!r}.")
        _check_is_called(model, site)
        _check_has_tokens(site, config)
    return sites


def _each_once(sites: list[Site], model: nn.Module) -> list[Site]:
    """The sites, each module once and under its name in the model; several layers may share a module (Zamba)."""
    names = {module: name for name, module in named_modules(model)}
    once = {(site.module, site.side): site for site in reversed(sites)}
    shared = [replace(site, name=names.get(module, site.name)) for (module, _), site in once.items()]
    return shared[::-1]


def _check_is_called(model: nn.Module, site: Site) -> None:
    parent = model.get_submodule(site.name.rpartition(".")[0])
    fused = multiplies_itself(type(parent)) or (hasattr(parent, "A_log") and hasattr(parent, "conv1d"))
    if fused and site.name.endswith(".out_proj"):
        raise ValueError(
            f"{site.name!r} cannot be edited: {type(parent).__name__} uses its weight without calling it. Target "
            f"{site.name.rpartition('.')[0]!r} instead."
        )


def _check_has_tokens(site: Site, config: ReftConfig) -> None:
    layout = site.place.layout
    if layout is not None and not layout.maps_tokens and config.parsed_positions.needs_prompt:
        raise ValueError(
            f"positions={config.positions!r} has no meaning at {site.name!r}: in this model, {site.place.reason}. Edit "
            "everything there (positions='all'), or choose other layers or modules (layers_to_transform, "
            "target_modules)."
        )


def _reached(model: nn.Module, sites: list[Site], config: ReftConfig) -> list[Site]:
    """The sites where `positions` can select a token."""
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
    # The encoder last, because some decoders hold it too.
    parts = reversed(streams_of(model).items())
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
            f"component={config.component!r} needs {_no_blocks(model)} Name the modules to edit in target_modules."
        )
    lists = _the_stacks(model, _by_pattern(lists, config))
    _check_layers(lists, config)
    return [site for component in config.components for site in _component_sites(model, lists, component, config)]


def _no_blocks(model: nn.Module) -> str:
    """The end of a sentence that says what a model without blocks lacks."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"the blocks of a Transformers model, but {kind} is not a Transformers model."
    return (
        f"the blocks of a Transformers model, but none were found in {kind}: no nn.ModuleList in it has modules whose "
        "outputs are recorded as hidden states, that are checkpointed one by one, or that all have parts."
    )


def _the_stacks(model: nn.Module, lists: list[BlockList]) -> list[BlockList]:
    """The stacks, if they are unambiguous.

    Raises:
        ValueError: several parts of the model have a stack for the same tokens.
    """
    owners = {(stack.stream, stack.owner[0]) for stack in lists}
    if len(owners) > len({stack.stream for stack in lists}):
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks, and nothing tells which of them to edit: "
            f"{', '.join(repr(stack.name) for stack in lists)}. Choose with layers_pattern, or name modules in "
            "target_modules."
        )
    return lists


def _component_sites(model: nn.Module, lists: list[BlockList], component: str, config: ReftConfig) -> list[Site]:
    sites: list[Site] = []
    without: dict[str, list[str]] = {}
    for stack in lists:
        places, past_hooks = Places(model, stack), is_called_past_hooks(model, stack)
        for index in sorted(_indices(len(stack.blocks), config)):
            parts = _parts(stack, index, component)
            reason = parts if isinstance(parts, str) else places.obstacle(index, parts[0])
            if reason is None:
                sites += [_site_of_part(places, index, part, past_hooks) for part in parts]
            else:
                kind = type(stack.blocks[index]).__name__
                without.setdefault(f"{kind}: {reason}", []).append(f"{stack.names[index]}")
    if not sites:
        raise ValueError(
            f"component={component!r} was not found in any of the layers to edit ({'; '.join(without)}). Name the "
            "modules to edit in target_modules."
        )
    if without:
        # Hybrid models have attention in some blocks only.
        count = sum(map(len, without.values()))
        warnings.warn(
            f"component={component!r} is edited in {len(sites)} layers; {count} have none and are passed over "
            f"({'; '.join(without)}).",
            stacklevel=2,
        )
    return sites


def _parts(stack: BlockList, index: int, component: str) -> list[Part] | str:
    """A component of a block, or the reason why the block has none; its name is relative to the block."""
    block = stack.blocks[index]
    told = parts_of_block(block)
    if component in told:
        name = told[component]
        return "it has none" if name is None else [Part(name, block.get_submodule(name))]
    if not stack.is_loose:
        return find_component(block, component)
    name = part_of_layer(component, index)
    return "no module is given what the layer is" if name is None else [Part(name, stack.owner[1].get_submodule(name))]


def _site_of_part(places: Places, index: int, part: Part, past_hooks: bool) -> Site:
    stack = places.blocks
    common = {"stream": stack.stream, "side": part.side, "index": index, "depth": len(stack.blocks)}
    if stack.is_loose:
        prefix = stack.owner[0]
        name = f"{prefix}.{part.name}" if prefix else part.name
        return Site(name, part.module, places.of_part(index, name, part.module), **common)
    name = stack.names[index]
    if not part.name:
        place = places.of_block(index, part.side)
        return Site(name, part.module, place, is_block=True, past_hooks=past_hooks, **common)
    name = f"{name}.{part.name}"
    return Site(name, part.module, places.of_part(index, name, part.module), **common)


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
                f"{_no_blocks(model)} Name each module in target_modules instead."
            )
        homes = _by_pattern(lists, config)
        _check_layers(homes, config)
    streams = _streams_by_module(model)
    sites = []
    for name, module in named_base_modules(model):
        if not matches(config.target_modules, name) or not has_output(module):
            continue
        home, index = _home(homes, name)
        if restricted and (home is None or index not in _indices(len(home.blocks), config)):
            continue
        sites.append(_named_site(model, name, module, home, index, streams.get(module, DECODER)))
    if not sites:
        layers = f" in layers_to_transform={config.layers_to_transform!r}" if _layers(config) is not None else ""
        layers += f" in layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module{layers}. A list matches whole names and their "
            "endings, a string is a regular expression for the whole name. Containers such as nn.ModuleList have no "
            "output to edit."
        )
    return sites


def _named_site(
    model: nn.Module, name: str, module: nn.Module, home: BlockList | None, index: int | None, stream: str
) -> Site:
    if home is None:
        return Site(name, module, place_outside(model, name, module), stream)
    places = Places(model, home)
    common = {"stream": stream, "index": index, "depth": len(home.blocks)}
    if name != home.names[index] or home.is_loose:
        return Site(name, module, places.of_part(index, name, module), **common)
    place = places.of_block(index, OUTPUT)
    return Site(name, module, place, is_block=True, past_hooks=is_called_past_hooks(model, home), **common)


def _home(homes: list[BlockList], name: str) -> tuple[BlockList | None, int | None]:
    """The stack that a module is in, and the number of its block there."""
    for home in homes:
        if name.startswith(f"{home.name}.") and (index := home.index_of(name)) is not None:
            return home, index
    return None, None


def matches(patterns: str | Iterable[str] | None, name: str) -> bool:
    """Whether a name matches a regular expression (string), or one of a list of names and their endings."""
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _holds_any(name: str, modules_to_save: Iterable[str] | None) -> bool:
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules_to_save or ())
