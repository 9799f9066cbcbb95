"""A reward model with TRL's RewardTrainer: LoReFT and a new score head learn which of two answers is better.

    python examples/reward.py                                   # the bundled model and data, offline
    python examples/reward.py --reft_positions l1 --reft_r 16   # RewardConfig's and ReFT's flags
    python examples/reward.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized

The whole head is trained and saved with the adapter (modules_to_save). A classifier generates no answer, so the whole
conversation counts as prompt. All flags: --help.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from datasets import Dataset, load_dataset
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser, get_quantization_config

from peft_reft.arguments import ReftArguments

TOPICS = {
    "train": ["my printer", "the invoice", "my password", "the new update", "my order", "the heating", "this form"],
    "test": ["my phone", "the ticket", "the door lock", "my account"],
}
FRIENDLY = {
    "train": [
        "Of course, I will gladly help you with {}.",
        "Thank you for asking about {}, here is what to do.",
        "I am sorry about the trouble with {}, let me fix it right away.",
    ],
    "test": [
        "It is my pleasure to look into {} together with you.",
        "Good that you wrote to us, {} will soon be fine.",
    ],
}
RUDE = {
    "train": [
        "Not again, go and bother someone else with {}.",
        "Why should I care about {}, just read the manual.",
        "Only a fool would have trouble with {}, so think harder yourself.",
    ],
    "test": ["Stop wasting my time with {}, you are a hopeless case.", "Honestly, {} is your own fault and I am busy."],
}


def preferences(split: str) -> Iterator[dict]:
    """Friendly answers are better than rude ones; the test's topics and phrases are not in training."""
    for topic, (friendly, rude) in itertools.product(TOPICS[split], zip(FRIENDLY[split], RUDE[split], strict=True)):
        yield {
            "prompt": [{"role": "user", "content": f"I need help with {topic}."}],
            "chosen": [{"role": "assistant", "content": friendly.format(topic.replace("my", "your"))}],
            "rejected": [{"role": "assistant", "content": rude.format(topic.replace("my", "your"))}],
        }


@torch.no_grad()
def score(trainer: RewardTrainer, row: dict) -> tuple[float, float]:
    """The rewards of the chosen and the rejected answer of one conversation."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    rewards = []
    for name in ("chosen", "rejected"):
        messages = row.get("prompt", []) + row[name]
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
        rewards.append(model(**inputs).logits.item())
    return rewards[0], rewards[1]


def main() -> None:
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig, ReftArguments))
    # On a CPU TRL's default, bfloat16, raises.
    parser.set_defaults(bf16=is_torch_bf16_gpu_available(), gradient_checkpointing=False, report_to=["none"])
    parser.set_defaults(output_dir="outputs/reward", reft_r=4)
    parser.set_defaults(reft_modules_to_save=["score"], learning_rate=1e-3, num_train_epochs=1.0)
    parser.set_defaults(per_device_train_batch_size=4, logging_steps=1)
    script_args, training_args, model_args, reft_args = parser.parse_args_and_config()
    name = model_args.model_name_or_path or default_model()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if script_args.dataset_name is None:
        train, test = (Dataset.from_list(list(preferences(split))) for split in ("train", "test"))
    else:
        data = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
        train, test = data[script_args.dataset_train_split], data.get(script_args.dataset_test_split)
    shown = train if test is None else test

    try:
        trainer = RewardTrainer(
            model=name,
            args=training_args,
            train_dataset=train,
            eval_dataset=test,
            quantization_config=get_quantization_config(model_args),
            peft_config=reft_args.config(task_type="SEQ_CLS"),
        )
    except OSError as error:
        raise SystemExit(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    rows = list(shown.take(2))
    before, scores = [score(trainer, row) for row in rows], trainer.evaluate() if test is not None else {}
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The adapter is in {training_args.output_dir}.")

    print("\nReward before -> after")
    for row, old in zip(rows, before, strict=True):
        new = score(trainer, row)
        print(f"> {row.get('prompt', row['chosen'])[0]['content']}")
        for name, first, last in zip(("chosen", "rejected"), old, new, strict=True):
            print(f"  {first:7.2f} -> {last:6.2f}  {row[name][-1]['content'][:76]}")
    if test is not None:
        now = trainer.evaluate()
        print(
            f"\nHeld-out pairs in which the chosen answer scores higher: {scores['eval_accuracy']:.0%} before, "
            f"{now['eval_accuracy']:.0%} after"
        )


def default_model() -> str:
    """The bundled model, if this script is in its repository; otherwise the same model from the hub."""
    try:
        from smollm2 import smollm2_folder
    except ImportError:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return str(smollm2_folder())


if __name__ == "__main__":
    main()
