"""Reinforcement learning with TRL's GRPOTrainer: LoReFT learns to sound excited, from a reward function alone.

    python examples/grpo.py                                  # the bundled model and prompts, offline
    python examples/grpo.py --max_steps 30 --beta 0.02       # GRPOConfig's and ReFT's flags
    python examples/grpo.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/tldr
    python examples/grpo.py --use_vllm                       # vLLM generates, with the adapter as it is at each step

The model generates its own completions; an edit lands on the same tokens then and in training. All flags: --help.
"""

from __future__ import annotations

import torch
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
from trl import GRPOConfig, GRPOTrainer, ScriptArguments, get_quantization_config

from peft_reft.integrations.trl import vllm_rollouts

NEWS = {
    "train": [
        "I passed my driving test today.",
        "We adopted a puppy.",
        "My sister is getting married.",
        "I baked my first cake.",
        "Our team won the game.",
        "I finished reading a long book.",
        "It is snowing outside.",
        "I found a new job.",
        "My garden has its first tomatoes.",
        "I learned to ride a bike.",
        "We are going to the beach tomorrow.",
        "I got tickets for the concert.",
        "My friend is visiting me this weekend.",
        "I painted my room.",
        "I saw a rainbow this morning.",
        "My grandmother turned ninety.",
    ],
    "test": [
        "I learned to swim this summer.",
        "My brother won a chess tournament.",
        "We moved into a new house.",
        "I cooked dinner for my parents.",
        "My cat had kittens.",
        "I ran my first marathon.",
    ],
}


def excitement(completions: list, **kwargs) -> list[float]:
    """One point for each exclamation mark, up to two."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(min(text.count("!"), 2)) for text in texts]


@torch.no_grad()
def mean_reward(trainer: GRPOTrainer, prompts: list[list[dict]], samples: int = 2) -> float:
    """The mean reward of sampled completions, as the trainer samples them."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    tokenizer.padding_side = "left"
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(prompts, **options).to(model.device)
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=trainer.args.max_completion_length,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = excitement(texts)
    return sum(rewards) / len(rewards)


def main() -> None:
    script_args, training_args, model_args = parse(
        ScriptArguments,
        GRPOConfig,
        ModelArguments,
        output_dir="outputs/grpo",
        learning_rate=1.5e-3,
        beta=0.05,  # stay close to the base model's language
        max_steps=10,
        num_generations=8,
        per_device_train_batch_size=16,
        max_completion_length=20,
        logging_steps=2,
        gradient_checkpointing=False,
    )
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    rows = {split: [{"prompt": [{"role": "user", "content": news}]} for news in NEWS[split]] for split in NEWS}
    train, test = load_data(script_args, rows["train"], rows["test"])

    with vllm_rollouts():  # for --use_vllm
        trainer = GRPOTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train,
            reward_funcs=excitement,
            quantization_config=get_quantization_config(model_args),
            peft_config=reft_config(model_args),
        )
    train_and_save(trainer, script_args)

    prompts = [row["prompt"] for row in (train if test is None else test).take(6)]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    answers = answers_before_and_after(trainer.model, trainer.processing_class, prompts[:3])
    for messages, pair in zip(prompts, answers, strict=False):
        print_before_after(messages[-1]["content"], *pair)
    with trainer.model.disable_adapter():
        before = mean_reward(trainer, prompts)
    print(
        f"\nMean reward on held-out prompts: base model {before:.2f}, with adapter {mean_reward(trainer, prompts):.2f}"
    )


if __name__ == "__main__":
    main()
