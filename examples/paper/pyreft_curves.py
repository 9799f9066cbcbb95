"""Does LoReFT through this package learn as in pyreft? The same model, adapter, batches and optimizer in both.

    python examples/paper/pyreft_curves.py --pyreft-python path/to/python    # of an environment with pyreft
    python examples/paper/pyreft_curves.py --pyreft-python ... --data FOLDER --steps 200
    python examples/paper/pyreft_curves.py --pyreft-python ... --steps 8 --frozen_subspace --output frozen

The environment: `pip install pyreft==0.1.0 transformers==4.45.1`. pyreft makes a fresh adapter, which is converted to
one of ours (`peft_reft.convert`), so that both start from the same W, b and R. AdamW without weight decay, linear
schedule, gradients clipped at 1. The first losses agree to rounding. With --frozen_subspace R stays as it is, and the
whole curves agree to rounding: positions, gradients and updates of W and b are the same. Without it they need not:
pyreft trains R through a chart of Householder reflections, this package through a matrix whose rows it orthonormalizes,
and Adam's steps in the two differ. A third curve starts as this package does by default, from the identity.

Writes `pyreft_curves.json` and `pyreft_curves.png`, and prints how far the curves are apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import SAMPLES, draw, load_tokenizer, read_rows
from suites import Commonsense

# isort: split
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from machine import machine, versions
from peft import PeftModel, get_peft_model
from presets import smollm2
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from peft_reft import ReftConfig
from peft_reft.convert import convert

HERE = Path(__file__).resolve().parent


def make_batches(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[dict[str, list]]:
    """Right-padded batches of the commonsense training rows, with prompts long enough for all positions."""
    rows = []
    for row in read_rows(options.data / "commonsense" / "train.jsonl.gz"):
        prompt = tokenizer(Commonsense.prompt(row))["input_ids"]
        answer = tokenizer(Commonsense.completion(row) + tokenizer.eos_token)["input_ids"]
        if 16 <= len(prompt) <= options.max_length:
            rows.append((prompt, answer))
    rows = draw(rows, options.steps * options.batch_size)
    # Short data are gone through several times.
    rows = (rows * (options.steps * options.batch_size // len(rows) + 1))[: options.steps * options.batch_size]
    return [
        collate(rows[start : start + options.batch_size], tokenizer.pad_token_id)
        for start in range(0, len(rows), options.batch_size)
    ]


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, list]:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], "prompt_lengths": []}
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        batch["input_ids"].append(prompt + answer + [pad] * padding)
        batch["attention_mask"].append([1] * (longest - padding) + [0] * padding)
        batch["labels"].append([-100] * len(prompt) + answer + [-100] * padding)
        batch["prompt_lengths"].append(len(prompt))
    return batch


def tensors(batch: dict[str, list]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask", "labels")}


def train(model: PeftModel, batches: list[dict[str, list]], learning_rate: float, title: str) -> dict[str, Any]:
    """The same as `pyreft_worker.py`, with this package."""
    model.eval()  # no dropout anywhere, as there
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    losses, begin = [], time.process_time()
    for number, batch in enumerate(batches):
        loss = model(**tensors(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number % 10 == 0:
            print(f"{title}  step {number:3}  loss {losses[-1]:.4f}", flush=True)
    return {
        "losses": losses,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "processor_seconds": time.process_time() - begin,
        "versions": versions("peft-reft"),
    }


def curves(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All three runs."""
    model = str(options.model or smollm2())
    batches = make_batches(load_tokenizer(model), options)
    task = {name: getattr(options, name) for name in ("seed", "rank", "positions", "learning_rate", "frozen_subspace")}
    (folder / "task.json").write_text(json.dumps(task | {"model": model, "batches": batches}))
    subprocess.run([options.pyreft_python, HERE / "pyreft_worker.py", folder], check=True)
    pyreft = json.loads((folder / "pyreft.json").read_text())

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    with torch.no_grad():
        base_loss = base().eval()(**tensors(batches[0])).loss.item()
    adapter = convert(folder / "init", folder / "converted", options.positions, True, base_model=model)
    same = PeftModel.from_pretrained(base(), adapter, is_trainable=True)
    if options.frozen_subspace:
        for name, parameter in same.named_parameters():
            if name.endswith("projection"):
                parameter.requires_grad_(False)
    ours = train(same, batches, options.learning_rate, "peft_reft")
    torch.manual_seed(options.seed)
    config = ReftConfig(
        r=options.rank, positions=options.positions, freeze_subspace=options.frozen_subspace, task_type="CAUSAL_LM"
    )
    identity = train(get_peft_model(base(), config), batches, options.learning_rate, "identity")
    return {
        "task": task | {"model": Path(model).name, "steps": options.steps, "batch_size": options.batch_size},
        "machine": machine(),
        "base_loss": base_loss,
        "pyreft": pyreft,
        "peft_reft": ours,
        "peft_reft, identity": identity,
    }


def mean_of_last(losses: list[float]) -> float:
    last = losses[-max(1, len(losses) // 5) :]
    return sum(last) / len(last)


def summary(results: dict[str, Any]) -> dict[str, float]:
    ours, theirs = results["peft_reft"]["losses"], results["pyreft"]["losses"]
    gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return {
        "difference of the base models' losses": abs(results["base_loss"] - results["pyreft"]["base_loss"]),
        "difference of the first losses": gaps[0],
        "largest difference along the curve": max(gaps),
        "mean difference along the curve": sum(gaps) / len(gaps),
        "last fifth, pyreft": mean_of_last(theirs),
        "last fifth, peft_reft from the same parameters": mean_of_last(ours),
        "last fifth, peft_reft from the identity": mean_of_last(results["peft_reft, identity"]["losses"]),
    }


def plot(results: dict[str, Any], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    styles = {"pyreft": ("#D55E00", "-"), "peft_reft": ("#0072B2", "--"), "peft_reft, identity": ("#56B4E9", ":")}
    labels = {"peft_reft": "peft_reft, the same parameters", "peft_reft, identity": "peft_reft, from the identity"}
    for name, (color, style) in styles.items():
        axis.plot(results[name]["losses"], style, color=color, label=labels.get(name, name))
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyreft-python", type=Path, required=True, help="Python of an environment with pyreft")
    parser.add_argument("--model", type=Path, help="folder of a Llama; the bundled SmolLM2 by default")
    parser.add_argument("--data", type=Path, default=SAMPLES, help="folder with commonsense/train.jsonl.gz")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=96, help="longest prompt, in tokens")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--frozen_subspace", action="store_true", help="train W and b alone")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the JSON file and the plot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = curves(options, Path(folder))
    results["summary"] = summary(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pyreft_curves.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.output / "pyreft_curves.png")
    for name, value in results["summary"].items():
        print(f"{name:<52}{value:.2e}" if "difference" in name else f"{name:<52}{value:.4f}")


if __name__ == "__main__":
    main()
