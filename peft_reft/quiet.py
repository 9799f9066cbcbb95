"""Imports PEFT without a warning about a kernel that adapters of this package do not let bitsandbytes use.

PEFT imports bitsandbytes where it is installed, which then says "Failed to load CPU gemm_4bit_forward" on CPUs with
AVX512-BF16: the kernel without a gradient of `quantized.forbid_packing`.
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
