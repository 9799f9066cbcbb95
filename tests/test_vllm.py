"""Serving from vLLM: every answer is Hugging Face's, whatever else is in the batch, the cache and the engine."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

# Read when vLLM is imported: one process, one thread, nothing sent anywhere.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
vllm = pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import (  # noqa: E402
    ADAPTERS,
    VOCAB,
    Answer,
    HuggingFace,
    Request,
    answer_of,
    answers,
    mixed,
    outputs,
    prompts,
    sampling,
    save_adapter,
    save_model,
)
from tiny import build, tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from vllm.exceptions import VLLMValidationError  # noqa: E402

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}

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
        config = (
            {"reft_adapters": {name: str(folder) for name, folder in adapters.items()}} if adapters is not None else {}
        )
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
        with pytest.raises(VLLMValidationError, match=r"no ReFT adapter 'emoji'; loaded are .*'active'"):
            answers(engine, [Request(ids, "all"), Request(ids, "emoji")])
        requests = [Request(ids, "all")]
        check(truth, requests, answers(engine, requests))

    @pytest.mark.parametrize(
        "asked", [{"strength": 1}, 3, {"name": "all", "power": 2}, {"name": [7]}, {"name": "all", "strength": "1"}]
    )
    def test_other_forms_than_the_known_ones_are_refused(self, engine, asked):
        params = vllm.SamplingParams(extra_args={"reft": asked})
        with pytest.raises(VLLMValidationError, match=r"reft=|strength"):
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
        wrong = [
            max(truth.differences(r, a).gaps) > 1e-3
            for r, a in zip(requests, answers(engine, requests, 12), strict=True)
        ]
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
        assert self.cached(engine, [Request(ids, "untied"), Request(ids, "untied"), Request(longer, "untied")]) == [
            0,
            96,
            96,
        ]
        assert self.cached(engine, [Request(ids[:64], "replacing"), Request(ids, "replacing")]) == [0, 32]

    def test_strengths_share_nothing_that_they_edit(self, engine, ids):
        requests = [
            Request(ids, "all"),
            Request(ids, "all", 0.5),
            Request(ids, "all"),
            Request(ids, "all", 0.0),
            Request(ids),
        ]
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
        with pytest.raises(VLLMValidationError, match="no ReFT adapter 'completion'"):
            answers(engine, requests)
        add_adapter(engine, "completion", str(folders["completion"]))
        assert adapters(engine).keys() == {"all", "untied", "completion"}
        check(truth, requests, answers(engine, requests))
        remove_adapter(engine, "completion")
        with pytest.raises(VLLMValidationError, match="no ReFT adapter 'completion'"):
            answers(engine, requests)
        with pytest.raises(ValueError, match="no ReFT adapter 'completion'"):
            remove_adapter(engine, "completion")
        check(truth, requests[1:], answers(engine, requests[1:]))
        assert len(self.state(engine).adapters) == 2

    def test_new_weights_under_a_name_are_used_at_once_and_not_mixed_with_cached_blocks(
        self, engine, truth, folders, other
    ):
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
        check(
            truth, [Request(ids, name) for name in names.values()], [answer_of(finished[n].outputs[0]) for n in names]
        )
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
        requests = [
            Request(ids, n) for ids, n in zip(prompts(4), ("attention", "mlp", "into_blocks", None), strict=True)
        ]
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


class TestEngines:
    """The same answers from engines that cut, keep and order the work in other ways."""

    def test_a_prefill_in_small_chunks(self, start, truth):
        engine = start(max_num_batched_tokens=32, max_num_seqs=8)
        requests = mixed(4)
        check(truth, requests, answers(engine, requests))

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_cache_too_small_for_the_batch(self, start, truth, cached):
        engine = start(num_gpu_blocks_override=16, enable_prefix_caching=cached, max_num_seqs=26)
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        preempt, count = scheduler._preempt_request, []
        scheduler._preempt_request = lambda *args, **kwargs: (count.append(1), preempt(*args, **kwargs))[1]
        requests = mixed(5)
        check(truth, requests, answers(engine, requests, 40))
        assert len(count) >= 5

    def test_bfloat16_is_as_near_to_float32_as_in_hugging_face(self, start, model, folders, truth):
        """How far that is depends on the adapter, more than the base model's distance, there as much as here."""
        half = HuggingFace(model, folders, torch.bfloat16)
        requests = mixed(10)
        own, theirs = {}, {}
        for request, answer in zip(requests, answers(start(dtype="bfloat16"), requests), strict=True):
            whole, rounded = truth.logprobs(request, answer.tokens), half.logprobs(request, answer.tokens)
            for place, logprobs in enumerate(answer.logprobs):
                for token, logprob in logprobs.items():
                    own.setdefault(request.adapter, []).append(abs(logprob - whole[place, token].item()))
                    theirs.setdefault(request.adapter, []).append(abs((rounded - whole)[place, token].item()))
        for adapter in own:
            assert fmean(own[adapter]) < 1.5 * fmean(theirs[adapter]) + 2e-3, adapter

    @pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
    def test_random_requests_with_aborts_are_answered_right_and_leave_nothing(self, start, truth, count):
        core = start(num_gpu_blocks_override=40, max_num_batched_tokens=128, max_num_seqs=16).llm_engine
        chance = random.Random(count)
        waiting = [Request(ids, chance.choice([*ADAPTERS, None])) for ids in prompts(count, count)]
        running, kept, aborted = {}, [], 0
        while waiting or core.has_unfinished_requests():
            for _ in range(min(chance.randrange(4), len(waiting))):
                number, request = str(len(waiting)), waiting.pop()
                core.add_request(
                    number, {"prompt_token_ids": list(request.ids)}, sampling(request, chance.randint(1, 20))
                )
                running[number] = request
            for output in core.step():
                if output.finished:
                    kept.append((running.pop(output.request_id), answer_of(output.outputs[0])))
            if running and chance.random() < 0.1:
                victim = chance.choice(list(running))
                core.abort_request([victim])
                del running[victim]
                aborted += 1
        assert aborted > count // 50
        assert len(kept) + aborted == count
        check(truth, *zip(*kept, strict=True))
        core.add_request("last", {"prompt_token_ids": [7, 8]}, sampling(Request((7, 8)), 1))
        while core.has_unfinished_requests():
            core.step()
        state = core.engine_core.engine_core.model_executor.driver_worker.worker.reft
        assert not state.requests
        assert not state.retired
        assert state.plan is None

    def test_lora_beside_reft(self, start, model, folders, truth, tmp_path):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        tuned = get_peft_model(base, lora)
        tuned.save_pretrained(tmp_path / "lora")
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
        both = HuggingFace(tmp_path / "merged", folders)
        engine = start(enable_lora=True, max_lora_rank=8)
        requests = mixed(6, copies=1)
        asked = vllm.lora.request.LoRARequest("lora", 1, str(tmp_path / "lora"))
        for _ in range(2):  # the second time from the cache
            check(truth, requests, answers(engine, requests))
            given = engine.generate(
                [{"prompt_token_ids": list(r.ids)} for r in requests],
                [sampling(r) for r in requests],
                lora_request=asked,
                use_tqdm=False,
            )
            check(both, requests, [answer_of(output.outputs[0]) for output in given], 2e-4)

    def test_the_scheduler_in_another_process(self, start, truth, folders, monkeypatch):
        from peft_reft.integrations.vllm import add_adapter, remove_adapter

        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        engine = start({name: folders[name] for name in ADAPTERS if name != "red"})
        requests = [request for request in mixed(7) if request.adapter != "red"]
        check(truth, requests, answers(engine, requests))
        with pytest.raises(VLLMValidationError, match="no ReFT adapter 'red'"):
            answers(engine, mixed(7))
        add_adapter(engine, "red", str(folders["red"]))
        check(truth, mixed(7), answers(engine, mixed(7)))
        with pytest.raises(ValueError, match="cannot be read"):
            add_adapter(engine, "red", str(folders["red"] / "nothing"))
        remove_adapter(engine, "red")
        with pytest.raises(VLLMValidationError, match="no ReFT adapter 'red'"):
            answers(engine, mixed(7))
        check(truth, requests, answers(engine, requests))

    def run(self, tmp_path, model, folders, rounds, tokens=12, second=False, **options):
        """The answers of an engine in a process of its own."""
        engine = SMALL | {
            "model": str(model),
            "additional_config": {"reft_adapters": {name: str(folder) for name, folder in folders.items()}},
        }
        task = {"engine": engine | options, "rounds": rounds, "tokens": tokens, "second": second}
        path = tmp_path / "task.json"
        path.write_text(json.dumps(task))
        environment = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        script = Path(__file__).parent / "vllm_run.py"
        subprocess.run([sys.executable, str(script), str(path)], env=environment, check=True, timeout=500)
        written = json.loads(path.with_suffix(".answers").read_text())
        return [[Answer(tuple(tokens), tuple(map(dict, places))) for tokens, places in answers] for answers in written]

    def test_a_compiled_model(self, tmp_path, model, folders, truth):
        swapped = [r._replace(adapter=o.adapter) for r, o in zip(mixed(8), mixed(8)[1:], strict=False)]
        rounds = [mixed(8), mixed(8), swapped]
        for requests, given in zip(
            rounds, self.run(tmp_path, model, folders, rounds, enforce_eager=False), strict=True
        ):
            check(truth, requests, given)

    @pytest.mark.slow
    def test_two_tensor_parallel_workers(self, tmp_path, model, folders, truth):
        rounds = [mixed(8), mixed(8)]
        given = self.run(tmp_path, model, folders, rounds, tensor_parallel_size=2)
        for requests, answered in zip(rounds, given, strict=True):
            check(truth, requests, answered)

    @pytest.mark.slow
    def test_two_pipeline_stages(self, tmp_path, model, folders, truth):
        # Compiled: on a CPU only the warm-up of a compiled model makes the buffer between the stages.
        rounds = [mixed(8), mixed(8)]
        given = self.run(tmp_path, model, folders, rounds, pipeline_parallel_size=2, enforce_eager=False)
        for requests, answered in zip(rounds, given, strict=True):
            check(truth, requests, answered)

    def test_the_second_model_runner_with_small_chunks_and_preemption(self, tmp_path, model, folders, truth):
        rounds = [mixed(9, copies=1), mixed(9, copies=1)]
        options = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 10, "max_num_seqs": 16}
        given = self.run(tmp_path, model, folders, rounds, 16, second=True, **options)
        for requests, answered in zip(rounds, given, strict=True):
            check(truth, requests, answered)


FAMILIES = {
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256}),
    "opt": (
        OPTConfig,
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 64,
        },
    ),
    "qwen3": (Qwen3Config, LLAMA | {"head_dim": 32}),
    "gemma3": (Gemma3TextConfig, LLAMA | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        LLAMA | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}


class TestFamilies:
    @pytest.mark.parametrize(
        "family",
        ["gpt2", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "qwen3", "qwen3_moe"))],
    )
    def test_a_model_of_another_family(self, start, tmp_path, family):
        config_class, settings = FAMILIES[family]
        config = config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
        initial = "init_std" if family == "opt" else "initializer_range"
        setattr(config, initial, 0.2)
        model = build(lambda config: AutoModelForCausalLM.from_config(config), config)
        model.save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        kinds = {name: ADAPTERS[name] for name in ("untied", "all", "red", "into_blocks", "attention")}
        kinds["mlp"] = {"r": 4, "positions": "all", "component": "mlp_output"}
        if family == "qwen3_moe":
            del kinds["mlp"]
        adapters = {name: save_adapter(tmp_path / name, tmp_path / "model", **kind) for name, kind in kinds.items()}
        truth = HuggingFace(tmp_path / "model", adapters)
        engine = start(adapters, tmp_path / "model")
        requests = [Request(ids, name) for ids, name in zip(prompts(14), [*adapters, None] * 2, strict=False)]
        check(truth, requests, answers(engine, requests))


class TestRefusals:
    """What cannot be served is refused when it is loaded, by name."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_modules": ["q_proj"]}, "no module 'self_attn.q_proj': it fuses modules"),
            ({"target_modules": ["self_attn"]}, "'self_attn' in LlamaDecoderLayer is a LlamaAttention"),
            ({"target_modules": ["gate_proj"]}, "size 128 at 0.mlp.gate_proj.output"),
            ({"target_modules": ["input_layernorm"]}, "is a RMSNorm, whose output cannot be edited"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
            ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
            ({"target_modules": ["embed_tokens"]}, "belongs to no intervention in a numbered layer"),
        ],
    )
    def test_an_adapter_that_vllm_cannot_serve(self, start, model, tmp_path, settings, message):
        folder = save_adapter(tmp_path / "adapter", model, **{"r": 2, "positions": "all"} | settings)
        with pytest.raises(ValueError, match=message):
            start({"it": folder})

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 32}, "'it' edits representations of size 32 .* hidden size 64. It was trained on"),
            ({"num_hidden_layers": 6}, "'it' edits layer 4, but the served model has 4 layers. It was trained on"),
        ],
    )
    def test_an_adapter_of_another_model(self, start, tmp_path, sizes, message):
        other = save_model(tmp_path / "model", **sizes)
        folder = save_adapter(tmp_path / "adapter", other, r=2, positions="all")
        with pytest.raises(ValueError, match=message):
            start({"it": folder})

    def test_an_engine_that_the_plug_in_does_not_know(self, start):
        with pytest.raises(ValueError, match="not supported with runner='pooling'"):
            start(runner="pooling")

    def test_a_misspelled_option(self, start):
        with pytest.raises(ValueError, match="Unknown 'reft_adapter' in additional_config"):
            start(None, additional_config={"reft_adapter": {}})

    def test_a_vllm_that_is_built_differently(self, start, monkeypatch):
        from vllm.v1.engine.input_processor import InputProcessor

        from peft_reft.integrations.vllm import plugin, wrapping

        monkeypatch.setattr(plugin, "_done", {"register"})
        monkeypatch.delattr(InputProcessor, "process_inputs")
        with pytest.raises(wrapping.UnknownVersion, match=r"process_inputs is missing.*It knows vLLM 0.32.0"):
            start()
        monkeypatch.setattr(InputProcessor, "process_inputs", lambda self, inputs: None, raising=False)
        with pytest.raises(wrapping.UnknownVersion, match=r"process_inputs takes \['self', 'inputs'\], without"):
            start()


class TestWithoutAdapters:
    def test_an_engine_without_adapters_is_as_without_the_plug_in(self, start):
        requests = [Request(ids) for ids in prompts(8)]
        engine = start(None)
        worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in worker.get_model().modules())
        plain = answers(engine, requests)
        with pytest.raises(VLLMValidationError, match="this engine serves no ReFT adapters"):
            answers(engine, [Request((7, 8), "all")])
        # Tokens that no adapter edits stay as they are, to the last bit.
        assert answers(start(), requests) == plain

    def test_importing_the_package_imports_nothing_of_vllm(self):
        code = "import sys, peft_reft; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Server:
    """vLLM's OpenAI server on loopback, in a process of its own."""

    def __init__(self, model: Path, config: dict, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "base",
            *OPTIONS,
            *arguments,
        ]
        environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [*command, "--additional-config", json.dumps(config)], env=environment, stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + 240
        while not self._is_up():
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, Any]:
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, header))

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


# `SMALL` on the command line.
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(32 << 20)]
OPTIONS += ["--block-size", "32", "--max-model-len", "256"]


class TestServer:
    @pytest.fixture(scope="class")
    def server(self, model, folders, tmp_path_factory):
        served = {name: str(folders[name]) for name in ("all", "untied", "completion")}
        server = Server(model, {"reft_adapters": served}, tmp_path_factory.mktemp("server") / "log")
        yield server
        server.stop()

    def complete(self, server, ids, **body) -> Answer:
        defaults = {"model": "base", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 3}
        settings = defaults | {"return_tokens_as_token_ids": True} | body
        status, answer = server.post("/v1/completions", prompt=list(ids), **settings)
        assert status == 200, answer
        logprobs = answer["choices"][0]["logprobs"]

        def number(token):
            return int(token.removeprefix("token_id:"))

        places = ({number(t): p for t, p in place.items()} for place in logprobs["top_logprobs"])
        return Answer(tuple(map(number, logprobs["tokens"])), tuple(places))

    def test_the_models_are_the_base_model_and_the_adapters(self, server, folders):
        status, listed = server.get("/v1/models")
        assert status == 200
        assert {card["id"]: (card["parent"], card["root"]) for card in listed["data"] if card["id"] != "base"} == {
            name: ("base", str(folders[name])) for name in ("all", "untied", "completion")
        }

    def test_three_ways_to_name_an_adapter(self, server, truth):
        ids = prompts(1, 3)[0]
        half = Request(ids, "all", 0.5)
        for request, body in [
            (Request(ids), {}),
            (Request(ids, "all"), {"model": "all"}),
            (Request(ids, "untied"), {"vllm_xargs": {"reft": "untied"}}),
            (Request(ids, "completion"), {"reft": "completion"}),
            (half, {"reft": {"name": "all", "strength": 0.5}}),
            (half, {"vllm_xargs": {"reft": ["all", 0.5]}}),
            (Request(ids, "all"), {"model": "untied", "reft": "all"}),
        ]:
            check(truth, [request], [self.complete(server, ids, **body)])

    def test_many_at_once(self, server, truth):
        requests = [
            Request(ids, name) for ids, name in zip(prompts(12), ["all", "untied", "completion", None] * 3, strict=True)
        ]
        with ThreadPoolExecutor(12) as pool:
            given = list(pool.map(lambda r: self.complete(server, r.ids, model=r.adapter or "base"), requests))
        check(truth, requests, given)

    def test_a_chat_names_an_adapter_as_its_model(self, server):
        chat = {"messages": [{"role": "user", "content": "w7 w8 w9"}], "max_tokens": 8, "temperature": 0}
        texts = {}
        for name in ("base", "all", "untied"):
            status, answer = server.post("/v1/chat/completions", model=name, ignore_eos=True, **chat)
            assert status == 200, answer
            texts[name] = answer["choices"][0]["message"]["content"]
        assert len(set(texts.values())) == 3

    def test_wrong_requests_are_answered_with_400_and_the_server_lives(self, server, truth):
        for body in ({"reft": "emoji"}, {"vllm_xargs": {"reft": "emoji"}}, {"reft": {"name": "all", "strength": "x"}}):
            status, answer = server.post("/v1/completions", model="base", prompt=[7, 8], **body)
            assert status == 400, answer
            assert "reft" in answer["error"]["message"].lower()
        assert server.post("/v1/completions", model="emoji", prompt=[7, 8])[0] == 404
        status, answer = server.post("/v1/completions", model="all", prompt=[7, 8], use_beam_search=True, n=2)
        assert status == 400
        assert "beam search" in answer["error"]["message"]
        check(truth, [Request((7, 8, 9), "all")], [self.complete(server, (7, 8, 9), model="all")])

    def test_adapters_are_loaded_and_unloaded_as_loras_are(self, server, truth, folders, model, tmp_path):
        ids = prompts(1, 5, 80, 80)[0]
        load = {"lora_name": "late", "lora_path": str(folders["red"])}
        assert server.post("/v1/load_lora_adapter", **load)[0] == 200
        check(truth, [Request(ids, "red")], [self.complete(server, ids, model="late")])
        assert server.post("/v1/load_lora_adapter", **load)[0] == 400
        other = load | {"lora_path": str(folders["counted"]), "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", **other)[0] == 200
        check(truth, [Request(ids, "counted")], [self.complete(server, ids, model="late")])
        status, answer = server.post("/v1/load_lora_adapter", lora_name="mlp", lora_path=str(folders["mlp"]))
        assert status == 400
        assert "reft_components" in answer["error"]["message"]
        assert server.post("/v1/unload_lora_adapter", lora_name="late")[0] == 200
        assert server.post("/v1/completions", model="late", prompt=[7, 8])[0] == 404
        assert server.post("/v1/unload_lora_adapter", lora_name="late")[0] in (400, 404)
