"""One engine with all adapters: every answer is Hugging Face's, whatever else is in the batch."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, Request, answer_of, answers, check, mixed, outputs, prompts, sampling
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError


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
        with pytest.raises(VLLMValidationError, match=r"no ReFT adapter 'emoji'; loaded are .*'active'"):
            answers(engine, [Request(ids, "all"), Request(ids, "emoji")])
        requests = [Request(ids, "all")]
        check(truth, requests, answers(engine, requests))

    @pytest.mark.parametrize(
        "asked", [{"strength": 1}, 3, {"name": "all", "power": 2}, {"name": [7]}, {"name": "all", "strength": "1"}]
    )
    def test_other_forms_than_the_known_ones_are_refused(self, engine, asked):
        params = SamplingParams(extra_args={"reft": asked})
        with pytest.raises(VLLMValidationError, match=r"reft=|strength"):
            engine.generate([{"prompt_token_ids": [7, 8]}], params, use_tqdm=False)

    def test_the_callers_arguments_stay_as_they_are(self, engine):
        params = SamplingParams(max_tokens=1, extra_args={"reft": "all"})
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
