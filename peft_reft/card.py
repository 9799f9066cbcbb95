"""The text in a model card that says how to load an adapter. PEFT without this package cannot load it."""

from __future__ import annotations

import warnings
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig

NAME = "README.md"

_HEADING = "## How to load this ReFT adapter"
_TEXT = """{heading}

The adapter was trained with `peft_reft` (`pip install peft-reft`, or `pip install .` in a checkout), which adds ReFT to
PEFT when it is imported. Without the import PEFT fails with `KeyError: 'REFT'`. To use a program that loads adapters
itself, run it with `python -m peft_reft.run PROGRAM ARGUMENTS...`

```python
import peft_reft  # registers ReFT with PEFT
from peft import {loader}

model = {loader}.from_pretrained("path/or/hub-id/of/this/adapter")
```
"""

# PEFT's class for any model refuses adapters with a task type.
_LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def with_loading_text(folder: Path, config: PeftConfig) -> ModelCard | None:
    """The card in an adapter's folder, or a new one, with the text; None, and a warning, if the card is unreadable."""
    path = folder / NAME
    try:
        card = ModelCard.load(path) if path.exists() else _new_card(config)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{path} is no model card that can be read ({reason}), so it is left unchanged. The adapter is saved; to "
            "load it, `import peft_reft` first. Move the file away and save again to get a card that says so.",
            stacklevel=4,
        )
        return None
    tags = card.data.tags or []
    # PEFT replaces the tags each time it saves.
    card.data.tags = sorted({*([tags] if isinstance(tags, str) else tags), "reft", "peft_reft"})
    if _HEADING not in card.text:
        text = _TEXT.format(heading=_HEADING, loader=_LOADERS.get(config.task_type, "AutoPeftModel"))
        # Above PEFT's template, 200 lines of blanks to fill in.
        title, heading, rest = card.text.partition("\n## ")
        card.text = f"{title.rstrip()}\n\n{text}{heading}{rest}".rstrip() + "\n"
    return card


def _new_card(config: PeftConfig) -> ModelCard:
    data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path or None)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n")
