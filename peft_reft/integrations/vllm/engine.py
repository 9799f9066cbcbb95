"""The plug-in in vLLM's engine: requests and their adapters, the scheduler's keys, adapters added at run time."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.cache_keys import block_key
from peft_reft.integrations.vllm.requests import Registry, Resolved
from peft_reft.integrations.vllm.settings import ADAPTERS, NO_BEAMS, NOT_SERVED, REQUEST, TARGETS, Settings


def prepare(config: VllmConfig, settings: Settings) -> None:
    """Check the adapters of an engine's configuration, and add the modules that they edit to its `additional_config`.

    Raises:
        ValueError: an adapter cannot be served, or not with this configuration.
    """
    _check_configuration(config)
    registry = registry_of(config)
    targets = set(settings.targets)
    for name, source in settings.adapters.items():
        adapter = registry.load(name, source)
        targets |= {f"{place.module} {place.side}" for place in adapter.places}
    # Compiled models contain the edits, so the edited modules must be part of their cache key.
    config.additional_config = {**config.additional_config, TARGETS: sorted(targets)}


def _check_configuration(config: VllmConfig) -> None:
    parallel, compilation = config.parallel_config, config.compilation_config
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE) and not current_platform.is_cpu()
    obstacles = {
        "an encoder-decoder model": config.model_config.is_encoder_decoder,
        f"runner={config.model_config.runner_type!r}": config.model_config.runner_type != "generate",
        "CUDA graphs (set enforce_eager=True)": graphs,
        "dual batch overlap (enable_dbo)": parallel.use_ubatching,
        "a KV connector, whose keys may not know which tokens are edited": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(config.cache_config.kv_sharing_fast_prefill),
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "sequence parallelism": bool(getattr(compilation.pass_config, "enable_sp", False)),
        "speculative decoding with asynchronous scheduling": (
            config.speculative_config is not None and bool(config.scheduler_config.async_scheduling)
        ),
    }
    for obstacle, present in obstacles.items():
        if present:
            raise ValueError(f"ReFT adapters ({ADAPTERS}) are not supported with {obstacle}.")


def registry_of(config: VllmConfig) -> Registry:
    """An empty registry for the model of a configuration."""
    model = config.model_config
    return Registry(model.model, model.get_hidden_size(), model.get_total_num_hidden_layers())


# In the process that receives requests.


def _init_input_processor(original: Any, self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
    original(self, vllm_config, *args, **kwargs)
    settings = Settings.of(vllm_config.additional_config)
    if settings is not None:
        self.reft = registry_of(vllm_config)
        for name, source in settings.adapters.items():
            self.reft.enter(name, self.reft.load(name, source), source)


def _process_inputs(
    original: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    asked = (getattr(params, "extra_args", None) or {}).get(REQUEST)
    if asked is None:
        return original(self, request_id, prompt, params, *args, **kwargs)
    if self.reft is None:
        raise VLLMValidationError(NOT_SERVED.format(f"{REQUEST}={asked!r}"), parameter=REQUEST)
    if kwargs.get("resumable"):
        raise VLLMValidationError(f"{REQUEST}={asked!r}: a streamed prompt has no end that edits could be placed by.")
    try:
        resolved = self.reft.resolve(asked)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=REQUEST) from error
    request = original(self, request_id, prompt, params, *args, **kwargs)
    # The engine's copy of the parameters; the caller's dictionary does not change.
    own = request.sampling_params
    own.extra_args = {**own.extra_args, REQUEST: vars(resolved)}
    return request


def _beam_search(original: Any, self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    # Each step of vLLM's beam search is a request of its own, whose prompt holds what was generated before.
    asked = (getattr(params, "extra_args", None) or {}).get(REQUEST)
    if asked is not None:
        raise VLLMValidationError(NO_BEAMS.format(f"{REQUEST}={asked!r}"), parameter=REQUEST)
    return original(self, prompts, params, *args, **kwargs)


# In the process of the scheduler.


def _initialize_kv_caches(original: Any, self: Any, vllm_config: VllmConfig) -> Any:
    # The first step of the scheduler's start with workers. Plug-ins are loaded in the middle of its `__init__`.
    initialized = original(self, vllm_config)
    if Settings.of(vllm_config.additional_config) is not None:
        self.reft, *others = (set(known) for known in self.collective_rpc("reft_try_out"))
        if any(known != self.reft for known in others):
            raise RuntimeError("The workers read different ReFT adapters: the folders changed while they started.")
    return initialized


def _preprocess_add_request(original: Any, self: Any, request: Any) -> Any:
    asked = Resolved.of(request.sampling_params)
    if asked is not None and asked.fingerprint not in (self.reft or ()):
        # The caller gets it as an exception, or as the response to its request.
        raise ValueError(f"The ReFT adapter {asked.name!r} was removed, or its folder changed, since the request came.")
    return original(self, request)


def _reft_add(self: Any, name: str, settings: str, tensors: bytes) -> None:
    fingerprint = Adapter.unpack(settings, tensors).fingerprint
    if fingerprint in self.reft:
        return
    try:
        self.collective_rpc("reft_add", args=(name, settings, tensors))
    except Exception:
        # Some workers may have added it.
        self.collective_rpc("reft_retire", args=(fingerprint, []))
        raise
    self.reft.add(fingerprint)


def _reft_retire(self: Any, fingerprint: str) -> None:
    self.reft.discard(fingerprint)
    users = [
        request.request_id
        for request in self.scheduler.requests.values()
        if (asked := Resolved.of(request.sampling_params)) is not None and asked.fingerprint == fingerprint
    ]
    self.collective_rpc("reft_retire", args=(fingerprint, users))


def _extra_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, start_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    own = block_key(request, start_token_idx, end_token_idx)
    return (keys if own is None else (*(keys or ()), own)), start_mm_idx


def add_methods() -> None:
    """Add the methods that `runtime` calls to the scheduler's process. Mutates vLLM's classes."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    # The value for engines that were started before.
    InputProcessor.reft = EngineCore.reft = None
    EngineCore.reft_add, EngineCore.reft_retire = _reft_add, _reft_retire


WRAPPERS = {
    "vllm.v1.engine.input_processor:InputProcessor.__init__": _init_input_processor,
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": _process_inputs,
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": _beam_search,
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches": _initialize_kv_caches,
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": _preprocess_add_request,
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": _extra_keys,
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys": _extra_keys,
}
