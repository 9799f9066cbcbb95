"""Memory of training and size on disk: LoReFT, LoRA and the frozen model.

    python examples/benchmarks/memory.py          # random Llamas, of 34 million parameters and of width 4096
    python examples/benchmarks/memory.py --models 1b --device cuda --dtype bfloat16

Every variant runs in a new process: two training steps, with AdamW and without gradient checkpointing. Memory is the
peak during the steps minus the memory with the base loaded: of the CUDA allocator on a GPU, else of the process
(resident set; large blocks are returned to the system at once, so the peak is that of live tensors). The frozen model
is the one in `training_step.py`. The adapter's size is the size of its saved weights; the bytes of its parameters are
the lower bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from apart import MIB, held, peak, reset_peak, run_apart
from harness import Spread, finish, parser, progress, start, table
from models import LORA, LORA_ALL, LOREFT, LOREFT_ALL, LOREFT_COMPLETION, SHAPES, adapted, build, floor, training_shape
from training_step import FLOOR, example
from transformers import PreTrainedModel

ADAPTERS = (LOREFT, LOREFT_ALL, LOREFT_COMPLETION, LORA, LORA_ALL)
STEPS = 2
QUICK_ADAPTERS = (LOREFT, LOREFT_ALL, LORA)


def main() -> None:
    arguments = parser(__doc__, model=None, rounds=3)
    arguments.add_argument(
        "--models", nargs="+", default=["34m", "wide"], help=", ".join([*SHAPES, "smollm2 or other"])
    )
    arguments.add_argument("--measure", choices=[FLOOR, *ADAPTERS], help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.quick:
        args.rounds = 1
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    start(args)
    results = {model: measure_all(model, args) for model in args.models}
    heading = f"Memory of a training step above the loaded base, MiB, {args.dtype}; medians, ratios (quartiles):"
    reports = [f"{model}:\n\n{report(one)}" for model, one in results.items()]
    finish(args, {"memory": results}, "\n\n".join([heading, *reports]))


def measure_all(model: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variant -> the result of `measure`, with the memory of all rounds."""
    results: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for name in (FLOOR, *(QUICK_ADAPTERS if args.quick else ADAPTERS)):
            progress(f"memory, {model}, {name}, {number + 1} of {args.rounds}")
            options = ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
            one = run_apart(__file__, "--measure", name, "--models", model, *options)
            earlier = results[name]["memory"] if name in results else []
            results[name] = one | {"memory": [*earlier, one["memory"]]}
    return results


def beside(results: dict[str, dict[str, Any]], variant: str, reference: str) -> Spread:
    """A variant's memory relative to another one's, round by round."""
    pairs = zip(results[variant]["memory"], results[reference]["memory"], strict=True)
    return Spread.of(own / other for own, other in pairs)


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of a variant's training, in a process that has done nothing else; bytes of its file and of its parameters."""
    device, dtype = start(args)
    # What Python imports at the first step is nobody's memory.
    train(build("tiny", device, dtype), name, (1, 8))
    base = build(args.models[0], device, dtype).requires_grad_(False)
    before = held(device)
    reset_peak(device)
    model = train(base, name, training_shape(args.models[0]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = {"memory": (peak(device) - before) / MIB, "parameter_bytes": sum(p.nbytes for p in parameters)}
    if name != FLOOR:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            result["file_bytes"] = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return result


def train(base: PreTrainedModel, name: str, shape: tuple[int, int]) -> torch.nn.Module:
    """The base model with a variant's adapter, after `STEPS` steps on a batch of this shape."""
    batch = example(*shape, base.config.get_text_config().vocab_size, base.device)
    model = floor(base, 0) if name == FLOOR else adapted(base, name)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters) if parameters else None
    for _ in range(STEPS):
        model(**batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return model


def report(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, one in results.items():
        cells = [f"{Spread.of(one['memory']).median:.0f}", *(beside(results, name, other) for other in (FLOOR, LORA))]
        if name == FLOOR:
            cells += ["", ""]
        else:
            excess = one["file_bytes"] / one["parameter_bytes"] - 1
            cells += [f"{one['parameter_bytes']:,}", f"{one['file_bytes']:,} ({excess:+.1%})"]
        rows.append([name, *cells])
    return table(["", "MiB", "/ frozen", f"/ {LORA}", "bytes of parameters", "bytes of the file"], rows)


if __name__ == "__main__":
    main()
