"""Commonsense reasoning: eight multiple-choice tasks, answered in words (the paper's table 1).

    python examples/paper/commonsense.py --quick                                  # the bundled model and data, offline
    python examples/paper/commonsense.py --data FOLDER --method lora              # the bundled model
    python examples/paper/commonsense.py --data LLM-Adapters --preset llama-7b    # the paper's recipe

FOLDER holds `train.jsonl.gz` and `<task>.test.jsonl.gz`, or is a checkout of the repository LLM-Adapters. All flags,
those of TRL's SFTConfig among them: --help.
"""

from __future__ import annotations

from collections.abc import Sequence

from answering import scored_run
from suites import Commonsense

QUICK = {"num_train_epochs": 1.0, "train_rows": 48, "eval_rows": 8, "logging_steps": 1, "max_length": 160}


def main(argv: Sequence[str] | None = None) -> dict:
    return scored_run(Commonsense, argv, QUICK)


if __name__ == "__main__":
    main()
