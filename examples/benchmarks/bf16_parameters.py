"""The loss of precision when adapter parameters are stored in bfloat16, as TRL does on a quantized base.

LoReFT's W and R start with entries of about 1/sqrt(hidden size), and bfloat16 resolves 1/256 of a number: updates below
that are rounded away, whatever the optimizer keeps. The script trains the same adapter on the same batches with its
parameters in float32 and in bfloat16, once for each learning rate, and prints a Markdown table.

    python examples/benchmarks/bf16_parameters.py
    python examples/benchmarks/bf16_parameters.py --steps 10 --learning_rates 1e-4 --json result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import machine, versions
from peft import PeftModel, get_peft_model
from quickstart import PAIRS
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from transformers.utils import logging

from peft_reft import ReftConfig, ReftLayer

BATCH = 4


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return prompt, tokenizer(f"{answer}{tokenizer.eos_token}")["input_ids"]


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {
        "input_ids": torch.full(shape, pad),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        batch["input_ids"][number, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][number, :end] = 1
        batch["labels"][number, len(prompt) : end] = torch.tensor(answer)
    return batch


def fresh_edit(model: PeftModel, batch: dict[str, torch.Tensor]) -> float:
    """Norm of a new adapter's edits relative to that of R h, |R^T (W h + b - R h)| / |R h|; zero in float32."""
    norms = []

    def record(intervention: torch.nn.Module, args: tuple, edit: torch.Tensor) -> None:
        read = args[0] @ intervention.subspace(torch.float32)[0].mT
        norms.append((edit.norm() / read.norm()).item())

    interventions = [m.reft_intervention["default"] for m in model.modules() if isinstance(m, ReftLayer)]
    handles = [intervention.register_forward_hook(record) for intervention in interventions]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return max(norms)


def train(base: torch.nn.Module, rows: list, pad: int, dtype: torch.dtype, lr: float, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    layers = [8, 12, 16, 20]
    model = get_peft_model(base, ReftConfig(r=4, positions="l3", layers_to_transform=layers, task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)  # as TRL does it
    everything = collate(rows, pad)
    edit = fresh_edit(model, everything)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    lost = total = 0
    for _ in range(steps):
        chosen = torch.randperm(len(rows))[:BATCH].tolist()
        model(**collate([rows[number] for number in chosen], pad)).loss.backward()
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        lost += sum((p == old).sum().item() for p, old in zip(parameters, before, strict=True))
        total += sum(p.numel() for p in parameters)
    with torch.no_grad():
        loss = model(**everything).loss.item()
        with model.disable_adapter():
            start = model(**everything).loss.item()
    model.unload()
    return {"fresh_edit": edit, "lost": lost / total, "start": start, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[4e-3, 9e-4, 1e-4, 2e-5], help="default: %(default)s"
    )
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    rows = [encode(tokenizer, *pair) for pair in PAIRS]
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)

    results = []
    print("| learning rate | loss before | after, float32 | after, bfloat16 | updates lost in bfloat16 |")
    print("|---|---|---|---|---|")
    for lr in options.learning_rates:
        single, half = (
            train(base, rows, tokenizer.pad_token_id, dtype, lr, options.steps)
            for dtype in (torch.float32, torch.bfloat16)
        )
        results.append({"learning_rate": lr, "float32": single, "bfloat16": half})
        print(
            f"| {lr:g} | {single['start']:.3f} | {single['loss']:.3f} | {half['loss']:.3f} | {half['lost']:.0%} |",
            flush=True,
        )
    fresh = max(result["bfloat16"]["fresh_edit"] for result in results)
    print(f"\nA fresh adapter in bfloat16 changes what it reads by {fresh:.2%} (0 in float32).")
    print(f"SmolLM2-135M-Instruct, {options.steps} steps of AdamW, {machine()}; {versions()}.")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "versions": versions(), "results": results}))


if __name__ == "__main__":
    main()
