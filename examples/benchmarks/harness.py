"""Shared by the benchmarks: interleaved timing of variants, ratios within a round, command line, results as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine, versions
from models import SHAPES

# variant -> phase -> milliseconds of each round
Times = dict[str, dict[str, list[float]]]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def ratio(times: Times, variant: str, reference: str, phase: str) -> Spread:
    """A variant's time relative to another one's in the same round: what slows a whole round cancels out."""
    pairs = zip(times[variant][phase], times[reference][phase], strict=True)
    return Spread.of(own / other for own, other in pairs)


def interleave(runs: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, warmup: int = 1) -> Times:
    """Run all variants in turns; each round starts with another one.

    Args:
        runs: variant -> a function that runs it and returns milliseconds of each phase.
        rounds: number of rounds that count.
        warmup: number of rounds before them that do not count.
    """
    names = list(runs)
    times: Times = {name: {} for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for phase, milliseconds in runs[name]().items():
                if number >= warmup:
                    times[name].setdefault(phase, []).append(milliseconds)
    return times


class Clock:
    """Milliseconds: processor time if the process has one CPU thread (other load hardly matters), else wall time.

    On a GPU it waits for all kernels first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._seconds = time.process_time if alone else time.perf_counter

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * self._seconds()


def time_often(run: Callable[[], Any], clock: Clock, least: float = 10.0) -> Callable[[], dict[str, float]]:
    """A run for `interleave` that repeats a short one for at least `least` milliseconds, and returns the mean."""

    def timed() -> dict[str, float]:
        begin, count = clock(), 0
        while count == 0 or clock() - begin < least:
            run()
            count += 1
        return {"time": (clock() - begin) / count}

    return timed


def parser(description: str, model: str | None = "34m", rounds: int | None = 9) -> argparse.ArgumentParser:
    """The options of all benchmarks."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model is not None:
        shapes = ", ".join(SHAPES)
        help_ = (
            f"a random Llama ({shapes}), smollm2 (the bundled model), or a folder or hub name (default: %(default)s)"
        )
        result.add_argument("--model", default=model, help=help_)
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    result.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    if rounds is not None:
        result.add_argument("--rounds", type=int, default=rounds, help="in turns (default: %(default)s)")
    result.add_argument(
        "--quick", action="store_true", help="fewer rounds of smaller batches, and only what the targets need"
    )
    result.add_argument("--json", help="file for the results")
    return result


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Set seed and threads; returns the device and dtype of the options."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    return torch.device(args.device), getattr(torch, args.dtype)


def finish(args: argparse.Namespace, results: Mapping[str, Any], text: str) -> None:
    """Print a report with the machine below it; write the results to the file of `--json`."""
    print(f"{text}\n\n{machine(args.device)}; {versions()}.")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {"settings": settings, "machine": machine(args.device), "versions": versions(), "text": text}
        Path(args.json).write_text(json.dumps(record | results, indent=1))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
