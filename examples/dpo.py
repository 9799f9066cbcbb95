"""Preference tuning with TRL's DPOTrainer: LoReFT teaches a chat model to answer in one plain sentence.

    python examples/dpo.py                                    # the bundled model and data, offline
    python examples/dpo.py --beta 0.3 --reft_positions l7     # DPOConfig's and ReFT's flags
    python examples/dpo.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized

The reference model is the base model: TRL computes it with the adapter disabled. All flags: --help.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from peft_reft.arguments import ReftArguments

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
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, ReftArguments))
    # On a CPU TRL's default, bfloat16, raises.
    parser.set_defaults(bf16=is_torch_bf16_gpu_available(), gradient_checkpointing=False, report_to=["none"])
    parser.set_defaults(output_dir="outputs/dpo", reft_r=4)
    # DPO alone makes rejected answers less likely, but chosen ones hardly more.
    parser.set_defaults(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    parser.set_defaults(learning_rate=1.5e-3, num_train_epochs=2.0, per_device_train_batch_size=4, logging_steps=2)
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
        trainer = DPOTrainer(
            model=name,
            args=training_args,
            train_dataset=train,
            eval_dataset=test,
            quantization_config=get_quantization_config(model_args),
            peft_config=reft_args.config(task_type="CAUSAL_LM"),
        )
    except OSError as error:
        raise SystemExit(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The adapter is in {training_args.output_dir}.")

    for row in shown.take(4):
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with trainer.model.disable_adapter():
            before = answer(trainer.model, trainer.processing_class, messages)
        after = answer(trainer.model, trainer.processing_class, messages)
        print(f"\n> {messages[-1]['content']}\n  base model:   {before}\n  with adapter: {after}")
    if test is not None:
        scores = trainer.evaluate()
        margin, accuracy = scores["eval_rewards/margins"], scores["eval_rewards/accuracies"]
        print(f"\nHeld-out pairs: reward margin {margin:.2f} (base model 0.00), positive in {accuracy:.0%}")


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
