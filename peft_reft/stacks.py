"""The stacks of blocks of a model: Transformers' own notion of them first, then structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_reft.components import DECODER, ENCODER, has_output
from peft_reft.families import has_loose_layers, stack_of
from peft_reft.modules import named_modules

# How strong the evidence is that a list holds blocks: Transformers records hidden states there; it checkpoints the
# modules one by one; their parts have parts.
_RECORDED, _CHECKPOINTED, _NESTED = 3, 2, 1
_List = nn.ModuleList | nn.Sequential


@dataclass(frozen=True, eq=False)
class BlockList:
    """The stack of blocks of a model or of a part of one.

    Attributes:
        name: dotted name of the `nn.ModuleList` or `nn.Sequential`.
        blocks: the blocks, in the order of their numbers, which count through lists of lists.
        names: their dotted names.
        owner: name and module of the Transformers model that it belongs to.
        stream: see `Site`.
        is_loose: whether the model has lists of the parts of its layers in place of blocks; `blocks` is the last list.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    owner: tuple[str, PreTrainedModel]
    stream: str = DECODER
    is_loose: bool = False

    def index_of(self, name: str) -> int | None:
        """Number of the block that the module of this name is or is in; None if it is in none."""
        found = (i for i, block in enumerate(self.names) if name == block or name.startswith(f"{block}."))
        return next(found, None)


def block_lists(model: nn.Module) -> list[BlockList]:
    """The stacks of blocks of a Transformers model: one, or an encoder's and a decoder's. Empty for anything else.

    In a multimodal model, only the part with the text configuration counts. Within a part of the model that has its own
    stream of tokens, the stack is, in this order: what `families.stack_of` names; the list that Transformers records
    hidden states from (`_can_record_outputs`); the list of modules that it checkpoints one by one; a list of modules
    whose parts have parts. Recorded and checkpointed lists are searched in the models of the part's own configuration,
    then in the one that holds the input embeddings, then in all. Without such a list, it is an `nn.Sequential` of
    modules whose parts have parts, else a list of modules that have parts. Among several such lists, the one with the
    most parameters is chosen, or all with the same number. If several models within the part have a list, all are
    returned.
    """
    return _Search(model).lists() if isinstance(model, PreTrainedModel) else []


def only_block_list(model: nn.Module) -> BlockList:
    """The stack of blocks of a model that has one.

    Raises:
        ValueError: it has none, or two.
    """
    found = block_lists(model)
    if len(found) != 1:
        names = ", ".join(repr(block_list.name) for block_list in found) or "none"
        raise ValueError(
            f"Layers are numbered here in a model's only stack of blocks, but {type(model).__name__} has {names}. "
            "Encoder-decoder models and models without a stack are not supported for this."
        )
    return found[0]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether tokens pass through the model in two streams."""
    return ENCODER in streams_of(model)


def streams_of(model: nn.Module) -> dict[str, nn.Module]:
    """The part of the model that each stream of tokens passes through; empty for anything but a Transformers model."""
    if not isinstance(model, PreTrainedModel):
        return {}
    text = _text_part(model)
    if not getattr(text.config, "is_encoder_decoder", False) or (encoder := text.get_encoder()) is text:
        # Decoder-only classes of encoder-decoder families return themselves as the encoder.
        return {DECODER: text}
    return {ENCODER: encoder, DECODER: text.get_decoder()}


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that has its text configuration: all of it, or one tower of a multimodal model."""
    text_config = model.config.get_text_config()
    # Composite encoder-decoder models call their decoder's configuration the text configuration.
    if text_config is model.config or getattr(model.config, "is_encoder_decoder", False):
        return model
    parts = (module for _, module in named_modules(model) if isinstance(module, PreTrainedModel))
    # A class with one tower (CLIPForImageClassification) has the configuration of the whole model.
    return next((part for part in parts if type(part.config) is type(text_config)), model)


def innermost_model(model: PreTrainedModel, name: str) -> tuple[str, PreTrainedModel]:
    """Name and module of the innermost Transformers model that is, or holds, the module of this name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        owner = model.get_submodule(".".join(parts[:length]))
        if isinstance(owner, PreTrainedModel):
            return ".".join(parts[:length]), owner
    return "", model


class _Search:
    """Looks for the stacks of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = {module: name for name, module in named_modules(model)}

    def lists(self) -> list[BlockList]:
        found: list[BlockList] = []
        seen: set[nn.Module] = set()
        for stream, part in streams_of(self.model).items():
            lists = self._of_family(part) or self._of_part(part, seen)
            found += [self._block_list(blocks, stream) for blocks in lists]
            # Some decoders (Florence-2) hold the encoder too.
            seen.update(module for _, module in named_modules(part))
        return found

    def _of_family(self, part: nn.Module) -> list[_List]:
        for name, module in named_modules(part):
            if isinstance(module, PreTrainedModel) and (stack := stack_of(module)) is not None:
                return [part.get_submodule(f"{name}.{stack}" if name else stack)]
        return []

    def _of_part(self, part: nn.Module, seen: set[nn.Module]) -> list[_List]:
        tower = _text_part(part) if isinstance(part, PreTrainedModel) else part
        ranks = {blocks: self._rank(blocks) for blocks in _outermost_lists(tower) if blocks not in seen}
        owners = {blocks: self._owner(blocks) for blocks in ranks}
        config, entry = type(self._owner(tower).config), self._entry(tower)
        own = [blocks for blocks in ranks if type(owners[blocks].config) is config]
        first = [blocks for blocks in ranks if owners[blocks] is entry]
        for rank, lists in (
            (_RECORDED, own),
            (_RECORDED, first),
            (_CHECKPOINTED, own),
            (_CHECKPOINTED, first),
            (_RECORDED, ranks),
            (_CHECKPOINTED, ranks),
            (_NESTED, own),
            (_NESTED, ranks),
        ):
            if chosen := [blocks for blocks in lists if ranks[blocks] == rank]:
                return list(_largest(chosen, owners if lists is ranks else {}))
        return list(_largest(_other_lists(tower, seen), {}))

    def _owner(self, module: nn.Module) -> PreTrainedModel:
        return innermost_model(self.model, self.names[module])[1]

    def _entry(self, tower: nn.Module) -> PreTrainedModel | None:
        """The model within the tower that holds the embeddings of its input."""
        try:
            embeddings = tower.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return self._owner(embeddings) if embeddings in self.names else None

    def _rank(self, blocks: nn.ModuleList) -> int:
        recorded = _recorded_classes(self._owner(blocks))
        if recorded and any(isinstance(part, recorded) for block in _flat(blocks) for part in block.modules()):
            return _RECORDED
        return _CHECKPOINTED if any(_is_checkpointed(block) for block in _flat(blocks)) else _NESTED

    def _block_list(self, blocks: _List, stream: str) -> BlockList:
        name, flat = self.names[blocks], _flat(blocks)
        if not all(map(_is_nested, flat)) and any(map(_is_checkpointed, flat)):
            # Vision models have patch embeddings between their blocks.
            flat = [block for block in flat if _is_checkpointed(block)]
        names = tuple(self.names[block] for block in flat)
        owner = innermost_model(self.model, name)
        return BlockList(name, tuple(flat), names, owner, stream, is_loose=has_loose_layers(owner[1]))


def _outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Outermost lists of modules whose parts have parts, or some of which are checkpointed one by one."""
    return _outermost(model, nn.ModuleList, lambda flat: all(map(_is_nested, flat)) or any(map(_is_checkpointed, flat)))


def _other_lists(tower: nn.Module, seen: set[nn.Module]) -> list[_List]:
    """The next best lists, for models in which no `nn.ModuleList` certainly holds blocks."""
    if any(isinstance(part, PreTrainedModel) and has_loose_layers(part) for _, part in named_modules(tower)):
        return []
    found = list(_outermost(tower, nn.Sequential, lambda flat: len(flat) > 1 and all(map(_is_nested, flat))))
    found = found or list(_outermost(tower, nn.ModuleList, lambda flat: len(flat) > 1 and all(map(_has_parts, flat))))
    return [blocks for blocks in found if blocks not in seen]


def _outermost(model: nn.Module, kind: type[nn.Module], fits: Callable[[list[nn.Module]], bool]) -> Iterator[_List]:
    inside: tuple[str, ...] = ()
    for name, module in named_modules(model):
        if name.startswith(inside) or not isinstance(module, kind) or not (flat := _flat(module)):
            continue
        if fits(flat):
            inside += (f"{name}.",)
            yield module


def _flat(blocks: _List) -> list[nn.Module]:
    """The modules of a list and of the lists in it, in order."""
    flat = [block for entry in blocks for block in (entry if isinstance(entry, nn.ModuleList) else [entry])]
    # Some lists hold None for some layers.
    return [block for block in flat if block is not None]


def _is_nested(block: nn.Module) -> bool:
    """Whether a module's parts have parts: a block, rather than a projection or an expert."""
    return has_output(block) and any(next(part.children(), None) is not None for part in block.children())


def _has_parts(block: nn.Module) -> bool:
    return has_output(block) and next(block.children(), None) is not None


def _is_checkpointed(block: nn.Module) -> bool:
    return isinstance(block, GradientCheckpointingLayer)


def _recorded_classes(model: PreTrainedModel) -> tuple[type, ...]:
    """The classes of the modules whose outputs Transformers collects as the hidden states of a model."""
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("hidden_states", ())
    classes = []
    for entry in recorded if isinstance(recorded, (list, tuple)) else (recorded,):
        target = getattr(entry, "target_class", entry)
        classes += target if isinstance(target, tuple) else (target,)
    return tuple(entry for entry in classes if isinstance(entry, type))


def _largest(lists: list[_List], owners: Mapping[_List, PreTrainedModel]) -> Iterator[_List]:
    """The lists of each owner that hold the most parameters."""
    sizes = {blocks: _parameter_count(blocks) for blocks in lists}
    for blocks in lists:
        if sizes[blocks] == max(sizes[other] for other in lists if owners.get(other) is owners.get(blocks)):
            yield blocks


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for _, part in named_modules(module) for p in part.parameters(recurse=False))
