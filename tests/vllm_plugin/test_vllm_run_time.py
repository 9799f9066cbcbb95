"""Adapters come, change and go while an engine serves."""

from __future__ import annotations

import re
import shutil

import pytest

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, HuggingFace, Request, answer_of, answers, check, prompts, sampling, save_adapter
from vllm.exceptions import VLLMValidationError

from peft_reft.integrations.vllm import Adapter, adapters, add_adapter, remove_adapter


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
        ids = prompts(1, 3, 80, 80)[0]
        check(truth, [Request(ids, "all")], answers(engine, [Request(ids, "all")]))
        add_adapter(engine, "all", str(other))
        check(truth, [Request(ids, "other")], answers(engine, [Request(ids, "all")]))
        add_adapter(engine, "all", str(folders["all"]))
        check(truth, [Request(ids, "all")], answers(engine, [Request(ids, "all")]))
        assert len(self.state(engine).adapters) == 2

    def test_requests_under_way_keep_the_weights_that_they_began_with(self, engine, truth, folders, other):
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
        truth.model.set_adapter("counted")
        add_adapter(engine, "training", Adapter.of_model(truth.model, "counted"))
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "counted")], answers(engine, [Request(ids, "training")]))
        remove_adapter(engine, "training")

    def test_a_folder_may_vanish_while_its_adapter_is_served(self, start, engine, truth, folders, tmp_path):
        shutil.copytree(folders["red"], tmp_path / "red")
        add_adapter(engine, "red", str(tmp_path / "red"))
        shutil.rmtree(tmp_path / "red")
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "red")]))
        with pytest.raises(ValueError, match="cannot be read"):
            add_adapter(engine, "red", str(tmp_path / "red"))
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "red")]))
        remove_adapter(engine, "red")

    def test_an_adapter_of_the_hub(self, engine, truth, folders, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository, revision = tmp_path / "models--somebody--red", 40 * "0"
        shutil.copytree(folders["red"], repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        add_adapter(engine, "hub", "somebody/red")
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "hub")]))
        with pytest.raises(ValueError, match="'somebody/blue' cannot be read"):
            add_adapter(engine, "blue", "somebody/blue")
        remove_adapter(engine, "hub")

    def test_an_adapter_in_the_place_of_its_path(self, engine, truth, folders):
        url = Adapter.load(str(folders["red"])).to_url()
        add_adapter(engine, "sent", url)
        assert adapters(engine)["sent"] == "in memory"
        ids = prompts(1, 4)[0]
        check(truth, [Request(ids, "red")], answers(engine, [Request(ids, "sent")]))
        with pytest.raises(ValueError, match=r"The adapter in 'data:.*is broken"):
            add_adapter(engine, "sent", url[:-40])
        remove_adapter(engine, "sent")

    def test_a_component_that_the_engine_was_not_prepared_for_is_refused(self, engine, folders):
        with pytest.raises(ValueError, match=r"output of 'self_attn.o_proj'.*reft_components"):
            add_adapter(engine, "attention", str(folders["attention"]))

    def test_an_engine_prepared_for_a_component_takes_it_later(self, start, truth, folders):
        wider = {"reft_components": ["attention_output", "mlp_output", "block_input"]}
        engine = start({}, additional_config=wider)
        for name in ("attention", "mlp", "into_blocks"):
            add_adapter(engine, name, str(folders[name]))
        requests = [
            Request(ids, n) for ids, n in zip(prompts(4), ("attention", "mlp", "into_blocks", None), strict=True)
        ]
        check(truth, requests, answers(engine, requests))

    def test_memory_is_bounded_by_an_option_and_told_in_the_log(self, start, model, folders, tmp_path, log):
        engine = start({"all": folders["all"]}, additional_config={"reft_memory_mib": 1})
        for number in range(3):
            save_adapter(tmp_path / str(number), model, number, r=64, positions="f1+l1+c1", share_weights=False)
        add_adapter(engine, "0", str(tmp_path / "0"))
        add_adapter(engine, "1", str(tmp_path / "1"))
        with pytest.raises(ValueError, match=r"'2' takes 0.\d MiB.*more than reft_memory_mib=1"):
            add_adapter(engine, "2", str(tmp_path / "2"))
        remove_adapter(engine, "0")
        add_adapter(engine, "2", str(tmp_path / "2"))
        expected = r"'2': loreft on 'f1\+l1\+c1' at 4 places of this worker, 0.4 MiB \(3 adapters, 0.8 of 1 MiB\)"
        assert re.search(expected, log[-1])
