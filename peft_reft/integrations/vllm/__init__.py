"""Serve ReFT adapters from vLLM: a plug-in of the unmodified engine.

vLLM finds it by its entry point, so nothing needs to be imported:

    from vllm import LLM, SamplingParams

    served = {"reft_adapters": {"emoji": "emoji-adapter"}}
    llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct", additional_config=served, enforce_eager=True)
    llm.generate(prompts, SamplingParams(max_tokens=50, extra_args={"reft": "emoji"}))
"""

from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.runtime import (
    adapters,
    add_adapter,
    add_adapter_async,
    remove_adapter,
    remove_adapter_async,
)

__all__ = ["Adapter", "adapters", "add_adapter", "add_adapter_async", "remove_adapter", "remove_adapter_async"]
