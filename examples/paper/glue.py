"""GLUE: eight tasks through sequence classification (the paper's table 4).

    python examples/paper/glue.py --quick                                         # the bundled model and data, offline
    python examples/paper/glue.py --data FOLDER --method lora --tasks rte cola    # the bundled model
    python examples/paper/glue.py --preset roberta-base                           # the paper's recipe, data of the hub

FOLDER holds `<task>.train.jsonl.gz` and `<task>.validation.jsonl.gz`. As in the paper, one part of the validation set
picks the best epoch and the rest gives the score; with `--dev_rows`, training rows that are kept back pick it and the
whole validation set gives the score. `--method none` trains the head alone. All flags, those of
Transformers' TrainingArguments among them: --help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runs import (
    SAMPLES,
    PaperArguments,
    Run,
    draw,
    first_look,
    is_folder,
    load_tokenizer,
    load_trained,
    measured,
    parse,
    read_rows,
    write_json,
)
from suites import GLUE_TASKS, METRICS, Row, metrics_with_error, validation_halves

# isort: split
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

DEFAULTS = {
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "label_names": ["labels"],
}
QUICK = {"data": str(SAMPLES / "glue"), "num_train_epochs": 2.0, "per_device_train_batch_size": 8, "logging_steps": 5}


@dataclass
class GlueArguments(PaperArguments):
    """The run's options, and those of classification. Its data are on the hub."""

    data: str = field(
        default="nyu-mll/glue", metadata={"help": "Folder of the data, or the name of a data set on the hub."}
    )
    max_length: int = field(default=256, metadata={"help": "Longest sequence, in tokens."})
    dev_rows: int = field(
        default=0,
        metadata={"help": "So many training rows pick the best epoch, and all validation rows give the score."},
    )


def load_split(data: str, task: str, split: str) -> list[Row]:
    """All labeled rows of a task's training or validation split."""
    if is_folder(data):
        return read_rows(Path(data).expanduser() / f"{task}.{split}.jsonl.gz")
    return load_dataset(data, task, split=GLUE_TASKS[task].validation if split == "validation" else split).to_list()


def has_files(data: str, task: str, splits: Sequence[str]) -> bool:
    return all(Path(data).expanduser().joinpath(f"{task}.{split}.jsonl.gz").exists() for split in splits)


def prepare(rows: list[Row], task: str, tokenize: Callable, longest_first: bool = False) -> Dataset:
    """Tokenized sentences or pairs with their labels."""
    texts = [[row[column] for row in rows] for column in GLUE_TASKS[task].columns]
    kind = float if GLUE_TASKS[task].num_labels == 1 else int
    tokens = tokenize(*texts)
    order = range(len(rows))
    if longest_first:  # less padding
        order = sorted(order, key=lambda number: -len(tokens["input_ids"][number]))
    columns = {**tokens, "labels": [kind(row["label"]) for row in rows]}
    return Dataset.from_dict({name: [column[number] for number in order] for name, column in columns.items()})


def split_rows(arguments: GlueArguments, task: str, seed: int, trains: bool) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows to train on, those that pick the epoch, and those that give the score."""
    validation, dev = load_split(arguments.data, task, "validation"), arguments.dev_rows
    train = load_split(arguments.data, task, "train") if trains or dev else []
    train = draw(train, None if arguments.train_rows is None else arguments.train_rows + dev)
    if not dev:
        parts = [[validation[number] for number in part] for part in validation_halves(len(validation), seed)]
    elif dev >= len(train):
        raise SystemExit(f"--dev_rows {dev} leaves none of {len(train)} rows to train on.")
    else:
        train, parts = train[:-dev], [train[-dev:], validation]
    picking, scoring = (draw(part, arguments.eval_rows) for part in parts)
    return train if trains else [], picking, scoring


def run_task(argv: Sequence[str] | None, task: str) -> dict[str, Any]:
    """Train one task, keep the best epoch on the rows that pick it, and score on the others."""
    arguments, training = parse(argv, GlueArguments, TrainingArguments, "glue", DEFAULTS, QUICK, task)[:2]
    training.output_dir = str(Path(training.output_dir, task))
    run = Run("glue", Path(training.output_dir), arguments, training, "SEQ_CLS")
    tokenizer = load_tokenizer(arguments.model)
    tokenize = partial(tokenizer, truncation=True, max_length=arguments.max_length)

    train, *parts = split_rows(arguments, task, training.seed, run.trains)
    parts = [prepare(rows, task, tokenize, longest_first=True) for rows in parts]
    print(f"{task}: {len(train):,} rows to train on, {len(parts[0]):,} that pick the epoch, {len(parts[1]):,} to score")

    set_seed(training.seed)
    trainer = Trainer(
        model=load_model(run, GLUE_TASKS[task].num_labels, tokenizer.pad_token_id),
        args=training,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=prepare(train, task, tokenize) if train else None,
        eval_dataset=parts[0],
        compute_metrics=lambda prediction: metrics_with_error(task, prediction.predictions, prediction.label_ids),
    )
    if run.trains:
        run.train(trainer)
    with measured() as cost:
        picked, scored = (metrics_of(trainer.evaluate(part)) for part in parts)
    print(f"{task}: {scored['score']:.1f}")
    results = {"scores": scored, "picking_scores": picked, "rows": {"picking": len(parts[0]), "scoring": len(parts[1])}}
    return run.write(trainer.model, results, cost)


def metrics_of(evaluation: dict[str, float]) -> dict[str, float]:
    """Without the entries that the trainer adds about itself."""
    names = {"score", "standard_error", *METRICS}
    evaluation = {name.removeprefix("eval_"): value for name, value in evaluation.items()}
    return {name: value for name, value in evaluation.items() if name in names}


def load_model(run: Run, num_labels: int, pad_token_id: int) -> PreTrainedModel | PeftModel:
    """The model to train, or the trained one."""

    def load(name: str) -> PreTrainedModel:
        dtype = run.arguments.dtype
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels, dtype=dtype)
        if model.config.pad_token_id is None:  # a decoder finds a row's last token with it
            model.config.pad_token_id = pad_token_id
        return model

    if not run.trains:
        return load_trained(load, run)
    model = load(run.arguments.model)
    if run.arguments.method == "none":
        model.base_model.requires_grad_(False)
    return model if run.adapter is None else get_peft_model(model, run.adapter)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    asked = first_look(argv, GlueArguments)
    if unknown := set(asked.tasks or []) - set(GLUE_TASKS):
        raise SystemExit(f"--tasks {' '.join(sorted(unknown))}: GLUE has {', '.join(GLUE_TASKS)}.")
    data = QUICK["data"] if asked.quick and asked.data == GlueArguments.data else asked.data
    splits = ("validation",) if asked.eval_only else ("train", "validation")
    there = [task for task in GLUE_TASKS if not is_folder(data) or has_files(data, task, splits)]
    tasks = asked.tasks or there
    missing = set(tasks) - set(there)
    if missing or not tasks:
        names = ", ".join(sorted(missing)) or "any task"
        raise SystemExit(f"There are no {' and '.join(splits)} data of {names} in {data}.")
    runs = {task: run_task(argv, task) for task in tasks}
    average = sum(run["scores"]["score"] for run in runs.values()) / len(runs)
    print(f"{'average':<16}{average:6.1f}   over {len(runs)} tasks")
    results = {"suite": "glue", "scores": {"average": average}, "tasks": runs}
    first = next(iter(runs.values()))
    write_json(Path(first["configuration"]["training_arguments"]["output_dir"]).parent / "results.json", results)
    return results


if __name__ == "__main__":
    main()
