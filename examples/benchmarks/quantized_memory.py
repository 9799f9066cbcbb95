"""Memory and time of a training step on a 4-bit base: LoReFT (QLoReFT), LoRA (QLoRA) and the frozen base.

Every variant runs in a new process, on the same NF4 weights (double quantization), with AdamW and adapters in float32.
Memory is the peak during the steps minus the memory with the base loaded: of the CUDA allocator on a GPU, else of the
process (resident set; large blocks are returned to the system at once, so the peak is that of live tensors). Time is
the fastest step (processor time on a CPU), relative to the frozen base's forward and backward pass with a gradient for
its input. Prints a Markdown table.

    python examples/benchmarks/quantized_memory.py
    python examples/benchmarks/quantized_memory.py --model_name_or_path Qwen/Qwen3-8B --batch 4 --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from apart import MIB, held, peak, reset_peak, run_apart
from machine import machine, versions
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from peft_reft import ReftConfig

FROZEN = "frozen base"
ADAPTERS = {
    "LoReFT, r=4, f7+l7, all layers": ReftConfig(r=4, positions="f7+l7", task_type="CAUSAL_LM"),
    "LoReFT, r=4, all tokens, all layers": ReftConfig(r=4, positions="all", task_type="CAUSAL_LM"),
    "LoRA, r=8, q_proj and v_proj": LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "LoRA, r=16, all linear layers": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def load(options: argparse.Namespace) -> PreTrainedModel:
    # Most CPUs emulate bfloat16 slowly.
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        options.model_name_or_path, quantization_config=config, dtype=dtype, device_map={"": device}
    )
    model.requires_grad_(False)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def clock() -> float:
    """Seconds; on a CPU processor time, which other programs hardly change."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Memory and time of one variant, in a new process."""
    torch.manual_seed(0)
    model = load(options)
    base_bytes = model.get_memory_footprint()
    shape = options.batch, options.tokens
    ids = torch.randint(100, model.config.get_text_config().vocab_size, shape, device=model.device)
    labels = ids.index_fill(1, torch.arange(options.tokens // 2, device=model.device), -100)
    batch = {"labels": labels, "attention_mask": torch.ones_like(ids), "use_cache": False}
    before = held(model.device)
    reset_peak(model.device)
    if name == FROZEN:
        model.train()
        batch["inputs_embeds"] = model.get_input_embeddings()(ids).detach().requires_grad_()
        parameters, optimizer = [], None
    else:
        model = get_peft_model(model, ADAPTERS[name]).train()
        batch["input_ids"] = ids
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
    seconds = []
    for _ in range(options.steps):
        begin = clock()
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    return {
        "trainable": sum(parameter.numel() for parameter in parameters),
        "base_MiB": base_bytes / MIB,
        "memory_MiB": (peak(model.device) - before) / MIB,
        "seconds": min(seconds),
    }


def print_table(results: dict[str, dict[str, float]]) -> None:
    frozen = results[FROZEN]["seconds"]
    print("| on the NF4 base | trainable parameters | memory of a step, MiB | time of a step |")
    print("|---|---|---|---|")
    for name, row in results.items():
        ratio = row["seconds"] / frozen
        print(f"| {name} | {row['trainable']:,} | {row['memory_MiB']:.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id or path (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence; half of them are the prompt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant, in turn")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--measure", choices=[FROZEN, *ADAPTERS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model_name_or_path is None:
        from smollm2 import smollm2_folder

        options.model_name_or_path = str(smollm2_folder())
    if options.measure:
        logging.disable_progress_bar()
        print(json.dumps(measure(options.measure, options)))
        return

    rounds = [
        {n: run_apart(__file__, "--measure", n, *sys.argv[1:]) for n in (FROZEN, *ADAPTERS)}
        for _ in range(options.rounds)
    ]
    results = {
        name: row | {key: min(one[name][key] for one in rounds) for key in ("memory_MiB", "seconds")}
        for name, row in rounds[0].items()
    }
    print_table(results)
    spread = max(abs(one[name]["memory_MiB"] - results[name]["memory_MiB"]) for one in rounds for name in results)
    model = Path(options.model_name_or_path).name
    checkpointing = "with" if options.gradient_checkpointing else "without"
    note = (
        f"{model} ({results[FROZEN]['base_MiB']:.0f} MiB in NF4), {options.batch} x {options.tokens} tokens, "
        f"{checkpointing} gradient checkpointing; {machine()}; {versions('bitsandbytes')}. Time 1.00 is "
        f"{results[FROZEN]['seconds']:.2f} s; memory repeats to {spread:.0f} MiB."
    )
    print(f"\n{note}")
    if options.json:
        Path(options.json).write_text(json.dumps({"note": note, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
