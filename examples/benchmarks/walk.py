"""The path of a pass through the package: how often it changes from one file to another, and by which calls.

    python examples/benchmarks/walk.py
    python examples/benchmarks/walk.py --show training

A tiny Llama with one edited layer: a training forward pass, `generate` of one token, and a batch whose rows have
different adapters. Fewer moves make code that is easier to follow; `tests/test_structure.py` checks upper bounds.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peft_reft
from peft_reft import ReftConfig

PACKAGE = str(Path(peft_reft.__file__).parent)


class Walk:
    """Follows the package's own frames while a function runs.

    Attributes:
        files: the files on the path, in order; a file counts again when the path returns to it.
        calls: the functions that were called, in order, with their file.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.calls: list[str] = []
        self._inside: list[str] = []

    def follow(self, run: Callable[[], Any]) -> Walk:
        """Run a function."""
        sys.setprofile(self._event)
        try:
            run()
        finally:
            sys.setprofile(None)
        return self

    @property
    def moves(self) -> int:
        """How often the walk changes from one file to another."""
        return max(len(self.files) - 1, 0)

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(PACKAGE):
            return
        name = path[len(PACKAGE) + 1 :]
        if event == "call":
            self._inside.append(name)
            self.calls.append(
                f"{name}:{frame.f_code.co_qualname if hasattr(frame.f_code, 'co_qualname') else frame.f_code.co_name}"
            )
        else:
            self._inside.pop()
        here = self._inside[-1] if self._inside else name
        if not self.files or self.files[-1] != here:
            self.files.append(here)


def walks() -> dict[str, Walk]:
    """The walks of the three passes, each after a warm-up pass."""
    config = ReftConfig(r=2, positions="f2+l2", layers_to_transform=[1], task_type="CAUSAL_LM")
    model, mixed = (get_peft_model(tiny_llama(), config, adapter_name="a") for _ in range(2))
    mixed.add_adapter("b", ReftConfig(r=2, positions="l1", layers_to_transform=[1], task_type="CAUSAL_LM"))
    ids = torch.arange(3, 13)[None]
    labels = torch.where(torch.arange(10)[None] < 6, -100, ids)
    runs: dict[str, Callable[[], Any]] = {
        "training": lambda: model.train()(input_ids=ids, labels=labels, use_cache=False),
        "generate": lambda: model.eval().generate(input_ids=ids, max_new_tokens=1, do_sample=False),
        "mixed": lambda: mixed.eval()(input_ids=ids.repeat(2, 1), labels=labels.repeat(2, 1), adapter_names=["a", "b"]),
    }
    found = {}
    for name, run in runs.items():
        with torch.set_grad_enabled(name == "training"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
            found[name] = Walk().follow(run)
    return found


def tiny_llama() -> PreTrainedModel:
    """A random Llama of three layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--show", choices=["training", "generate", "mixed"], help="print this walk, call by call")
    show = parser.parse_args().show
    found = walks()
    for name, walk in found.items():
        functions, files = len(set(walk.calls)), len(set(walk.files))
        print(f"{name}: {walk.moves} moves between {files} files, {len(walk.calls)} calls of {functions} functions")
    if show is not None:
        print(*found[show].calls, sep="\n")


if __name__ == "__main__":
    main()
