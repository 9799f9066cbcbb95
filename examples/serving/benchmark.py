"""Time of vLLM with ReFT adapters and with its own LoRA, relative to the bare engine in the same process.

    python examples/serving/benchmark.py
    python examples/serving/benchmark.py --adapters 1 --rounds 3 --rows 16

Three engines with the same model: a bare one, one with ReFT adapters, one with `enable_lora`. Adapters are assigned to
the rows of a batch in turns. The bare engine and each variant alternate step by step, so other load on the machine
slows both. Times are processor times, on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from peft_reft import ReftConfig
from peft_reft.integrations.vllm import Adapter, add_adapter

sys.path.insert(0, str(Path(__file__).parents[1]))
from smollm2 import smollm2_folder

PROMPT_ONLY, ALL, LORA = "LoReFT r=8, f7+l7", "LoReFT r=8, all", "LoRA r=8, q and v"
POSITIONS = {PROMPT_ONLY: "f7+l7", ALL: "all"}
# Seconds of each step of a batch; the first is the prefill.
Steps = Iterator[float]
# variant -> phase -> (seconds of the bare engine, its own) of each round
Times = dict[str, dict[str, list[tuple[float, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=64, help="requests of a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=8, help="generated tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.model = args.model or str(smollm2_folder())
    with TemporaryDirectory() as folder:
        bare, runs = variants(args, Path(folder))
        print(report(measure(bare, runs, args.rounds), args))


def variants(args: argparse.Namespace, folder: Path) -> tuple[Callable[[], Steps], dict[str, Callable[[], Steps]]]:
    """The bare engine's batch, and the variants' batches by name."""
    most = max(args.adapters)
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 512 << 20,
        "max_model_len": 256,
        "max_num_seqs": args.rows,
        "max_num_batched_tokens": args.rows * args.tokens,
        "disable_log_stats": True,
    }
    bare = vllm.LLM(args.model, **options)
    reft = vllm.LLM(args.model, **options, additional_config={"reft_adapters": {}})
    lora = vllm.LLM(args.model, **options, enable_lora=True, max_loras=most, max_cpu_loras=most, max_lora_rank=8)
    add_reft_adapters(reft, args.model, most)
    requests = save_loras(args.model, folder, most)
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    prompts = torch.randint(vocabulary, (args.rows, args.tokens)).tolist()
    runs = {}
    for count in args.adapters:
        numbers = [row % count for row in range(args.rows)]
        for name, positions in POSITIONS.items():
            names = [{"reft": f"{positions} {number}"} for number in numbers]
            runs[f"{name} | {count}"] = partial(run, reft, prompts, args.new, extra_args=names)
        runs[f"{LORA} | {count}"] = partial(run, lora, prompts, args.new, loras=[requests[n] for n in numbers])
    return partial(run, bare, prompts, args.new), runs


def add_reft_adapters(llm: vllm.LLM, model: str, count: int) -> None:
    """Random adapters, in memory."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for positions in POSITIONS.values():
        config = ReftConfig(r=8, positions=positions, init_weights=False, task_type="CAUSAL_LM")
        tuned = get_peft_model(base, config)
        first = Adapter.of_model(tuned)
        base = tuned.unload()
        for number in range(count):
            tensors = {name: torch.randn_like(t) * t.std() for name, t in first.tensors.items()}
            add_adapter(llm, f"{positions} {number}", replace(first, tensors=tensors))


def save_loras(model: str, folder: Path, count: int) -> list[LoRARequest]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    return [LoRARequest(str(number), number, str(folder)) for number in range(1, count + 1)]


def run(
    llm: vllm.LLM,
    prompts: list[list[int]],
    new: int,
    extra_args: Sequence[dict[str, Any] | None] | None = None,
    loras: Sequence[LoRARequest | None] | None = None,
) -> Steps:
    """Run a batch, one step per `next`; yields its seconds."""
    engine, nothing = llm.llm_engine, [None] * len(prompts)
    for number, (ids, extra, lora) in enumerate(zip(prompts, extra_args or nothing, loras or nothing, strict=True)):
        params = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=extra)
        engine.add_request(str(number), {"prompt_token_ids": ids}, params, lora_request=lora)
    while engine.has_unfinished_requests():
        begin = time.process_time()
        engine.step()
        yield time.process_time() - begin


def measure(bare: Callable[[], Steps], runs: dict[str, Callable[[], Steps]], rounds: int) -> Times:
    """Run each variant in turns with the bare engine; the first round does not count."""
    times: Times = {name: {"prefill": [], "decode step": []} for name in runs}
    for number in range(rounds + 1):
        for place, (name, start) in enumerate(runs.items()):
            pairs = in_turns(bare(), start(), swapped=(number + place) % 2 == 1)
            if number:
                times[name]["prefill"].append(pairs[0])
                base, own = zip(*pairs[1:], strict=True)
                times[name]["decode step"].append((statistics.median(base), statistics.median(own)))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return times


def in_turns(bare: Steps, own: Steps, swapped: bool) -> list[tuple[float, float]]:
    """Seconds of both for each step; `swapped`: the variant runs first."""
    if swapped:
        return [(base, variant) for variant, base in zip(own, bare, strict=True)]
    return list(zip(bare, own, strict=True))


def report(times: Times, args: argparse.Namespace) -> str:
    """A Markdown table of throughputs relative to the bare engine's in the same round, the inverse of the times."""
    milliseconds = {
        phase: 1e3 * statistics.median(base for phases in times.values() for base, _ in phases[phase])
        for phase in ("prefill", "decode step")
    }
    lines = [
        f"{Path(args.model).name}, float32, {args.rows} requests of {args.tokens} tokens, {args.new} new tokens, vLLM "
        f"{vllm.__version__}, one CPU thread, eager. Bare engine: "
        + ", ".join(f"{phase} {value:.0f} ms" for phase, value in milliseconds.items())
        + ". Throughput relative to it, median of "
        + f"{args.rounds} rounds (worst to best):",
        "",
        "| adapters | of them in the batch | prefill | decode |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {' | '.join(map(spread, phases.values()))} |" for name, phases in times.items()]
    return "\n".join(lines)


def spread(pairs: list[tuple[float, float]]) -> str:
    ratios = sorted(base / own for base, own in pairs)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
