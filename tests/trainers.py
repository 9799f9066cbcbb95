"""The arguments of every trainer in the tests: a few steps on a CPU, without files and reports."""

from __future__ import annotations

ON_A_CPU = {
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
}
