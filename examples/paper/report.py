"""Writes the tables and plots of RESULTS.md from what `grid.py` measured; the text around them stays.

    python examples/paper/report.py
    python examples/paper/report.py --results one.jsonl other.jsonl --document OTHER.md

A file that does not exist is begun. What stands between the two marker lines is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from plan import SEEDS, STARTS, TASKS

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- report.py begins -->", "<!-- report.py ends -->"
REFERENCE = "LoRA r=8, q and v"
# Families of methods in colors that stay apart for color-blind readers.
COLORS = {"LoReFT": "#0072B2", "DiReFT": "#56B4E9", "LoRA": "#D55E00", "DoRA": "#E69F00", "IA3": "#009E73"}
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v")

Result = dict[str, Any]


def score(result: Result) -> float:
    return result["scores"]["score" if "score" in result["scores"] else "average"]


def adapter_parameters(result: Result) -> int:
    """Trainable parameters without a classification head, which all methods train alike."""
    return result["trainable_parameters"] - result["head_parameters"]


def on_processors(result: Result) -> bool:
    return result["machine"].endswith("CPUs")


class Method:
    """All results of one method on one task: a sweep with the first seed, and seeds at the best rate."""

    def __init__(self, results: list[Result]) -> None:
        first = min(result["seed"] for result in results)
        self.label = results[0]["label"]
        # Of two results of a run the later one is scored.
        swept = {result["learning_rate"]: result for result in results if result["seed"] == first}
        self.sweep = sorted(swept.values(), key=lambda result: result["learning_rate"] or 0)
        self.best = max(self.sweep, key=lambda result: result["quality"] or 0.0)
        self.rate = self.best["learning_rate"]
        others = [result for result in results if result["seed"] != first and result["learning_rate"] == self.rate]
        self.seeds = [result for result in (self.best, *others) if result["scores"]]
        self.scores = [score(result) for result in self.seeds]
        self.parameters = adapter_parameters(self.best)

    @property
    def score(self) -> float:
        return mean(self.scores)

    @property
    def family(self) -> str:
        """The method and where it is applied, without the rank."""
        return re.sub(r" r=\d+,?", "", self.label)

    @property
    def error(self) -> float | None:
        """Standard error of the mean score: of the test rows, which all seeds share, and of the seeds."""
        if "standard_error" not in self.best["scores"]:
            return None
        rows = mean(result["scores"]["standard_error"] for result in self.seeds)
        seeds = stdev(self.scores) / len(self.scores) ** 0.5 if len(self.scores) > 1 else 0.0
        return (rows**2 + seeds**2) ** 0.5

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or last of those tried, so that a better one may lie beyond."""
        return self.rate is not None and self.rate in (self.sweep[0]["learning_rate"], self.sweep[-1]["learning_rate"])

    @property
    def complete(self) -> bool:
        """Whether all rates and seeds that the plan asks for have been run."""
        rates = min(map(len, STARTS.values()))
        seeds = min(map(len, SEEDS.values()))
        return self.rate is None or (len(self.sweep) >= rates and len(self.seeds) >= seeds and not self.at_edge)

    def with_error(self) -> str:
        return f"{self.score:.1f}" if self.error is None else f"{self.score:.1f} ± {self.error:.1f}"

    def row(self) -> str:
        rate = "-" if self.rate is None else f"{self.rate:g}{' *' if self.at_edge else ''}"
        # A GPU's time is the wall clock's; processors are shared, so there it is that of the process.
        clock = "processor_seconds" if on_processors(self.best) else "seconds"
        seconds = self.best[clock]["train"]
        memory = max(filter(None, self.best["peak_memory_mib"].values()))
        cells = [
            f"{self.label}{'' if self.complete else ' †'}",
            f"{self.parameters:,}",
            f"{100 * self.parameters / self.best['base_parameters']:.3f}%",
            rate,
            f"**{self.with_error()}**",
            f"{min(self.scores):.1f} to {max(self.scores):.1f}" if len(self.scores) > 1 else "-",
            str(len(self.scores)),
            "-" if seconds is None else f"{seconds:.0f}",
            f"{memory:,.0f}",
        ]
        return f"| {' | '.join(cells)} |"


COLUMNS = (
    *("method", "trainable", "of the base", "learning rate", "score", "lowest to highest", "seeds"),
    *("train, s", "peak MiB"),
)


def by_task(results: Iterable[Result]) -> dict[str, list[Method]]:
    """The tasks in the plan's order, by their size the methods of each whose best rate was scored."""
    grouped: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        grouped.setdefault(result["task"], {}).setdefault(result["label"], []).append(result)
    methods = {task: list(map(Method, grouped[task].values())) for task in TASKS if task in grouped}
    return {
        task: sorted(
            (method for method in found if method.scores), key=lambda method: (method.parameters, method.label)
        )
        for task, found in methods.items()
        if any(method.scores for method in found)
    }


def table(task: str, methods: list[Method]) -> str:
    size = methods[0].best["name"].partition("/")[0]
    plan = TASKS[task]
    lines = [
        f"### {plan.title}",
        "",
        *_header(COLUMNS),
        *(method.row() for method in methods),
        "",
        f"Score: {plan.metric}. Every run: `{plan.script}.py {' '.join(plan.flags[size])}`.",
        "",
        *_rates(methods),
    ]
    if "tasks" in methods[0].best:
        lines += ["", *_task_table(methods)]
    return "\n".join(lines).rstrip()


def _header(columns: Sequence[str]) -> tuple[str, str]:
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def _rates(methods: list[Method]) -> list[str]:
    """What picked the rate, with the first seed: scores of rows that were kept back, or their loss."""
    swept = [method for method in methods if method.rate is not None]
    rates = sorted({result["learning_rate"] for method in swept for result in method.sweep})
    if not rates:
        return []
    by_loss = "picking_scores" not in swept[0].best
    lines = []
    for method in swept:
        found = {
            result["learning_rate"]: f"{-result['quality']:.3f}" if by_loss else f"{result['quality']:.1f}"
            for result in method.sweep
        }
        found[method.rate] = f"**{found[method.rate]}**"
        lines.append(f"| {method.label} | {' | '.join(found.get(rate, '') for rate in rates)} |")
    what = f"{'loss' if by_loss else 'score'} of rows kept back, by rate"
    return [*_header((what, *(f"{rate:g}" for rate in rates))), *lines]


def _task_table(methods: list[Method]) -> list[str]:
    """Scores of each task beside what the most frequent answer gets."""
    tasks = methods[0].best["tasks"]
    kinds = {"score": ""} | ({"score_normalized": ", by length"} if "score_normalized" in _first(tasks) else {})
    if len(tasks) == 1:
        return []
    rows = {"most frequent answer": [f"{task['majority']:.1f}" for task in tasks.values()]}
    for method in methods:
        for kind, said in kinds.items():
            scores = (mean(result["tasks"][task][kind] for result in method.seeds) for task in tasks)
            rows[f"{method.label}{said}"] = [f"{value:.1f}" for value in scores]
    lines = [f"| {label} | {' | '.join(values)} |" for label, values in rows.items()]
    return [*_header((f"{_first(tasks)['rows']} rows each", *tasks)), *lines]


def _first(tasks: dict[str, Any]) -> Any:
    return next(iter(tasks.values()))


def small_beside_lora(tasks: dict[str, list[Method]]) -> list[str]:
    """LoReFT with at most a tenth of the parameters of LoRA r=8, beside it: what was best by rows that do not score."""
    lines = []
    for task, methods in tasks.items():
        lora = next((method for method in methods if method.label == REFERENCE), None)
        if lora is None:
            continue
        small = [
            method
            for method in methods
            if method.label.startswith("LoReFT") and 10 * method.parameters <= lora.parameters
        ]
        if not small:
            continue
        best = max(small, key=lambda method: method.best["quality"])
        baseline = next((method for method in methods if not method.parameters), None)
        within = best.error is not None and best.score >= lora.score - (lora.error or 0.0)
        marks = ["" if method is None or method.complete else " †" for method in (best, lora, baseline)]
        cells = [
            TASKS[task].title,
            f"{best.label}{marks[0]}",
            f"{best.parameters:,}, 1/{lora.parameters / best.parameters:.0f}",
            best.with_error(),
            f"{lora.with_error()}{marks[1]}",
            "-" if baseline is None else f"{baseline.score:.1f}{marks[2]}",
            "yes" if within else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    columns = ("task", "LoReFT", "trainable, of LoRA's", "score", REFERENCE, "baseline", "within a standard error")
    return [*_header(columns), *lines] if lines else []


def looks(methods: list[Method]) -> dict[str, tuple[str, str, str]]:
    """Color, line style and marker of each family: the color of its method, the others by its number there."""
    found: dict[str, tuple[str, str, str]] = {}
    for family in dict.fromkeys(method.family for method in methods):
        color = next((color for name, color in COLORS.items() if family.startswith(name)), "#555555")
        number = sum(other == color for other, _, _ in found.values())
        found[family] = color, STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
    return found


def draw_scores(axis: Axes, task: str, methods: list[Method]) -> None:
    """Score against trainable parameters, a line for each family; hollow is what is not complete."""
    for family, (color, style, marker) in looks(methods).items():
        members = [method for method in methods if method.family == family]
        if not members[0].parameters:
            axis.axhline(members[0].score, color="#999999", linestyle="--", linewidth=1, label=family)
            continue
        for complete in (True, False):
            chosen = [method for method in members if method.complete == complete]
            if not chosen:
                continue
            points = [[getattr(method, name) for method in chosen] for name in ("parameters", "score")]
            axis.errorbar(
                *points,
                yerr=[method.error or 0.0 for method in chosen],
                color=color,
                marker=marker,
                capsize=3,
                linestyle=style if complete else "none",
                markerfacecolor=color if complete else "white",
                label=family if complete or len(chosen) == len(members) else None,
            )
    reference = next((method for method in methods if method.label == REFERENCE), None)
    if reference is not None and reference.error is not None:
        low, high = reference.score - reference.error, reference.score + reference.error
        axis.axhspan(low, high, color=COLORS["LoRA"], alpha=0.1, linewidth=0)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.5, high * 1.5)
    axis.set(xlabel="trainable parameters, without the head", ylabel=TASKS[task].metric)


def draw_curves(axis: Axes, task: str, methods: list[Method]) -> None:
    """Training loss of the first seed at the best rate, as a running mean."""
    chosen = looks(methods)
    for method in methods:
        color, style, _ = chosen[method.family]
        rank = re.search(r"r=(\d+)", method.label)
        width = 1.0 if rank is None else 0.6 + 0.3 * int(rank.group(1)).bit_length()
        steps = [step for step, _ in method.best["losses"]]
        windows = [method.best["losses"][max(0, number - 3) : number + 1] for number in range(len(steps))]
        losses = [mean(loss for _, loss in window) for window in windows]
        if steps:
            axis.plot(steps, losses, style, color=color, linewidth=width, label=f"{method.label}, {method.rate:g}")
    axis.set(xlabel="step", ylabel="training loss, running mean")


def plot(tasks: dict[str, list[Method]], file: Path, draw: Callable[[Axes, str, list[Method]], None]) -> None:
    """A picture with one panel for each task with a trained method, at most three in a row."""
    tasks = {task: methods for task, methods in tasks.items() if any(method.parameters for method in methods)}
    columns = max(1, min(3, len(tasks)))
    rows = max(1, -(-len(tasks) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 5.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, (task, methods) in zip(axes.flat, tasks.items(), strict=False):
        draw(axis, task, methods)
        axis.set_title(TASKS[task].title.replace(", ", ",\n", 1), fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(file, dpi=100)
    plt.close(figure)


EXPLANATION = (
    "Trainable parameters are without the classification head, which every method trains. Scores are means over seeds "
    "at the best rate, which was picked with the first seed by training rows that were kept back. ± is the standard "
    "error of that mean: of the rows that give the score, which all methods and seeds share, and of the seeds. † marks "
    "what is not complete: fewer than four rates or three seeds, or a best rate at the edge of those tried, which * "
    "marks. In the plot that is hollow, and the band is LoRA r=8, q and v, with its standard error."
)


def render(results: list[Result], folder: Path) -> str:
    """The Markdown between the markers; draws the plots beside it."""
    tasks = by_task(results)
    plot(tasks, folder / "scores.png", draw_scores)
    plot(tasks, folder / "curves.png", draw_curves)
    machines = " and ".join(sorted({result["machine"] for result in results}))
    software = " and ".join(sorted({result["versions"] for result in results}))
    return "\n\n".join(
        [
            "![Score against trainable parameters](scores.png)",
            "## A tenth of LoRA's parameters",
            "\n".join(small_beside_lora(tasks)),
            "## All methods",
            f"{len(results)} runs on {machines}; {software}. Seconds are those of training"
            + (", of the processor." if any(map(on_processors, results)) else "."),
            EXPLANATION,
            *(table(task, methods) for task, methods in tasks.items()),
            "![Learning curves](curves.png)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[HERE / "results.jsonl"])
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
