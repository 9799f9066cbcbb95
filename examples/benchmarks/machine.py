"""On what a number was measured: to be printed beside it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> str:
    """The accelerator if there is one, else the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs"


def versions(*packages: str) -> str:
    """Versions of torch, transformers and peft, and of further packages."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", *packages))
