"""Time of finding the tokens to edit, which a pass with an adapter does once: here for 64 x 2,048 tokens.

    python examples/benchmarks/finding_positions.py
    python examples/benchmarks/finding_positions.py --device cuda

The cost of a pass before its first edit, from the arguments of `forward` to the indices of the tokens; other layers
with the same positions reuse it. Three cases: a right-padded training batch with labels, the same packed into rows
without padding, and the prefill of a left-padded `generate`. The last row is the cost of further positions in a pass of
the first case, once the prompts are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from harness import Clock, Spread, finish, interleave, parser, start, table, time_often

from peft_reft.tokens.generation import Generation
from peft_reft.tokens.passes import Stream
from peft_reft.tokens.positions import Positions, parse
from peft_reft.tokens.prompts import CallTokens, Told
from peft_reft.tokens.selections import Selection

TRAINING, PACKED, GENERATION = "training, right-padded", "training, packed", "generate, left-padded"
KNOWN = "prompts known"
SPECS = ("f7+l7", "prompt", "completion", "all")


def main() -> None:
    arguments = parser(__doc__, model=None, rounds=15)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=2048)
    args = arguments.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 7)
    device, _ = start(args)
    clock = Clock(device)
    # One feature: only the shape and the device of the representations matter.
    hidden = torch.zeros(args.batch, args.tokens, 1, device=device)
    finders = {
        f"{case}, {spec}": partial(find, stream, parse(spec), hidden)
        for case, stream in streams(args.batch, args.tokens, device).items()
        for spec in SPECS
    }
    known = streams(args.batch, args.tokens, device)[TRAINING]()
    finders |= {f"{KNOWN}, {spec}": partial(find_more, known, parse(spec), hidden) for spec in SPECS}
    times = interleave({name: time_often(run, clock) for name, run in finders.items()}, args.rounds)
    results = {name: one["time"] for name, one in times.items()}
    heading = f"Finding the tokens to edit, {args.batch} x {args.tokens} tokens; milliseconds, median (quartiles):"
    finish(args, {"times": results}, f"{heading}\n\n{report(results)}")


def find(stream: Callable[[], Stream], positions: Positions, hidden: torch.Tensor) -> Selection | None:
    return stream().select(positions, hidden, "block")


def find_more(stream: Stream, positions: Positions, hidden: torch.Tensor) -> Selection | None:
    """Like `find`, in a pass that has already found its prompts for other positions."""
    segments = stream.segments(positions, stream.shape)
    return segments.selection(positions, len(hidden), hidden.device, stream.training)


def streams(batch: int, tokens: int, device: torch.device) -> dict[str, Callable[[], Stream]]:
    """Case -> a function that creates the stream of one of its passes."""
    call = example(batch, tokens, device)
    # What `generate` hands over.
    flipped = {name: call[name].flip(-1) for name in ("input_ids", "attention_mask")}

    def generation() -> Stream:
        real = flipped["attention_mask"] != 0  # as `generate` has it once a call
        return Generation(flipped["input_ids"], real, real, 0).stream(CallTokens.of(flipped), in_graph=False)

    def training(call: Mapping[str, torch.Tensor]) -> Stream:
        told = CallTokens.of(call)
        return Told(told.shape, training=True, tokens=told, language_model=True)

    packed = {name: value for name, value in call.items() if name != "attention_mask"}
    packed["position_ids"] = torch.arange(tokens, device=device).remainder(tokens // 4).expand(batch, tokens)
    packed["labels"] = torch.where(packed["position_ids"] < tokens // 8, -100, packed["input_ids"])
    return {
        TRAINING: partial(training, call),
        PACKED: partial(training, packed),
        GENERATION: generation,
    }


def example(batch: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A right-padded batch of sequences of different lengths; the first half of each is prompt."""
    ids = torch.randint(1, 1000, (batch, tokens), device=device)
    lengths = torch.randint(tokens // 4, tokens + 1, (batch, 1), device=device)
    index = torch.arange(tokens, device=device)
    mask = (index < lengths).long()
    supervised = (index >= lengths // 2) & (index < lengths)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(supervised, ids, -100)}


def report(times: Mapping[str, list[float]]) -> str:
    def cell(case: str, spec: str) -> str:
        return f"{Spread.of(times[f'{case}, {spec}']):.3f}"

    rows = ([case, *(cell(case, spec) for spec in SPECS)] for case in (TRAINING, PACKED, GENERATION, KNOWN))
    return table(["", *SPECS], rows)


if __name__ == "__main__":
    main()
