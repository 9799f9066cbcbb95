"""Questions with a few possible answers, and the log-likelihood of each, as lm-evaluation-harness scores them.

| questions | prompt | answers |
|---|---|---|
| SST-2 | the sentence, "Sentiment:" | negative, positive |
| RTE | both sentences as a question, as in the harness | True, False |
| commonsense | the harness's, without the answers | the texts that the paper's prompt lists |

BoolQ is asked without its passage, which the paper's data do not have. WinoGrande, which the harness scores by the rest
of the sentence after each option, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from suites import COMMONSENSE_TASKS, Row
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_reft import ReftConfig, prompt_mask_of


@dataclass(frozen=True)
class LabelWords:
    """A task of GLUE as a question in words. `words` are the answers for its labels, in order."""

    tasks: tuple[str, ...]
    template: str
    words: tuple[str, ...]
    name: ClassVar[str] = "likelihood"
    samples: ClassVar[str] = "glue"

    @property
    def train_files(self) -> tuple[str, ...]:
        return (f"{self.tasks[0]}.train.jsonl.gz",)

    def test_files(self, task: str) -> tuple[str, ...]:
        return (f"{task}.validation.jsonl.gz",)

    def prompt(self, row: Row) -> str:
        return self.template.format(**{name: str(value).strip() for name, value in row.items()})

    def choices(self, row: Row) -> list[str]:
        return list(self.words)

    def gold(self, row: Row) -> int:
        return int(row["label"])

    def completion(self, row: Row) -> str:
        return f" {self.words[self.gold(row)]}"


class CommonsenseChoices:
    """The paper's commonsense rows as the harness asks them: a question, and the answer in its own words."""

    name = "likelihood"
    samples = "commonsense"
    tasks = tuple(task for task in COMMONSENSE_TASKS if task != "winogrande")
    train_files = ("train.jsonl.gz",)

    @staticmethod
    def test_files(task: str) -> tuple[str, ...]:
        return (f"{task}.test.jsonl.gz", f"{task}.heldout.jsonl.gz")

    @classmethod
    def prompt(cls, row: Row) -> str:
        question = cls.parts(row)[0]
        if row["task"] in ("hellaswag", "openbookqa"):
            return question
        return f"Q: {question}\nA:" if row["task"] == "social_i_qa" else f"Question: {question}\nAnswer:"

    @classmethod
    def choices(cls, row: Row) -> list[str]:
        return cls.parts(row)[1]

    @staticmethod
    def gold(row: Row) -> int:
        if row["task"] == "boolq":
            return ("false", "true").index(row["answer"])
        return int(row["answer"].strip()[-1]) - 1  # answer1, solution1, ending1

    @classmethod
    def completion(cls, row: Row) -> str:
        return f" {cls.choices(row)[cls.gold(row)]}"

    @staticmethod
    def parts(row: Row) -> tuple[str, list[str]]:
        """The question and its answers, extracted from the paper's prompt."""
        text = row["instruction"].rpartition("Answer format:")[0].strip()
        if row["task"] == "boolq":
            return text.partition("question: ")[2], ["no", "yes"]
        question, *answers = re.split(r"\s*\b(?:Answer|Solution|Ending)[1-5]: ?", text)
        return re.sub(r"^Please choose the .*?(?:question|sentence): ", "", question), answers


QUESTIONS = {
    "sst2": LabelWords(("sst2",), "{sentence}\nSentiment:", ("negative", "positive")),
    "rte": LabelWords(("rte",), "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", ("True", "False")),
    "commonsense": CommonsenseChoices(),
}


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int,
    title: str = "",
) -> list[list[float]]:
    """Log-probability of each answer, after its prompt and a space.

    As in the harness, the last token of an answer is not passed through the model: answers of one token share one pass.
    Nothing is cut.
    """
    requests: dict[tuple[tuple[int, ...], int], list[tuple[int, int, list[int]]]] = {}
    for row, (prompt, answers) in enumerate(zip(prompts, choices, strict=True)):
        start = tokenizer(prompt)["input_ids"]
        for number, answer in enumerate(answers):
            tokens = tokenizer(f"{prompt} {answer}")["input_ids"]
            key = tuple(tokens[:-1]), len(start)
            requests.setdefault(key, []).append((row, number, tokens[len(start) :]))
    scores = [[0.0] * len(answers) for answers in choices]
    order = sorted(requests, key=lambda request: -len(request[0]))
    model.eval()
    with tqdm(total=len(order), desc=title, disable=None) as progress:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            for request, logits in zip(batch, _logits(model, tokenizer, batch), strict=True):
                for row, number, answer in requests[request]:
                    found = logits[-len(answer) :].float().log_softmax(-1)
                    scores[row][number] = found[torch.arange(len(answer)), answer].sum().item()
            progress.update(len(batch))
    return scores


def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[tuple[int, ...], int]]
) -> torch.Tensor:
    """Logits of the last tokens of each row, from the last one of its prompt on."""
    tokens = {"input_ids": [list(row) for row, _ in batch]}
    padded = tokenizer.pad(tokens, padding_side="left", return_tensors="pt").to(model.device)
    mask = padded["attention_mask"]
    after = torch.tensor([len(row) - prompt for row, prompt in batch], device=model.device)
    prompt_mask = mask.bool() & (torch.arange(mask.shape[1], device=model.device) < mask.shape[1] - after[:, None])
    reft = isinstance(getattr(model, "active_peft_config", None), ReftConfig)
    with prompt_mask_of(model, prompt_mask) if reft else nullcontext():
        return model(**padded, logits_to_keep=int(after.max()) + 1).logits


def accuracy(
    scores: Sequence[Sequence[float]], gold: Sequence[int], choices: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Percentage of rows whose gold answer is likeliest, also by log-likelihood per character, with standard errors."""

    def percentage(right: list[bool]) -> tuple[float, float]:
        share = sum(right) / len(right)
        return 100 * share, 100 * (share * (1 - share) / len(right)) ** 0.5

    def best(values: Sequence[float]) -> int:
        return max(range(len(values)), key=values.__getitem__)

    plain = [best(row) == answer for row, answer in zip(scores, gold, strict=True)]
    by_length = [
        [score / len(text) for score, text in zip(*row, strict=True)] for row in zip(scores, choices, strict=True)
    ]
    normalized = [best(row) == answer for row, answer in zip(by_length, gold, strict=True)]
    (score, error), (score_normalized, error_normalized) = percentage(plain), percentage(normalized)
    return {
        "score": score,
        "standard_error": error,
        "score_normalized": score_normalized,
        "standard_error_normalized": error_normalized,
    }
