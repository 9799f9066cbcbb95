"""A run of a suite whose answers are generated: training through TRL's SFTTrainer, then greedy answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import (
    SAMPLES,
    PaperArguments,
    Run,
    draw,
    find_file,
    is_folder,
    load_tokenizer,
    load_trained,
    measured,
    parse,
    read_rows,
)
from suites import Arithmetic, Commonsense, Instruct, Row, generate, majority

# isort: split
from choices import CommonsenseChoices, LabelWords
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

Suite = type[Commonsense] | type[Arithmetic] | type[Instruct] | LabelWords | CommonsenseChoices


@dataclass
class GenerationArguments(PaperArguments):
    """The run's options, and those of generation."""

    dev_rows: int = field(
        default=0,
        metadata={"help": "Keep so many training rows back, and measure the loss on them as training goes on."},
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer, in tokens."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "instruct.py only: a file to answer, rows with `instruction` (JSON or JSON lines)."},
    )


class GenerationRun:
    """A suite, its options, and the run's folder."""

    arguments_type = GenerationArguments

    def __init__(
        self, suite: Suite, argv: Sequence[str] | None, defaults: dict[str, Any], quick: dict[str, Any]
    ) -> None:
        quick = {"data": str(SAMPLES / suite.name)} | quick
        self.suite = suite
        self.arguments, self.training, recipe = parse(argv, self.arguments_type, SFTConfig, suite.name, defaults, quick)
        self.tasks = self.arguments.tasks or list(suite.tasks)
        if unknown := set(self.tasks) - set(suite.tasks):
            raise SystemExit(f"--tasks {' '.join(sorted(unknown))}: {suite.name} has {', '.join(suite.tasks)}.")
        self.options = dict(recipe.generation)
        if self.arguments.max_new_tokens is not None:
            self.options.pop("max_length", None)
            self.options["max_new_tokens"] = self.arguments.max_new_tokens
        if self.arguments.dev_rows and self.training.eval_strategy == "no":
            self.training.eval_strategy = IntervalStrategy.EPOCH
        self.run = Run(suite.name, Path(self.training.output_dir), self.arguments, self.training, "CAUSAL_LM")
        self.tokenizer = load_tokenizer(self.arguments.model)

    def model(self) -> PreTrainedModel:
        """The model to evaluate: trained now or before, or the base model."""
        set_seed(self.training.seed)
        if self.arguments.method == "none" and self.arguments.adapter is None:
            return self.load(self.arguments.model).requires_grad_(False)
        if not self.run.trains:
            return load_trained(self.load, self.run).to(self.training.device)
        trainer = self.trainer()
        self.run.train(trainer)
        return trainer.model

    def load(self, name: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=self.arguments.dtype)
        return model.to(self.training.device)

    def trainer(self) -> SFTTrainer:
        rows, dev = self.split()
        print(f"Training on {len(rows):,} rows, {len(dev)} kept back")
        return SFTTrainer(
            model=self.load(self.arguments.model),
            args=self.training,
            processing_class=self.tokenizer,
            train_dataset=self.pairs(rows),
            eval_dataset=self.pairs(dev) if dev else None,
            peft_config=self.run.adapter,
        )

    def split(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on, and the held-out ones."""
        rows = self.without_hopeless(self.train_rows())
        end = len(rows) - self.arguments.dev_rows
        if end < 1:
            raise SystemExit(f"--dev_rows {self.arguments.dev_rows} leaves none of {len(rows)} rows to train on.")
        return rows[:end], rows[end:]

    def pairs(self, rows: list[Row]) -> Dataset:
        """Rows in TRL's format; TRL ends completions with the end-of-sequence token."""
        return Dataset.from_list(
            [{"prompt": self.suite.prompt(row), "completion": self.suite.completion(row)} for row in rows]
        )

    def train_rows(self) -> list[Row]:
        """Drawn rows of the suite's training data."""
        data, names = self.arguments.data, self.suite.train_files
        if is_folder(data):
            file = find_file(Path(data).expanduser(), names)
            if file is None:
                raise SystemExit(f"No training data in {data}: there is no {' and no '.join(names)}.")
            rows = read_rows(file)
        else:
            rows = load_dataset(data, split="train").to_list()
        number = self.arguments.train_rows
        return draw(rows, None if number is None else number + self.arguments.dev_rows)

    def without_hopeless(self, rows: list[Row]) -> list[Row]:
        """Without those whose prompt alone fills the sequence, so that nothing of the answer is left to learn."""
        prompts = self.tokenizer([self.suite.prompt(row) for row in rows])["input_ids"]
        kept = [row for row, ids in zip(rows, prompts, strict=True) if len(ids) < self.training.max_length]
        if len(kept) < len(rows):
            print(f"Left out {len(rows) - len(kept)} rows with prompts of {self.training.max_length} tokens and more")
        return kept

    def test_rows(self, task: str) -> tuple[list[Row], str] | None:
        """Drawn rows of a task's test data, and their source; None if there are none."""
        data = self.arguments.data
        if is_folder(data):
            # A checkout of LLM-Adapters has dataset/<task>/test.json.
            names = (f"{task}.test.jsonl.gz", f"{task}.heldout.jsonl.gz", f"dataset/{task}/test.json")
            file = find_file(Path(data).expanduser(), names)
            return None if file is None else (draw(read_rows(file), self.arguments.eval_rows), file.name)
        rows = load_dataset(data, split="test").filter(lambda row: row["task"] == task).to_list()
        return (draw(rows, self.arguments.eval_rows), f"{data}, test") if rows else None

    def tests(self) -> dict[str, tuple[list[Row], str]]:
        """The test rows of all tasks, and their sources."""
        tests = {task: found for task in self.tasks if (found := self.test_rows(task)) is not None}
        if missing := [task for task in self.tasks if task not in tests]:
            message = f"There are no test data of {', '.join(missing)} in {self.arguments.data}"
            if self.arguments.tasks or not tests:
                raise SystemExit(f"{message}.")
            print(f"{message}: left out")
        return tests

    def answers(self, model: PreTrainedModel, task: str, rows: list[Row]) -> list[str]:
        """Prompts with the generated texts; kept in `generations/`, so that an interrupted evaluation resumes."""
        prompts = [self.suite.prompt(row) for row in rows]
        file = self.run.folder / "generations" / f"{task}.jsonl"
        head = {
            **{name: getattr(self.arguments, name) for name in ("model", "dtype", "method", "adapter")},
            "options": self.options,
            "max_prompt": self.training.max_length,
            "saved": self.run.saved_at,
        }
        done = _read_generations(file, head, prompts)
        left = [number for number in range(len(rows)) if number not in done]
        with file.open("a", encoding="utf-8") as stream:
            for number, text in generate(
                model,
                self.tokenizer,
                [prompts[number] for number in left],
                self.training.per_device_eval_batch_size,
                self.training.max_length,
                task,
                **self.options,
            ):
                done[left[number]] = text
                line = {"number": left[number], "prompt": prompts[left[number]], "text": text}
                stream.write(_json_line(line))
                stream.flush()
        return [done[number] for number in range(len(rows))]


def _read_generations(file: Path, head: dict[str, Any], prompts: list[str]) -> dict[int, str]:
    """The results of an earlier evaluation with the same settings; starts the file anew if the settings differ."""
    done = {}
    if file.exists():
        # Not splitlines, which splits at more characters than JSON's line breaks. An incomplete line of an interrupted
        # run has no line break.
        first, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] or [None]
        asked = dict(enumerate(prompts))
        if first == head and all(asked.get(line["number"]) == line["prompt"] for line in lines):
            done = {line["number"]: line for line in lines}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(_json_line(line) for line in (head, *done.values())), encoding="utf-8")
    return {number: line["text"] for number, line in done.items()}


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def scored_run(suite: type[Commonsense] | type[Arithmetic], argv: Sequence[str] | None, quick: dict[str, Any]) -> dict:
    """Train, answer every task of a suite, and write the percentages of right answers beside the majority's."""
    this = GenerationRun(suite, argv, {}, quick)
    tests = this.tests()  # before training, which is long
    model = this.model()
    tasks: dict[str, dict[str, Any]] = {}
    with measured() as cost:
        for task, (rows, source) in tests.items():
            texts = this.answers(model, task, rows)
            answers = [suite.extract(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
            right = [suite.correct(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
            tasks[task] = {
                "score": 100 * sum(right) / len(right),
                "majority": majority([row["answer"] for row in rows]),
                "rows": len(rows),
                "unanswered": answers.count(""),
                "source": source,
            }
            print("{:<16}{score:6.1f}   (majority {majority:.1f}, {rows} rows, {source})".format(task, **tasks[task]))
    average = sum(scores["score"] for scores in tasks.values()) / len(tasks)
    print(f"{'average':<16}{average:6.1f}   over {len(tasks)} tasks")
    return this.run.write(model, {"scores": {"average": average}, "tasks": tasks}, cost)
