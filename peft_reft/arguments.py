"""ReFT's options as flags of a training script, beside TRL's: `--reft_r`, `--reft_positions` and so on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_reft.config import ReftConfig


@dataclass
class ReftArguments:
    """Flags for TRL's `TrlParser` or Transformers' `HfArgumentParser`, like `lora_...` in TRL's `ModelConfig`.

        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, ReftArguments))
        script_args, training_args, model_args, reft_args = parser.parse_args_and_config()
        trainer = SFTTrainer(..., peft_config=reft_args.config(task_type="CAUSAL_LM"))

    Each flag sets the option of `ReftConfig` with the name after the prefix; `reft_layers` sets `layers_to_transform`.
    """

    reft_r: int = field(default=8, metadata={"help": "Rank: the dimension of the subspace that is edited."})
    reft_positions: str = field(
        default="f7+l7",
        metadata={"help": "Which tokens are edited: f<n>, l<n>, prompt, c<n>, completion, all; combined with '+'."},
    )
    reft_share_weights: bool = field(
        default=True, metadata={"help": "Whether one intervention serves all words of reft_positions."}
    )
    reft_intervention: str = field(default="loreft", metadata={"help": "The method."})
    reft_layers: list[int] | None = field(
        default=None, metadata={"help": "The layers to edit, all by default; negative numbers count from the end."}
    )
    reft_component: list[str] | None = field(
        default=None, metadata={"help": "What is edited in a layer; the block's output by default."}
    )
    reft_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules to edit, in place of reft_component."}
    )
    reft_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save with the adapter."}
    )
    reft_dropout: float = field(default=0.0, metadata={"help": "Dropout on the edited representations."})
    reft_use_bias: bool = field(default=True, metadata={"help": "Whether the method has a b."})

    def config(self, **options: Any) -> ReftConfig:
        """The configuration of an adapter.

        Args:
            options: further options of `ReftConfig`, such as `task_type`; they override the flags.

        Raises:
            ValueError: see [`ReftConfig`].
        """
        given = {name.removeprefix("reft_"): value for name, value in vars(self).items()}
        given["layers_to_transform"] = given.pop("layers")
        return ReftConfig(**{name: value for name, value in given.items() if value is not None} | options)
