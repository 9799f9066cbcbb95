"""Blocks of the prefix cache are shared between requests whose tokens in them are edited alike, and no others."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import ADAPTERS, Request, answers, check, outputs, prompts


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
