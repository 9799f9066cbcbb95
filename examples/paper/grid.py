"""Compares methods on the small models: learning rates swept alike, then several seeds at the best one.

    python examples/paper/grid.py --data FOLDER --dry_run     # which runs are left, and how long they will take
    python examples/paper/grid.py --data FOLDER --tasks sst2 prompted-sst2 --workers 2
    python examples/paper/grid.py --data FOLDER --size gpu --results results-gpu.jsonl
    python examples/paper/report.py                           # RESULTS.md from what was measured

FOLDER holds `glue/` and `commonsense/` (see README.md). `plan.py` says what is compared, the telling comparisons first.
A method is swept over four rates; while the best one is at an edge the next one is tried; then the other seeds follow.
Every run is a call of `glue.py`, `likelihood.py` or `commonsense.py`, a process of one thread with its log in --output.
Its result is a line that is appended to --results. What has a line is not run again, also on another machine; an
interrupted run resumes from its last checkpoint.

The rows that give the score have no say in the rate. Training rows that are kept back pick it: by their score in
`glue.py`, elsewhere by their loss.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from plan import LADDERS, SEEDS, STARTS, TASKS, Contender, studies

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries that the suites import

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: what it is a run of, and its folder and command line. One that is not scored only picks a rate."""

    task: str
    contender: Contender
    rate: float | None
    seed: int
    size: str
    scored: bool = True

    @property
    def name(self) -> str:
        return self.folder if self.scored else f"{self.folder}-unscored"

    @property
    def folder(self) -> str:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        label = self.contender.label.lower().replace(",", "").replace(" ", "-")
        return f"{self.size}/{self.task}/{label}{rate}-seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        """The command line but for folders."""
        flags = ["--seed", str(self.seed), *self.contender.flags, *TASKS[self.task].flags[self.size]]
        if self.rate is not None:
            flags += ["--learning_rate", str(self.rate)]
        return flags if self.scored else [*flags, "--eval_rows", "0"]

    def results_file(self, output: Path) -> Path:
        # glue.py takes several tasks, and has a folder for each.
        inner = self.flags[self.flags.index("--tasks") + 1] if TASKS[self.task].script == "glue" else ""
        return output / self.folder / inner / "results.json"


class Results:
    """The file of JSON lines, and what is in it: one line for each finished run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self.lines = {result["name"]: result for result in map(json.loads, text.splitlines())}

    def get(self, job: Job) -> Result | None:
        """The result of a job, if it was run."""
        result = self.lines.get(job.name)
        if result is not None and result["flags"] != job.flags:
            raise SystemExit(
                f"{self.file}: {job.name} was run with {result['flags']}, not {job.flags}. Choose another --results."
            )
        return result

    def add(self, job: Job, output: Path) -> Result:
        """Read what a run has written, and append it without its bulk."""
        result = compact(job, json.loads(job.results_file(output).read_text(encoding="utf-8")))
        self.lines[job.name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        return result


def compact(job: Job, results: Result) -> Result:
    """What of a run's results is kept: no folders, and of its log the losses."""
    kept = (
        *("scores", "picking_scores", "tasks", "trainable_parameters", "head_parameters", "base_parameters"),
        *("adapter_bytes", "seconds", "processor_seconds", "peak_memory_mib", "machine", "versions"),
    )
    losses = [[entry["step"], round(entry["loss"], 4)] for entry in results["log"] if "loss" in entry]
    return {
        "name": job.name,
        **{"task": job.task, "label": job.contender.label, "learning_rate": job.rate, "seed": job.seed},
        "flags": job.flags,
        "quality": quality(results),
        **{name: _rounded(results[name]) for name in kept if name in results},
        "losses": losses,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def quality(results: Result) -> float | None:
    """What picks the learning rate, higher is better; None for what was not trained."""
    if "picking_scores" in results:
        return results["picking_scores"]["score"]
    losses = [entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry]
    if not losses:
        return None
    return -losses[-1] if math.isfinite(losses[-1]) else -1e9  # training came apart


def wanted(task: str, contender: Contender, results: Results, options: argparse.Namespace) -> list[Job]:
    """The runs of a method that are known to be needed: more, once these are finished."""

    def jobs(rates: list[float] | list[None], seeds: list[int], scored: bool = True) -> list[Job]:
        return [Job(task, contender, rate, seed, options.size, scored) for rate in rates for seed in seeds]

    first, *others = options.seeds
    if contender.rates is None:
        return jobs([None], [first])
    rates, ladder, scored = list(STARTS[contender.rates]), LADDERS[contender.rates], TASKS[task].scores_sweep
    while True:
        sweep = jobs(rates, [first], scored)
        found = [results.get(job) for job in sweep]
        if None in found:
            return sweep
        best = max(zip(found, rates, strict=True), key=lambda pair: pair[0]["quality"])[1]
        beyond = _beyond(best, rates, ladder)
        if beyond is None:
            return sweep + jobs([best], others if scored else options.seeds)
        rates = sorted([*rates, beyond])


def _beyond(best: float, rates: list[float], ladder: tuple[float, ...]) -> float | None:
    """The next rate to try: beyond the best one, if that is at an edge of those tried and not of the ladder."""
    place = ladder.index(best)
    if best == rates[0] and place > 0:
        return ladder[place - 1]
    if best == rates[-1] and place < len(ladder) - 1:
        return ladder[place + 1]
    return None


def all_wanted(results: Results, options: argparse.Namespace) -> Iterator[Job]:
    for task, contender in studies(options.tasks, options.methods):
        yield from wanted(task, contender, results, options)


def run_job(job: Job, options: argparse.Namespace) -> None:
    """Run one job, the only one of this process, its output into `log.txt`."""
    folder = options.output / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[job.task]
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            folders = ["--data", str(options.data / task.data), "--output_dir", str(folder)]
            importlib.import_module(task.script).main([*folders, *job.flags])
        except (Exception, SystemExit):
            traceback.print_exc()
            log.flush()
            os._exit(1)


def run_all(results: Results, options: argparse.Namespace) -> None:
    """Run what is wanted and not finished, in order, in processes of one thread each."""
    begin = time.perf_counter()
    # Forked after the imports: nothing to load, and memory that is measured from the same start.
    fork = multiprocessing.get_context("fork")
    running: dict[Job, BaseProcess] = {}
    failed: set[Job] = set()
    while True:
        left = (job for job in all_wanted(results, options) if results.get(job) is None)
        job = next((job for job in left if job not in running and job not in failed), None)
        if job is not None and len(running) < options.workers:
            running[job] = fork.Process(target=run_job, args=(job, options))
            running[job].start()
            continue
        if not running:
            return
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for job in [job for job, process in running.items() if not process.is_alive()]:
            process = running.pop(job)
            process.join()
            if process.exitcode:
                failed.add(job)
                said = f"failed, see {options.output / job.folder / 'log.txt'}"
            else:
                said = outcome(results.add(job, options.output))
            print(f"{time.perf_counter() - begin:6.0f} s  {job.name}  {said}", flush=True)


def outcome(result: Result) -> str:
    scores = "  ".join(f"{name} {value:.1f}" for name, value in result["scores"].items())
    return scores if result["quality"] is None else f"{scores}  (quality {result['quality']:.3f})"


def estimate(results: Results, options: argparse.Namespace) -> None:
    """Print the runs that are known to be needed, with the processor time that runs of the same method have taken."""
    known: dict[tuple[str, str], list[float]] = {}
    jobs = list(all_wanted(results, options))
    for job in jobs:
        if (result := results.get(job)) is not None:
            seconds = sum(second or 0 for second in result["processor_seconds"].values())
            known.setdefault((job.task, job.contender.label), []).append(seconds)
    total = 0.0
    for job in jobs:
        times = known.get((job.task, job.contender.label))
        done = results.get(job) is not None
        mean = sum(times) / len(times) if times else None
        total += 0 if done else mean or 0
        print(f"{job.name:<52} {'finished' if done else ''} {f'about {mean:.0f} s' if mean else ''}")
    print(f"{len(jobs)} runs; those left of a known kind take {total / 60:.0f} processor minutes")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/ and commonsense/")
    parser.add_argument("--size", choices=SEEDS, default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="only methods whose label has one of these words")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("outputs", "paper", "grid"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().with_name("results.jsonl"), help="where results go"
    )
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    options.data = options.data.expanduser().resolve()
    options.seeds = options.seeds or SEEDS[options.size]
    return options


def main() -> None:
    options = parse_options()
    results = Results(options.results)
    if options.dry_run:
        estimate(results, options)
        return
    # Before the first import of torch: one thread a process.
    os.environ["OMP_NUM_THREADS"] = "1"
    for script in {TASKS[task].script for task in options.tasks}:
        importlib.import_module(script)
    run_all(results, options)


if __name__ == "__main__":
    main()
