"""Instruction following: long answers for AlpacaEval's judge (the paper's table 3).

    python examples/paper/instruct.py --quick                                    # the bundled model and data, offline
    python examples/paper/instruct.py --data tatsu-lab/alpaca --preset llama-7b \\
        --eval_data hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json
    IS_ALPACA_EVAL_2=False alpaca_eval --annotators_config alpaca_eval_gpt4 \\
        --model_outputs outputs/paper/instruct/llama-7b-loreft/model_outputs.json

The last command is the paper's AlpacaEval 1.0, against text-davinci-003; without the variable it is 2.0, against GPT-4.

Data have `instruction`, `input` (may be empty) and `output`; a folder holds them as `train.jsonl.gz`, `train.json` or
`alpaca_data.json`. Without --eval_data the answered instructions are training rows that were kept back (--dev_rows).
The judge is another model, behind a key of your own: this script stops at the file that it reads. All flags, those of
TRL's SFTConfig among them: --help.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from answering import GenerationRun
from runs import draw, measured, read_rows, write_json
from suites import Instruct, Row

# isort: split
from datasets import load_dataset

DEFAULTS = {"dev_rows": 100}
QUICK = {
    "num_train_epochs": 1.0,
    "train_rows": 24,
    "dev_rows": 4,
    "logging_steps": 1,
    "max_length": 192,
    "max_new_tokens": 48,
}


def questions(this: GenerationRun) -> tuple[list[Row], str]:
    """The rows to answer, and their source."""
    data = this.arguments.eval_data
    if data is None:
        return draw(this.split()[1], this.arguments.eval_rows), "kept back"
    path = Path(data).expanduser()
    rows = read_rows(path) if path.exists() else load_dataset("json", data_files=data, split="train").to_list()
    return draw(rows, this.arguments.eval_rows), path.name


def model_outputs(rows: Sequence[Row], texts: Sequence[str], generator: str, source: str) -> list[dict[str, str]]:
    """The rows that AlpacaEval's command reads as `--model_outputs`."""
    return [
        {
            "instruction": "\n\n".join(filter(None, (row["instruction"], row.get("input")))),
            "output": Instruct.extract(text, ""),
            "generator": generator,
            "dataset": row.get("dataset", source),
        }
        for row, text in zip(rows, texts, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict:
    this = GenerationRun(Instruct, argv, DEFAULTS, QUICK)
    rows, source = questions(this)  # before training, which is long
    model = this.model()
    with measured() as cost:
        texts = this.answers(model, "instruct", rows)
    generator = f"{Path(this.arguments.model).name}-{this.arguments.method}"
    outputs = model_outputs(rows, texts, generator, source)
    write_json(this.run.folder / "model_outputs.json", outputs)
    for row in outputs[:2]:
        print(f"> {row['instruction'][:200]}\n  {row['output'][:300]}")
    words = sum(len(row["output"].split()) for row in outputs) / len(outputs)
    return this.run.write(model, {"scores": {"mean_words": words}, "rows": len(outputs), "source": source}, cost)


if __name__ == "__main__":
    main()
