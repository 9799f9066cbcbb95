"""Compares methods on the small models: learning rates swept alike, then several seeds at the best one.

    python examples/paper/grid.py --data FOLDER --size cpu --dry_run    # which runs, and how long they will take
    python examples/paper/grid.py --data FOLDER --size cpu              # two processes of one thread each
    python examples/paper/grid.py --data FOLDER --size gpu --workers 1
    python examples/paper/report.py                                     # RESULTS.md from what was measured

FOLDER holds `glue/` and `commonsense/` (see README.md). Runs that are finished are not run again, an interrupted one
goes on from its last checkpoint. Every run is a call of `glue.py` or `commonsense.py` and keeps its log and results in
its folder; all results together are JSON lines in --results.

The best rate is that with the best score on the part of the validation set that picks epochs (GLUE), or with the lowest
loss on training rows that are kept back: the rows that give the score have no say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries that the suites import

SEEDS = {"cpu": [42, 43], "gpu": [42, 43, 44]}

# A factor of three apart, around what is usual for the method; the first ones are used if fewer are asked for.
RATES = {
    "reft": [2e-3, 6e-3, 6e-4, 2e-2],
    "lora": [3e-3, 1e-3, 1e-2, 3e-4],
    "ia3": [1e-2, 3e-2, 3e-3, 1e-1],
    "full": [1e-4, 3e-5, 3e-4, 1e-5],
    "head": [1e-2, 3e-3, 3e-2, 1e-3],
}
NUMBER_OF_RATES = {"cpu": 3, "gpu": 4}


@dataclass(frozen=True)
class Contender:
    """A method with its options, and which rates it is swept over; none for what is not trained."""

    label: str
    flags: tuple[str, ...]
    rates: str | None


def _reft(name: str, method: str, rank: int, positions: str) -> Contender:
    flags = ("--method", method, "--rank", str(rank), "--positions", positions)
    return Contender(f"{name} r={rank} {positions}", flags, "reft")


def contenders(suite: str, size: str) -> list[Contender]:
    """LoReFT at several sizes and positions, DiReFT, LoRA and the baseline; on a GPU also the costlier ones."""
    if suite == "glue":
        reft = [
            _reft("LoReFT", "loreft", 4, "f3+l3"),
            *(_reft("LoReFT", "loreft", rank, "all") for rank in (4, 16)),
            _reft("DiReFT", "nodireft", 16, "all"),
        ]
        baseline = Contender("head alone", ("--method", "none"), "head")
    else:
        # A run of a generation suite takes minutes of a processor: one size there.
        ranks = (8,) if size == "cpu" else (1, 8)
        reft = [
            *(_reft("LoReFT", "loreft", rank, "f7+l7") for rank in ranks),
            _reft("DiReFT", "nodireft", 8, "f7+l7"),
        ]
        baseline = Contender("zero-shot", ("--method", "none"), None)
    chosen = [*reft, Contender("LoRA r=8, q and v", ("--method", "lora"), "lora"), baseline]
    if size == "gpu":
        chosen += [
            Contender("LoRA r=8, all linear", ("--method", "lora-all"), "lora"),
            Contender("DoRA r=8, q and v", ("--method", "dora"), "lora"),
            Contender("IA3", ("--method", "ia3"), "ia3"),
            Contender("full", ("--method", "full"), "full"),
        ]
    return chosen


# A task of GLUE, or a generation suite, and what every run on it has in common.
TASKS = {
    "sst2": {
        "cpu": ["--train_rows", "4000", "--num_train_epochs", "1"],
        "gpu": ["--train_rows", "16000", "--num_train_epochs", "3"],
    },
    "rte": {
        "cpu": ["--num_train_epochs", "1", "--max_length", "96"],
        "gpu": ["--num_train_epochs", "10"],
    },
    "cola": {
        "cpu": ["--train_rows", "4000", "--num_train_epochs", "4"],
        "gpu": ["--num_train_epochs", "10"],
    },
    "commonsense": {
        "cpu": [
            *("--train_rows", "240", "--dev_rows", "40", "--num_train_epochs", "1", "--max_length", "128"),
            *("--tasks", "boolq", "piqa", "ARC-Easy", "openbookqa", "--eval_rows", "25", "--logging_steps", "2"),
        ],
        "gpu": ["--train_rows", "2800", "--dev_rows", "200", "--eval_rows", "200", "--num_train_epochs", "3"],
    },
}
DEFAULT_TASKS = {"cpu": ["sst2", "cola", "commonsense"], "gpu": list(TASKS)}


@dataclass(frozen=True)
class Job:
    """One run: what it is a run of, and its folder and command line."""

    task: str
    contender: Contender
    rate: float | None
    seed: int
    size: str

    @property
    def suite(self) -> str:
        return self.task if self.task == "commonsense" else "glue"

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        label = self.contender.label.lower().replace(",", "").replace(" ", "-")
        return f"{self.size}/{self.task}/{label}{rate}-seed{self.seed}"

    def folder(self, root: Path) -> Path:
        return root / self.name

    def results_file(self, root: Path) -> Path:
        folder = self.folder(root)
        return (folder / self.task if self.suite == "glue" else folder) / "results.json"

    @property
    def flags(self) -> list[str]:
        """The command line but for folders."""
        flags = ["--seed", str(self.seed), *self.contender.flags, *TASKS[self.task][self.size]]
        if self.suite == "glue":
            flags += ["--tasks", self.task]
        if self.rate is not None:
            flags += ["--learning_rate", str(self.rate)]
        return flags


def run_job(job: Job, options: argparse.Namespace) -> tuple[Job, str | None]:
    """Run one job, the only one of this process, its output into `log.txt`; what went wrong, if anything."""
    folder = write_flags(job, options)
    with (folder / "log.txt").open("a") as log:
        # The process ends after this job.
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            folders = ["--data", str(options.data / job.suite), "--output_dir", str(folder)]
            importlib.import_module(job.suite).main([*folders, *job.flags])
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return job, f"{type(error).__name__}: {error}"
    return job, None


def write_flags(job: Job, options: argparse.Namespace) -> Path:
    """Make the job's folder, with a note of what is run there."""
    folder = job.folder(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flags.json").write_text(json.dumps(job.flags))
    return folder


def finished(job: Job, options: argparse.Namespace) -> dict[str, Any] | None:
    """The results of a job that was run."""
    file = job.results_file(options.output)
    if not file.exists():
        return None
    flags = json.loads((job.folder(options.output) / "flags.json").read_text())
    if flags != job.flags:
        raise SystemExit(f"{job.folder(options.output)} was run with {flags}, not {job.flags}: another --output?")
    return json.loads(file.read_text())


def quality(results: dict[str, Any]) -> float:
    """What picks the learning rate: higher is better."""
    if results["suite"] == "glue":
        return results["picking_scores"]["score"]
    return -[entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry][-1]


def sweep_jobs(options: argparse.Namespace) -> list[Job]:
    """Every rate of every method, with the first seed."""
    jobs = []
    for task in options.tasks:
        for contender in contenders("glue" if task != "commonsense" else task, options.size):
            if options.methods and not any(name.lower() in contender.label.lower() for name in options.methods):
                continue
            rates = [None] if contender.rates is None else sorted(RATES[contender.rates][: options.rates])
            jobs += [Job(task, contender, rate, options.seeds[0], options.size) for rate in rates]
    return jobs


def best_jobs(jobs: Iterable[Job], options: argparse.Namespace) -> list[Job]:
    """The best rate's job of each method; without those that have no results yet."""
    best: dict[tuple[str, str], tuple[float, Job]] = {}
    for job in jobs:
        results = finished(job, options)
        if results is not None:
            value = 0.0 if job.rate is None else quality(results)
            key = job.task, job.contender.label
            if key not in best or value > best[key][0]:
                best[key] = value, job
    return [job for _, job in best.values()]


def seed_jobs(options: argparse.Namespace) -> list[Job]:
    """The other seeds at the best rates. What is not trained has no seed."""
    return [
        Job(job.task, job.contender, job.rate, seed, job.size)
        for job in best_jobs(sweep_jobs(options), options)
        for seed in options.seeds[1:]
        if job.rate is not None
    ]


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Run what is not finished, in worker processes of one thread each."""
    left = [job for job in jobs if finished(job, options) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished before", flush=True)
    if not left:
        return
    begin = time.perf_counter()
    # Forked for every run after the imports: nothing to load, and memory that is measured from the same start.
    with multiprocessing.get_context("fork").Pool(options.workers, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(run_job, (job, options)) for job in left]
        for number, one in enumerate(waiting, 1):
            job, error = one.get()
            seconds = time.perf_counter() - begin
            print(f"{seconds:6.0f} s  {number}/{len(left)}  {job.name}  {error or outcome(job, options)}", flush=True)


def outcome(job: Job, options: argparse.Namespace) -> str:
    results = finished(job, options)
    return "  ".join(f"{name} {value:.1f}" for name, value in results["scores"].items())


def collect(jobs: list[Job], options: argparse.Namespace) -> None:
    """All results as JSON lines, with what the run was and without the bulk of its configuration."""
    lines = []
    for job in dict.fromkeys(jobs):
        results = finished(job, options)
        if results is not None:
            command = {"method": job.contender.flags, "common": TASKS[job.task][job.size]}
            results["configuration"] = {"command": command}
            results |= {"task": job.task, "label": job.contender.label, "learning_rate": job.rate, "size": job.size}
            results |= {"model": results["preset"], "data": Path(results["data"]).name}  # in place of folders
            lines.append(json.dumps(results, ensure_ascii=False))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {len(lines)} results to {options.results}")


def estimate(jobs: list[Job], options: argparse.Namespace) -> None:
    """Print the runs that are left, with the processor time that runs of the same task and method have taken."""
    known: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        if (results := finished(job, options)) is not None:
            seconds = sum(second or 0 for second in results["processor_seconds"].values())
            known.setdefault((job.task, job.contender.label), []).append(seconds)
    total = 0.0
    for job in jobs:
        times = known.get((job.task, job.contender.label))
        done = finished(job, options) is not None
        mean = sum(times) / len(times) if times else None
        total += 0 if done else mean or 0
        print(f"{job.name:<52} {'finished' if done else ''} {f'about {mean:.0f} s' if mean else ''}")
    print(f"{len(jobs)} runs; those left of a known kind take {total / 60:.0f} processor minutes")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/ and commonsense/")
    parser.add_argument("--size", choices=SEEDS, default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--methods", nargs="+", help="only methods whose label has one of these words")
    parser.add_argument("--rates", type=int, help="how many learning rates")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=Path("outputs", "paper", "grid"), help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=Path("outputs", "paper", "results.jsonl"), help="where to collect them"
    )
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    options.data = options.data.expanduser().resolve()
    options.tasks = options.tasks or DEFAULT_TASKS[options.size]
    options.seeds = options.seeds or SEEDS[options.size]
    options.rates = options.rates or NUMBER_OF_RATES[options.size]
    return options


def main() -> None:
    options = parse_options()
    if options.dry_run:
        estimate(sweep_jobs(options) + seed_jobs(options), options)
        return
    # Before the first import of torch: one thread a process.
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    for suite in {job.suite for job in sweep_jobs(options)}:
        importlib.import_module(suite)
    run_all(sweep_jobs(options), options)
    run_all(seed_jobs(options), options)
    collect(sweep_jobs(options) + seed_jobs(options), options)


if __name__ == "__main__":
    main()
