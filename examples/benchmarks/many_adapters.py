"""Time of batches whose rows have different adapters: ReFT and PEFT's LoRA with `adapter_names`, and the bare model.

    python examples/benchmarks/many_adapters.py                  # a random Llama of 11 million parameters
    python examples/benchmarks/many_adapters.py --adapters 1 64 512
    python examples/benchmarks/many_adapters.py --model 1b --device cuda --dtype bfloat16

With fewer adapters than rows, several rows share one; with more, evenly spaced ones are in the batch. The prefill is
everything up to the first new token, including what `generate` does before it; a decode step is the median of a run's
steps.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from generation import BARE, DECODE, PREFILL, generate
from harness import Clock, Times, finish, interleave, parser, progress, ratio, start, table
from models import LORA, LOREFT, LOREFT_ALL, adapted, adapter, build, depth, describe
from peft import PeftModel

ADAPTERS = (LOREFT, LOREFT_ALL, LORA)


def main() -> None:
    arguments = parser(__doc__, model="11m")
    arguments.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64], help="loaded (default: %(default)s)")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=32, help="of each prompt (default: %(default)s)")
    arguments.add_argument("--new", type=int, default=8, help="new tokens (default: %(default)s)")
    args = arguments.parse_args()
    if args.quick:
        args.rounds, args.adapters = min(args.rounds, 5), args.adapters[-1:]
    device, dtype = start(args)
    base = build(args.model, device, dtype)
    models = {name: adapted(base, name, random=True).eval() for name in ADAPTERS}
    ids = torch.randint(base.config.get_text_config().vocab_size, (args.rows, args.tokens), device=device)
    times = {}
    for count in sorted(args.adapters):
        for name, model in models.items():
            load(model, name, count)
        progress(f"many adapters, {count}")
        # The first adapter has the name that PEFT gives it.
        numbers = [row * count // args.rows if count > args.rows else row % count for row in range(args.rows)]
        names = ["default" if number == 0 else str(number) for number in numbers]
        runs = {BARE: partial(generate, base, ids, args.new, Clock(device))}
        for name, model in models.items():
            runs[name] = partial(generate, model, ids, args.new, Clock(device), adapter_names=names)
        times[count] = interleave(runs, args.rounds)
    heading = (
        f"Different adapters in a batch of {args.rows} rows of {args.tokens} tokens, {args.model} ({describe(base)}), "
        f"{args.dtype}; relative to the bare model:"
    )
    finish(args, {"times": times}, f"{heading}\n\n{report(times)}")


def load(model: PeftModel, variant: str, count: int) -> None:
    """Add random adapters until there are `count`."""
    for number in range(len(model.peft_config), count):
        model.add_adapter(str(number), adapter(variant, depth(model), random=True))
    model.eval()


def report(times: dict[int, Times]) -> str:
    rows = []
    for phase in (PREFILL, DECODE):
        bare = (f"{statistics.median(one[BARE][phase]):.1f} ms" for one in times.values())
        rows.append([f"{phase}, {BARE}", *bare])
        for name in ADAPTERS:
            rows.append([f"{phase}, {name}", *(ratio(one, name, BARE, phase) for one in times.values())])
    return table(["", *(f"{count} adapter{'s' if count > 1 else ''}" for count in times)], rows)


if __name__ == "__main__":
    main()
