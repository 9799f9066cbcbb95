"""The plug-in in vLLM's OpenAI server: an adapter is a model, and is loaded like LoRA adapters.

A request names an adapter as its `model`, as `"reft": "name"` or `"reft": {"name": ..., "strength": ...}`, or among
`vllm_xargs`. The routes `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` (enabled by vLLM's environment variable
VLLM_ALLOW_RUNTIME_LORA_UPDATING) take ReFT adapters too, by path or in the request (`Adapter.to_url`).
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.exceptions import VLLMValidationError

from peft_reft.config import ReftConfig
from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.requests import Registry
from peft_reft.integrations.vllm.runtime import add_adapter_async, remove_adapter_async
from peft_reft.integrations.vllm.settings import NO_BEAMS, REQUEST

# The adapters that a server's requests can name; a process has one server.
_served: Registry | None = None


def _registry(models: Any) -> Registry | None:
    global _served
    _served = getattr(models.input_processor, "reft", None)
    return _served


def _is_base_model(original: Any, self: Any, model_name: str) -> bool:
    """Whether a name needs no LoRA adapter: the base model, or a ReFT adapter."""
    registry = _registry(self)
    return original(self, model_name) or (registry is not None and model_name in registry.adapters)


async def _show_available_models(original: Any, self: Any) -> Any:
    listed, registry = await original(self), _registry(self)
    for name, source in (registry.sources if registry is not None else {}).items():
        parent = self.base_model_paths[0].name
        listed.data.append(ModelCard(id=name, root=source, parent=parent, permission=[ModelPermission()]))
    return listed


def _to_sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    params, asked = original(self, *args, **kwargs), _asked(self)
    if asked is not None:
        params.extra_args = {**(params.extra_args or {}), REQUEST: asked}
    return params


def _to_beam_search_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (asked := _asked(self)) is not None:
        raise VLLMValidationError(NO_BEAMS.format(f"{REQUEST}={asked!r}"), parameter=REQUEST)
    return original(self, *args, **kwargs)


def _asked(request: Any) -> Any:
    """The adapter that a request names; the most specific of several ways counts."""
    for arguments in (request.vllm_xargs, request.model_extra):
        if (asked := (arguments or {}).get(REQUEST)) is not None:
            return asked
    return request.model if _served is not None and request.model in _served.adapters else None


async def _load_adapter(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    registry = _registry(self)
    if registry is None or not _is_reft(request.lora_path):
        return await original(self, request, *args, **kwargs)
    name = request.lora_name
    known = name in registry.adapters
    if (known and not request.load_inplace) or (not known and (self.is_base_model(name) or name in self.lora_requests)):
        return create_error_response(
            f"There is a model or an adapter {name!r} already; set 'load_inplace' to true to replace a ReFT adapter."
        )
    try:
        await add_adapter_async(self.engine_client, name, request.lora_path)
    except ValueError as error:
        return create_error_response(error)
    return f"Success: ReFT adapter '{name}' added successfully."


async def _unload_adapter(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    registry = _registry(self)
    if registry is None or request.lora_name not in registry.adapters:
        return await original(self, request, *args, **kwargs)
    await remove_adapter_async(self.engine_client, request.lora_name)
    return f"Success: ReFT adapter '{request.lora_name}' removed successfully."


def _is_reft(source: str) -> bool:
    if Adapter.is_url(source):
        return True
    try:
        return isinstance(PeftConfig.from_pretrained(source), ReftConfig)
    except Exception:  # vLLM reports what is wrong with it
        return False


_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_PROTOCOL = "vllm.entrypoints.openai"
WRAPPERS = {
    f"{_MODELS}.is_base_model": _is_base_model,
    f"{_MODELS}.show_available_models": _show_available_models,
    f"{_MODELS}.load_lora_adapter": _load_adapter,
    f"{_MODELS}.unload_lora_adapter": _unload_adapter,
    f"{_PROTOCOL}.chat_completion.protocol:ChatCompletionRequest.to_sampling_params": _to_sampling_params,
    f"{_PROTOCOL}.completion.protocol:CompletionRequest.to_sampling_params": _to_sampling_params,
    f"{_PROTOCOL}.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params": _to_beam_search_params,
    f"{_PROTOCOL}.completion.protocol:CompletionRequest.to_beam_search_params": _to_beam_search_params,
    f"{_PROTOCOL}.responses.protocol:ResponsesRequest.to_sampling_params": _to_sampling_params,
}
