"""Arithmetic reasoning: seven sets of word problems, answered with a worked solution (the paper's table 2).

    python examples/paper/arithmetic.py --quick                                 # the bundled model and data, offline
    python examples/paper/arithmetic.py --data FOLDER --method lora             # the bundled model
    python examples/paper/arithmetic.py --data LLM-Adapters --preset llama-7b \\
        --tasks AQuA gsm8k mawps SVAMP                                          # the paper's recipe and tasks

FOLDER holds `train.jsonl.gz` and `<task>.test.jsonl.gz`, or is a checkout of the repository LLM-Adapters. Only `answer`
is gold in the test rows: their `output` is what a language model wrote, and often wrong. Decoding is greedy, as in the
paper's code; its text says sampling. All flags, those of TRL's SFTConfig among them: --help.
"""

from __future__ import annotations

from collections.abc import Sequence

from answering import scored_run
from suites import Arithmetic

QUICK = {"num_train_epochs": 1.0, "train_rows": 16, "eval_rows": 2, "logging_steps": 1, "max_new_tokens": 48}


def main(argv: Sequence[str] | None = None) -> dict:
    return scored_run(Arithmetic, argv, QUICK)


if __name__ == "__main__":
    main()
