"""vLLM's OpenAI server with adapters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import Answer, Request, check, prompts
from vllm_server import Server


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

    def test_an_adapter_is_replaced_while_it_answers(self, server, truth, folders):
        """Each answer is made with the weights of one of the two, from its first token to its last."""
        both = ("red", "counted")
        load = {"lora_name": "changing", "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", lora_path=str(folders["red"]), **load)[0] == 200
        asked = prompts(24, 11)
        with ThreadPoolExecutor(4) as pool:
            coming = [pool.submit(self.complete, server, ids, model="changing", max_tokens=16) for ids in asked]
            for turn in range(6):
                status, answer = server.post("/v1/load_lora_adapter", lora_path=str(folders[both[turn % 2]]), **load)
                assert status == 200, answer
            given = [one.result() for one in coming]
        for ids, answer in zip(asked, given, strict=True):
            assert min(truth.differences(Request(ids, name), answer).largest for name in both) < 1e-4
        assert server.post("/v1/unload_lora_adapter", lora_name="changing")[0] == 200
