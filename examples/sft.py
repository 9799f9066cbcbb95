"""Supervised finetuning with TRL's SFTTrainer: LoReFT teaches a chat model to turn orders into JSON.

    python examples/sft.py                                             # the bundled model and data, offline
    python examples/sft.py --reft_positions l3 --reft_r 8 --packing    # SFTConfig's and ReFT's flags
    python examples/sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
        --assistant_only_loss --max_length 1024                        # any model, any dataset of the hub

The data needs a prompt: prompt/completion rows, or conversations with --assistant_only_loss. `--reft_positions all`
needs none. All flags: --help.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from peft_reft.arguments import ReftArguments

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
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, ReftArguments))
    # On a CPU TRL's default, bfloat16, raises.
    parser.set_defaults(bf16=is_torch_bf16_gpu_available(), gradient_checkpointing=False, report_to=["none"])
    parser.set_defaults(output_dir="outputs/sft", reft_r=4)
    parser.set_defaults(learning_rate=4e-3, num_train_epochs=2.0, per_device_train_batch_size=4)
    script_args, training_args, model_args, reft_args = parser.parse_args_and_config()
    name = model_args.model_name_or_path or default_model()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if script_args.dataset_name is None:
        train, test = (Dataset.from_list(list(orders(split, n))) for split, n in (("train", 48), ("test", 8)))
    else:
        data = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
        train, test = data[script_args.dataset_train_split], data.get(script_args.dataset_test_split)
    shown = train if test is None else test

    try:
        trainer = SFTTrainer(
            model=name,
            args=training_args,
            train_dataset=train,
            eval_dataset=test if training_args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=reft_args.config(task_type="CAUSAL_LM"),
        )
    except OSError as error:
        raise SystemExit(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The adapter is in {training_args.output_dir}.")
    show(trainer, shown)


def show(trainer: SFTTrainer, rows: Dataset) -> None:
    """Ask the base model and the adapted one a few questions from the data, and compare with the data's answers."""
    model, tokenizer, right = trainer.model, trainer.processing_class, [0, 0]
    conversations = [conversation(row) for row in rows.take(8)]
    for messages, expected in conversations:
        with model.disable_adapter():
            answers = [answer(model, tokenizer, messages)]
        answers.append(answer(model, tokenizer, messages))
        right = [count + (text == expected) for count, text in zip(right, answers, strict=True)]
        print(f"\n> {messages[-1]['content']}\n  base model:   {answers[0]}\n  with adapter: {answers[1]}")
    counts = f"base model {right[0]}, with adapter {right[1]} of {len(conversations)}"
    print(f"\nExact matches with the data's answers: {counts}")


@torch.no_grad()
def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer to a conversation."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def conversation(row: dict) -> tuple[list[dict], str]:
    """The messages up to the first answer, and that answer, in either of TRL's formats."""
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return row["messages"][:first], row["messages"][first]["content"]
    if isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    return row["prompt"], row["completion"][0]["content"]


def default_model() -> str:
    """The bundled model, if this script is in its repository; otherwise the same model from the hub."""
    try:
        from smollm2 import smollm2_folder
    except ImportError:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return str(smollm2_folder())


if __name__ == "__main__":
    main()
