"""Which tokens to take directions from: compares `"last"`, `"mean"` and `"differing"` of `directions_from_pairs`.

Directions from displeased to pleased reviews of several forms are added to every token of SmolLM2-135M-Instruct, with
`lobireft` adapters. For each direction the table shows how much likelier unseen pleased texts become than unseen
displeased ones (in nats per text, relative to the base model), at strength 1 and at the strength that raises the loss
on neutral texts by 0.1 nats per token; and how much that loss rises at strength 1.

    python examples/benchmarks/directions.py
    python examples/benchmarks/directions.py --layers 8 12
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from peft import PeftModel, get_peft_model
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_reft import ReftConfig, directions_from_pairs

THINGS = [
    *("The movie", "The dinner", "My holiday", "The hotel room", "The new phone", "The concert", "The book"),
    *("The train ride", "Our teacher", "The party", "The service", "This song", "The garden", "The museum"),
]
PLEASED = ["was wonderful, I loved every minute of it", "was fantastic and made me so happy", "was a real joy"]
DISPLEASED = ["was terrible, I hated every minute of it", "was awful and made me so angry", "was a real misery"]
UNSEEN = ["The restaurant", "Our new kitchen", "The football match", "Her speech", "The boat trip"]
UNSEEN_PLEASED = ["was delightful and I would go back at once", "could not have been better"]
UNSEEN_DISPLEASED = ["was disgusting and I would never go back", "could not have been worse"]
NEUTRAL = [
    "The library opens at nine in the morning and closes at six, except on Sundays.",
    "To boil an egg, put it into hot water and wait for about seven minutes.",
    "The river rises in the mountains and flows north through two towns before it reaches the sea.",
    "A triangle has three sides, and the sum of its angles is one hundred and eighty degrees.",
]


def shapes() -> dict[str, tuple[list[str], list[str]]]:
    """Name -> pleased and displeased texts; each entry adds one more difference between them."""

    def texts(pattern: str, endings: list[str]) -> list[str]:
        return [pattern.format(thing, ending) for thing, ending in product(THINGS, endings)]

    def both(pleased: str, displeased: str) -> tuple[list[str], list[str]]:
        return texts(pleased, PLEASED), texts(displeased, DISPLEASED)

    return {
        "end alike, in a full stop": both("{} {}.", "{} {}."),
        "end in their own words": both("{} {}", "{} {}"),
        "end in ! and .": both("{} {}!", "{} {}."),
        "end in a line break and .": both("{} {}.\n", "{} {}."),
        "begin differently too": both("Great: {} {}.", "Sadly, {} {}."),
        "end alike, in a question": both("{} {}. How was it?", "{} {}. How was it?"),
    }


@torch.no_grad()
def log_likelihoods(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[float, float]:
    """Mean log-probability per text, and per token."""
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    logits = model(input_ids=padded, attention_mask=real).logits[:, :-1]
    found = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
    total = (found * real[:, 1:].flatten()).sum().item()
    return total / len(texts), total / real[:, 1:].sum().item()


def measured(model: PeftModel, tokenizer: PreTrainedTokenizerBase, strength: float) -> tuple[float, float]:
    """How much likelier pleased texts are than displeased ones, and the loss on neutral texts."""
    with model.rescaled("default", strength):
        pleased, displeased = (
            log_likelihoods(model, tokenizer, [f"{thing} {ending}." for thing, ending in product(UNSEEN, endings)])[0]
            for endings in (UNSEEN_PLEASED, UNSEEN_DISPLEASED)
        )
        return pleased - displeased, -log_likelihoods(model, tokenizer, NEUTRAL)[1]


def at_equal_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase, base: tuple[float, float]) -> float:
    """The gain at the strength that raises the loss on neutral texts by 0.1, found by bisection."""
    low, high = 0.0, 8.0
    for _ in range(7):
        middle = (low + high) / 2
        with model.rescaled("default", middle):
            loss = -log_likelihoods(model, tokenizer, NEUTRAL)[1]
        low, high = (middle, high) if loss - base[1] < 0.1 else (low, middle)
    return measured(model, tokenizer, low)[0] - base[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 14, 18])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = ReftConfig(
        intervention="lobireft", r=1, positions="all", layers_to_transform=options.layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    before = measured(model, tokenizer, 0)
    print("| texts | tokens | gain at strength 1 | loss on neutral texts | gain where that is 0.1 |")
    print("|---|---|---|---|---|")
    for name, (positive, negative) in shapes().items():
        for tokens in ("last", "mean", "differing"):
            directions = directions_from_pairs(model, tokenizer, positive, negative, options.layers, tokens)
            model.set_directions("default", directions)
            gain, loss = (after - first for after, first in zip(measured(model, tokenizer, 1), before, strict=True))
            equal = at_equal_loss(model, tokenizer, before)
            print(f"| {name} | {tokens} | {gain:+.1f} | {loss:+.2f} | {equal:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
