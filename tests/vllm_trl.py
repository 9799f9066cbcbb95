"""A small GRPO run with vLLM, for tests; and one of several processes of such a run:

torchrun --nproc_per_node 2 tests/vllm_trl.py MODEL FOLDER TENSOR_PARALLEL_SIZE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from serving import SMALL
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from peft_reft import ReftConfig
from peft_reft.integrations.trl import vllm_rollouts

# What TRL has no option for.
ENGINE = {name: SMALL[name] for name in ("dtype", "kv_cache_memory_bytes", "block_size")}


def trainer(folder: Path, model: Path, kind: type = GRPOTrainer, config: Any = None, **options: Any) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder),
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "report_to": [],
    }
    return kind(
        model=str(model),
        args={GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind](**settings | options),
        train_dataset=Dataset.from_dict({"prompt": ["w7 w8 w9 w10", "w11"] * 4}),
        reward_funcs=lambda completions, **others: [float(len(set(text.split()))) for text in completions],
        peft_config=config or ReftConfig(r=2, positions="f2+c3", init_weights=False, share_weights=False),
    )


def off_policy(made: GRPOTrainer) -> list[float]:
    """How far the log-probabilities of the completions in vLLM are from the trained model's, by step; TRL's own log."""
    name = "sampling/sampling_logp_difference/max"
    return [entry[name] for entry in made.state.log_history if name in entry]


def main(model: str, folder: str, tensor_parallel_size: str) -> None:
    with vllm_rollouts(**ENGINE):
        made = trainer(Path(folder), Path(model), vllm_tensor_parallel_size=int(tensor_parallel_size))
    made.train()
    told = {"processes": made.accelerator.num_processes, "off_policy": off_policy(made)}
    (Path(folder) / f"{made.accelerator.process_index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
