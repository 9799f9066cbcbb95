"""Every architecture of the installed Transformers, one line each: what works, what does not, and why.

    python tests/architectures.py                          # all of them
    python tests/architectures.py --only LlamaForCausalLM,xlnet
    python tests/architectures.py --kinds causal,multimodal --jobs 2
    python tests/architectures.py --rows rows.jsonl --missing   # those that have no row yet
    python tests/architectures.py --rows rows.jsonl --write   # the table in docs/architectures.md

Rows are added to the file of `--rows`; the last one of a class counts.

Model classes are those of Transformers' automatic mappings, so new ones are picked up by themselves. The first class of
a family gets all checks, the others, which share its blocks, those that depend on what is around them. The exit status
is 1 if a class fails that `KNOWN` does not list: what the sweep cannot show, by name, each with a reason that is not
ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from architecture_checks import Checks
from architecture_table import table
from subjects import MAPPINGS, Subject, architectures, build

_SECONDS = 180
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
_JOB = ("kind", "model_type", "class", "whole")


class Known(NamedTuple):
    """What the sweep cannot show of a class: the checks that fail, and why that is never a fault of ours."""

    checks: str
    reason: str


# By class or model_type.
KNOWN: dict[str, Known] = {
    "mllama": Known(
        "edits train block_input attention_output mlp_output",
        "without an image the model skips its layers of cross-attention, which a warning tells",
    ),
    "diffusion_gemma": Known(
        "edits train tokens attention_output mlp_output",
        "the last layer of its encoder does not count in what it generates, LoRA's either, and its hidden states are "
        "those of what it generates; tests/test_architectures.py edits its prompt",
    ),
    "CvtForImageClassification": Known(
        "edits train", "its head reads the class token alone, which its last stage puts out beside what is edited"
    ),
    "levit": Known(
        "train attention_output",
        "its head normalizes over the batch in training, which takes off what is alike in all of it",
    ),
    "reformer": Known(
        "train block_input attention_output mlp_output",
        "its reversible layers have no gradients for parameters within, LoRA's either",
    ),
    "mra": Known("attention_output", "without its CUDA kernel the base model's attention puts out zeros"),
    "encodec": Known(
        "attach", "its convolutions stand in one flat list, without blocks; modules are named in target_modules"
    ),
    "univnet": Known("attach", "nothing tells the widths of its blocks, and LoRA finds nothing to adapt in them"),
    "fastspeech2_conformer": Known(
        "train block_input attention_output mlp_output", "it is trained with all labels only, which the sweep has not"
    ),
}


def _work(kind: str, model_type: str, name: str, whole: bool, connection: Connection) -> None:
    """Check one class in a process of its own; sends what is known so far after each check."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    row = {"kind": kind, "model_type": model_type, "class": name, "whole": whole}
    row |= {"state": "building", "checks": {}, "notes": {}}
    try:
        model = build(model_type, name)
        row["state"] = "built"
        subject = Subject(kind, model)
        checks = Checks(subject)
        row["state"] = "runs" if subject.error is None else "does not run"
        row["notes"] = {} if subject.error is None else {"error": _told(subject.error)}
        for check, run in (checks.all() if whole else checks.of_others()).items():
            started = time.time()
            row["checks"][check] = _result(run)
            row["notes"] |= checks.notes
            row["notes"]["seconds"] = row["notes"].get("seconds", 0) + time.time() - started
            connection.send(row)
    except Exception as error:
        row["notes"]["error"] = _told(error)
    row["done"] = True
    connection.send(row)


def _result(check: Callable[[], str | None]) -> str:
    try:
        return check() or "ok"
    except Exception as error:
        return f"FAIL: {error if isinstance(error, AssertionError) else _told(error)}"


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}{where}"


def jobs_of(kinds: Iterable[str]) -> list[tuple[str, str, str, bool]]:
    """Kind, `model_type` and name of each class, and whether it gets all checks: the first of its family does.

    These come first.
    """
    jobs, families = [], set()
    for kind, model_type, name in architectures(list(kinds)):
        jobs.append((kind, model_type, name, model_type not in families))
        families.add(model_type)
    return sorted(jobs, key=lambda job: not job[-1])


def sweep(jobs: list[tuple[str, str, str, bool]], processes: int) -> Iterator[dict]:
    """The row of each class, in the order in which they are done."""
    context, waiting, running = multiprocessing.get_context("fork"), list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            with contextlib.suppress(Exception):
                # Imported once, for all processes behind.
                getattr(transformers, job[2])
            process = context.Process(target=_silent, args=(*job, sender))
            process.start()
            sender.close()
            running.append((process, receiver, time.time(), dict(zip(_JOB, job, strict=True))))
        for entry in list(running):
            process, receiver, started, row = entry
            row.update(_received(receiver))
            # Ten times as long on a machine that others use, or where nothing happens any more.
            late = time.time() - started > 10 * _SECONDS
            if process.is_alive() and not late and not row.get("done"):
                continue
            process.kill()
            process.join()
            row.update(_received(receiver))
            running.remove(entry)
            if not row.get("done"):
                row.setdefault("checks", {})["whole"] = (
                    f"FAIL: {'too long' if late else f'died of signal {-process.exitcode}'}"
                )
            yield row
        time.sleep(0.02)


def _silent(*job: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    _work(*job)


def _received(receiver: Connection) -> dict:
    row = {}
    try:
        while receiver.poll(0.01):
            row = receiver.recv()
    except (EOFError, OSError):
        pass
    return row


def failures(row: dict) -> dict[str, str]:
    """Name of each check of a row that failed -> how; LoRA's is there to compare with."""
    checks = row.get("checks", {}).items()
    if refused_by_peft(row):
        return {}
    failed = {name: said.removeprefix("FAIL: ") for name, said in checks if said.startswith("FAIL") and name != "lora"}
    # All other checks attach too.
    return {"attach": failed["attach"]} if "attach" in failed else failed


def refused_by_peft(row: dict) -> bool:
    """Whether PEFT refuses the model, in the same words whatever the method."""
    attach, lora = (row.get("checks", {}).get(name, "") for name in ("attach", "lora"))
    return attach.startswith("FAIL") and attach == lora


def known_of(row: dict) -> Known | None:
    return KNOWN.get(row["class"], KNOWN.get(row["model_type"]))


def state_of(row: dict) -> str:
    """`ok`, `FAIL`, `known` (a failure that `KNOWN` lists), or `base`: the base model is not built or does not run."""
    if failed := failures(row):
        if row["state"] != "runs" and failed.get("attach", "").startswith("ValueError"):
            # Refused, and so does not show what a model that runs would have told.
            return "base"
        known = known_of(row)
        return "known" if known is not None and failed.keys() <= set(known.checks.split()) else "FAIL"
    return "ok" if row.get("state") == "runs" and not refused_by_peft(row) else "base"


def line_of(row: dict) -> str:
    failed = failures(row)
    passed = len(row.get("checks", {})) - len(failed)
    said = "; ".join(f"{name}: {how[:160]}" for name, how in failed.items()) or row.get("notes", {}).get("error", "")
    return (
        f"{state_of(row):5s} {row['kind']:11s} {row['model_type']:28s} {row['class']:48s} {passed:2d} {said}".rstrip()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(MAPPINGS))
    parser.add_argument("--only", default="", help="classes or model types, with commas between them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="a file for all rows, as lines of JSON")
    parser.add_argument("--missing", action="store_true", help="only classes that have no row in that file")
    parser.add_argument("--write", action="store_true", help="write the table of the manual")
    arguments = parser.parse_args()
    jobs, kept = jobs_of(arguments.kinds.split(",")), _kept(arguments.rows)
    if arguments.only:
        chosen = set(arguments.only.split(","))
        jobs = [(*job[:3], True) for job in jobs if {*job[1:3]} & chosen]
    if arguments.missing:
        jobs = [job for job in jobs if job[2] not in kept]
    for number, row in enumerate(sweep(jobs, arguments.jobs), 1):
        kept[row["class"]] = row
        print(f"{number:4d}/{len(jobs)} {line_of(row)}", flush=True)
        if arguments.rows:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
    states = Counter(state_of(kept[name]) for _, _, name, _ in jobs if name in kept)
    print(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    if arguments.write:
        every = {name: state_of(row) for name, row in kept.items()}
        reasons = {name: known_of(kept[name]).reason for name, state in every.items() if state == "known"}
        TABLE.write_text(table(kept.values(), every, reasons), encoding="utf-8")
    return int(states["FAIL"] > 0)


def _kept(file: Path | None) -> dict[str, dict]:
    """Class -> its row in a file of earlier runs."""
    if file is None or not file.exists():
        return {}
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["class"]: row for row in rows}


if __name__ == "__main__":
    sys.exit(main())
