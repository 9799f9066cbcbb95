"""TRL's trainers generate from vLLM with the adapter as it is: colocated, and from a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

import torch
from peft import LoraConfig
from trl import RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from vllm_server import Server
from vllm_trl import ENGINE, off_policy, trainer

from peft_reft import ReftConfig
from peft_reft.integrations.trl import _leave_server, vllm_rollouts

PROMPTS = [tuple(range(7, 17)), (20, 21, 22)]


def sampled(trainer) -> list[list[int]]:
    """Greedy completions, on TRL's way to vLLM."""
    generation = trainer.vllm_generation
    before, generation.temperature = generation.temperature, 0.0
    _, tokens, _, _ = generation.generate([list(ids) for ids in PROMPTS], None, 1)
    generation.temperature = before
    return [list(own) for own in tokens]


@torch.no_grad()
def expected(trainer) -> list[list[int]]:
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


def change(trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


class TestColocated:
    @pytest.fixture(scope="class")
    def trained(self, model, tmp_path_factory):
        with vllm_rollouts(**ENGINE):
            made = trainer(tmp_path_factory.mktemp("grpo"), model)
        made.start = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
        made.train()
        yield made
        made.vllm_generation.llm.llm_engine.engine_core.shutdown()

    def test_completions_come_from_the_weights_of_their_step(self, trained):
        now = dict(trained.model.named_parameters())
        assert all((now[name] - before).abs().max() > 0.05 for name, before in trained.start.items())
        assert len(off_policy(trained)) == 3
        assert max(off_policy(trained)) < 2e-5

    def test_greedy_completions_are_those_of_generate_and_follow_the_weights(self, trained):
        trained.vllm_generation.sync_weights()
        first = sampled(trained)
        assert first == expected(trained)
        change(trained)
        assert expected(trained) != first
        assert sampled(trained) == first
        trained.vllm_generation.sync_weights()
        assert sampled(trained) == expected(trained)

    def test_the_engine_keeps_one_adapter(self, trained):
        worker = trained.vllm_generation.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        for _ in range(3):
            change(trained)
            trained.vllm_generation.sync_weights()
        assert len(worker.reft.adapters) == 1

    def test_the_strength_of_the_model_is_that_of_the_completions(self, trained):
        with trained.model.strength("default", -1.0):
            trained.vllm_generation.sync_weights()
            assert sampled(trained) == expected(trained)
            there = expected(trained)
        assert expected(trained) != there

    def test_arguments_of_the_user_for_generation_stay(self, trained):
        generation = trained.vllm_generation
        generation._given_arguments = {"min_tokens": 2, "extra_args": {"other": 1}}
        generation.sync_weights()
        assert generation.generation_kwargs["min_tokens"] == 2
        assert generation.generation_kwargs["extra_args"].keys() == {"other", "reft"}
        generation._given_arguments = {}

    def test_switched_off_subspaces_are_refused(self, trained):
        layer = next(m for m in trained.model.modules() if type(m).__name__ == "ReftLayer")
        layer.reft_settings["default"].coordinates = torch.tensor([1.0, 0.0])
        with pytest.raises(ValueError, match=r"subspaces switched off.*set_subspaces\('default', None\)"):
            trained.vllm_generation.sync_weights()
        layer.reft_settings["default"].coordinates = None

    def test_images_are_refused(self, trained):
        with pytest.raises(ValueError, match="does not take images"):
            trained.vllm_generation.generate([[7, 8]], [["an image"]], 1)

    def test_rloo_with_an_adapter_of_the_attention(self, start, model, tmp_path):
        config = ReftConfig(r=2, positions="l2", component="attention_output", init_weights=False)
        with vllm_rollouts(**ENGINE):
            made = trainer(tmp_path, model, RLOOTrainer, config)
        made.train()
        made.vllm_generation.sync_weights()
        assert sampled(made) == expected(made)
        made.vllm_generation.llm.llm_engine.engine_core.shutdown()

    @pytest.mark.slow
    @pytest.mark.parametrize("tensor_parallel_size", [1, 2])
    def test_two_processes(self, model, tmp_path, tensor_parallel_size):
        script = Path(__file__).parents[1] / "vllm_trl.py"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        arguments = [script, model, tmp_path, str(tensor_parallel_size)]
        subprocess.run([*launch, *arguments], env=environment, check=True, timeout=400)
        for rank in range(2):
            told = json.loads((tmp_path / f"{rank}.json").read_text())
            assert told["processes"] == 2
            assert len(told["off_policy"]) == 3
            assert max(told["off_policy"]) < 2e-5


class TestServer:
    @pytest.fixture(scope="class")
    def server(self, model, tmp_path_factory):
        log = tmp_path_factory.mktemp("server") / "log"
        more = ["--logprobs-mode", "processed_logprobs"]
        server = Server(model, {"reft_adapters": {}}, log, *more, VLLM_SERVER_DEV_MODE="1")
        yield server
        server.stop()

    def test_completions_come_from_the_weights_of_their_step(self, server, model, tmp_path):
        with vllm_rollouts():
            made = trainer(tmp_path, model, vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{server.port}")
        made.train()
        assert len(off_policy(made)) == 3
        assert max(off_policy(made)) < 2e-5
        made.vllm_generation.sync_weights()
        first = sampled(made)
        assert first == expected(made)
        change(made)
        assert sampled(made) == first
        made.vllm_generation.sync_weights()
        assert sampled(made) == expected(made)
        assert self.adapters(server) == {made.vllm_generation.served_name: "in memory"}
        _leave_server(made.vllm_generation.vllm_client.base_url, made.vllm_generation.served_name)
        assert self.adapters(server) == {}

    def adapters(self, server):
        return {card["id"]: card["root"] for card in server.get("/v1/models")[1]["data"] if card["id"] != "base"}

    def test_an_adapter_that_the_server_does_not_take(self, server, model, tmp_path):
        config = ReftConfig(r=2, positions="l2", component="attention_output")
        address = f"http://127.0.0.1:{server.port}"
        with vllm_rollouts():
            made = trainer(tmp_path, model, config=config, vllm_mode="server", vllm_server_base_url=address)
        with pytest.raises(RuntimeError, match=r"did not take the ReFT adapter \(400.*Start it with"):
            made.train()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vllm_enable_sleep_mode": True}, "does not work with vllm_enable_sleep_mode=True"),
            ({"vllm_mode": "server"}, r"vllm_mode='server' and arguments of an engine \(dtype"),
        ],
    )
    def test_what_cannot_be_tried_here(self, model, tmp_path, options, message):
        with vllm_rollouts(**ENGINE), pytest.raises(ValueError, match=message):
            trainer(tmp_path, model, **options)

    def test_an_argument_that_no_engine_has(self, model, tmp_path):
        with vllm_rollouts(kv_memory=3), pytest.raises(ValueError, match="EngineArgs has no argument 'kv_memory'"):
            trainer(tmp_path, model)

    def test_outside_of_the_block_the_error_names_it(self, monkeypatch, model, tmp_path):
        monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
        made = trainer(tmp_path, model)
        with pytest.raises(ValueError, match=re.escape("`with peft_reft.integrations.trl.vllm_rollouts():`")):
            made.train()

    def test_models_without_a_reft_adapter_are_left_to_trl(self, monkeypatch, model, tmp_path):
        started = []
        monkeypatch.setattr(VLLMGeneration, "_init_vllm", started.append)
        original = VLLMGeneration._init_vllm
        with vllm_rollouts():
            made = trainer(tmp_path, model, config=LoraConfig(r=2, task_type="CAUSAL_LM"))
        assert started == [made.vllm_generation]
        assert type(made.vllm_generation) is VLLMGeneration
        assert VLLMGeneration._init_vllm is original

    def test_a_trl_that_is_built_differently(self, monkeypatch):
        monkeypatch.delattr(VLLMGeneration, "_init_vllm")
        with pytest.raises(RuntimeError, match=r"differently from TRL 1\.16"), vllm_rollouts():
            pass
