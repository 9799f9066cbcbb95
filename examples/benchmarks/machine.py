"""The machine and versions of a measurement, to print beside it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine(device: str | None = None) -> str:
    """The processor and its threads, or the accelerator if `device` is one (by default: if there is one)."""
    if torch.cuda.is_available() if device is None else torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} CPUs"


def versions(*packages: str) -> str:
    """Versions of torch, transformers and peft, and of further packages."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", *packages))
