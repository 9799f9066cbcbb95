"""Serving from vLLM: every answer is Hugging Face's, whatever else is in the batch, the cache and the engine."""

from __future__ import annotations

import gc
import os

import pytest

# Read when vLLM is imported: one process, one thread, nothing sent anywhere.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
vllm = pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, Answer, HuggingFace, Request, answer_of, answers, mixed, outputs, prompts, sampling
from serving import save_adapter, save_model

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "block_size": 32,
    "max_model_len": 256,
    "disable_log_stats": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(root / name, model, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def truth(model, folders):
    return HuggingFace(model, folders)


@pytest.fixture(scope="module")
def start(model, folders):
    """Start an engine; the engine before it is stopped."""
    engines = []

    def start(adapters=folders, model=model, **options):
        stop()
        config = {"reft_adapters": {name: str(folder) for name, folder in adapters.items()}} if adapters is not None else {}
        extra = options.pop("additional_config", {})
        engines.append(vllm.LLM(str(model), **SMALL | {"additional_config": config | extra} | options))
        return engines[-1]

    def stop():
        if engines:
            engines.pop().llm_engine.engine_core.shutdown()
            gc.collect()

    yield start
    stop()


def check(truth: HuggingFace, requests: list[Request], given: list[Answer], logprob: float = 1e-4) -> None:
    """Every token is the best one there, or as good as it (a tie); log-probabilities agree."""
    assert len(requests) == len(given)
    for request, answer in zip(requests, given, strict=True):
        gaps, largest = truth.differences(request, answer)
        assert max(gaps) < 2e-5, f"{request.adapter}: a token that is {max(gaps)} less likely than the best"
        assert largest < logprob, f"{request.adapter}: log-probabilities differ by {largest}"


@pytest.fixture(scope="module")
def engine(start):
    return start()


class TestOneEngine:
    """Everything that one engine with all adapters can show."""

    def test_a_mixed_batch_answers_as_hugging_face_does(self, engine, truth):
        check(truth, mixed(), answers(engine, mixed()))

    def test_greedy_tokens_are_those_of_generate(self, engine, truth):
        requests = mixed(1, copies=1)
        assert [answer.tokens for answer in answers(engine, requests)] == [truth.generate(r, 12) for r in requests]

    def test_every_adapter_changes_the_answers(self, engine):
        ids = prompts(1, 5, 40, 40)[0]
        base, *others = answers(engine, [Request(ids), *(Request(ids, name) for name in ADAPTERS)])
        for name, other in zip(ADAPTERS, others, strict=True):
            assert other.logprobs != base.logprobs, name

    def test_prompts_of_every_length_from_one_token_on(self, engine, truth):
        requests = [Request(ids, name) for name in ADAPTERS for n in range(1, 9) for ids in prompts(1, n, n, n)]
        check(truth, requests, answers(engine, requests, 4))

    def test_four_samples_of_a_prompt_are_edited_alike(self, engine, truth):
        requests = mixed(2, copies=1)
        for request, output in zip(requests, outputs(engine, requests, n=4, temperature=1.0, seed=1), strict=True):
            assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
            for sample in output.outputs:
                assert truth.differences(request, answer_of(sample)).largest < 1e-4

    def test_strengths_of_one_adapter_in_a_batch(self, engine, truth):
        ids = prompts(1, 3, 30, 30)[0]
        requests = [Request(ids, name, s) for name in ("all", "active", "red") for s in (0.5, 1.0, -2.0, 0.25)]
        check(truth, requests, answers(engine, requests))

    def test_strength_zero_is_the_base_model(self, engine):
        ids = prompts(1, 4)[0]
        base, zero = answers(engine, [Request(ids), Request(ids, "all", 0.0)])
        assert base == zero

    def test_an_unknown_adapter_is_the_error_of_its_request_alone(self, engine, truth):
        ids = prompts(1, 6)[0]
        with pytest.raises(ValueError, match="no ReFT adapter 'emoji'; loaded are .*'active'"):
            answers(engine, [Request(ids, "all"), Request(ids, "emoji")])
        requests = [Request(ids, "all")]
        check(truth, requests, answers(engine, requests))

    @pytest.mark.parametrize("asked", [{"strength": 1}, 3, {"name": "all", "power": 2}, {"name": "all", "strength": "1"}])
    def test_other_forms_than_the_known_ones_are_refused(self, engine, asked):
        params = vllm.SamplingParams(extra_args={"reft": asked})
        with pytest.raises(ValueError, match="reft=|strength"):
            engine.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)

    def test_the_callers_arguments_stay_as_they_are(self, engine):
        params = vllm.SamplingParams(max_tokens=1, extra_args={"reft": "all"})
        engine.generate([{"prompt_token_ids": [7, 8]}] * 2, params, use_tqdm=False)
        assert params.extra_args == {"reft": "all"}

    def test_requests_aborted_in_the_middle_leave_the_others_right(self, engine, truth):
        core, requests = engine.llm_engine, mixed(8)
        for number, request in enumerate(requests):
            core.add_request(str(number), {"prompt_token_ids": list(request.ids)}, sampling(request, 10))
        finished, steps = {}, 0
        while core.has_unfinished_requests():
            finished |= {output.request_id: output for output in core.step() if output.finished}
            steps += 1
            if steps == 4:
                core.abort_request([str(number) for number in range(0, len(requests), 3)])
        kept = [number for number in range(len(requests)) if number % 3]
        given = [answer_of(finished[str(number)].outputs[0]) for number in kept]
        check(truth, [requests[number] for number in kept], given)
        state = core.engine_core.engine_core.model_executor.driver_worker.worker.reft
        answers(engine, [Request((7, 8, 9))], 1)
        assert len(state.requests) == 0
