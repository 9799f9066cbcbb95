"""Which versions the tests passed with, for the README.

`bash tests/run.sh all --record` writes what ran to `versions.json` and into the README's table, which
`python tests/versions.py` makes anew.
"""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("versions.json")
README = Path(__file__).parent.parent / "README.md"
SETS = ("newest", "pinned", "oldest")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
BEGIN, END = "<!-- written by tests/versions.py -->\n", "<!-- end -->\n"


def recorded() -> dict[str, dict]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def record(versions: str, passed: int, skipped: int) -> None:
    """Write to `FILE` and into the README that the whole suite passed just now, with the set `versions`."""
    run = {
        "day": date.today().isoformat(),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": processor(),
        "passed": passed,
        "skipped": skipped,
    }
    FILE.write_text(json.dumps(recorded() | {versions: run}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_table()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def table(runs: dict[str, dict]) -> str:
    """The recorded runs as a table in Markdown."""
    rows = [["versions", *PACKAGES, "Python", "passed", "skipped", "processor", "day"], ["---"] * (len(PACKAGES) + 6)]
    for name in SETS:
        if name in runs:
            run = runs[name]
            numbers = [run["packages"][package] for package in PACKAGES]
            counts = [str(run["passed"]), str(run["skipped"])]
            rows.append([name, *numbers, run["python"], *counts, run["processor"], run["day"]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(text: str) -> str:
    """The README's `text` with the table of what is recorded now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(recorded()) + END + after


def write_table() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_table()
