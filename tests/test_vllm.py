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


def with_answers(llm, requests: list[Request], tokens: int = 40) -> list[Request]:
    """The same requests with their answers in the prompt, as the next turn of a chat brings them back."""
    given = answers(llm, requests, tokens, logprobs=None)
    return [r._replace(ids=r.ids + a.tokens) for r, a in zip(requests, [*given], strict=True)]


class TestPrefixCache:
    """Blocks are shared between requests whose tokens in them are edited alike, and between no others."""

    @pytest.fixture(scope="class")
    def ids(self):
        return prompts(1, 9, 100, 100)[0]

    @pytest.fixture
    def engine(self, engine):
        assert engine.llm_engine.engine_core.reset_prefix_cache()
        return engine

    def cached(self, engine, requests, tokens=1):
        """Prompt tokens that were found in the cache, one request after the other."""
        return [outputs(engine, [request], tokens)[0].num_cached_tokens for request in requests]

    def test_answers_do_not_depend_on_what_is_cached(self, engine, truth, ids):
        requests = [Request(ids, name) for name in [*ADAPTERS, None]]
        cold = answers(engine, requests, 40)
        warm = answers(engine, requests[::-1], 40)[::-1]
        check(truth, requests, cold)
        check(truth, requests, warm)
        returned = [r._replace(ids=r.ids + a.tokens) for r, a in zip(requests, cold, strict=True)]
        swapped = [r._replace(adapter=o.adapter) for r, o in zip(returned, requests[1:] + requests[:1], strict=True)]
        for again in (returned, swapped):
            check(truth, again, answers(engine, again))

    def test_without_the_keys_answers_are_wrong(self, engine, truth, ids, monkeypatch):
        from peft_reft.integrations.vllm import engine as plugin

        monkeypatch.setattr(plugin, "block_key", lambda *arguments: None)
        requests = [Request(ids, name) for name in [None, *ADAPTERS]]
        answers(engine, requests[:1], 1)
        wrong = [max(truth.differences(r, a).gaps) > 1e-3 for r, a in zip(requests, answers(engine, requests, 12), strict=True)]
        assert sum(wrong) > 3

    def test_completion_adapters_share_the_whole_prompt_with_each_other_and_the_base_model(self, engine, ids):
        requests = [Request(ids), Request(ids, "completion"), Request(ids), Request(ids, "completion", 0.5)]
        assert self.cached(engine, requests) == [0, 96, 96, 96]

    def test_prompt_adapters_share_what_comes_before_their_first_edit(self, engine, ids):
        # "attention" edits the last four of 100 tokens, behind the last whole block; "untied" the first three.
        assert self.cached(engine, [Request(ids), Request(ids, "attention"), Request(ids, "untied")]) == [0, 96, 0]
        shorter = ids[:66]  # the last four are in the second and the third block
        assert self.cached(engine, [Request(shorter, "attention"), Request(shorter, "attention")]) == [32, 64]

    def test_an_adapter_shares_with_itself_where_it_edits_the_same_tokens(self, engine, ids):
        longer = ids + ids[:20]
        # The first three tokens are edited alike, the last three of the shorter prompt are not edited in the longer.
        assert self.cached(engine, [Request(ids, "untied"), Request(ids, "untied"), Request(longer, "untied")]) == [0, 96, 96]
        assert self.cached(engine, [Request(ids[:64], "replacing"), Request(ids, "replacing")]) == [0, 32]

    def test_strengths_share_nothing_that_they_edit(self, engine, ids):
        requests = [Request(ids, "all"), Request(ids, "all", 0.5), Request(ids, "all"), Request(ids, "all", 0.0), Request(ids)]
        assert self.cached(engine, requests) == [0, 0, 96, 0, 96]

    def test_the_same_weights_under_another_name_share_everything(self, engine, folders, ids):
        from peft_reft.integrations.vllm import add_adapter, remove_adapter

        add_adapter(engine, "twin", str(folders["all"]))
        assert self.cached(engine, [Request(ids, "all"), Request(ids, "twin")]) == [0, 96]
        remove_adapter(engine, "twin")
        assert self.cached(engine, [Request(ids, "all")]) == [96]


class TestRunTime:
    """Adapters come, change and go while an engine serves."""

    @pytest.fixture(scope="class")
    def other(self, model, tmp_path_factory):
        return save_adapter(tmp_path_factory.mktemp("other"), model, 77, **ADAPTERS["all"] | {"r": 5})

    @pytest.fixture(scope="class")
    def engine(self, start, folders):
        return start({name: folders[name] for name in ("all", "untied")})

    @pytest.fixture(scope="class")
    def truth(self, model, folders, other):
        return HuggingFace(model, {**folders, "other": other})

    def state(self, engine):
        return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.reft

    def test_an_adapter_is_added_and_removed(self, engine, truth, folders):
        from peft_reft.integrations.vllm import adapters, add_adapter, remove_adapter

        requests = [Request(ids, name) for ids, name in zip(prompts(3), ("completion", "all", None), strict=True)]
        with pytest.raises(ValueError, match="no ReFT adapter 'completion'"):
            answers(engine, requests)
        add_adapter(engine, "completion", str(folders["completion"]))
        assert adapters(engine).keys() == {"all", "untied", "completion"}
        check(truth, requests, answers(engine, requests))
        remove_adapter(engine, "completion")
        with pytest.raises(ValueError, match="no ReFT adapter 'completion'"):
            answers(engine, requests)
        with pytest.raises(ValueError, match="no ReFT adapter 'completion'"):
            remove_adapter(engine, "completion")
        check(truth, requests[1:], answers(engine, requests[1:]))
        assert len(self.state(engine).adapters) == 2

    def test_new_weights_under_a_name_are_used_at_once_and_not_mixed_with_cached_blocks(self, engine, truth, folders, other):
        from peft_reft.integrations.vllm import add_adapter

        ids = prompts(1, 3, 80, 80)[0]
        check(truth, [Request(ids, "all")], answers(engine, [Request(ids, "all")]))
        add_adapter(engine, "all", str(other))
        check(truth, [Request(ids, "other")], answers(engine, [Request(ids, "all")]))
        add_adapter(engine, "all", str(folders["all"]))
        check(truth, [Request(ids, "all")], answers(engine, [Request(ids, "all")]))
        assert len(self.state(engine).adapters) == 2

    def test_requests_under_way_keep_the_weights_that_they_began_with(self, engine, truth, folders, other):
        from peft_reft.integrations.vllm import add_adapter

        core, ids = engine.llm_engine, prompts(1, 4)[0]
        core.add_request("before", {"prompt_token_ids": list(ids)}, sampling(Request(ids, "all"), 12))
        for _ in range(4):
            core.step()
        core.add_request("waiting", {"prompt_token_ids": list(ids)}, sampling(Request(ids, "all"), 12))
        add_adapter(engine, "all", str(other))
        core.add_request("behind", {"prompt_token_ids": list(ids)}, sampling(Request(ids, "all"), 12))
        assert len(self.state(engine).adapters) == 3
        finished = {}
        while core.has_unfinished_requests():
            finished |= {output.request_id: output for output in core.step() if output.finished}
        names = {"before": "all", "waiting": "all", "behind": "other"}
        check(truth, [Request(ids, name) for name in names.values()], [answer_of(finished[n].outputs[0]) for n in names])
        answers(engine, [Request(ids)], 1)
        assert len(self.state(engine).adapters) == 2
        add_adapter(engine, "all", str(folders["all"]))

    def test_an_adapter_in_memory_is_served_as_it_is_now(self, engine, truth):
        from peft_reft.integrations.vllm import Adapter, add_adapter, remove_adapter

        truth.model.set_adapter("counted")
        add_adapter(engine, "training", Adapter.of_model(truth.model, "counted"))
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "counted")], answers(engine, [Request(ids, "training")]))
        remove_adapter(engine, "training")

    def test_a_folder_may_vanish_while_its_adapter_is_served(self, start, engine, truth, folders, tmp_path):
        import shutil

        from peft_reft.integrations.vllm import add_adapter, remove_adapter

        shutil.copytree(folders["red"], tmp_path / "red")
        add_adapter(engine, "red", str(tmp_path / "red"))
        shutil.rmtree(tmp_path / "red")
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "red")]))
        with pytest.raises(ValueError, match="cannot be read"):
            add_adapter(engine, "red", str(tmp_path / "red"))
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "red")]))
        remove_adapter(engine, "red")

    def test_a_component_that_the_engine_was_not_prepared_for_is_refused(self, engine, folders):
        from peft_reft.integrations.vllm import add_adapter

        with pytest.raises(ValueError, match=r"output of 'self_attn.o_proj'.*reft_components"):
            add_adapter(engine, "attention", str(folders["attention"]))

    def test_an_engine_prepared_for_a_component_takes_it_later(self, start, truth, folders):
        from peft_reft.integrations.vllm import add_adapter

        wider = {"reft_components": ["attention_output", "mlp_output", "block_input"]}
        engine = start({}, additional_config=wider)
        for name in ("attention", "mlp", "into_blocks"):
            add_adapter(engine, name, str(folders[name]))
        requests = [Request(ids, n) for ids, n in zip(prompts(4), ("attention", "mlp", "into_blocks", None), strict=True)]
        check(truth, requests, answers(engine, requests))

    def test_memory_is_bounded_by_an_option(self, start, model, folders, tmp_path):
        from peft_reft.integrations.vllm import add_adapter

        engine = start({"all": folders["all"]}, additional_config={"reft_memory_mib": 1})
        for number in range(3):
            save_adapter(tmp_path / str(number), model, number, r=64, positions="f1+l1+c1", share_weights=False)
        add_adapter(engine, "0", str(tmp_path / "0"))
        add_adapter(engine, "1", str(tmp_path / "1"))
        with pytest.raises(ValueError, match=r"'2' takes 0.\d MiB.*more than reft_memory_mib=1"):
            add_adapter(engine, "2", str(tmp_path / "2"))
