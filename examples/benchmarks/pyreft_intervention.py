"""Times pyreft's LoReFT intervention; runs in pyreft's own environment, started by `intervention.py --pyreft-python`.

Imports nothing of this repository: pyreft needs versions of Transformers that peft_reft does not run with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from pyreft import LoreftIntervention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    results = []
    for width in args.widths:
        for rank in args.ranks:
            begin = clock()
            intervention = LoreftIntervention(embed_dim=width, low_rank_dimension=rank, dtype=torch.float32)
            construction = 1e3 * (clock() - begin)
            times = measure(intervention, torch.randn(1, args.rows, width), args.rounds, clock)
            results.append({"width": width, "rank": rank, "construction": construction, "times": times})
    packages = ("pyreft", "pyvene", "torch", "transformers")
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    print(json.dumps({"versions": names, "results": results}))


def measure(
    intervention: torch.nn.Module, hidden: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> list[float]:
    """Milliseconds of a forward and backward pass; the first one does not count."""
    hidden.requires_grad_()
    gradient = torch.randn_like(hidden)
    inputs = [hidden, *intervention.parameters()]
    times = []
    for _ in range(rounds + 1):
        begin = clock()
        torch.autograd.grad(intervention(hidden), inputs, gradient)
        times.append(1e3 * (clock() - begin))
    return times[1:]


if __name__ == "__main__":
    main()
