"""One process of a distributed run: `accelerate launch ... tests/distributed_worker.py FOLDER CASE...`.

Trains each case with TRL, and saves the adapter and the process's measurements in `FOLDER/CASE`.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tiny import VOCAB
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig

BATCH, STEPS, CHECKPOINT = 4, 3, 2
PROMPT = torch.tensor([[7, 8, 9, 10, 11, 12]])


@dataclass(frozen=True)
class Case:
    """One run: settings of the adapter and of the trainer, which model, and what is special about it.

    `idle`: nothing is edited in the second process. `interrupted`: a distributed run resumes from a checkpoint.
    """

    reft: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: str = "model"
    idle: bool = False
    interrupted: bool = False


def _checkpointing(**settings: Any) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}


CASES = {
    "shared": Case(interrupted=True),
    # Large enough for ZeRO-3 to shard it, which leaves small parameters whole.
    "unshared": Case({"share_weights": False, "r": 16}, model="tied"),
    "accumulated": Case(trainer={"gradient_accumulation_steps": 2}),
    "checkpointed": Case({"share_weights": False}, _checkpointing(use_reentrant=False)),
    # DDP cannot look for unused parameters with this kind of checkpointing, whatever the adapter.
    "reentrant": Case(trainer=_checkpointing(use_reentrant=True) | {"ddp_find_unused_parameters": False}),
    # With this setting DDP waits for the gradient of every parameter.
    "idle": Case(trainer={"ddp_find_unused_parameters": False}, idle=True),
    "norms": Case({"target_modules": ["post_attention_layernorm", "model.norm"]}),
    "bf16": Case(trainer={"bf16": True}),
}


def data(case: Case, rows: int) -> Dataset:
    """Prompts and completions of many lengths. The second process gets the second half of each batch."""
    draw = random.Random(0)

    def words(length: int) -> str:
        return " ".join(f"w{draw.randrange(6, VOCAB)}" for _ in range(length))

    def pair(row: int) -> dict[str, str]:
        # Each side of f2+l3 takes at most half of a prompt, so none of one token.
        length = 1 if case.idle and row % BATCH >= BATCH // 2 else draw.randint(1, 9)
        return {"prompt": f"{words(length)} ", "completion": words(draw.randint(1, 4))}

    return Dataset.from_list([pair(row) for row in range(rows)])


def make_trainer(folder: Path, name: str, processes: int, **settings: Any) -> SFTTrainer:
    """A trainer for `STEPS` steps, with the same global batches for any number of processes."""
    case = CASES[name]
    defaults = {"gradient_checkpointing": False, "bf16": False, "save_strategy": "no"}
    args = SFTConfig(
        output_dir=folder / name / "trainer",
        per_device_train_batch_size=BATCH // processes,
        max_steps=STEPS,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **defaults | case.trainer | settings,
    )
    adapter = {"r": 4, "positions": "f2+l3", "init_weights": False, "task_type": "CAUSAL_LM"} | case.reft
    rows = BATCH * STEPS * args.gradient_accumulation_steps
    torch.manual_seed(0)
    return SFTTrainer(
        str(folder / case.model), args=args, train_dataset=data(case, rows), peft_config=ReftConfig(**adapter)
    )


def train(folder: Path, name: str, processes: int, **settings: Any) -> None:
    """Train a case, save its adapter in `folder/name`, and beside it what this process saw."""
    if CASES[name].interrupted and processes > 1:
        stopping = settings | {"save_strategy": "steps", "save_steps": CHECKPOINT}
        make_trainer(folder, name, processes, **stopping).train()
        trainer = make_trainer(folder, name, processes, **settings)
        trainer.train(resume_from_checkpoint=str(folder / name / "trainer" / f"checkpoint-{CHECKPOINT}"))
    else:
        trainer = make_trainer(folder, name, processes, **settings)
        trainer.train()
    trainer.save_model(folder / name)
    torch.save(seen(trainer), folder / name / f"{trainer.accelerator.process_index}.pt")


@torch.no_grad()
def seen(trainer: SFTTrainer) -> dict[str, Any]:
    """Losses and gradient norms of all steps, logits of a prompt, and what the trained model generates for it."""
    model = trainer.model.eval()
    # The processes have prompts of another length, and are not done at the same time.
    shorter = 2 * trainer.accelerator.process_index
    prompt = PROMPT[:, : PROMPT.shape[1] - shorter]
    new_tokens = 6 - shorter
    logits = model(input_ids=prompt).logits
    generated = trainer.accelerator.unwrap_model(model).generate(
        input_ids=prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return {"logs": torch.tensor(logs), "prompt": prompt, "logits": logits, "generated": generated}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    # A process that waits in vain gives up.
    seconds = 120
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        settings = {"ddp_backend": "gloo", "ddp_timeout": seconds}
    else:
        settings = {"use_cpu": True}
        # Not cpu:0 and cpu:1, where Transformers 5.5 cannot load a checkpoint to.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards between GPUs and their like only, so the CPUs pass for some.
        PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    for name in names:
        train(Path(folder), name, int(os.environ["WORLD_SIZE"]), **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
