"""The same answers from engines that cut, keep and order the work in other ways, and in other processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, SMALL, Answer, HuggingFace, Request, answer_of, answers, check, mixed, prompts, sampling
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError


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
        running, kept, aborted, memory = {}, [], 0, None
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
            if memory is None and len(waiting) < count // 2:
                memory = psutil.Process().memory_info().rss
        # Without adapters vLLM, and the answers kept here, take 36 MiB more for 1,000 requests.
        assert psutil.Process().memory_info().rss - memory < 48 << 20
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
        asked = LoRARequest("lora", 1, str(tmp_path / "lora"))
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
        # A process that dies takes nothing along but its engine.
        resources = engine.llm_engine.engine_core.resources
        (process,) = resources.engine_manager.processes
        process.kill()
        deadline = time.monotonic() + 60
        while not resources.engine_dead:  # a request that is sent before vLLM notices waits forever
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(EngineDeadError):
            answers(engine, requests)
        with pytest.raises(EngineDeadError):
            add_adapter(engine, "red", str(folders["red"]))

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
        script = Path(__file__).parents[1] / "vllm_run.py"
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
