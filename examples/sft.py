"""Supervised finetuning with TRL's SFTTrainer: LoReFT teaches a chat model to read orders into JSON.

    python examples/sft.py                                             # the bundled model and data, offline
    python examples/sft.py --reft_positions l3 --reft_r 8 --packing    # SFTConfig's and ReFT's flags
    python examples/sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
        --assistant_only_loss --max_length 1024                        # any model, any dataset of the hub

The data needs a prompt: prompt/completion rows, or conversations with --assistant_only_loss. `--reft_positions all`
goes without. All flags: --help.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

from common import (
    ModelArguments,
    answers_before_and_after,
    load_data,
    model_init_kwargs,
    parse,
    print_before_after,
    reft_config,
    train_and_save,
)
from datasets import Dataset
from trl import ScriptArguments, SFTConfig, SFTTrainer, get_quantization_config

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
ITEMS = {
    "train": [
        *("coffee", "espresso", "lemonade", "iced tea", "pizza", "salad", "cheeseburger", "cookie", "pumpkin soup"),
        *("orange juice", "muffin", "taco", "burrito", "croissant", "lasagna", "sandwich", "mojito", "cupcake"),
    ],
    "test": ["waffle", "pretzel", "milkshake", "donut"],
}
TABLES = {"train": [1, 2, 3, 5, 6, 8, 11, 12], "test": [4, 7, 9, 10]}
SENTENCES = {
    "train": [
        "Could we get {count} {items} at table {table}?",
        "Table {table} would like {count} {items}, please.",
        "{count} {items} for table {table}.",
        "Hi there! I'd like to order {count} {items}. We are sitting at table {table}.",
    ],
    "test": [
        "Please bring {count} {items} to table {table}.",
        "We're at table {table} and very hungry: {count} {items}!",
    ],
}


def orders(split: str, number: int, seed: int = 0) -> Iterator[dict]:
    """Prompt/completion rows in conversational form; the test's items, tables and sentences are not in training."""
    draw = random.Random(seed)
    sentences = itertools.cycle(SENTENCES[split])
    for sentence in itertools.islice(sentences, number):
        word, item, table = draw.choice(list(NUMBERS)), draw.choice(ITEMS[split]), draw.choice(TABLES[split])
        items = item if word == "one" else f"{item}s"
        text = sentence.format(count=word, items=items, table=table)
        order = {"item": item, "count": NUMBERS[word], "table": table}
        yield {
            "prompt": [{"role": "user", "content": text[0].upper() + text[1:]}],
            "completion": [{"role": "assistant", "content": json.dumps(order)}],
        }


def main() -> None:
    script_args, training_args, model_args = parse(
        ScriptArguments,
        SFTConfig,
        ModelArguments,
        output_dir="outputs/sft",
        learning_rate=4e-3,
        num_train_epochs=2.0,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
    )
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    train, test = load_data(script_args, orders("train", 48), orders("test", 8))

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=reft_config(model_args),
    )
    train_and_save(trainer, script_args)
    show(trainer, train if test is None else test)


def show(trainer: SFTTrainer, rows: Dataset) -> None:
    """Ask the base model and the adapted one a few questions of the data, and compare with the answers there."""
    conversations = [conversation(row) for row in rows.take(8)]
    prompts = [messages for messages, _ in conversations]
    answers = answers_before_and_after(trainer.model, trainer.processing_class, prompts)
    right = [0, 0]
    for (_, expected), pair in zip(conversations, answers, strict=True):
        right = [count + (answer == expected) for count, answer in zip(right, pair, strict=True)]
    for messages, pair in zip(prompts[:4], answers, strict=False):
        print_before_after(messages[-1]["content"], *pair)
    print(f"\nExactly the answer of the data: base model {right[0]}, with adapter {right[1]} of {len(answers)}")


def conversation(row: dict) -> tuple[list[dict], str]:
    """The messages up to the first answer, and that answer, in either of TRL's formats."""
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return row["messages"][:first], row["messages"][first]["content"]
    if isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    return row["prompt"], row["completion"][0]["content"]


if __name__ == "__main__":
    main()
