"""Keys for blocks of vLLM's prefix cache: requests may share a block if its tokens get the same edits."""

from __future__ import annotations

from typing import Any

from peft_reft.integrations.vllm.chunks import edited_runs
from peft_reft.integrations.vllm.requests import Resolved


def block_key(request: Any, begin: int, end: int) -> tuple[str, str] | None:
    """The key of a block, besides its tokens and the blocks before it; None if none of its tokens is edited.

    A block's hash covers the blocks before it, so blocks after an edited one are never shared across different edits.

    Args:
        request: vLLM's `Request`.
        begin, end: the block's tokens, counted from the first one of the sequence.
    """
    asked = Resolved.of(request.sampling_params)
    if asked is None or asked.strength == 0:
        return None
    editing = asked.editing(request.num_prompt_tokens)
    runs = [
        (run.begin - begin, run.end - begin, run.unit)
        for run in edited_runs(editing.positions, editing.prompt, begin, end)
    ]
    return ("reft", f"{asked.fingerprint} {asked.strength!r} {sorted(runs)}") if runs else None
