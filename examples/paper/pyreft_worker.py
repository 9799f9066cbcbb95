"""The half of `pyreft_curves.py` that runs in pyreft's own environment; knows nothing of peft_reft.

    python pyreft_worker.py FOLDER

reads `task.json` in FOLDER, saves a fresh adapter to FOLDER/init, trains it and writes `pyreft.json`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyreft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_linear_schedule_with_warmup


def load_model(folder: str) -> PreTrainedModel:
    """The base model. Older Transformers reads the rotary base from another place than newer ones write it to."""
    config = AutoConfig.from_pretrained(folder)
    stored = json.loads(Path(folder, "config.json").read_text())
    if "rope_parameters" in stored:
        config.rope_theta = stored["rope_parameters"]["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32).eval()


def adapted(model: PreTrainedModel, rank: int) -> pyreft.ReftModel:
    """A fresh LoReFT on the output of every block, one for both ends of the prompt."""
    width = model.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=width, low_rank_dimension=rank, dropout=0.0, dtype=torch.float32
            ),
        }
        for layer in range(model.config.num_hidden_layers)
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def loss_of(reft: pyreft.ReftModel, batch: dict, positions: str, layers: int) -> torch.Tensor:
    """The loss with pyreft's own positions."""
    locations = [
        pyreft.get_intervention_locations(
            last_position=last, positions=positions, num_interventions=layers, share_weights=True
        )
        for last in batch["prompt_lengths"]
    ]
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    units = torch.tensor(locations).permute(1, 0, 2).tolist()
    _, output = reft(inputs, unit_locations={"sources->base": (None, units)}, labels=torch.tensor(batch["labels"]))
    return output.loss


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    random.seed(task["seed"])
    np.random.seed(task["seed"])
    torch.manual_seed(task["seed"])
    model = load_model(task["model"])
    first = {name: torch.tensor(task["batches"][0][name]) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        base_loss = model(**first).loss.item()
    reft = adapted(model, task["rank"])
    reft.save(str(folder / "init"))
    if task["frozen_subspace"]:
        for name, parameter in reft.named_parameters():
            if "rotate_layer" in name:
                parameter.requires_grad_(False)

    parameters = [parameter for parameter in reft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task["learning_rate"], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(task["batches"]))
    losses, begin = [], time.process_time()
    for number, batch in enumerate(task["batches"]):
        loss = loss_of(reft, batch, task["positions"], model.config.num_hidden_layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number % 10 == 0:
            print(f"pyreft  step {number:3}  loss {losses[-1]:.4f}", flush=True)
    result = {
        "losses": losses,
        "base_loss": base_loss,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "processor_seconds": time.process_time() - begin,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pyreft", "pyvene")),
    }
    (folder / "pyreft.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
