"""What `grid.py` compares: tasks, methods in the order in which they are run, and learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEEDS = {"cpu": [42, 43, 44], "gpu": [42, 43, 44]}

# About a factor of three apart. A sweep begins with the part between the two marks and goes on beyond, as long as the
# best rate is at an edge of what was tried.
LADDERS = {
    "reft": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1),
    "lora": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "ia3": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "full": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "head": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
STARTS = {
    "reft": (6e-4, 2e-3, 6e-3, 2e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "head": (3e-3, 1e-2, 3e-2, 1e-1),
}


@dataclass(frozen=True)
class Contender:
    """A method with its options, and which rates it is swept over; none for what is not trained.

    Attributes:
        stage: 0 for the comparison itself, 1 for the curve over the rank, 2 for other places to edit or train.
    """

    label: str
    flags: tuple[str, ...]
    rates: str | None
    stage: int


def _reft(rank: int, positions: str, stage: int, layers: tuple[int, ...] = (), method: str = "loreft") -> Contender:
    name = {"loreft": "LoReFT", "nodireft": "DiReFT"}[method]
    flags = ("--method", method, "--rank", str(rank), "--positions", positions)
    if layers:
        flags += ("--layers", *map(str, layers))
    return Contender(f"{name} r={rank} {positions}{', upper half' if layers else ''}", flags, "reft", stage)


def _lora(rank: int, stage: int, method: str = "lora") -> Contender:
    where = {"lora": "q and v", "lora-all": "all linear"}[method]
    return Contender(f"LoRA r={rank}, {where}", ("--method", method, "--rank", str(rank)), "lora", stage)


def _untrained(label: str, rates: str | None) -> Contender:
    return Contender(label, ("--method", "none"), rates, 0)


HEAD, ZERO_SHOT = _untrained("head alone", "head"), _untrained("zero-shot", None)
FULL = Contender("full", ("--method", "full"), "full", 2)
IA3 = Contender("IA3", ("--method", "ia3"), "ia3", 2)
DORA = Contender("DoRA r=8, q and v", ("--method", "dora"), "lora", 2)


def _encoder(upper: tuple[int, ...]) -> tuple[Contender, ...]:
    """The classifier reads the first token."""
    return (
        *(_lora(8, 0), _reft(1, "all", 0), HEAD, _reft(4, "all", 0)),
        *(_lora(1, 1), _reft(2, "all", 1), _reft(8, "all", 1), _reft(1, "all", 1, method="nodireft"), _lora(4, 1)),
        *(_reft(4, "f3+l3", 2), _reft(2, "all", 2, upper), _reft(4, "f1", 2), _reft(4, "all", 2, method="nodireft")),
        *(_lora(1, 2, "lora-all"), _lora(8, 2, "lora-all"), FULL),
    )


def _decoder(upper: tuple[int, ...], baseline: Contender) -> tuple[Contender, ...]:
    """The answer, or the classifier, reads the last token of the prompt."""
    return (
        *(baseline, _lora(8, 0), _reft(1, "all", 0)),
        *(_reft(1, "f3+l3", 1), _reft(4, "all", 1), _lora(1, 1), _reft(2, "all", 1), _reft(8, "all", 1)),
        *(_reft(4, "f3+l3", 2), _lora(4, 2)),
        *(_reft(1, "l1", 2), _reft(2, "all", 2, upper), _reft(1, "all", 2, method="nodireft")),
        *(_lora(1, 2, "lora-all"), _lora(8, 2, "lora-all"), FULL),
    )


def _generation() -> tuple[Contender, ...]:
    """Answers that are generated, with the paper's positions."""
    return (
        *(ZERO_SHOT, _lora(8, 0), _reft(8, "f7+l7", 0), _reft(1, "f7+l7", 1), _reft(8, "f7+l7", 1, method="nodireft")),
        *(_lora(8, 2, "lora-all"), DORA, IA3, FULL),
    )


MINILM_UPPER, SMOLLM2_UPPER = tuple(range(3, 6)), tuple(range(15, 30))


@dataclass(frozen=True)
class Task:
    """A script with what all its runs have in common, and the methods that are compared on it.

    Attributes:
        data: the folder, within that of all data.
        flags: of each size of machine.
        scores_sweep: whether runs that only pick a rate are scored too; if not, the best one is scored afterwards.
    """

    title: str
    metric: str
    script: str
    data: str
    contenders: tuple[Contender, ...]
    flags: dict[str, tuple[str, ...]]
    scores_sweep: bool = True


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


def _glue(title: str, metric: str, task: str, flags: dict[str, str], decoder: bool = False) -> Task:
    common = f"--tasks {task} --preset {'smollm2' if decoder else 'minilm'} "
    contenders = _decoder(SMOLLM2_UPPER, HEAD) if decoder else _encoder(MINILM_UPPER)
    return Task(
        title, metric, "glue", "glue", contenders, {size: _words(common + line) for size, line in flags.items()}
    )


def _likelihood(title: str, questions: str, data: str, flags: dict[str, str]) -> Task:
    common = f"--questions {questions} "
    contenders = _decoder(SMOLLM2_UPPER, ZERO_SHOT)
    return Task(
        *(title, "accuracy", "likelihood", data, contenders),
        {size: _words(common + line) for size, line in flags.items()},
        scores_sweep=False,
    )


TASKS = {
    "sst2": _glue(
        *("SST-2, MiniLM", "accuracy", "sst2"),
        {
            "cpu": "--train_rows 4000 --dev_rows 1000 --num_train_epochs 1",
            "gpu": "--train_rows 16000 --dev_rows 2000 --num_train_epochs 3",
        },
    ),
    "cola": _glue(
        *("CoLA, MiniLM", "Matthews correlation", "cola"),
        {
            "cpu": "--train_rows 4000 --dev_rows 1000 --num_train_epochs 4",
            "gpu": "--train_rows 7500 --dev_rows 1000 --num_train_epochs 10",
        },
    ),
    "rte": _glue(
        *("RTE, MiniLM", "accuracy", "rte"),
        {
            "cpu": "--train_rows 2090 --dev_rows 400 --num_train_epochs 3 --max_length 96",
            "gpu": "--train_rows 2090 --dev_rows 400 --num_train_epochs 10",
        },
    ),
    "prompted-sst2": _likelihood(
        *("SST-2 as prompt and completion, SmolLM2-135M-Instruct", "sst2", "glue"),
        {
            "cpu": "--train_rows 640 --dev_rows 128 --num_train_epochs 1 --max_length 64 --dtype bfloat16",
            "gpu": "--train_rows 16000 --dev_rows 1000 --num_train_epochs 1 --max_length 128",
        },
    ),
    "prompted-rte": _likelihood(
        *("RTE as prompt and completion, SmolLM2-135M-Instruct", "rte", "glue"),
        {
            "cpu": "--train_rows 640 --dev_rows 128 --num_train_epochs 1 --max_length 96 --dtype bfloat16",
            "gpu": "--train_rows 2090 --dev_rows 400 --num_train_epochs 5 --max_length 256",
        },
    ),
    "smollm2-sst2": _glue(
        *("SST-2 as classification, SmolLM2-135M-Instruct", "accuracy", "sst2"),
        {
            "cpu": "--train_rows 640 --dev_rows 128 --num_train_epochs 1 --max_length 64 --dtype bfloat16",
            "gpu": "--train_rows 16000 --dev_rows 1000 --num_train_epochs 1",
        },
        decoder=True,
    ),
    "choices": _likelihood(
        *("Commonsense by log-likelihood, SmolLM2-135M-Instruct", "commonsense", "commonsense"),
        {
            "cpu": "--train_rows 640 --dev_rows 128 --num_train_epochs 1 --max_length 96 --dtype bfloat16 "
            "--tasks ARC-Easy openbookqa piqa --eval_rows 200",
            "gpu": "--train_rows 2800 --dev_rows 200 --num_train_epochs 3 --max_length 256",
        },
    ),
    "commonsense": Task(
        *("Commonsense as the paper's answers, SmolLM2-135M-Instruct", "mean accuracy", "commonsense", "commonsense"),
        _generation(),
        {
            "cpu": _words(
                "--train_rows 240 --dev_rows 40 --num_train_epochs 1 --max_length 128 "
                "--tasks boolq piqa ARC-Easy openbookqa --eval_rows 25 --logging_steps 2"
            ),
            "gpu": _words("--train_rows 2800 --dev_rows 200 --eval_rows 200 --num_train_epochs 3"),
        },
    ),
}


def studies(tasks: list[str], methods: list[str] | None) -> Iterator[tuple[str, Contender]]:
    """Tasks with their contenders, the telling ones of all tasks first; of methods those with one of these words."""
    for stage in range(3):
        for task in tasks:
            for contender in TASKS[task].contenders:
                asked = methods is None or any(word.lower() in contender.label.lower() for word in methods)
                if contender.stage == stage and asked:
                    yield task, contender
