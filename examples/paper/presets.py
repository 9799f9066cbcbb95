"""Hyper-parameters: the paper's for its base models, and our own for the two small models that come as packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suites import GLUE_TASKS

sys.path.append(str(Path(__file__).resolve().parents[1]))


@dataclass(frozen=True)
class Recipe:
    """A base model, ReFT's options, and what differs from the defaults of the trainer's arguments.

    Attributes:
        model: hub id, or a function that finds the folder of a model that comes as a package.
        layers: the layers to edit; None for all.
        max_length: of tokenized training sequences, and of prompts.
        generation: keyword arguments of `generate`.
    """

    model: str | Callable[[], Path]
    rank: int
    positions: str
    share_weights: bool
    max_length: int
    training: dict[str, Any]
    layers: list[int] | None = None
    dropout: float = 0.0
    generation: dict[str, Any] = field(default_factory=dict)


def smollm2() -> Path:
    from smollm2 import smollm2_folder

    return smollm2_folder()


def minilm() -> Path:
    from minilm import minilm_folder

    return minilm_folder()


def _training(learning_rate: float, epochs: float, batch: int, accumulation: int = 1, warmup: float = 0) -> dict:
    return {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": warmup,  # below 1: a part of all steps
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
    }


def _commonsense(model: str) -> Recipe:
    return Recipe(model, 8, "f7+l7", True, 512, _training(9e-4, 6, 16, 2, 0.1), generation={"max_new_tokens": 32})


def _arithmetic(model: str) -> Recipe:
    return Recipe(model, 8, "f7+l7", True, 512, _training(9e-4, 12, 16, 2, 0.1), generation={"max_new_tokens": 512})


# Less padding, and so less time on a CPU.
_GROUPED = {"train_sampling_strategy": "group_by_length"}

INSTRUCT_GENERATION = {"no_repeat_ngram_size": 5, "repetition_penalty": 1.1}

GENERATION_PRESETS = {
    "commonsense": {
        "llama-7b": _commonsense("yahma/llama-7b-hf"),
        "llama-13b": _commonsense("yahma/llama-13b-hf"),
        "smollm2": Recipe(
            smollm2, 8, "f7+l7", True, 256, _training(9e-4, 2, 8, 1, 0.1) | _GROUPED, generation={"max_new_tokens": 10}
        ),
    },
    "arithmetic": {
        "llama-7b": _arithmetic("yahma/llama-7b-hf"),
        "llama-13b": _arithmetic("yahma/llama-13b-hf"),
        "smollm2": Recipe(
            smollm2, 8, "f7+l7", True, 512, _training(4e-3, 3, 8, 1, 0.1) | _GROUPED, generation={"max_new_tokens": 256}
        ),
    },
    # Not the paper's: answers by log-likelihood.
    "likelihood": {"smollm2": Recipe(smollm2, 4, "f3+l3", True, 128, _training(2e-3, 1, 16, 1, 0.06) | _GROUPED)},
    "instruct": {
        "llama-7b": Recipe(
            "meta-llama/Llama-2-7b-hf",
            *(4, "f5+l5", False, 768),
            _training(9e-4, 9, 4, 32),
            layers=[3, 9, 18, 24],
            generation=INSTRUCT_GENERATION | {"max_length": 2048},
        ),
        "smollm2": Recipe(
            smollm2,
            *(4, "f5+l5", False, 512),
            _training(4e-3, 2, 4, 4) | _GROUPED,
            generation=INSTRUCT_GENERATION | {"max_length": 1024},
        ),
    },
}

# Per task: position, learning rate, dropout, warmup, epochs. Rank 1 on all layers, batches of 32.
PAPER_GLUE = {
    "roberta-base": {
        "mnli": ("f1", 6e-4, 0.05, 0.06, 40),
        "sst2": ("f3", 6e-4, 0.10, 0.1, 40),
        "mrpc": ("f3", 3e-4, 0.05, 0, 40),
        "cola": ("f3", 4e-4, 0.20, 0.005, 60),
        "qnli": ("f11", 9e-4, 0.05, 0.1, 20),
        "qqp": ("f11", 6e-4, 0.05, 0, 40),
        "rte": ("f3", 9e-4, 0.05, 0, 60),
        "stsb": ("f3", 6e-4, 0.05, 0.03, 60),
    },
    "roberta-large": {
        "mnli": ("f1", 6e-4, 0.05, 0, 20),
        "sst2": ("f3", 6e-4, 0.05, 0.10, 20),
        "mrpc": ("f3", 3e-4, 0.20, 0.06, 30),
        "cola": ("f3", 1e-4, 0.20, 0.20, 30),
        "qnli": ("f11", 9e-4, 0.05, 0.10, 20),
        "qqp": ("f11", 6e-4, 0.05, 0.06, 20),
        "rte": ("f3", 6e-4, 0.05, 0, 30),
        "stsb": ("f3", 8e-4, 0.05, 0.20, 30),
    },
}


def _paper_glue(model: str, position: str, rate: float, dropout: float, warmup: float, epochs: int) -> Recipe:
    return Recipe(model, 1, position, False, 256, _training(rate, epochs, 32, 1, warmup), dropout=dropout)


GLUE_PRESETS = {
    preset: {task: _paper_glue(f"FacebookAI/{preset}", *values) for task, values in tasks.items()}
    for preset, tasks in PAPER_GLUE.items()
} | {
    # Trained to have its tokens' states averaged: no single token stands for the sentence.
    "minilm": {
        task: Recipe(minilm, 4, "all", True, 128, _training(2e-3, 3, 32, 1, 0.06) | _GROUPED) for task in GLUE_TASKS
    },
    # Its classifier reads the last token.
    "smollm2": {
        task: Recipe(smollm2, 4, "f3+l3", True, 128, _training(2e-3, 1, 16, 1, 0.06) | _GROUPED) for task in GLUE_TASKS
    },
}


def recipe(suite: str, preset: str, task: str | None = None) -> Recipe:
    """The preset of a name in a suite, and in one task of GLUE."""
    presets = GLUE_PRESETS if suite == "glue" else GENERATION_PRESETS[suite]
    if preset not in presets:
        raise SystemExit(f"There is no recipe for --preset {preset} in {suite}; there are {', '.join(presets)}.")
    return presets[preset][task] if suite == "glue" else presets[preset]
