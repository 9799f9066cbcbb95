"""Imports PEFT without a warning about a bitsandbytes kernel that this package disables.

PEFT imports bitsandbytes if it is installed. On CPUs with AVX512-BF16, bitsandbytes then logs "Failed to load CPU
gemm_4bit_forward": the kernel without a gradient that `quantized.forbid_packing` disables.
"""

from __future__ import annotations

import importlib
import logging


def _says_something_else(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_logger.addFilter(_says_something_else)
try:
    importlib.import_module("peft")
finally:
    _logger.removeFilter(_says_something_else)
