"""Time of one LoReFT intervention, forward and backward: this package's, other implementations, and pyreft's.

    python examples/benchmarks/intervention.py
    python examples/benchmarks/intervention.py --pyreft-python PATH_TO_PYTHON    # of an environment with pyreft

Each maps h to h + R^T (W h + b - R h) for 112 selected tokens (f7+l7 of 8 sequences), and passes the gradient on to h.
The variants differ in where the orthonormal R comes from: this package orthonormalizes a plain parameter; torch's
`parametrizations.orthogonal` multiplies Householder reflections, as in pyreft; the plain factor, which is not
orthonormal, is the floor. pyreft runs in a separate process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Clock, Spread, Times, finish, interleave, parser, progress, start, table, time_often
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from peft_reft.interventions import LoreftIntervention

OURS, PLAIN, HOUSEHOLDER, PYREFT = "peft_reft", "plain factor", "torch's Householder map", "pyreft"


class LowRankEdit(nn.Module):
    """h + P^T (W h + b - P h); with a `torch.nn.Linear` for P, which torch can parametrize."""

    def __init__(self, width: int, rank: int, householder: bool) -> None:
        super().__init__()
        self.learned = nn.Linear(width, rank)
        self.subspace = nn.Linear(width, rank, bias=False)
        if householder:
            self.subspace = orthogonal(self.subspace)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        factor = self.subspace.weight
        return hidden + (self.learned(hidden) - hidden @ factor.mT) @ factor


class Ours(nn.Module):
    """The package's intervention, which returns only the edit."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.intervention = LoreftIntervention(width, rank, init_weights=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.intervention(hidden)


VARIANTS: dict[str, Callable[[int, int], nn.Module]] = {
    OURS: Ours,
    PLAIN: lambda width, rank: LowRankEdit(width, rank, householder=False),
    HOUSEHOLDER: lambda width, rank: LowRankEdit(width, rank, householder=True),
}


def main() -> None:
    arguments = parser(__doc__, model=None)
    arguments.add_argument("--widths", type=int, nargs="+", default=[512, 2048, 4096])
    arguments.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    arguments.add_argument("--rows", type=int, default=112, help="selected tokens (default: %(default)s)")
    arguments.add_argument("--pyreft-python", help="a Python with pyreft")
    args = arguments.parse_args()
    if args.quick:
        args.rounds, args.widths = min(args.rounds, 3), args.widths[-1:]
    device, _ = start(args)
    times = {}
    for width in args.widths:
        for rank in args.ranks:
            progress(f"intervention, d={width}, r={rank}")
            times[f"d={width}, r={rank}"] = measure(width, rank, args.rows, args.rounds, device)
    results: dict[str, Any] = {"times": times}
    note = ""
    if args.pyreft_python:
        pyreft = measure_pyreft(args)
        for one in pyreft["results"]:
            times[f"d={one['width']}, r={one['rank']}"][PYREFT] = {"time": one["times"]}
        results["pyreft_versions"] = pyreft["versions"]
        note = f"\n\npyreft: {pyreft['versions']}."
    heading = f"One intervention, forward and backward, {args.rows} tokens; milliseconds, and how often {OURS}'s:"
    finish(args, results, f"{heading}\n\n{report(times)}{note}")


def measure(width: int, rank: int, rows: int, rounds: int, device: torch.device) -> Times:
    hidden = torch.randn(1, rows, width, device=device, requires_grad=True)
    gradient = torch.randn_like(hidden)

    def passes(module: nn.Module) -> Callable[[], Any]:
        inputs = [hidden, *module.parameters()]
        return lambda: torch.autograd.grad(module(hidden), inputs, gradient)

    modules = {name: make(width, rank).to(device) for name, make in VARIANTS.items()}
    return interleave({name: time_often(passes(module), Clock(device)) for name, module in modules.items()}, rounds)


def measure_pyreft(args: Any) -> dict[str, Any]:
    """pyreft's intervention; only on the CPU, like the numbers it is compared with."""
    progress("intervention, pyreft")
    script = Path(__file__).with_name("pyreft_intervention.py")
    options = {"widths": args.widths, "ranks": args.ranks, "rows": [args.rows], "rounds": [args.rounds]}
    options["threads"] = [args.threads]
    words = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    done = subprocess.run([args.pyreft_python, script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speedup(times: Times, variant: str) -> Spread:
    """A variant's time relative to ours; a ratio of medians, because pyreft's rounds are separate from the others."""
    ours = statistics.median(times[OURS]["time"])
    return Spread.of(value / ours for value in times[variant]["time"])


def report(times: dict[str, Times]) -> str:
    names = list(next(iter(times.values())))
    rows = []
    for case, one in times.items():
        cells = [f"{statistics.median(one[OURS]['time']):.2f} ms"]
        for name in names[1:]:
            cells.append(f"{statistics.median(one[name]['time']):.2f} ms, {speedup(one, name).median:.3g}x")
        rows.append([case, *cells])
    return table(["", *names], rows)


if __name__ == "__main__":
    main()
