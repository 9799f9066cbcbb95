"""Prompt and completion through TRL, scored by the log-likelihood of the possible answers: for small models.

    python examples/paper/likelihood.py --quick                                            # SST-2, offline
    python examples/paper/likelihood.py --data FOLDER/glue --questions rte --method lora
    python examples/paper/likelihood.py --data FOLDER/commonsense --questions commonsense --tasks ARC-Easy piqa

Not a suite of the paper. A small language model seldom answers in a format that it was asked for, and knows more than
it says: the answer that it finds likeliest counts, as in lm-evaluation-harness. `choices.py` has prompts and answers.
Rows that are kept back (--dev_rows) measure the loss; all validation or test rows give the score, unless --eval_rows
asks for fewer (0: none). All flags, those of TRL's SFTConfig among them: --help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from answering import GenerationArguments, GenerationRun
from runs import SAMPLES, draw, find_file, first_look, measured, read_rows

# isort: split
from choices import QUESTIONS, accuracy, log_likelihoods
from peft import PeftModel
from suites import Row, majority
from transformers import PreTrainedModel

QUICK = {"num_train_epochs": 1.0, "train_rows": 64, "eval_rows": 16, "logging_steps": 1, "max_length": 96}


@dataclass
class LikelihoodArguments(GenerationArguments):
    """The run's options, and the questions."""

    questions: str = field(default="sst2", metadata={"help": "What is asked.", "choices": list(QUESTIONS)})


class LikelihoodRun(GenerationRun):
    """A run that scores given answers and generates none."""

    arguments_type = LikelihoodArguments

    def test_rows(self, task: str) -> tuple[list[Row], str] | None:
        folder, names = Path(self.arguments.data).expanduser(), self.suite.test_files(task)
        file = find_file(folder, names)
        return None if file is None else (draw(read_rows(file), self.arguments.eval_rows), file.name)

    def scores(self, model: PreTrainedModel | PeftModel, task: str, rows: list[Row]) -> dict[str, Any]:
        """Right answers of a task, and what the most frequent answer would get."""
        choices, gold = [self.suite.choices(row) for row in rows], [self.suite.gold(row) for row in rows]
        found = log_likelihoods(
            *(model, self.tokenizer, [self.suite.prompt(row) for row in rows], choices),
            *(self.training.per_device_eval_batch_size, task),
        )
        return accuracy(found, gold, choices) | {
            "majority": majority([str(answer) for answer in gold]),
            "rows": len(rows),
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    suite = QUESTIONS[first_look(argv, LikelihoodArguments).questions]
    this = LikelihoodRun(suite, argv, {}, {"data": str(SAMPLES / suite.samples)} | QUICK)
    tests = this.tests()
    model = this.model()
    tasks = {}
    with measured() as cost:
        for task, (rows, source) in tests.items():
            if not rows:  # --eval_rows 0
                continue
            tasks[task] = this.scores(model, task, rows) | {"source": source}
            line = "{:<16}{score:6.1f}   by length {score_normalized:.1f}   (majority {majority:.1f}, {rows} rows)"
            print(line.format(task, **tasks[task]))
    return this.run.write(model, {"scores": average(list(tasks.values())), "tasks": tasks}, cost)


def average(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Means over tasks, with the standard error of the first."""
    if not tasks:
        return {}
    return {
        "score": sum(found["score"] for found in tasks) / len(tasks),
        "standard_error": sum(found["standard_error"] ** 2 for found in tasks) ** 0.5 / len(tasks),
        "score_normalized": sum(found["score_normalized"] for found in tasks) / len(tasks),
    }


if __name__ == "__main__":
    main()
