"""Runs all benchmarks, one after the other, and writes a Markdown report: targets first, then every table.

    python examples/benchmarks/run_all.py --quick
    python examples/benchmarks/run_all.py --pyreft-python PATH_TO_PYTHON --output report.md
    python examples/benchmarks/run_all.py --models 1b 7b --device cuda --dtype bfloat16

A target is met if the unrounded median meets it; the quartiles of the rounds follow the median. `--quick` measures
fewer rounds of smaller batches, and only what the targets need.
"""

from __future__ import annotations

import argparse
import json
import operator
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import finding_positions
import generation
import intervention
import loading
import memory
import training_step
from harness import Spread, finish, parser, progress, ratio, start, table
from models import LORA, LORA_ALL, LOREFT, LOREFT_ALL, LOREFT_UPPER

# Job -> the JSON results of its script.
Results = Mapping[str, Mapping[str, Any]]
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}
BATCH, ADAPTERS, CASE = "4", "64", "d=4096, r=8"


class Target(NamedTuple):
    """A row of the table: `measured` is None where the run has not measured it."""

    what: str
    comparison: str
    limit: float
    measured: Spread | None

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else COMPARISONS[self.comparison](self.measured.median, self.limit)

    def cells(self) -> tuple[str, str, str, str]:
        verdict = {None: "not measured", True: "yes", False: "**no**"}[self.met]
        measured = "" if self.measured is None else _number(self.measured)
        return self.what, f"{self.comparison} {self.limit:g}", measured, verdict


def _number(spread: Spread) -> str:
    text = f"{spread:.0f}" if spread.median >= 50 else f"{spread:.3f}"
    return text.partition(" ")[0] if spread.low == spread.high else text


def main() -> None:
    arguments = parser(__doc__, model=None, rounds=None)
    arguments.add_argument("--models", nargs="+", default=["34m", "wide"], help="default: %(default)s")
    arguments.add_argument("--pyreft-python", help="a Python with pyreft, to compare with")
    arguments.add_argument("--output", help="file for the report")
    args = arguments.parse_args()
    start(args)
    begin = time.perf_counter()
    results = run(jobs(args), args)
    minutes = (time.perf_counter() - begin) / 60
    kind = "Quick" if args.quick else "Full"
    text = f"{report(results, args.models)}\n\n{kind} run of {minutes:.0f} minutes."
    finish(args, {"results": results}, text)
    if args.output:
        where = next(iter(results.values()))
        Path(args.output).write_text(f"{text}\n\n{where['machine']}; {where['versions']}.\n")


def jobs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Job -> the script's name and its own arguments."""
    result = {f"training_step {model}": ["training_step", "--model", model] for model in args.models}
    result["generation"] = ["generation", "--model", args.models[0], "--batches", BATCH]
    result["many_adapters"] = ["many_adapters"]
    result["memory"] = ["memory", "--models", *args.models]
    result["loading"] = ["loading"]
    result["finding_positions"] = ["finding_positions"]
    result["intervention"] = ["intervention"]
    if args.pyreft_python:
        result["intervention"] += ["--pyreft-python", args.pyreft_python]
    return result


def run(jobs: Mapping[str, list[str]], args: argparse.Namespace) -> Results:
    common = ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (job, (script, *own)) in enumerate(jobs.items()):
            progress(f"[{number + 1}/{len(jobs)}] {job}")
            record = Path(folder) / f"{number}.json"
            command = [sys.executable, Path(__file__).with_name(f"{script}.py"), *own, *common, "--json", record]
            begin = time.perf_counter()
            subprocess.run([*command, *(["--quick"] if args.quick else [])], stdout=subprocess.DEVNULL, check=True)
            progress(f"{time.perf_counter() - begin:.0f} s")
            results[job] = json.loads(record.read_text())
    return results


def report(results: Results, models: list[str]) -> str:
    header = ["what", "target", "measured", "met"]
    sections = ["## Targets", table(header, (target.cells() for target in targets(results, models)))]
    for job, one in results.items():
        sections += [f"## {job}", one["text"]]
    return "\n\n".join(sections)


def targets(results: Results, models: list[str]) -> Iterator[Target]:
    """The rows of the table of targets."""
    for model in models:
        yield from _training(results[f"training_step {model}"]["times"], model)
    for model in models:
        yield from _memory(results["memory"]["memory"][model], model)
    yield from _generation(results["generation"]["times"][BATCH])
    yield from _many(results["many_adapters"]["times"][ADAPTERS])
    yield _intervention(results["intervention"]["times"][CASE])
    yield from _positions(results["finding_positions"]["times"])
    yield from _loading(results["loading"])


def _training(times: Any, model: str) -> Iterator[Target]:
    step, what = training_step.STEP, f"training step, {model}"
    beside = ((training_step.FLOOR, "<=", 1.03, "the frozen forward and backward"), (LORA, "<", 1, LORA))
    for reference, comparison, limit, name in beside:
        yield Target(f"{what}, {LOREFT} / {name}", comparison, limit, ratio(times, LOREFT, reference, step))
    yield Target(f"{what}, {LOREFT_UPPER} / {LORA}", "<=", 0.8, ratio(times, LOREFT_UPPER, LORA, step))


def _memory(results: Any, model: str) -> Iterator[Target]:
    for name in (LOREFT, LOREFT_ALL):
        what = f"memory of a training step above the base, {model}, {name} / {LORA}"
        yield Target(what, "<=", 1, memory.beside(results, name, LORA))
    size = results[LOREFT]["file_bytes"] / results[LOREFT]["parameter_bytes"]
    yield Target(f"adapter file, {model}, {LOREFT} / its parameters", "<=", 1.02, Spread.of([size]))


def _generation(times: Any) -> Iterator[Target]:
    cases = ((LOREFT, generation.BARE, 1.02), (LOREFT_ALL, generation.BARE, 1.1), (LOREFT_ALL, LORA_ALL, 1))
    for name, reference, limit in cases:
        measured = ratio(times, name, reference, generation.TOTAL)
        yield Target(f"generate, batch {BATCH}, {name} / {reference}", "<=", limit, measured)


def _many(times: Any) -> Iterator[Target]:
    for phase, limit in ((generation.PREFILL, 1.15), (generation.DECODE, 1.02)):
        what = f"{ADAPTERS} adapters in a batch of 64, {LOREFT}, {phase} / {generation.BARE}"
        yield Target(what, "<=", limit, ratio(times, LOREFT, generation.BARE, phase))


def _intervention(times: Any) -> Target:
    measured = intervention.speedup(times, intervention.PYREFT) if intervention.PYREFT in times else None
    return Target(f"one intervention, {CASE}, pyreft / {intervention.OURS}", ">=", 100, measured)


def _positions(times: Any) -> Iterator[Target]:
    for case in (finding_positions.TRAINING, finding_positions.GENERATION, finding_positions.KNOWN):
        spread = Spread.of(times[f"{case}, f7+l7"])
        yield Target(f"finding positions, 64 x 2,048, {case}, f7+l7, ms", "<=", 0.1, spread)


def _loading(results: Any) -> Iterator[Target]:
    for kind in (loading.META, loading.REAL):
        spread = Spread.of(results["attach"][f"{LOREFT}, {kind}"])
        yield Target(f"attaching to 32 layers of width 4096, {kind}, ms", "<=", 100, spread)
    growth = loading.growth(results["load"][LOREFT])
    yield Target("loading the last of 100 adapters / one of the first", "<=", 1, growth)


if __name__ == "__main__":
    main()
