"""The plug-in in vLLM's workers: hooks when the model is loaded, a plan for each step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from vllm.config import CompilationMode

from peft_reft.integrations.vllm import wrapping
from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.plan import Chunk
from peft_reft.integrations.vllm.settings import Settings
from peft_reft.integrations.vllm.sites import BLOCK_OUTPUT, Target, attach, check_target, find_layers, target_of
from peft_reft.integrations.vllm.worker import WorkerState, edit, edit_running


def start(worker: Any, settings: Settings) -> WorkerState:
    """Hook a worker's model and load its first adapters. Mutates the model.

    Raises:
        ValueError: this model cannot serve an adapter, or a component.
    """
    model, config = worker.model_runner.get_model(), worker.model_config
    hidden_size, depth = config.get_hidden_size(), config.get_total_num_hidden_layers()
    layers = find_layers(model, depth)
    targets = {BLOCK_OUTPUT, *(target_of(component, layers) for component in settings.components)}
    targets |= {Target(*target.split(" ")) for target in settings.targets}
    for target in targets:
        check_target(target, next(iter(layers.values())), worker.parallel_config.tensor_parallel_size)
    eager = worker.vllm_config.compilation_config.mode == CompilationMode.NONE
    names = attach(layers, targets, hidden_size, edit_running if eager else edit)
    state = WorkerState(names, targets, set(layers), hidden_size, depth, worker.device, settings.memory_mib)
    for name, source in settings.adapters.items():
        state.add(name, Adapter.load(source))
    return state


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    settings = Settings.of(self.vllm_config.additional_config)
    if settings is not None:
        self.reft = start(self, settings)
        _follow_inputs(self.model_runner, self.reft, self.use_v2_model_runner)


def _follow_inputs(runner: Any, state: WorkerState, second: bool) -> None:
    """Have a model runner report the order and position of the requests in each pass. Mutates this runner."""
    name, chunks = ("prepare_inputs", _second_chunks) if second else ("_prepare_inputs", _first_chunks)
    original = getattr(runner, name, None)
    path = f"{type(runner).__name__}.{name}"
    if original is None:
        raise wrapping.unknown(f"{path} is missing")
    wrapping.check_function(path, original, ("scheduler_output",))

    @functools.wraps(original)
    def prepare(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(scheduler_output, *args, **kwargs)
        state.prepare(chunks(runner, inputs, scheduler_output))
        return inputs

    setattr(runner, name, prepare)


def _first_chunks(runner: Any, inputs: Any, scheduler_output: Any) -> Iterator[Chunk]:
    batch = runner.input_batch
    begins = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
    for request, begin in zip(batch.req_ids, begins, strict=True):
        yield Chunk(request, begin, scheduler_output.num_scheduled_tokens[request])


def _second_chunks(runner: Any, inputs: Any, scheduler_output: Any) -> Iterator[Chunk]:
    counts, begins = inputs.num_scheduled_tokens.tolist(), inputs.num_computed_tokens_np.tolist()
    yield from map(Chunk, inputs.req_ids, begins, counts)


def _execute_model(original: Any, self: Any, scheduler_output: Any) -> Any:
    if self.reft is None:
        return original(self, scheduler_output)
    self.reft.follow(scheduler_output)
    with self.reft.running():
        return original(self, scheduler_output)


def _reft_try_out(self: Any) -> list[str]:
    self.reft.try_out(self.execute_dummy_batch)
    return sorted(self.reft.adapters)


def _reft_add(self: Any, name: str, settings: str, tensors: bytes) -> None:
    self.reft.add(name, Adapter.unpack(settings, tensors))


def _reft_retire(self: Any, fingerprint: str, requests: list[str]) -> None:
    self.reft.retire(fingerprint, requests)


def add_methods() -> None:
    """Add the methods that the scheduler's process calls to workers. Mutates vLLM's class."""
    from vllm.v1.worker.gpu_worker import Worker

    # The value for engines that were started before.
    Worker.reft = None
    Worker.reft_try_out, Worker.reft_add, Worker.reft_retire = _reft_try_out, _reft_add, _reft_retire


WRAPPERS = {
    "vllm.v1.worker.gpu_worker:Worker.load_model": _load_model,
    "vllm.v1.worker.gpu_worker:Worker.execute_model": _execute_model,
}
