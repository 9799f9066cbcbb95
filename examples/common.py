"""What the training scripts share: command line arguments in TRL's style, data, the run, and answers to look at.

Import it before torch and Transformers: it sets what they read from the environment.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

if not any(
    argument.startswith(("--model_name", "--dataset_name", "--config", "--push_to_hub")) for argument in sys.argv
):
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait make a CPU which other programs use too several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, TrlParser

from peft_reft import ReftConfig  # importing it makes ReFT known to PEFT


@dataclass
class ModelArguments:
    """TRL's `ModelConfig`, with ReFT's options in the place of LoRA's."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or path of a chat model; the bundled SmolLM2-135M-Instruct by default."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Load the base model in this dtype.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Which attention implementation to use."})
    reft_r: int = field(default=4, metadata={"help": "Rank: the dimension of the subspace that is edited."})
    reft_positions: str = field(
        default="f7+l7",
        metadata={"help": "Which tokens are edited: f<n>, l<n>, prompt, c<n>, completion, all; combined with '+'."},
    )
    reft_share_weights: bool = field(
        default=True, metadata={"help": "Whether one intervention serves all words of reft_positions."}
    )
    reft_intervention: str = field(default="loreft", metadata={"help": "The method."})
    reft_layers: list[int] | None = field(
        default=None, metadata={"help": "The layers to edit, all by default; negative numbers count from the end."}
    )
    reft_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules to edit, in place of the layers' output."}
    )
    reft_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save with the adapter."}
    )
    reft_dropout: float = field(default=0.0, metadata={"help": "Dropout on the edited representations."})
    reft_task_type: str = field(
        default="CAUSAL_LM",
        metadata={"help": "Task type, 'SEQ_CLS' for reward models.", "choices": ["CAUSAL_LM", "SEQ_CLS"]},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Quantization type.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Whether to quantize the scales too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Quantization storage dtype."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit contradict each other: choose one.")


def parse(*dataclass_types: type, **defaults: Any) -> tuple[Any, ...]:
    """Arguments from the command line and `--config file.yaml`, as instances of `dataclass_types`.

    `defaults` are the script's own. Like TRL, a GPU computes in bf16; a CPU, on which that raises, in float32. Without
    `--model_name_or_path` the bundled model is used, which is converted the first time.
    """
    parser = TrlParser(dataclass_types)
    parser.set_defaults(
        **{
            "bf16": is_torch_bf16_gpu_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not sys.stderr.isatty(),
            "report_to": ["none"],
        }
        | defaults
    )
    # TRL's and Transformers' words about each other.
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    parsed = parser.parse_args_and_config()
    for arguments in parsed:
        if isinstance(arguments, ModelArguments) and arguments.model_name_or_path is None:
            from smollm2 import smollm2_folder

            arguments.model_name_or_path = str(smollm2_folder())
    return parsed


def reft_config(arguments: ModelArguments) -> ReftConfig:
    """The `peft_config` for a TRL trainer."""
    return ReftConfig(
        r=arguments.reft_r,
        positions=arguments.reft_positions,
        share_weights=arguments.reft_share_weights,
        intervention=arguments.reft_intervention,
        layers_to_transform=arguments.reft_layers,
        target_modules=arguments.reft_target_modules,
        modules_to_save=arguments.reft_modules_to_save,
        dropout=arguments.reft_dropout,
        task_type=arguments.reft_task_type,
    )


def model_init_kwargs(arguments: ModelArguments) -> dict[str, Any]:
    """What TRL's trainers hand to `from_pretrained`."""
    return {
        "revision": arguments.model_revision,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }


def load_data(
    arguments: ScriptArguments, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The train and test splits of `--dataset_name`, or else the given rows."""
    if arguments.dataset_name is None:
        return datasets.Dataset.from_list(list(train)), datasets.Dataset.from_list(list(test))
    data = datasets.load_dataset(
        arguments.dataset_name, name=arguments.dataset_config, streaming=arguments.dataset_streaming
    )
    return data[arguments.dataset_train_split], data.get(arguments.dataset_test_split)


def train_and_save(trainer: Trainer, arguments: ScriptArguments) -> None:
    """Train, from a checkpoint if that was asked for, and save the adapter, to the hub too if that was."""
    begin = time.perf_counter()
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    print(f"Trained in {time.perf_counter() - begin:.0f} s; the adapter is in {trainer.args.output_dir}.")


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_new_tokens: int = 32
) -> str:
    """The model's greedy answer to a conversation, cut off where it is long."""
    model.eval()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return f"{text} ..." if len(new) == max_new_tokens else text


def answers_before_and_after(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Any], max_new_tokens: int = 32
) -> list[tuple[str, str]]:
    """For each conversation the answer of the base model, and that with the adapter."""
    pairs = []
    for messages in prompts:
        with model.disable_adapter():
            before = answer(model, tokenizer, messages, max_new_tokens)
        pairs.append((before, answer(model, tokenizer, messages, max_new_tokens)))
    return pairs


def print_before_after(prompt: str, before: str, after: str) -> None:
    """One question with both answers below it."""
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"\n> {prompt}")
    for label, text in (("base model", before), ("with adapter", after)):
        print("\n".join(wrap(text, width, initial_indent=f"  {label:<14}", subsequent_indent=" " * 16)))
