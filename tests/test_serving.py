"""The parts of serving that need no engine: positions of chunks, batches of edits, adapters, names, keys."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from reference import edited, edited_tokens
from serving import ADAPTERS, HIDDEN, LAYERS, save_adapter, save_model
from transformers.activations import ACT2FN

from peft_reft.integrations.vllm.adapters import Adapter, check
from peft_reft.integrations.vllm.cache_keys import block_key
from peft_reft.integrations.vllm.chunks import edited_runs
from peft_reft.integrations.vllm.edits import Table, edit_rows, factors_of, kind_of
from peft_reft.integrations.vllm.plan import Chunk, Editing, Entry, Plan
from peft_reft.integrations.vllm.requests import Registry, Resolved
from peft_reft.integrations.vllm.settings import Settings
from peft_reft.interventions import INTERVENTIONS
from peft_reft.tokens.positions import parse
from peft_reft.tokens.runs import Marks

SPECS = ["f3", "l2", "f3+l2", "f7+l7", "prompt", "all", "completion", "c2", "prompt+c2", "f2+c3", "l2+completion"]


@st.composite
def chunked(draw):
    """A prompt length, an answer length, and where the chunks of the sequence end."""
    prompt, answer = draw(st.integers(1, 20)), draw(st.integers(0, 8))
    cuts = draw(st.sets(st.integers(1, prompt + answer)))
    return prompt, answer, sorted({0, prompt + answer} | cuts)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.booleans(), chunked())
def test_chunks_edit_the_tokens_of_the_reference_and_of_training(spec, shared, sequence):
    prompt, answer, cuts = sequence
    positions = parse(spec, shared)
    units = {}
    for begin, end in pairwise(cuts):
        for run in edited_runs(positions, prompt, begin, end):
            assert begin <= run.begin < run.end <= end
            units |= dict.fromkeys(range(run.begin, run.end), run.unit)
    expected = edited_tokens(spec, "p" * prompt + "c" * answer)
    assert units == {token: 0 if shared else word for token, word in expected.items()}
    is_prompt = torch.arange(prompt + answer)[None] < prompt
    codes = Marks(torch.ones_like(is_prompt), prompt=is_prompt).grid(positions)[0].tolist()
    assert units == {token: code - 1 for token, code in enumerate(codes) if code}


def random_intervention(method: str, rank: int, units: int, act_fn: str | None = None):
    return INTERVENTIONS[method](HIDDEN, rank, units, act_fn, init_weights=False).eval().requires_grad_(False)


# fingerprint -> method, rank, units, activation
STACKED = {
    "a": ("loreft", 4, 2, None),
    "b": ("loreft", 4, 1, None),
    "c": ("loreft", 2, 1, None),
    "d": ("noreft", 4, 1, "gelu"),
    "e": ("direft", 4, 1, "relu"),
    "f": ("nodireft", 4, 2, None),
    "g": ("consreft", 3, 1, None),
    "h": ("lobireft", 3, 1, None),
    "i": ("red", 0, 2, None),
    "j": ("red", 0, 1, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [True, False], ids=["two parts", "one part"])
def test_batches_of_many_adapters_edit_each_token_as_the_reference(dtype, split):
    tables, entries, interventions = {}, {}, {}
    for fingerprint, (method, rank, units, act_fn) in STACKED.items():
        own = interventions[fingerprint] = random_intervention(method, rank, units, act_fn)
        table = tables.setdefault(kind_of(own), Table(kind_of(own)))
        entries[fingerprint] = Entry(kind_of(own), len(table))
        table.append(factors_of(own))
    requests, chunks = {}, []
    for number, fingerprint in enumerate([*STACKED, None, *STACKED]):
        length = 1 + number % 7
        if fingerprint is not None:
            shared = STACKED[fingerprint][2] == 1
            strength = 1.0 if number < len(STACKED) else 0.5
            requests[str(number)] = Editing(fingerprint, strength, parse("f2+l1", shared), 5)
        chunks.append(Chunk(str(number), number % 3, length))
    tokens = sum(chunk.count for chunk in chunks)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    residual = torch.randn(tokens, HIDDEN).to(dtype) if split else None
    before = hidden if residual is None else hidden + residual
    expected, untouched = before.clone(), torch.ones(tokens, dtype=torch.bool)
    starts = [0, *accumulate(chunk.count for chunk in chunks)]
    for chunk, start in zip(chunks, starts, strict=False):
        for token, word in edited_tokens("f2+l1", "p" * 5 + "c" * 20).items():
            row = start + token - chunk.begin
            if chunk.request not in requests or not chunk.begin <= token < chunk.begin + chunk.count:
                continue
            editing = requests[chunk.request]
            method, _, units, act_fn = STACKED[editing.fingerprint]
            unit = word if units > 1 else 0
            params = {name: p[unit] for name, p in interventions[editing.fingerprint].named_parameters()}
            h = before[row].float()
            after = edited(method, h, params, ACT2FN[act_fn] if act_fn else lambda x: x)
            expected[row] = before[row] + (editing.strength * (after - h)).to(dtype)
            untouched[row] = False
    given = hidden.clone(), None if residual is None else residual.clone()
    batches, whole = Plan(requests, chunks, torch.device("cpu")).at(frozenset(entries.items()))
    assert not whole
    edit_rows(hidden, residual, [(tables[kind], batch) for kind, batch in batches], whole)
    sums = hidden if residual is None else hidden + residual
    torch.testing.assert_close(sums, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert 0 < untouched.sum() < tokens
    assert hidden[untouched].equal(given[0][untouched])
    assert residual is None or residual[untouched].equal(given[1][untouched])


@pytest.mark.parametrize("split", [True, False], ids=["two parts", "one part"])
@pytest.mark.parametrize("names", ["abc", "aaa", "cab"])
def test_neighboring_tokens_are_edited_as_any_others(names, split):
    kind, table, entries = None, None, {}
    for fingerprint in "abc":
        own = random_intervention("loreft", 4, 1)
        kind = kind_of(own)
        table = table or Table(kind)
        entries[fingerprint] = Entry(kind, len(table))
        table.append(factors_of(own))
    requests = {str(i): Editing(name, 1.0, parse("all"), 3) for i, name in enumerate(names)}
    hidden, residual = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN) if split else None
    before = hidden.clone() if residual is None else hidden + residual
    expected = before.clone()
    for i, name in enumerate(names):
        own, rows = {part: f[entries[name].first] for part, f in table.factors.items()}, slice(2 * i, 2 * i + 2)
        expected[rows] += (before[rows] @ own["right"].T + own["bias"]) @ own["left"]
    chunks = [Chunk(str(i), 4, 2) for i in range(3)]
    batches, whole = Plan(requests, chunks, torch.device("cpu")).at(frozenset(entries.items()))
    assert whole
    assert all(isinstance(batch.rows, slice) == (names != "cab") for _, batch in batches)
    edit_rows(hidden, residual, [(table, batch) for _, batch in batches], whole)
    assert residual is None or not residual.any()
    torch.testing.assert_close(hidden if residual is None else hidden + residual, expected, rtol=1e-5, atol=1e-5)


def test_members_that_are_neighbors_are_not_copied():
    kind = kind_of(random_intervention("loreft", 4, 1))
    entries = {name: Entry(kind, number) for number, name in enumerate("abcd")}
    requests = {name: Editing(name, 1.0, parse("all"), 3) for name in "dacb"}

    def members(names):
        plan = Plan(requests, [Chunk(n, 4, 1) for n in names], torch.device("cpu"))
        (_, batch), *more = plan.at(frozenset(entries.items())).batches
        assert not more
        return batch.members

    assert members("dacb") == slice(0, 4)
    assert members("ca").tolist() == [0, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), model, **ADAPTERS["into_blocks"])


def test_an_adapter_travels_to_another_process(folder):
    adapter = Adapter.load(str(folder))
    again = Adapter.unpack(*adapter.pack())
    assert again.fingerprint == adapter.fingerprint
    assert again.places.keys() == adapter.places.keys()
    assert {(p.layer, p.module, p.side) for p in adapter.places} == {
        (layer, "", side) for layer in range(LAYERS) for side in ("input", "output")
    }


def test_a_fingerprint_tells_weights_and_positions_apart(model, folder, tmp_path):
    first = Adapter.load(str(folder)).fingerprint
    same = save_adapter(tmp_path / "same", model, **ADAPTERS["into_blocks"])
    assert Adapter.load(str(same)).fingerprint == first
    for name, other in {"seed": {"seed": 1}, "words": {"positions": "f3+l2"}, "act": {"act_fn": "relu"}}.items():
        saved = save_adapter(tmp_path / name, model, **ADAPTERS["into_blocks"] | other)
        assert Adapter.load(str(saved)).fingerprint != first, name


def test_a_broken_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="'nowhere' cannot be read"):
        Adapter.load("nowhere")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    (tmp_path / SAFETENSORS_WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read: SafetensorError"):
        Adapter.load(str(tmp_path))
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"positions": "x7"}))
    with pytest.raises(ValueError, match="cannot be read: ValueError: Unknown word 'x7'"):
        Adapter.load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (tmp_path / SAFETENSORS_WEIGHTS_NAME).write_bytes((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes())
    with pytest.raises(ValueError, match=r"holds a .*LORA adapter"):
        Adapter.load(str(tmp_path))


def test_parameters_that_do_not_fit_together_are_refused(folder):
    adapter = Adapter.load(str(folder))
    name = next(key for key in adapter.tensors if key.endswith("weight"))

    def refuse(tensors, message, **changes):
        settings = {
            field: getattr(adapter, field) for field in ("intervention", "act_fn", "positions", "share_weights")
        }
        with pytest.raises(ValueError, match=message):
            check("it", Adapter(**settings | changes, tensors=tensors), HIDDEN, LAYERS)

    refuse({**adapter.tensors, name: torch.zeros(1, 2, HIDDEN)}, "size mismatch for weight")
    refuse({key: t for key, t in adapter.tensors.items() if key != name}, 'Missing key.*"weight"')
    refuse({key: t for key, t in adapter.tensors.items() if "projection" not in key}, "parameters are missing")
    refuse(adapter.tensors, "need 2 units, but there are 1", share_weights=False)
    refuse(
        {
            key.replace("model.layers", "decoder.layers") if "layers.0" in key else key: t
            for key, t in adapter.tensors.items()
        },
        "several streams",
    )


def resolved(spec: str = "all", strength: float = 1.0, fingerprint: str = "f") -> dict:
    return vars(Resolved("it", fingerprint, spec, True, strength))


def key(asked, begin: int, end: int, prompt: int = 40):
    params = SimpleNamespace(extra_args=None if asked is None else {"reft": asked})
    return block_key(SimpleNamespace(sampling_params=params, num_prompt_tokens=prompt), begin, end)


class TestKeys:
    def test_blocks_without_an_edit_have_none(self):
        assert key(None, 0, 16) is None
        assert key(resolved("completion"), 0, 32) is None
        assert key(resolved("f3+l3"), 16, 32) is None
        assert key(resolved(strength=0.0), 0, 16) is None

    def test_they_tell_weights_strength_and_edited_tokens_apart(self):
        keys = [
            key(resolved(), 0, 16),
            key(resolved(fingerprint="g"), 0, 16),
            key(resolved(strength=0.5), 0, 16),
            key(resolved("f3"), 0, 16),
            key(resolved("f4"), 0, 16),
        ]
        assert len(set(keys)) == len(keys)

    def test_a_longer_prompt_shares_what_is_edited_alike(self):
        assert key(resolved("f3+l3"), 0, 16, 40) == key(resolved("f3+l3"), 0, 16, 90)
        assert key(resolved("f3+l3"), 32, 48, 40) != key(resolved("f3+l3"), 32, 48, 41)
        assert key(resolved("f3+completion"), 32, 48, 40) != key(resolved("f3+completion"), 32, 48, 90)


def test_options_are_checked():
    assert Settings.of({}) is None
    assert Settings.of({"something": 1}) is None
    assert Settings.of({"reft_adapters": {}}).adapters == {}
    for wrong, message in [
        ({"reft_adapters": ["a"]}, "must map names"),
        ({"reft_adapters": {}, "reft_components": ["mlp"]}, "must be a list of some of"),
        ({"reft_adapters": {}, "reft_memory_mib": 0}, "positive integer"),
        ({"reft_adapter": {}}, "Unknown 'reft_adapter'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings.of(wrong)


def test_a_name_is_free_when_its_weights_have_no_other(folder):
    registry, adapter = Registry("served", HIDDEN, LAYERS), Adapter.load(str(folder))
    assert registry.enter("a", adapter, "x") is None
    assert registry.enter("b", adapter, "x") is None
    assert registry.leave("a") is None
    assert registry.leave("b") == adapter.fingerprint
    with pytest.raises(ValueError, match="no ReFT adapter 'b'"):
        registry.leave("b")
