"""Adapters of a running engine: add, replace and remove them.

The scheduler and the workers get a new adapter before requests can name it, and drop an old one when the last request
that uses it is finished: every answer is generated with one set of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.requests import Registry
from peft_reft.integrations.vllm.settings import ADAPTERS

_IN_MEMORY = "in memory"


def adapters(engine: Any) -> dict[str, str]:
    """Name of each adapter that requests can name -> where it was loaded from.

    Args:
        engine: vLLM's `LLM`, `LLMEngine` or `AsyncLLM`.

    Raises:
        ValueError: the engine was started without `reft_adapters`.
    """
    return dict(_registry(_inner(engine)).sources)


def add_adapter(llm: Any, name: str, adapter: str | Adapter) -> None:
    """Serve a new adapter, or new weights under an existing name. Mutates the engine.

    Running requests keep the weights that they started with.

    Args:
        llm: vLLM's `LLM` or `LLMEngine`; for `AsyncLLM` see `add_adapter_async`.
        name: its name in requests.
        adapter: a folder, a hub id, or an `Adapter` in memory (`Adapter.of_model`).

    Raises:
        ValueError: it cannot be read, does not fit the model, or takes more memory than `reft_memory_mib` leaves; or
            the engine was started without `reft_adapters`, or has several API servers.
    """
    engine = _inner(llm)
    registry = _registry(engine)
    loaded = _loaded(registry, name, adapter)
    with _refusing(name):
        _call(engine.engine_core, "reft_add", name, *loaded.pack())
    unused = registry.enter(name, loaded, _source(adapter))
    if unused is not None:
        _call(engine.engine_core, "reft_retire", unused)


def remove_adapter(llm: Any, name: str) -> None:
    """Stop serving an adapter. Running requests finish with it. For the arguments see `add_adapter`.

    Raises:
        ValueError: there is no adapter of this name.
    """
    engine = _inner(llm)
    unused = _registry(engine).leave(name)
    if unused is not None:
        _call(engine.engine_core, "reft_retire", unused)


async def add_adapter_async(engine: Any, name: str, adapter: str | Adapter) -> None:
    """`add_adapter` for vLLM's `AsyncLLM`; same arguments and errors."""
    registry = _registry(engine)
    loaded = _loaded(registry, name, adapter)
    with _refusing(name):
        await engine.engine_core.call_utility_async("reft_add", name, *loaded.pack())
    unused = registry.enter(name, loaded, _source(adapter))
    if unused is not None:
        await engine.engine_core.call_utility_async("reft_retire", unused)


async def remove_adapter_async(engine: Any, name: str) -> None:
    """`remove_adapter` for vLLM's `AsyncLLM`; same arguments and errors."""
    unused = _registry(engine).leave(name)
    if unused is not None:
        await engine.engine_core.call_utility_async("reft_retire", unused)


def _loaded(registry: Registry, name: str, adapter: str | Adapter) -> Adapter:
    if isinstance(adapter, Adapter):
        registry.check(name, adapter)
        return adapter
    return registry.load(name, str(adapter))


def _source(adapter: str | Adapter) -> str:
    return _IN_MEMORY if isinstance(adapter, Adapter) or Adapter.is_url(str(adapter)) else str(adapter)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:
        # Errors from another process arrive as text.
        raise ValueError(f"The engine cannot serve the ReFT adapter {name!r}: {error}") from error


def _inner(llm: Any) -> Any:
    return getattr(llm, "llm_engine", llm)


def _registry(engine: Any) -> Registry:
    registry = getattr(engine.input_processor, "reft", None)
    if registry is None:
        raise ValueError(
            f"This engine was not prepared for ReFT adapters. Start it with additional_config={{'{ADAPTERS}': {{}}}}, "
            "with or without adapters in it."
        )
    if engine.vllm_config.parallel_config._api_process_count > 1:
        raise ValueError("With several API servers (api_server_count) adapters cannot be added or removed.")
    return registry


def _call(client: Any, method: str, *arguments: Any) -> None:
    core = getattr(client, "engine_core", None)
    if core is not None:  # in this process
        getattr(core, method)(*arguments)
    else:
        client.call_utility(method, *arguments)
