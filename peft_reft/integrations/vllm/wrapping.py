"""Finds, checks and wraps functions of vLLM that it has no extension point for."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

KNOWN_VERSIONS = ("0.32.0",)

# vLLM's functions that are wrapped, and the parameters that the wrappers rely on.
ENGINE_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_engine_config"
FRONT = {
    "vllm.v1.engine.input_processor:InputProcessor.__init__": ("self", "vllm_config"),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ("self", "request_id", "prompt", "params"),
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": ("self", "prompts", "params"),
}
CORE = {
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches": ("self", "vllm_config"),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ("self", "request"),
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ),
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ),
}
WORKER = {
    "vllm.v1.worker.gpu_worker:Worker.load_model": ("self", "load_dummy_weights"),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch": ("self",),
}
SERVER = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.is_base_model": ("self", "model_name"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": ("self",),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter": ("self", "request"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter": ("self", "request"),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params": ("self",),
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params": ("self",),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params": ("self",),
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params": ("self",),
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params": ("self",),
}


class UnknownVersion(RuntimeError):
    """The plug-in does not support this version of vLLM."""


def find(path: str) -> tuple[Any, str, Callable]:
    """Owner, name and function of a path `module:Class.function`.

    Raises:
        UnknownVersion: there is no such function.
    """
    module, _, names = path.partition(":")
    *parents, name = names.split(".")
    try:
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise unknown(f"{path} is missing ({error})") from error


def check(path: str, parameters: tuple[str, ...]) -> None:
    """Raise `UnknownVersion` if a function is missing, or does not take these parameters."""
    check_function(path, find(path)[2], parameters)


def check_function(path: str, function: Callable, parameters: tuple[str, ...]) -> None:
    has = tuple(inspect.signature(function).parameters)
    if missing := [parameter for parameter in parameters if parameter not in has]:
        raise unknown(f"{path} takes {list(has)}, without {missing}")


def wrap(path: str, around: Callable) -> None:
    """Call `around(original, *arguments)` in place of a function. Mutates its class or module."""
    owner, name, original = find(path)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapper)


def unknown(found: str) -> UnknownVersion:
    """An error that names the difference that was found, and the known versions."""
    import vllm

    return UnknownVersion(
        f"peft_reft cannot serve ReFT adapters from vLLM {vllm.__version__}: {found}. It knows vLLM "
        f"{', '.join(KNOWN_VERSIONS)}. Install one of these, or serve without reft_adapters."
    )
