"""vLLM's entry point: called in each of its processes, before anything else.

At first it only wraps the creation of an engine's configuration. Everything else is wrapped when a configuration has
ReFT adapters, in this process and, through an environment variable, in its child processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft_reft.integrations.vllm import wrapping
from peft_reft.integrations.vllm.settings import NOT_SERVED, REQUEST, Settings

_FLAG = "PEFT_REFT_SERVES"
_SERVER = "vllm.entrypoints.openai.models.serving"

_done: set[str] = set()
# Arguments for engines that other code starts.
_arguments: ContextVar[dict[str, Any] | None] = ContextVar("engine_arguments", default=None)


def register() -> None:
    """Register ReFT adapters with vLLM; engines without them do not change. Safe to call again. Mutates vLLM."""
    if os.environ.get(_FLAG):
        install()
    if "register" not in _done:
        wrapping.wrap(wrapping.ENGINE_CONFIG, _create_engine_config)
        _done.add("register")


def install() -> None:
    """Wrap the functions that adapters need. Mutates vLLM's classes in this process.

    Raises:
        UnknownVersion: this version of vLLM lacks one of these functions, or an argument of one.
    """
    if "install" in _done:
        return
    serves = _SERVER in sys.modules  # other processes should not import the server
    symbols = wrapping.FRONT | wrapping.CORE | wrapping.WORKER | (wrapping.SERVER if serves else {})
    for path, parameters in symbols.items():
        wrapping.check(path, parameters)
    from peft_reft.integrations.vllm import engine, steps

    wrappers = engine.WRAPPERS | steps.WRAPPERS
    if serves:
        from peft_reft.integrations.vllm import server

        wrappers |= server.WRAPPERS
    for path, around in wrappers.items():
        wrapping.wrap(path, around)
    engine.add_methods()
    steps.add_methods()
    _done.update(("install", "refuse"))


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """Override arguments of vLLM's `EngineArgs` for engines that are started in this block.

    Raises:
        ValueError: raised by the engine, which has no such argument.
    """
    register()
    token = _arguments.set(arguments)
    try:
        yield
    finally:
        _arguments.reset(token)


def _create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    for name, value in (_arguments.get() or {}).items():
        if not hasattr(self, name):
            raise ValueError(f"vLLM's EngineArgs has no argument {name!r}.")
        setattr(self, name, value)
    config = original(self, *args, **kwargs)
    settings = Settings.of(config.additional_config)
    if settings is None:
        _refuse_requests()
        return config
    install()
    from peft_reft.integrations.vllm.engine import prepare

    os.environ[_FLAG] = "1"
    prepare(config, settings)
    return config


def _refuse_requests() -> None:
    """Have an engine without adapters refuse requests for one, which otherwise would get the base model's answer."""
    path = "vllm.v1.engine.input_processor:InputProcessor.process_inputs"
    try:
        wrapping.check(path, wrapping.FRONT[path])
    except wrapping.UnknownVersion:
        return
    if "refuse" not in _done:
        wrapping.wrap(path, _process_inputs)
        _done.add("refuse")


def _process_inputs(
    original: Any, self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    asked = (getattr(params, "extra_args", None) or {}).get(REQUEST)
    if asked is not None and getattr(self, "reft", None) is None:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(NOT_SERVED.format(f"{REQUEST}={asked!r}"), parameter=REQUEST)
    return original(self, request_id, prompt, params, *args, **kwargs)
