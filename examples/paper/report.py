"""Writes the tables and plots of RESULTS.md from what `grid.py` measured; the text around them stays.

    python examples/paper/report.py
    python examples/paper/report.py --results one.jsonl other.jsonl --document OTHER.md

A file that does not exist is begun. What stands between the two marker lines is replaced.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from grid import quality
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- report.py begins -->", "<!-- report.py ends -->"
METRICS = {"sst2": "accuracy", "rte": "accuracy", "cola": "Matthews correlation", "commonsense": "mean accuracy"}
TITLES = {"sst2": "SST-2", "rte": "RTE", "cola": "CoLA", "commonsense": "Commonsense"}
# Method families in colors that stay apart for color-blind readers.
COLORS = {"LoReFT": "#0072B2", "DiReFT": "#56B4E9", "LoRA": "#D55E00", "DoRA": "#E69F00", "IA3": "#009E73"}
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")

Result = dict[str, Any]


def score(result: Result) -> float:
    return result["scores"]["score" if result["suite"] == "glue" else "average"]


def adapter_parameters(result: Result) -> int:
    """Trainable parameters without a classification head, which all methods train alike."""
    return result["trainable_parameters"] - result["head_parameters"]


def on_processors(result: Result) -> bool:
    return result["machine"].endswith("CPUs")


class Method:
    """All results of one method on one task: a sweep with the first seed, and seeds at the best rate."""

    def __init__(self, results: list[Result]) -> None:
        first = results[0]["seed"]
        self.label = results[0]["label"]
        self.sweep = [result for result in results if result["seed"] == first]
        self.best = max(self.sweep, key=lambda result: 0.0 if result["learning_rate"] is None else quality(result))
        self.rate = self.best["learning_rate"]
        self.seeds = [result for result in results if result["learning_rate"] == self.rate]
        self.scores = [score(result) for result in self.seeds]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or last of those tried, so that a better one may lie beyond."""
        rates = [result["learning_rate"] for result in self.sweep]
        return self.rate is not None and len(rates) > 1 and self.rate in (min(rates), max(rates))

    def row(self) -> str:
        parameters = adapter_parameters(self.best)
        rate = "-" if self.rate is None else f"{self.rate:g}{' *' if self.at_edge else ''}"
        spread = f"{min(self.scores):.1f} to {max(self.scores):.1f}" if len(self.scores) > 1 else "-"
        # A GPU's time is the wall clock's; processors are shared, so there it is that of the process.
        clock = "processor_seconds" if on_processors(self.best) else "seconds"
        seconds = self.best[clock]["train"]
        memory = max(filter(None, self.best["peak_memory_mib"].values()))
        cells = [
            self.label,
            f"{parameters:,}",
            f"{100 * parameters / self.best['base_parameters']:.3f}%",
            rate,
            f"**{mean(self.scores):.1f}**",
            spread,
            str(len(self.scores)),
            "-" if seconds is None else f"{seconds:.0f}",
            f"{memory:,.0f}",
            # Without an adapter the whole model is saved.
            f"{self.best['adapter_bytes'] / 1024:,.0f}" if parameters else "-",
        ]
        return f"| {' | '.join(cells)} |"


COLUMNS = (
    *("method", "trainable", "of the base", "learning rate", "score", "lowest to highest", "seeds"),
    *("train, s", "peak MiB", "file KiB"),
)


def by_task(results: Iterable[Result]) -> dict[str, list[Method]]:
    grouped: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        grouped.setdefault(result["task"], {}).setdefault(result["label"], []).append(result)
    return {task: [Method(found) for found in labels.values()] for task, labels in grouped.items()}


def table(task: str, methods: list[Method]) -> str:
    best = methods[0].best
    flags = " ".join(best["configuration"]["command"]["common"])
    lines = [
        f"### {TITLES[task]}: {METRICS[task]}, {best['model']}",
        "",
        *_header(COLUMNS),
        *(method.row() for method in methods),
        "",
        f"Every run: `{flags}`.",
    ]
    if task == "commonsense":
        lines += ["", *_task_table(methods)]
    return "\n".join(lines)


def _header(columns: Sequence[str]) -> tuple[str, str]:
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def _task_table(methods: list[Method]) -> list[str]:
    """Scores of each task beside what the most frequent answer gets, and the loss on rows that were kept back."""
    tasks = methods[0].best["tasks"]
    rows = {"most frequent answer": [*(f"{task['majority']:.1f}" for task in tasks.values()), "-"]}
    for method in methods:
        scores = (mean(result["tasks"][task]["score"] for result in method.seeds) for task in tasks)
        loss = "-" if method.rate is None else f"{mean(-quality(result) for result in method.seeds):.3f}"
        rows[method.label] = [*(f"{value:.1f}" for value in scores), loss]
    number = next(iter(tasks.values()))["rows"]
    lines = [f"| {label} | {' | '.join(values)} |" for label, values in rows.items()]
    return [*_header((f"{number} rows each", *tasks, "loss")), *lines]


def looks(methods: list[Method]) -> list[tuple[str, str, str]]:
    """Color, line style and marker: the color of its family, the others by its number there."""
    numbers: Counter[str] = Counter()
    chosen = []
    for method in methods:
        color = next((color for name, color in COLORS.items() if method.label.startswith(name)), "#555555")
        number = numbers[color]
        numbers[color] += 1
        chosen.append((color, STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]))
    return chosen


def plot_parameters(tasks: dict[str, list[Method]], file: Path) -> None:
    """Score against trainable parameters on a logarithmic axis; what has none is a dashed line."""
    figure, axes = _axes(len(tasks))
    for axis, (task, methods) in zip(axes, tasks.items(), strict=True):
        for method, (color, _, marker) in zip(methods, looks(methods), strict=True):
            parameters, middle = adapter_parameters(method.best), mean(method.scores)
            if not parameters:
                axis.axhline(middle, color="#999999", linestyle="--", linewidth=1, label=method.label)
                continue
            error = [[middle - min(method.scores)], [max(method.scores) - middle]]
            axis.errorbar(parameters, middle, yerr=error, fmt=marker, color=color, capsize=3, label=method.label)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(low / 2, high * 2)
        axis.set(title=TITLES[task], xlabel="trainable parameters, without the head", ylabel=METRICS[task])
        _finish(axis)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_curves(tasks: dict[str, list[Method]], file: Path) -> None:
    """Training loss of the first seed at the best rate, as a running mean."""
    figure, axes = _axes(len(tasks))
    for axis, (task, methods) in zip(axes, tasks.items(), strict=True):
        for method, (color, style, _) in zip(methods, looks(methods), strict=True):
            entries = [entry for entry in method.best["log"] if "loss" in entry]
            windows = [entries[max(0, number - 4) : number + 1] for number in range(len(entries))]
            losses = [mean(entry["loss"] for entry in window) for window in windows]
            if entries:
                label = f"{method.label}, {method.rate:g}"
                axis.plot([entry["step"] for entry in entries], losses, style, color=color, label=label)
        axis.set(title=TITLES[task], xlabel="step", ylabel="training loss, running mean")
        _finish(axis)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _axes(number: int) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, number, figsize=(4.8 * number, 5.2), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def render(results: list[Result], folder: Path) -> str:
    """The Markdown between the markers; draws the plots beside it."""
    tasks = by_task(results)
    plot_parameters(tasks, folder / "scores.png")
    plot_curves(tasks, folder / "curves.png")
    machines = " and ".join(sorted({result["machine"] for result in results}))
    software = " and ".join(sorted({result["versions"] for result in results}))
    return "\n\n".join(
        [
            f"{len(results)} runs on {machines}; {software}. Seconds are those of training"
            + (", of the processor." if any(map(on_processors, results)) else "."),
            "Trainable parameters are without the classification head, which every method trains. An asterisk marks a "
            "best learning rate at the edge of those tried. Scores are means over seeds at the best rate, which was "
            "picked with the first seed, by rows that do not count for its score. (In GLUE the seed also splits the "
            "validation set, as in the paper's code, so that some of those rows count for the other seeds' scores.)",
            *(table(task, methods) for task, methods in tasks.items()),
            "![Score against trainable parameters](scores.png)",
            "![Learning curves](curves.png)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[Path("outputs", "paper", "results.jsonl")])
    parser.add_argument("--document", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    results = [json.loads(line) for file in options.results for line in file.read_text(encoding="utf-8").splitlines()]
    text = (
        options.document.read_text(encoding="utf-8") if options.document.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    )
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    body = render(results, options.document.resolve().parent)
    options.document.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    print(f"Wrote {options.document}")


if __name__ == "__main__":
    main()
