"""Time of `generate` with a LoReFT adapter and with unmerged LoRA, relative to the bare model.

    python examples/benchmarks/generation.py                         # a random Llama of 34 million parameters
    python examples/benchmarks/generation.py --batches 1 4 8 64
    python examples/benchmarks/generation.py --model 1b --device cuda --dtype bfloat16

Greedy decoding with a cache; the adapters have random weights, so their edits are not zero. The prefill is everything
up to the first new token, including what `generate` does before it; a decode step is the median of a run's steps.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise

import torch
from harness import Clock, Times, finish, interleave, parser, progress, ratio, start, table
from models import LORA, LORA_ALL, LOREFT, LOREFT_ALL, adapted, build, describe
from transformers import StoppingCriteria, StoppingCriteriaList

BARE = "bare model"
ADAPTERS = (LOREFT, LOREFT_ALL, LORA, LORA_ALL)
QUICK_ADAPTERS = (LOREFT, LOREFT_ALL, LORA_ALL)
TOTAL, PREFILL, DECODE = "total", "prefill", "decode step"


def main() -> None:
    arguments = parser(__doc__, rounds=11)
    arguments.add_argument("--batches", type=int, nargs="+", default=[4], help="rows (default: %(default)s)")
    arguments.add_argument("--tokens", type=int, default=64, help="of each prompt (default: %(default)s)")
    arguments.add_argument("--new", type=int, default=64, help="new tokens (default: %(default)s)")
    args = arguments.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 4)
    device, dtype = start(args)
    base = build(args.model, device, dtype)
    names = QUICK_ADAPTERS if args.quick else ADAPTERS
    models = {BARE: base} | {name: adapted(base, name, random=True).eval() for name in names}
    times = {}
    for batch in args.batches:
        progress(f"generation, {args.model}, batch {batch}")
        ids = torch.randint(base.config.get_text_config().vocab_size, (batch, args.tokens), device=device)
        times[batch] = interleave(
            {name: partial(generate, model, ids, args.new, Clock(device)) for name, model in models.items()},
            args.rounds,
        )
    heading = f"Generation, {args.model} ({describe(base)}), {args.tokens} + {args.new} tokens, {args.dtype}:"
    reports = [f"Batch {batch}:\n\n{report(one)}" for batch, one in times.items()]
    finish(args, {"times": times}, "\n\n".join([heading, *reports]))


class Ticks(StoppingCriteria):
    """Never stops `generate`; records the time after each of its steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times = [clock()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(self.clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate(
    model: torch.nn.Module, ids: torch.Tensor, new_tokens: int, clock: Clock, **options: object
) -> dict[str, float]:
    """Milliseconds of a whole `generate`, of its prefill with everything before, and of a decode step."""
    ticks = Ticks(clock)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([ticks]),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    total = clock() - ticks.times[0]
    gaps = [after - before for before, after in pairwise(ticks.times)]
    return {TOTAL: total, PREFILL: gaps[0], DECODE: statistics.median(gaps[1:])}


def report(times: Times) -> str:
    bare = {phase: statistics.median(values) for phase, values in times[BARE].items()}
    rows = [
        [BARE, *(f"{bare[phase]:.1f} ms" for phase in (TOTAL, PREFILL, DECODE)), ratio(times, BARE, LORA_ALL, TOTAL)]
    ]
    for name in [name for name in times if name != BARE]:
        cells = (ratio(times, name, BARE, phase) for phase in (TOTAL, PREFILL, DECODE))
        rows.append([name, *cells, ratio(times, name, LORA_ALL, TOTAL)])
    return table(["", TOTAL, PREFILL, DECODE, f"{TOTAL} / {LORA_ALL}"], rows)


if __name__ == "__main__":
    main()
