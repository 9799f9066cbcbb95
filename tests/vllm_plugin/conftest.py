"""What the tests of serving share: a model, adapters of all kinds, and engines, of which one lives at a time."""

from __future__ import annotations

import gc
import logging
import os

import pytest
from serving import ADAPTERS, SMALL, HuggingFace, save_adapter, save_model

# Read when vLLM is imported: one process, one thread, nothing sent anywhere.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def folders(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(root / name, model, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="session")
def truth(model, folders):
    return HuggingFace(model, folders)


@pytest.fixture(scope="session")
def start(model, folders):
    """Start an engine; the engine before it is stopped."""
    from vllm import LLM

    engines = []

    def start(adapters=folders, model=model, **options):
        stop()
        config = (
            {"reft_adapters": {name: str(folder) for name, folder in adapters.items()}} if adapters is not None else {}
        )
        extra = options.pop("additional_config", {})
        engines.append(LLM(str(model), **SMALL | {"additional_config": config | extra} | options))
        return engines[-1]

    def stop():
        if engines:
            engines.pop().llm_engine.engine_core.shutdown()
            gc.collect()

    yield start
    stop()


@pytest.fixture
def log(monkeypatch):
    """The lines that the plug-in logs; vLLM's loggers do not hand theirs on to pytest."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.peft_reft")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    yield lines
    logger.manager._clear_cache()


@pytest.fixture(scope="module")
def engine(start):
    return start()
