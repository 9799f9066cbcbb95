"""Measures batches whose rows have different adapters: ReFT and PEFT's LoRA with `adapter_names`, and the base model.

    python examples/benchmarks/many_adapters.py                   # a random Llama of 11 million parameters, CPU
    python examples/benchmarks/many_adapters.py --device cuda --dtype bfloat16 --model large
    python examples/benchmarks/many_adapters.py --quick

Every variant runs in this one process, in turns, so that a busy machine slows all of them alike. On the CPU the clock
is the process's own CPU time, with one thread. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from peft_reft import ReftConfig

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "large": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}
VOCABULARY = 1000
PREFILL, DECODE = "prefill", "decode step"
CONFIGS = {
    "ReFT f7+l7": lambda: ReftConfig(r=4, positions="f7+l7", init_weights=False),
    "ReFT all": lambda: ReftConfig(r=4, positions="all", init_weights=False),
    "LoRA q, v": lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
}


@dataclass
class Measurement:
    """Milliseconds, and ratios to the base model's run of the same round."""

    variant: str
    adapters: int
    phase: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    counts = [n for n in (1, 8, 64, 512) if n <= args.most]
    base = build(args.model, device, dtype)
    models = {
        name: get_peft_model(build(args.model, device, dtype), make(), adapter_name="a0").eval()
        for name, make in CONFIGS.items()
    }
    ids = torch.randint(VOCABULARY, (args.rows, args.tokens), device=device)
    results = []
    for count in counts:
        # Of more adapters than rows, every so many-th.
        names = [f"a{row * count // args.rows if count > args.rows else row % count}" for row in range(args.rows)]
        runs = {"base model": partial(once, base, ids, args.steps)}
        for name, model in models.items():
            for i in range(len(model.peft_config), count):
                model.add_adapter(f"a{i}", CONFIGS[name]())
            runs[name] = partial(once, model.eval(), ids, args.steps, adapter_names=names)
        results += compare(runs, count, args.rounds)
        print(f"{count} adapters: done", file=sys.stderr)
    loading = {name: load_times(make, args.load) for name, make in CONFIGS.items()}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"one thread of {processor()}"
    print(
        f"{args.rows} rows of {args.tokens} tokens, a random Llama of "
        f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f} million parameters in {args.dtype} on {where}; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}. Ratios to the base "
        f"model: median (quartiles) of {args.rounds} rounds.\n"
    )
    print(table(results, loading))
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": [asdict(r) for r in results], "loading": loading}, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--model", default="small", choices=SIZES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=4, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--most", type=int, default=512, help="largest number of loaded adapters")
    parser.add_argument("--load", type=int, default=100, help="number of adapters to load one after the other")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean little")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rows, args.tokens, args.steps, args.rounds = "tiny", 16, 16, 2, 3
        args.most, args.load = 64, 10
    return args


def build(size: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, use_cache=True, **SIZES[size])
    return LlamaForCausalLM(config).to(device, dtype).eval()


def load_times(make: Callable, count: int) -> list[float]:
    """Milliseconds that adding each adapter to a tiny model takes."""
    model = get_peft_model(build("tiny", torch.device("cpu"), torch.float32), make(), adapter_name="a0")
    times = []
    for i in range(1, count + 1):
        begin = time.process_time()
        model.add_adapter(f"a{i}", make())
        times.append(1e3 * (time.process_time() - begin))
    return times


class Ticks(StoppingCriteria):
    """Never stops `generate`; notes the time after each step of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def note(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(1e3 * (time.perf_counter() if self.device.type == "cuda" else time.process_time()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def once(model: torch.nn.Module, ids: torch.Tensor, steps: int, **options: object) -> dict[str, float]:
    """Milliseconds of the prefill, with all that `generate` does before it, and of a decode step."""
    ticks = Ticks(ids.device)
    ticks.note()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([ticks]),
        max_new_tokens=steps + 1,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    gaps = [after - before for before, after in pairwise(ticks.times)]
    return {PREFILL: gaps[0], DECODE: statistics.median(gaps[1:])}


def compare(runs: dict[str, Callable[[], dict[str, float]]], adapters: int, rounds: int) -> list[Measurement]:
    """Run all variants in turns; the first round warms up."""
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        # Another one begins each time.
        order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in order:
            for phase, milliseconds in runs[name]().items():
                if number > 0:
                    times.setdefault((name, phase), []).append(milliseconds)
    results = []
    for (name, phase), own in times.items():
        ratios = [mine / theirs for mine, theirs in zip(own, times["base model", phase], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results.append(Measurement(name, adapters, phase, statistics.median(own), middle, (low, high)))
    return results


def table(results: list[Measurement], loading: dict[str, list[float]]) -> str:
    counts = list(dict.fromkeys(r.adapters for r in results))
    lines = [
        "| | " + " | ".join(f"{n} adapter{'s' if n > 1 else ''}" for n in counts) + " |",
        "|---" * (len(counts) + 1),
    ]
    lines[1] += "|"
    for phase in (DECODE, PREFILL):
        for name in ("base model", *CONFIGS):
            cells = [next(r for r in results if (r.variant, r.phase, r.adapters) == (name, phase, n)) for n in counts]
            values = (
                f"{r.milliseconds:.1f} ms"
                if name == "base model"
                else f"{r.ratio:.2f} ({r.quartiles[0]:.2f}-{r.quartiles[1]:.2f})"
                for r in cells
            )
            lines.append(f"| {phase}, {name} | " + " | ".join(values) + " |")
    for name, times in loading.items():
        first, last = (statistics.median(part) for part in (times[:5], times[-5:]))
        lines.append(
            f"\n{name}: adding one of the first 5 adapters {first:.1f} ms, of the last 5 of {len(times)} {last:.1f} ms"
        )
    return "\n".join(lines)


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
