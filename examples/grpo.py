"""Reinforcement learning with TRL's GRPOTrainer: LoReFT learns to sound excited, from a reward function alone.

    python examples/grpo.py                                  # the bundled model and prompts, offline
    python examples/grpo.py --max_steps 30 --beta 0.02       # GRPOConfig's and ReFT's flags
    python examples/grpo.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/tldr
    python examples/grpo.py --use_vllm                       # vLLM generates, with the current adapter at each step

The model generates its own completions; generation and training edit the same tokens. All flags: --help.
"""

from __future__ import annotations

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from peft_reft.arguments import ReftArguments
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
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, ReftArguments))
    # On a CPU TRL's default, bfloat16, raises.
    parser.set_defaults(bf16=is_torch_bf16_gpu_available(), gradient_checkpointing=False, report_to=["none"])
    parser.set_defaults(output_dir="outputs/grpo", reft_r=4)
    # With beta the model stays close to the base model's language.
    parser.set_defaults(beta=0.05, learning_rate=1.5e-3, max_steps=10, logging_steps=2)
    parser.set_defaults(num_generations=8, per_device_train_batch_size=16, max_completion_length=20)
    script_args, training_args, model_args, reft_args = parser.parse_args_and_config()
    name = model_args.model_name_or_path or default_model()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if script_args.dataset_name is None:
        rows = {split: [{"prompt": [{"role": "user", "content": news}]} for news in NEWS[split]] for split in NEWS}
        train, test = (Dataset.from_list(rows[split]) for split in ("train", "test"))
    else:
        data = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
        train, test = data[script_args.dataset_train_split], data.get(script_args.dataset_test_split)
    shown = train if test is None else test

    try:
        with vllm_rollouts():  # for --use_vllm
            trainer = GRPOTrainer(
                model=name,
                args=training_args,
                train_dataset=train,
                reward_funcs=excitement,
                quantization_config=get_quantization_config(model_args),
                peft_config=reft_args.config(task_type="CAUSAL_LM"),
            )
    except OSError as error:
        raise SystemExit(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The adapter is in {training_args.output_dir}.")

    for row in shown.take(3):
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with trainer.model.disable_adapter():
            before = answer(trainer.model, trainer.processing_class, messages)
        after = answer(trainer.model, trainer.processing_class, messages)
        print(f"\n> {messages[-1]['content']}\n  base model:   {before}\n  with adapter: {after}")
    prompts = [row["prompt"] for row in shown.take(6)]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    with trainer.model.disable_adapter():
        rewards = [mean_reward(trainer, prompts)]
    rewards.append(mean_reward(trainer, prompts))
    print(f"\nMean reward on held-out prompts: base model {rewards[0]:.2f}, with adapter {rewards[1]:.2f}")


@torch.no_grad()
def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer to a conversation."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def default_model() -> str:
    """The bundled model, if this script is in its repository; otherwise the same model from the hub."""
    try:
        from smollm2 import smollm2_folder
    except ImportError:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return str(smollm2_folder())


if __name__ == "__main__":
    main()
