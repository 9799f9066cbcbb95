"""Which requests may share a block of vLLM's prefix cache: those whose tokens in it are edited alike."""

from __future__ import annotations

from typing import Any

from peft_reft.integrations.vllm.chunks import edited_runs
from peft_reft.integrations.vllm.requests import Resolved


def block_key(request: Any, begin: int, end: int) -> tuple[str, str] | None:
    """What sets a block apart, besides its tokens and the blocks before it; None if none of its tokens is edited.

    A block's hash covers those before it, so that what comes behind the first edit is never shared with another edit.

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
