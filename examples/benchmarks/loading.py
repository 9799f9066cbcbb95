"""Time of attaching an adapter to a model of 32 layers of width 4096, and of loading a hundred from disk.

    python examples/benchmarks/loading.py

The model's hidden representations have full width, but its blocks are tiny inside. A new adapter is attached to it, and
to a model without weights (meta device). One adapter is then saved and loaded a hundred times under other names, LoReFT
and LoRA in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial

import torch
from harness import Clock, Spread, finish, interleave, parser, progress, start, table
from models import LORA, LOREFT, adapter, twin
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ADAPTERS = (LOREFT, LORA)
LAYERS = 32
META, REAL = "without weights", "with weights"
# How many of the first and of the last adapters are compared.
ENDS = 5


def main() -> None:
    arguments = parser(__doc__, model=None)
    arguments.add_argument("--adapters", type=int, default=100, help="to load (default: %(default)s)")
    arguments.add_argument("--layers", type=int, default=32, help="of the model that they are loaded into")
    args = arguments.parse_args()
    if args.quick:
        args.rounds, args.layers = min(args.rounds, 5), min(args.layers, 8)
    device, _ = start(args)
    clock = Clock(device)
    progress("loading: attach")
    bases = {META: hollow(LAYERS, torch.device("meta")), REAL: hollow(LAYERS, device)}
    attached = interleave(
        {f"{name}, {kind}": partial(attach, base, name, clock) for name in ADAPTERS for kind, base in bases.items()},
        args.rounds,
    )
    progress("loading: load")
    loaded = load(hollow(args.layers, device), args.adapters, clock)
    results = {"attach": {name: one["time"] for name, one in attached.items()}, "load": loaded}
    finish(args, results, report(results, args))


def hollow(layers: int, device: torch.device) -> PreTrainedModel:
    """A Llama of width 4096 whose attention and MLP are 8 wide."""
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=64,
    )
    with device:
        return LlamaForCausalLM(config).requires_grad_(False)


def attach(base: PreTrainedModel, name: str, clock: Clock) -> dict[str, float]:
    model, config = twin(base), adapter(name, base.config.num_hidden_layers)
    begin = clock()
    get_peft_model(model, config)
    return {"time": clock() - begin}


def load(base: PreTrainedModel, count: int, clock: Clock) -> dict[str, list[float]]:
    """Variant -> milliseconds for each of its adapters, in the order they were loaded."""
    times: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: get_peft_model(twin(base), adapter(name, base.config.num_hidden_layers)) for name in ADAPTERS}
        for name, model in models.items():
            model.save_pretrained(f"{folder}/{name}")
            model.delete_adapter("default")
        # The first one of all waits for imports.
        for number in range(-1, count):
            for name, model in models.items():
                begin = clock()
                model.load_adapter(f"{folder}/{name}", adapter_name=f"a{number}")
                times[name].append(clock() - begin)
                if number == -1:
                    model.delete_adapter("a-1")
    return {name: own[1:] for name, own in times.items()}


def growth(times: list[float]) -> Spread:
    """The last adapters' loading times relative to the median of the first ones'."""
    first = statistics.median(times[:ENDS])
    return Spread.of(time / first for time in times[-ENDS:])


def report(results: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> str:
    attach_rows = ([name, f"{Spread.of(values):.1f}"] for name, values in results["attach"].items())
    load_rows = (
        [name, f"{Spread.of(times[:ENDS]):.1f}", f"{Spread.of(times[-ENDS:]):.1f}", growth(times)]
        for name, times in results["load"].items()
    )
    return "\n\n".join(
        [
            f"A new adapter on {LAYERS} layers of width 4096, milliseconds:",
            table(["", "median (quartiles)"], attach_rows),
            f"Loading one of {args.adapters} from disk on {args.layers} layers, milliseconds, {ENDS} at each end:",
            table(["", "first", "last", "last / first"], load_rows),
        ]
    )


if __name__ == "__main__":
    main()
