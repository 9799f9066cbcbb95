"""The configuration of an adapter. Every invalid value raises an error here that names it."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft.config import PeftConfig
from transformers.activations import ACT2FN

from peft_reft import card
from peft_reft.components import COMPONENTS
from peft_reft.interventions import INTERVENTIONS
from peft_reft.registration import ensure_peft_type
from peft_reft.tokens import positions as pos

# Set by PEFT in every config.
_OF_PEFT = ("peft_type", "peft_version")
_COLLECTIONS = (
    "layers_to_transform",
    "layers_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "component",
)


@dataclass(repr=False)
class ReftConfig(PeftConfig):
    """
    Configuration of a [`ReftModel`]: representation finetuning (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    The defaults are the paper's recipe for commonsense reasoning where it has one: rank 8, the first and last seven
    prompt tokens with shared weights, every layer.

    Args:
        r (`int`):
            Rank: the dimension of the subspace that is edited, at most the hidden size.
        positions (`str`):
            Which tokens are edited: `f<n>` and `l<n>` (first and last n tokens of the prompt), `prompt`, `c<n>` (first
            n tokens after the prompt), `completion`, `all`, combined with `+`.
        share_weights (`bool`):
            Whether one intervention serves all words of `positions` (the paper's "tied") or each has its own.
        intervention (`str`):
            The method: `"loreft"`, `"noreft"`, `"direft"`, `"nodireft"`, `"consreft"`, `"lobireft"` or `"red"` (see the
            classes in `peft_reft.interventions` for their equations). `"red"` has no rank.
        layers_to_transform (`Union[List[int], int]`):
            The layers to edit, all by default; negative numbers count from the end. In an encoder-decoder model they
            apply to both stacks.
        layers_pattern (`Union[List[str], str]`):
            Restricts the layers to the stacks of blocks whose name ends so, for instance `"encoder.layers"`.
        component (`Union[List[str], str]`):
            What is edited in a layer: `"block_output"` and `"block_input"`, the residual stream after and before the
            block; `"attention_output"` and `"mlp_output"`, the outputs of the last projections of its self-attention
            and of its MLP (of the whole MLP, if it is a mixture of experts); or several of them.
        target_modules (`Union[List[str], str]`):
            Names the modules whose output is edited, in place of `component`. A list matches names and their endings, a
            string is a regular expression.
        exclude_modules (`Union[List[str], str]`):
            Modules to leave out, matched likewise.
        modules_to_save (`List[str]`):
            Further modules to train and to save with the adapter, such as a classification head.
        trainable_token_indices (`Union[List[int], Dict[str, List[int]]]`):
            Tokens whose embedding is trained and saved with the adapter, such as new ones; a dictionary names the
            embedding. TRL sets it when a chat template adds tokens.
        ensure_weight_tying (`bool`):
            Whether `modules_to_save` and `trainable_token_indices` stay tied where the model ties weights, such as the
            embedding and the output layer.
        dropout (`float`):
            Dropout on the edited representations, in training.
        act_fn (`str`):
            Activation on `W h + b`, a name in Transformers' `ACT2FN`; none by default.
        use_bias (`bool`):
            Whether the method has a `b`. Without one, an affine adapter of all tokens merges into models whose layers
            have no bias (Llama, Mistral, Qwen), and the merged model can be saved.
        subspaces (`Dict[str, int]`):
            Splits the `r` dimensions into named groups, for instance `{"style": 4, "task": 4}`, which can be edited
            (and trained) separately. They take the dimensions in alphabetical order. See `set_subspaces` of
            [`ReftModel`] and the argument `subspaces` of `forward`.
        freeze_subspace (`bool`):
            Whether the edited subspace is frozen, so that only W and b are learned.
        init_weights (`Union[bool, Literal["pyreft"]]`):
            True: a new adapter does not change the model (except `"consreft"`, which always does, and adapters with an
            `act_fn`). `"pyreft"`: random W and b, as in pyreft. False: random, for tests.

    Raises:
        ValueError: an unknown or contradictory value; the message names it.
    """

    r: int = field(default=8, metadata={"help": "Rank: the dimension of the subspace that is edited."})
    positions: str = field(
        default="f7+l7",
        metadata={
            "help": (
                "Which tokens are edited: f<n>, l<n> (first, last n prompt tokens), prompt, c<n> (first n tokens after "
                "the prompt), completion, all; combined with '+'."
            ),
            "example": "For example, 'f7+l7', 'l1', 'f3+c2' or 'all'",
        },
    )
    share_weights: bool = field(
        default=True,
        metadata={"help": "Whether one intervention serves all words of positions, or each word has its own."},
    )
    intervention: str = field(default="loreft", metadata={"help": f"The method, one of {sorted(INTERVENTIONS)}."})
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "The layer or layers to edit, all by default; negative numbers count from the end."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Restricts the layers to the stacks of blocks whose name ends so, e.g. 'encoder.layers'."},
    )
    component: list[str] | str = field(
        default="block_output", metadata={"help": f"What is edited in a layer, one or several of {list(COMPONENTS)}."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (list) or regular expression (string) of modules to edit, in place of component."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (list) or regular expression (string) of modules to leave out."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train and save with the adapter, such as a classification head."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embedding is trained and saved with the adapter."}
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Whether modules_to_save and trainable_token_indices stay tied if the model ties weights."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edited representations, in training."})
    act_fn: str | None = field(
        default=None, metadata={"help": "Activation on W h + b, a name from Transformers' ACT2FN."}
    )
    # Not named `bias`, which PEFT reads from every config as one of "none", "all" and "lora_only".
    use_bias: bool = field(
        default=True, metadata={"help": "Whether the method has a b; without one it merges into more models."}
    )
    subspaces: dict[str, int] | None = field(
        default=None, metadata={"help": "Splits the r dimensions into named groups, e.g. {'style': 4, 'task': 4}."}
    )
    freeze_subspace: bool = field(default=False, metadata={"help": "Whether the edited subspace is frozen."})
    init_weights: bool | Literal["pyreft"] = field(
        default=True,
        metadata={
            "help": "True: starts as the identity; 'pyreft': random W and b, as in pyreft; False: random, for tests."
        },
    )

    # Read by PEFT's module matching; ReFT edits outputs of modules, never parameters.
    target_parameters = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        for name in _COLLECTIONS:
            setattr(self, name, _as_list(getattr(self, name)))
        self._check_names()
        self._check_numbers()
        self._check_choices()
        self._check_contradictions()

    def __repr__(self) -> str:
        """A call that creates it, without options that have their default value."""
        always = ("intervention", "r", "positions")
        told = (f for f in fields(self) if f.name not in _OF_PEFT and (f.name in always or not _is_default(self, f)))
        told = sorted(told, key=lambda f: always.index(f.name) if f.name in always else len(always))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    @property
    def parsed_positions(self) -> pos.Positions:
        """`positions` and `share_weights`, parsed."""
        return pos.parse(self.positions, self.share_weights)

    @property
    def components(self) -> list[str]:
        """`component` as a list."""
        return [self.component] if isinstance(self.component, str) else self.component

    @property
    def coordinates(self) -> dict[str, range]:
        """Name of each of `subspaces`, in alphabetical order -> its coordinates among the `r`."""
        # PEFT sorts the names when it saves them.
        coordinates, begin = {}, 0
        for name, size in sorted((self.subspaces or {}).items()):
            coordinates[name] = range(begin, begin + size)
            begin += size
        return coordinates

    def _check_names(self) -> None:
        for name in ("layers_pattern", "target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _are_names(value)):
                raise ValueError(f"{name} must be a string or a list of strings, got {value!r}.")
        if not (self.modules_to_save is None or _are_names(self.modules_to_save)):
            raise ValueError(f"modules_to_save must be a list of strings, got {self.modules_to_save!r}.")
        tokens = self.trainable_token_indices
        named = tokens if isinstance(tokens, dict) else {"": tokens}
        if tokens is not None and not (_are_names([*named]) and all(map(_are_integers, named.values()))):
            raise ValueError(
                f"trainable_token_indices must be a list of integers, or a dictionary of such lists, got {tokens!r}."
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as error:
                raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from error

    def _check_numbers(self) -> None:
        if not _is_integer(self.r) or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}.")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        layers = self.layers_to_transform
        if layers == []:
            raise ValueError("layers_to_transform=[] selects no layer; None selects every layer.")
        if layers is not None and not all(_is_integer(i) for i in (layers if isinstance(layers, list) else [layers])):
            raise ValueError(f"layers_to_transform must be an integer or integers, got {layers!r}.")

    def _check_choices(self) -> None:
        self.parsed_positions  # noqa: B018  raises on an unknown word
        if self.intervention not in INTERVENTIONS:
            raise ValueError(f"Unknown intervention {self.intervention!r}; allowed are {sorted(INTERVENTIONS)}.")
        if not self.components or len(set(map(str, self.components))) < len(self.components):
            raise ValueError(f"component={self.component!r} must name something, and nothing twice.")
        for component in self.components:
            if component not in COMPONENTS:
                raise ValueError(f"Unknown component {component!r}; allowed are {list(COMPONENTS)}.")
        self._check_act_fn()
        if INTERVENTIONS[self.intervention].needs_bias and not self.use_bias:
            raise ValueError(f"use_bias={self.use_bias!r}: {self.intervention!r} is zero without a b; leave it out.")
        if not isinstance(self.init_weights, bool) and self.init_weights != "pyreft":
            raise ValueError(f"init_weights must be True, False or 'pyreft', got {self.init_weights!r}.")
        for name in ("share_weights", "freeze_subspace", "use_bias", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_subspaces()

    def _check_act_fn(self) -> None:
        if self.act_fn is None:
            return
        if not (isinstance(self.act_fn, str) and self.act_fn in ACT2FN):
            raise ValueError(f"Unknown act_fn {self.act_fn!r}; allowed are {sorted(ACT2FN)}, or None.")
        if not INTERVENTIONS[self.intervention].takes_act_fn:
            raise ValueError(
                f"act_fn={self.act_fn!r}: {self.intervention!r} has no learned projection W h + b that an activation "
                "could follow; leave it out, or choose another intervention."
            )
        if next(ACT2FN[self.act_fn].parameters(), None) is not None:
            raise ValueError(f"act_fn={self.act_fn!r} has its own parameters; choose an activation without any.")

    def _check_subspaces(self) -> None:
        if not INTERVENTIONS[self.intervention].low_rank:
            for name in ("subspaces", "freeze_subspace"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r}: {self.intervention!r} edits each coordinate separately, not "
                        "a subspace; choose another intervention."
                    )
        if self.subspaces is None:
            return
        sizes = self.subspaces
        if not isinstance(sizes, dict) or not all(
            isinstance(n, str) and _is_integer(k) and k > 0 for n, k in sizes.items()
        ):
            raise ValueError(f"subspaces must map names to positive integers, got {sizes!r}.")
        if sum(sizes.values()) != self.r:
            raise ValueError(f"subspaces={sizes!r} have {sum(sizes.values())} dimensions in all, but r={self.r}.")

    def _check_contradictions(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(f"target_modules={self.target_modules!r} selects nothing; None edits the blocks' output.")
        if self.target_modules is not None and self.components != ["block_output"]:
            raise ValueError(
                f"target_modules={self.target_modules!r} and component={self.component!r} contradict each other: "
                "target_modules replaces component."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with the regular expression "
                f"target_modules={self.target_modules!r}: write the layers into it, or name modules in a list."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """
        Save `adapter_config.json`, and say in the model card beside it how to load the adapter.

        Nothing outside the folder is read or written. Each file is written beside the old one and then renamed, so a
        process that is killed here leaves either the old file or the new one.

        Args:
            save_directory (`str`): The adapter's folder, made if it does not exist.
            kwargs: Passed on to PEFT.

        Raises:
            FileExistsError: `save_directory` is a file.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
            super().save_pretrained(beside, **kwargs)
            if (loading := card.with_loading_text(folder, self)) is not None:
                loading.save(Path(beside, card.NAME))
            for path in sorted(Path(beside).iterdir()):
                path.replace(folder / path.name)


def _is_default(config: ReftConfig, option: Field) -> bool:
    return option.default is not MISSING and getattr(config, option.name) == option.default


def _as_list(value: Any) -> Any:
    """A collection as the list that JSON returns, a set in sorted order; anything else unchanged."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))
