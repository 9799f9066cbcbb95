"""The paper's suites: prompts, answer extraction, metrics and greedy generation, as in its evaluation.

| suite | prompt | answer |
|---|---|---|
| commonsense | instruction, line break | what follows "the correct answer is " |
| arithmetic | Alpaca's header | the last number, or the first letter A to E where the gold answer is a letter |
| instruct | Alpaca's header, with or without an input | the whole text |
| GLUE | one sentence or two | a class, or a number for STS-B |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]

COMMONSENSE_TASKS = (
    *("boolq", "piqa", "social_i_qa", "hellaswag"),
    *("winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"),
)
ARITHMETIC_TASKS = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps")

COMMONSENSE_MARK = "the correct answer is "
RESPONSE_MARK = "### Response:"
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def after(text: str, mark: str) -> str:
    """What follows the first `mark`, or nothing."""
    return text.partition(mark)[2].strip()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Commonsense:
    """Eight multiple-choice tasks that are answered in words."""

    name = "commonsense"
    tasks: tuple[str, ...] = COMMONSENSE_TASKS
    train_files = ("train.jsonl.gz", "ft-training_set/commonsense_170k.json")

    @staticmethod
    def prompt(row: Row) -> str:
        return f"{row['instruction']}\n"

    @staticmethod
    def completion(row: Row) -> str:
        return f"{COMMONSENSE_MARK}{row['answer']}"

    @staticmethod
    def extract(text: str, gold: str) -> str:
        """The answer in the prompt followed by the generated text."""
        return after(text, COMMONSENSE_MARK)

    @staticmethod
    def correct(answer: str, gold: str) -> bool:
        return answer == gold.strip()


class Arithmetic:
    """Word problems that are answered with their solution. In test files only `answer` is gold, not `output`."""

    name = "arithmetic"
    tasks: tuple[str, ...] = ARITHMETIC_TASKS
    train_files = ("train.jsonl.gz", "ft-training_set/math_10k.json")

    @staticmethod
    def prompt(row: Row) -> str:
        return WITHOUT_INPUT.format(instruction=row["instruction"])

    @staticmethod
    def completion(row: Row) -> str:
        return row["output"]

    @staticmethod
    def extract(text: str, gold: str) -> str:
        """The last number, without commas, or the first letter A to E; empty if there is none."""
        text = after(text, RESPONSE_MARK)
        if is_number(gold):
            numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
            return numbers[-1] if numbers else ""
        letter = re.search("A|B|C|D|E", text)
        return letter.group() if letter else ""

    @staticmethod
    def correct(answer: str, gold: str) -> bool:
        if not is_number(gold):
            return answer == gold.strip()
        return is_number(answer) and abs(float(answer) - float(gold)) <= 1e-3


class Instruct:
    """Instructions with long answers, which another model judges."""

    name = "instruct"
    tasks: tuple[str, ...] = ("instruct",)
    train_files = ("train.jsonl.gz", "ultrafeedback_1k.jsonl.gz", "alpaca_data.json", "train.json")

    @staticmethod
    def prompt(row: Row) -> str:
        return (WITH_INPUT if row.get("input") else WITHOUT_INPUT).format(**row)

    @staticmethod
    def completion(row: Row) -> str:
        return row["output"]

    @staticmethod
    def extract(text: str, gold: str) -> str:
        return after(text, RESPONSE_MARK)


@dataclass(frozen=True)
class GlueTask:
    """Columns, metrics (their mean is the score) and number of classes (1: a number) of a task."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    num_labels: int = 2
    validation: str = "validation"


GLUE_TASKS = {
    "mnli": GlueTask(("premise", "hypothesis"), num_labels=3, validation="validation_matched"),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "cola": GlueTask(("sentence",), ("matthews_correlation",)),
    "qnli": GlueTask(("question", "sentence")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearmanr"), num_labels=1),
}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    # Of a constant there is no correlation.
    return float(x @ y / norm) if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in which equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    hits, total = ((predicted == 1) & (labels == 1)).sum(), (predicted == 1).sum() + (labels == 1).sum()
    return float(2 * hits / total) if total else 0.0


METRICS = {
    "accuracy": lambda predicted, labels: float((predicted == labels).mean()),
    "f1": _f1,
    # For two classes it is the correlation of the two indicator vectors.
    "matthews_correlation": lambda predicted, labels: _pearson(predicted.astype(float), labels.astype(float)),
    "pearson": _pearson,
    "spearmanr": lambda predicted, labels: _pearson(_ranks(predicted), _ranks(labels)),
}


def glue_metrics(task: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a GLUE task in percent, and their mean as `score`."""
    predicted = logits.squeeze(-1) if GLUE_TASKS[task].num_labels == 1 else logits.argmax(-1)
    values = {name: 100 * METRICS[name](predicted, labels) for name in GLUE_TASKS[task].metrics}
    return values | {"score": sum(values.values()) / len(values)}


def metrics_with_error(task: str, logits: np.ndarray, labels: np.ndarray, resamples: int = 500) -> dict[str, float]:
    """The metrics of a task, and the score's standard error over the rows: how far it varies as they are drawn anew."""
    # Some releases of Transformers evaluate rows in another order each time.
    order = np.lexsort([*logits.reshape(len(labels), -1).T, labels])
    logits, labels = logits[order], labels[order]
    generator = np.random.default_rng(0)
    drawn = (generator.integers(len(labels), size=len(labels)) for _ in range(resamples))
    scores = [glue_metrics(task, logits[rows], labels[rows])["score"] for rows in drawn]
    return glue_metrics(task, logits, labels) | {"standard_error": float(np.std(scores))}


def validation_halves(rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Which rows of a validation split pick the best epoch, and which give the score.

    1,000 rows pick if there are more than 5,000, half of them otherwise.
    """
    order = np.random.default_rng(seed).permutation(rows).tolist()
    pick = 1000 if rows > 5000 else rows // 2
    return order[:pick], order[pick:]


def majority(answers: Sequence[str]) -> float:
    """Percentage of the most frequent gold answer: the score of a model that always gives it."""
    return 100 * max(Counter(answers).values()) / len(answers)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_prompt: int,
    title: str,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Greedy texts with their prompts' numbers, the longest first, in left-padded batches.

    A text is the prompt and what follows it. Prompts are cut to `max_prompt` tokens on their own, as in training.
    """
    if not prompts:
        return
    # Training ends answers with this token, which the base model's configuration may not have.
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id} | options
    model.eval()
    lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda number: -lengths[number])
    with tqdm(total=len(prompts), desc=title, disable=None) as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            inputs = tokenizer(
                [prompts[number] for number in numbers],
                padding=True,
                padding_side="left",
                truncation=True,
                max_length=max_prompt,
                return_tensors="pt",
            ).to(model.device)
            tokens = model.generate(**inputs, do_sample=False, **options)
            yield from zip(numbers, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True)
            progress.update(len(numbers))
