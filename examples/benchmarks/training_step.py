"""Time of a training step with LoReFT and LoRA, and of the frozen model's forward and backward pass, the floor.

    python examples/benchmarks/training_step.py                      # a random Llama of 34 million parameters
    python examples/benchmarks/training_step.py --model wide
    python examples/benchmarks/training_step.py --model 1b --device cuda --dtype bfloat16

A model that is edited from block k up needs the backward pass only down to the output of block k. The floor is exactly
that, with nothing to learn and only the model's code. Labels are -100 on the first half of the tokens, the prompt. A
step is forward, backward, AdamW's step and the reset of gradients; the floor has no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from harness import Clock, Times, finish, interleave, parser, progress, ratio, start, table
from models import (
    LORA,
    LORA_ALL,
    LOREFT,
    LOREFT_ALL,
    LOREFT_UPPER,
    adapted,
    build,
    depth,
    describe,
    floor,
    training_shape,
)

FLOOR, FLOOR_UPPER = "frozen model", "frozen model, upper half"
ADAPTERS = (LOREFT, LOREFT_ALL, LOREFT_UPPER, LORA, LORA_ALL)
QUICK_ADAPTERS = (LOREFT, LOREFT_UPPER, LORA)
PASSES, STEP = "forward and backward", "step"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, help="sequences (default: 8, of the wide model 2)")
    args = arguments.parse_args()
    rows, tokens = training_shape(args.model)
    rows = args.batch or rows
    if args.quick:
        args.rounds, rows = min(args.rounds, 5), max(rows // 2, 1)
    device, dtype = start(args)
    base = build(args.model, device, dtype)
    batch = example(rows, tokens, base.config.get_text_config().vocab_size, device)
    names = QUICK_ADAPTERS if args.quick else ADAPTERS
    runs, trainable = variants(base, names, batch, Clock(device))
    progress(f"training steps, {args.model}")
    times = interleave(runs, args.rounds)
    heading = f"Training step, {args.model} ({describe(base)}), {rows} x {tokens} tokens, {args.dtype}:"
    finish(args, {"times": times}, f"{heading}\n\n{report(times, trainable)}")


def example(rows: int, tokens: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch whose first half of tokens is prompt."""
    ids = torch.randint(vocabulary, (rows, tokens), device=device)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def variants(
    base: torch.nn.Module, names: Iterable[str], batch: dict[str, torch.Tensor], clock: Clock
) -> tuple[dict[str, Callable[[], dict[str, float]]], dict[str, int]]:
    """Runs for `interleave`, and the number of parameters that each run trains."""
    layers = depth(base)
    models = {FLOOR: floor(base, 0), FLOOR_UPPER: floor(base, layers // 2)}
    models |= {name: adapted(base, name) for name in names}
    runs, trainable = {}, {}
    for name, model in models.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters) if parameters else None
        runs[name] = partial(step, model.train(), batch, optimizer, clock)
        trainable[name] = sum(p.numel() for p in parameters)
    return runs, trainable


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, clock: Clock
) -> dict[str, float]:
    begin = clock()
    model(**batch, use_cache=False).loss.backward()
    passes = clock() - begin
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return {PASSES: passes, STEP: clock() - begin}


def report(times: Times, trainable: dict[str, int]) -> str:
    rows = []
    for name in times:
        beside = FLOOR_UPPER if name in (FLOOR_UPPER, LOREFT_UPPER) else FLOOR
        cells = [ratio(times, name, *other) for other in ((beside, PASSES), (beside, STEP), (LORA, STEP))]
        rows.append([name, f"{trainable[name]:,}", *cells])
    header = ["", "trained", "forward + backward / frozen", "step / frozen", f"step / {LORA}"]
    return table(header, rows)


if __name__ == "__main__":
    main()
