"""Creates two adapters to serve, in seconds: steering vectors along and against the mood of a text.

python examples/serving/moods.py FOLDER          # writes FOLDER/pleased and FOLDER/displeased
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import ReftConfig, directions_from_pairs

sys.path.insert(0, str(Path(__file__).parents[1]))
from smollm2 import smollm2_folder

THINGS = ["The movie", "The dinner", "My holiday", "The hotel room", "The concert", "The book", "The train ride"]
LAYERS = [10, 12, 14, 16, 18]
STRENGTH = 0.35


def save_moods(model: str | Path, folder: str | Path) -> dict[str, str]:
    """Save the two adapters for a model; returns their folders by name."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    pleased = [f"{thing} was wonderful, I loved every minute of it." for thing in THINGS]
    displeased = [f"{thing} was terrible, I hated every minute of it." for thing in THINGS]
    directions = directions_from_pairs(base, tokenizer, pleased, displeased, LAYERS)
    folders = {}
    for name, sign in {"pleased": 1, "displeased": -1}.items():
        config = ReftConfig(
            intervention="lobireft", r=1, positions="all", layers_to_transform=LAYERS, task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(base, config)
        tuned.set_directions("default", {layer: sign * STRENGTH * d for layer, d in directions.items()})
        folders[name] = str(Path(folder) / name)
        tuned.save_pretrained(folders[name])
        base = tuned.unload()
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--model", help="folder or hub id (default: the bundled SmolLM2-135M-Instruct)")
    args = parser.parse_args()
    print(save_moods(args.model or smollm2_folder(), args.folder))
