"""Preference tuning with TRL's DPOTrainer: LoReFT teaches a chat model to answer in one plain sentence.

    python examples/dpo.py                                    # the bundled model and data, offline
    python examples/dpo.py --beta 0.3 --reft_positions l7     # DPOConfig's and ReFT's flags
    python examples/dpo.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized

The reference model is the base model: TRL computes it with the adapter disabled. All flags: --help.
"""

from __future__ import annotations

import itertools
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
from trl import DPOConfig, DPOTrainer, ScriptArguments, get_quantization_config

ADVICE = {
    "train": [
        ("How do I stay healthy?", "Sleep enough, eat well and move every day."),
        ("How can I save money?", "Spend less than you earn and put the rest away."),
        ("How do I learn a language?", "Use it a little every day."),
        ("What should I cook for dinner?", "Make pasta with tomatoes and basil."),
        ("How do I make friends in a new city?", "Join a club and go every week."),
        ("How can I sleep better?", "Go to bed at the same time every night."),
        ("How do I write a good letter?", "Say one thing and say it plainly."),
        ("What is a good hobby?", "Gardening gets you outside and costs little."),
        ("How do I get better at chess?", "Play slowly and look at your mistakes."),
        ("How do I keep my room tidy?", "Give every thing a place."),
        ("How can I read more books?", "Keep one by your bed and leave the phone elsewhere."),
        ("How do I prepare for an exam?", "Practice with old exams and rest the day before."),
        ("What should I wear to a wedding?", "Wear something festive that is not white."),
        ("How do I train my dog?", "Reward what you want and be patient."),
        ("How can I wake up early?", "Put the alarm across the room."),
        ("How do I choose a gift?", "Think of what the person likes to do."),
    ],
    "test": [
        ("How do I become a better cook?", "Taste often and cook the same dish again."),
        ("How can I feel less stressed?", "Take a walk without your phone."),
        ("What should I pack for a hike?", "Take water, food, a map and a rain jacket."),
        ("How do I take good photos?", "Look for soft light and go close."),
    ],
}
OPENINGS = [
    "That is a great question!",
    "There are many things to consider here.",
    "As an AI assistant, I can offer some tips on this topic.",
]
CLOSINGS = [
    "It is also important to keep in mind that everyone is different.",
    "In addition, make sure to set realistic goals for yourself and to stay consistent.",
]


def preferences(split: str) -> Iterator[dict]:
    """Conversations with a chosen and a rejected answer: one plain sentence rather than three."""
    openings, closings = itertools.cycle(OPENINGS), itertools.cycle(CLOSINGS)
    for question, advice in ADVICE[split]:
        yield {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": advice}],
            "rejected": [{"role": "assistant", "content": f"{next(openings)} {advice} {next(closings)}"}],
        }


def main() -> None:
    script_args, training_args, model_args = parse(
        ScriptArguments,
        DPOConfig,
        ModelArguments,
        output_dir="outputs/dpo",
        loss_type=["sigmoid", "sft"],  # DPO alone makes rejected answers less likely, but chosen ones hardly more
        loss_weights=[1.0, 1.0],
        learning_rate=1.5e-3,
        num_train_epochs=2.0,
        per_device_train_batch_size=4,
        logging_steps=2,
        gradient_checkpointing=False,
    )
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    train, test = load_data(script_args, preferences("train"), preferences("test"))

    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=get_quantization_config(model_args),
        peft_config=reft_config(model_args),
    )
    train_and_save(trainer, script_args)

    prompts = [row["prompt"] for row in (train if test is None else test).take(4)]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    answers = answers_before_and_after(trainer.model, trainer.processing_class, prompts)
    for messages, pair in zip(prompts, answers, strict=True):
        print_before_after(messages[-1]["content"], *pair)
    if test is not None:
        scores = trainer.evaluate()
        margin, accuracy = scores["eval_rewards/margins"], scores["eval_rewards/accuracies"]
        print(f"\nHeld-out pairs: reward margin {margin:.2f} (base model 0.00), positive in {accuracy:.0%}")


if __name__ == "__main__":
    main()
