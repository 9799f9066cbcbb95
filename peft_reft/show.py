"""The command `peft-reft show`: summarizes a saved adapter, and marks the tokens of a text that it edits.

It reads the configuration and the tokenizer of the base model, no weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import transformers
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from peft_reft.analysis.show import show_positions
from peft_reft.analysis.summary import summary
from peft_reft.config import ReftConfig
from peft_reft.convert import AUTO_CLASSES

_CLASSES = AUTO_CLASSES | {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", None: "AutoModel"}


def show(adapter: str, text: str | None = None, base_model: str | None = None, chat: bool = False) -> None:
    """Print a summary of a saved adapter, and a text with the edited tokens marked.

    Args:
        adapter: its folder or hub id.
        text: the text, all of it prompt.
        base_model: the base model, if the adapter does not name it.
        chat: whether the text is a user's message, for the chat template of the tokenizer.

    Raises:
        ValueError: `adapter` is not a ReFT adapter, or its base model is unknown.
        OSError: the adapter or the base model is not found.
    """
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, ReftConfig):
        raise ValueError(f"{adapter} is a {config.peft_type} adapter, not a ReFT adapter.")
    base = base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base model; give it (--base-model).")
    model = _model(base, config)
    print(summary(model))
    print(config)
    if text is not None:
        print()
        show_positions(
            model, AutoTokenizer.from_pretrained(base), [{"role": "user", "content": text}] if chat else text
        )


def _model(base: str, config: ReftConfig) -> nn.Module:
    """The base model with the adapter, without weights."""
    with torch.device("meta"):
        model = getattr(transformers, _CLASSES[config.task_type]).from_config(AutoConfig.from_pretrained(base))
        return get_peft_model(model, config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="peft-reft show", description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub id of the adapter")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="a text, all of it prompt")
    parser.add_argument("--base-model", help="the base model, if the adapter does not name it")
    parser.add_argument("--chat", action="store_true", help="the text is a user's message: apply the chat template")
    options = parser.parse_intermixed_args(arguments)
    try:
        show(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
