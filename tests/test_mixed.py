"""One adapter per row (`adapter_names`) equals each row alone with its adapter active, and takes one pass."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import tiny
import torch
from adapters import IDS, NEEDS_ADD_ADAPTER, layers_of, lora, reft
from peft import get_peft_model
from routes import GENERATE, pad, sequences
from tiny import LAYERS, ZOO
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

BASE = "__base__"
# All interventions, ranks, layers, components, positions, shared and not, activations.
ADAPTERS = {
    "loreft": {},
    "loreft8": {"r": 8, "positions": "f1+l3", "share_weights": False, "layers_to_transform": [0, 2]},
    "noreft": {"intervention": "noreft", "r": 1, "positions": "all", "component": "mlp_output"},
    "direft": {"intervention": "direft", "positions": "prompt", "act_fn": "tanh", "component": "attention_output"},
    "nodireft": {"intervention": "nodireft", "r": 3, "positions": "c2", "component": ["block_input", "mlp_output"]},
    "consreft": {"intervention": "consreft", "r": 2, "positions": "completion", "layers_to_transform": [1]},
    "lobireft": {"intervention": "lobireft", "positions": "l1", "component": "block_input"},
    "red": {"intervention": "red", "positions": "f2+l2", "share_weights": False},
    "red_all": {"intervention": "red", "positions": "all", "layers_to_transform": [-1]},
    "gelu": {"r": 5, "positions": "f3+c2", "share_weights": False, "act_fn": "gelu"},
    "relu": {"positions": "f3", "act_fn": "relu", "component": ["block_output", "attention_output"]},
}
STRENGTHS = {"loreft8": 0.3, "lobireft": -2.0, "red": 0.7, "relu": 1.9}
# Several rows of one adapter, not side by side.
NAMES = ("gelu", BASE, *ADAPTERS, "loreft8", BASE, "red")
ROLES = ("ppccc", "pccc", "ppppppccc", "pppcc", "ppppc", "ppppppp", "pc")


@dataclass
class Mixed:
    """A model with several adapters: what to call, and how to run everything with one of them."""

    model: torch.nn.Module
    use: Callable
    active: Callable[[str], None]


def peft_model(base, adapters=None, task_type="CAUSAL_LM", config=reft) -> Mixed:
    adapters = ADAPTERS if adapters is None else adapters
    model = None
    for name, settings in adapters.items():
        settings = {"task_type": task_type} | settings
        if model is None:
            model = get_peft_model(base, config(**settings), name)
        else:
            model.add_adapter(name, config(**settings))
    model.to(base.dtype).eval()
    if config is reft:
        for name in STRENGTHS.keys() & adapters.keys():
            model.set_strength(name, STRENGTHS[name])

    @contextmanager
    def use(name: str):
        model.set_adapter(next(iter(adapters)) if name == BASE else name)
        with model.disable_adapter() if name == BASE else nullcontext():
            yield
        model.set_adapter(next(iter(adapters)))

    return Mixed(model, use, model.set_adapter)


def base_route(base, *args, **kwargs) -> Mixed:
    """Calls that bypass the PeftModel."""
    mixed = peft_model(base, *args, **kwargs)
    return Mixed(mixed.model.get_base_model(), mixed.use, mixed.active)


def transformers_route(base, adapters=None, task_type="CAUSAL_LM") -> Mixed:
    adapters = ADAPTERS if adapters is None else adapters
    for name, settings in adapters.items():
        base.add_adapter(reft(**{"task_type": task_type} | settings), name)
    base.to(base.dtype).eval()
    for layer in layers_of(base):
        for name in STRENGTHS.keys() & layer.reft_settings.keys():
            layer.reft_settings[name].strength = STRENGTHS[name]

    @contextmanager
    def use(name: str):
        if name == BASE:
            base.disable_adapters()
        else:
            base.set_adapter(name)
        yield
        base.enable_adapters()
        base.set_adapter(next(iter(adapters)))

    return Mixed(base, use, base.set_adapter)


ROUTES = {"peft": peft_model, "base": base_route, "transformers": transformers_route}
EVERY_ROUTE = pytest.mark.parametrize("route", ["peft", "base", pytest.param("transformers", marks=NEEDS_ADD_ADAPTER)])


def rows(names: Sequence[str] = NAMES) -> tuple[tuple[str, ...], list[list[int]]]:
    roles = tuple(ROLES[i % len(ROLES)] for i in range(len(names)))
    return roles, sequences(roles)


def assert_rows(mixed: Mixed, names, roles, ids, batch, rtol: float, **kwargs) -> None:
    """Logits of each row equal the row's alone, and adapters do something."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
    got = mixed.model(**inputs, adapter_names=list(names), **kwargs).logits
    changed = 0
    for row, (name, role, tokens) in enumerate(zip(names, roles, ids, strict=True)):
        single = pad([role], [tokens])
        with mixed.use(name):
            expected = mixed.model(input_ids=single.ids, labels=single.labels).logits[0]
        torch.testing.assert_close(
            got[row, batch.where[row]], expected, rtol=rtol, atol=rtol, msg=lambda m, r=row: f"row {r}: {m}"
        )
        with mixed.use(BASE):
            base = mixed.model(input_ids=single.ids, labels=single.labels).logits[0]
        changed += not torch.equal(expected, base)
    # An adapter of first and last tokens leaves a prompt of one token alone.
    assert 2 * changed >= sum(name != BASE for name in names)


@torch.no_grad()
@pytest.mark.parametrize("padding", [{"left": "all"}, {"right": 2}], ids=["left", "right"])
@EVERY_ROUTE
@pytest.mark.parametrize(
    ("family", "dtype", "rtol"),
    [("gpt2", torch.float64, 1e-10), ("llama", torch.float32, 1e-5)],
    ids=["gpt2", "llama"],
)
def test_forward(family, dtype, rtol, route, padding):
    mixed = ROUTES[route](ZOO[family].build().to(dtype))
    roles, ids = rows()
    batch = pad(roles, ids, **padding)
    assert_rows(mixed, NAMES, roles, ids, batch, rtol, position_ids=(batch.mask.cumsum(-1) - 1).clamp(min=0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma2", "opt", "mamba"])
def test_forward_of_other_families(family):
    adapters = {k: v for k, v in ADAPTERS.items() if family != "mamba" or "component" not in v}
    mixed = peft_model(ZOO[family].build(), adapters)
    names = (*adapters, BASE)
    roles, ids = rows(names)
    # A state space model takes padding for tokens.
    roles = ("pppppccc",) * len(names) if family == "mamba" else roles
    ids = sequences(roles) if family == "mamba" else ids
    assert_rows(mixed, names, roles, ids, pad(roles, ids), 2e-5)


@torch.no_grad()
def test_one_row_and_one_adapter():
    mixed = peft_model(ZOO["gpt2"].build().double())
    for name in ("loreft8", BASE):
        roles, ids = ("ppppcc",), sequences(("ppppcc",))
        assert_rows(mixed, [name], roles, ids, pad(roles, ids), 1e-10)


@torch.no_grad()
def test_half_precision_edits_in_float32():
    mixed = peft_model(tiny.llama().bfloat16())
    assert mixed.model.dtype == torch.bfloat16
    roles, ids = rows()
    batch = pad(roles, ids)
    got = mixed.model(input_ids=batch.ids, labels=batch.labels, adapter_names=list(NAMES)).logits
    for row, name in enumerate(NAMES):
        single = pad([roles[row]], [ids[row]])
        with mixed.use(name):
            expected = mixed.model(input_ids=single.ids, labels=single.labels).logits[0]
        assert (got[row, batch.where[row]] - expected).norm() < 0.02 * expected.norm()


# Generation


def assert_generated(mixed: Mixed, names=NAMES, repeats: int = 1, **kwargs) -> None:
    """Tokens generated for each row equal those of the row alone; `repeats` sequences are returned for each."""
    roles = tuple("p" * (1 + i % 7) for i in range(len(names)))
    ids = sequences(roles)
    batch = pad(roles, ids, left="all")
    options = GENERATE | kwargs
    got = mixed.model.generate(
        input_ids=batch.ids, attention_mask=batch.mask, adapter_names=list(names), **options
    ).unflatten(0, (len(names), repeats))
    differ = 0
    for row, (name, tokens) in enumerate(zip(names, ids, strict=True)):
        with mixed.use(name):
            expected = mixed.model.generate(input_ids=torch.tensor([tokens]), **options)[:, len(tokens) :]
        assert same_tokens(got[row, :, batch.ids.shape[1] :], expected), f"row {row}, {name}"
        with mixed.use(BASE):
            base = mixed.model.generate(input_ids=torch.tensor([tokens]), **options)[:, len(tokens) :]
        differ += not same_tokens(base, expected)
    assert differ > len(names) // 2


def same_tokens(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to trailing padding."""
    steps = min(got.shape[1], expected.shape[1])
    behind = torch.cat([got[:, steps:], expected[:, steps:]], dim=1)
    # Beam search fills up with the end of sequence where padding is token 0.
    padding = torch.tensor([tiny.PAD, tiny.EOS])
    return torch.equal(got[:, :steps], expected[:, :steps]) and bool(torch.isin(behind, padding).all())


@EVERY_ROUTE
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=["dynamic", "none", "static"]
)
def test_generate(route, options):
    assert_generated(ROUTES[route](tiny.llama()), **options)


@EVERY_ROUTE
def test_generate_with_beams_and_several_sequences(route):
    names = ("loreft8", BASE, "gelu", "red", "loreft8", "noreft")
    mixed = ROUTES[route](tiny.llama())
    assert_generated(mixed, names, num_beams=3)
    assert_generated(mixed, names, repeats=2, num_beams=3, num_return_sequences=2)


def test_sampling_draws_what_each_adapter_alone_would():
    mixed = peft_model(tiny.llama())
    names = ("loreft", "gelu", BASE, "red_all", "noreft", "gelu")
    ids = torch.tensor(sequences(("ppppp",) * len(names)))
    options = GENERATE | {"do_sample": True, "num_return_sequences": 2, "eos_token_id": None}

    def draw(**kwargs):
        torch.manual_seed(5)
        return mixed.model.generate(input_ids=ids, **options, **kwargs).unflatten(0, (len(names), 2))

    got = draw(adapter_names=list(names))
    for row, name in enumerate(names):
        with mixed.use(name):
            assert torch.equal(got[row], draw()[row]), name
    assert not torch.equal(got, draw())


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_generate(family, beams):
    mixed = peft_model(ZOO[family].build(), task_type="SEQ_2_SEQ_LM")
    roles, ids = rows()
    batch = pad(roles, ids)
    options = GENERATE | {"num_beams": beams}
    got = mixed.model.generate(input_ids=batch.ids, attention_mask=batch.mask, adapter_names=list(NAMES), **options)
    everything = set()
    for row, name in enumerate(NAMES):
        with mixed.use(name):
            expected = mixed.model.generate(input_ids=torch.tensor([ids[row]]), **options)
        assert same_tokens(got[row : row + 1], expected), f"row {row}, {name}"
        everything.add(tuple(expected.flatten().tolist()))
    assert len(everything) > 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_forward(family):
    mixed = peft_model(ZOO[family].build().double(), task_type="SEQ_2_SEQ_LM")
    roles, ids = rows()
    batch = pad(roles, ids)
    answers = torch.tensor(sequences(("cccc",) * len(NAMES), seed=4))
    got = mixed.model(
        input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=answers, adapter_names=list(NAMES)
    ).logits
    for row, name in enumerate(NAMES):
        with mixed.use(name):
            expected = mixed.model(input_ids=torch.tensor([ids[row]]), decoder_input_ids=answers[row, None]).logits[0]
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)


def test_a_conversation_continued_from_a_cache():
    mixed = peft_model(tiny.llama())
    first = torch.tensor(sequences(("ppppp",) * len(NAMES)))
    second = torch.tensor(sequences(("pppp",) * len(NAMES), seed=9))
    options = GENERATE | {"eos_token_id": None}

    def converse(chosen, **kwargs):
        cache = DynamicCache(config=mixed.model.config)
        turn = mixed.model.generate(input_ids=first[chosen], past_key_values=cache, **options, **kwargs)
        turn = torch.cat([turn, second[chosen]], dim=1)
        return mixed.model.generate(input_ids=turn, past_key_values=cache, **options, **kwargs)

    got = converse(range(len(NAMES)), adapter_names=list(NAMES))
    for row, name in enumerate(NAMES):
        with mixed.use(name):
            assert torch.equal(got[row : row + 1], converse([row])), name


@torch.no_grad()
def test_forward_passes_with_a_cache():
    mixed = peft_model(ZOO["gpt2"].build().double())
    ids = torch.tensor(sequences(("p" * 8,) * len(NAMES)))

    def run(chosen, **kwargs):
        cache = DynamicCache(config=mixed.model.config)
        mixed.model(input_ids=ids[chosen, :5], past_key_values=cache, **kwargs)
        return mixed.model(input_ids=ids[chosen, 5:], past_key_values=cache, **kwargs).logits

    got = run(range(len(NAMES)), adapter_names=list(NAMES))
    for row, name in enumerate(NAMES):
        with mixed.use(name):
            torch.testing.assert_close(got[row : row + 1], run([row]), rtol=1e-10, atol=1e-10)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


FEW = {name: ADAPTERS[name] for name in ("loreft8", "gelu", "red")}


def test_compiled_decode_with_a_static_cache(dynamo):
    mixed = base_route(tiny.llama(num_hidden_layers=2), FEW | {"loreft8": {"r": 2, "positions": "f1+l3"}})
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    names = ["loreft8", BASE, "gelu", "red"]
    ids = torch.tensor(sequences(("ppppp",) * len(names)))
    options = GENERATE | {"max_new_tokens": 8, "eos_token_id": None}
    got = mixed.model.generate(
        input_ids=ids, adapter_names=names, cache_implementation="static", compile_config=compile_config, **options
    )
    assert 1 <= dynamo["stats"]["unique_graphs"] <= 2
    for row, name in enumerate(names):
        with mixed.use(name):
            assert torch.equal(got[row : row + 1], mixed.model.generate(input_ids=ids[row, None], **options)), name


# Other outputs


def classifiers() -> dict[str, dict]:
    return {
        "a": {"modules_to_save": ["score"]},
        "b": {"modules_to_save": ["score"], "positions": "all", "r": 2},
        "plain": {"positions": "l1"},
    }


@torch.no_grad()
@pytest.mark.parametrize("active", ["a", "plain"])
@pytest.mark.parametrize("route", ["peft", "base"])
def test_each_row_has_its_own_head(route, active):
    mixed = ROUTES[route](ZOO["llama_classifier"].build(), classifiers(), "SEQ_CLS")
    for name, parameter in mixed.model.named_parameters():
        if "modules_to_save" in name:
            parameter.normal_()
    mixed.active(active)
    names = ["a", "b", BASE, "plain", "b"]
    ids = torch.tensor(sequences(("ppppp",) * len(names)))
    got = mixed.model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        with mixed.use(name):
            torch.testing.assert_close(got[row, None], mixed.model(input_ids=ids[row, None]).logits)
    assert not any(module._forward_pre_hooks for n, module in mixed.model.named_modules() if n.endswith("score"))


@torch.no_grad()
def test_heads_as_lora():
    ids = torch.tensor(sequences(("ppppp",) * 3))
    logits = []
    for config in (reft, lora):
        settings = {"a": {"modules_to_save": ["score"]}, "b": {"modules_to_save": ["score"]}}
        base = ZOO["llama_classifier"].build()
        mixed = peft_model(base, settings, "SEQ_CLS", config)
        for name, parameter in mixed.model.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_({"a": 1.0, "b": -2.0}[name.split(".")[-2]])
            elif "reft" in name or "lora" in name:
                parameter.fill_(0.0) if "projection" not in name else None
        if config is reft:
            for name in settings:
                mixed.model.set_strength(name, 0.0)
        logits.append(mixed.model(input_ids=ids, adapter_names=["b", BASE, "a"]).logits)
    torch.testing.assert_close(*logits)
    assert not torch.allclose(logits[0][0], logits[0][2])


@torch.no_grad()
def test_outputs_without_a_token_axis():
    adapters = {
        "pooler": {"target_modules": ["pooler.dense"], "positions": "f1+l1", "share_weights": False},
        "both": {"target_modules": ["pooler.dense", "output.dense"], "positions": "all", "intervention": "red"},
        "blocks": {"positions": "prompt"},
    }
    mixed = peft_model(ZOO["bert"].build().double(), adapters, "FEATURE_EXTRACTION")
    names = ["both", "pooler", BASE, "blocks", "pooler"]
    ids = torch.tensor(sequences(("pppp",) * len(names)))
    got = mixed.model(input_ids=ids, adapter_names=names)
    for row, name in enumerate(names):
        with mixed.use(name):
            expected = mixed.model(input_ids=ids[row, None])
        torch.testing.assert_close(got.pooler_output[row, None], expected.pooler_output, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.last_hidden_state[row, None], expected.last_hidden_state, rtol=1e-10, atol=1e-10)


# Subspaces by row

GROUPS = {
    "a": {"r": 5, "subspaces": {"x": 2, "y": 3}},
    "b": {"r": 3, "subspaces": {"y": 1, "z": 2}, "positions": "all", "intervention": "noreft", "act_fn": "tanh"},
    "c": {"r": 2, "positions": "l1"},
}


@torch.no_grad()
def test_subspaces_of_each_row():
    mixed = peft_model(ZOO["gpt2"].build().double(), GROUPS)
    names = ["a", "a", "b", "b", "c", BASE, "a", "a"]
    groups = [["x"], ["x", "y"], ["y", "x"], "z", ["x"], ["x"], [], "y"]
    ids = torch.tensor(sequences(("ppppp",) * len(names)))
    got = mixed.model(input_ids=ids, adapter_names=names, subspaces=groups).logits
    for row, (name, group) in enumerate(zip(names, groups, strict=True)):
        only = mixed.model.use_subspaces(name, _own(name, group)) if name in "ab" else nullcontext()
        with mixed.use(name), only:
            expected = mixed.model(input_ids=ids[row, None]).logits
        torch.testing.assert_close(got[row, None], expected, rtol=1e-10, atol=1e-10)


def _own(name: str, group) -> list[str]:
    return [g for g in ([group] if isinstance(group, str) else group) if g in GROUPS[name]["subspaces"]]


@pytest.mark.parametrize("by_name", [True, False], ids=["adapter_names", "active"])
def test_subspaces_of_each_row_in_generate(by_name):
    mixed = peft_model(tiny.llama(), GROUPS)
    mixed.active("a")
    groups = [["x"], ["y"], [], ["x", "y"]]
    ids = torch.tensor(sequences(("ppppp",) * 4))
    more = {"adapter_names": ["a"] * 4} if by_name else {}
    got = mixed.model.generate(input_ids=ids, subspaces=groups, **more, **GENERATE)
    for row, group in enumerate(groups):
        with mixed.model.use_subspaces("a", group):
            assert torch.equal(got[row, None], mixed.model.generate(input_ids=ids[row, None], **GENERATE))


# Gradients


def test_gradients_in_evaluation_mode():
    """They are the sum of the gradients of the rows alone."""
    adapters = ADAPTERS | GROUPS
    mixed = peft_model(ZOO["gpt2"].build().double(), adapters)
    names = (*NAMES, *GROUPS, "a")
    subspaces = ["x"] * (len(names) - 1) + ["y"]
    ids = torch.tensor(sequences(("pppppppp",) * len(names)))
    labels = ids.clone()
    labels[:, :5] = -100
    parameters = [p for n, p in mixed.model.named_parameters() if "reft_" in n]
    probe = torch.randn(*ids.shape, tiny.VOCAB, dtype=torch.float64)

    def gradients(chosen, **kwargs):
        for parameter in parameters:
            parameter.requires_grad_().grad = None
        logits = mixed.model(input_ids=ids[chosen], labels=labels[chosen], **kwargs).logits
        if logits.requires_grad:
            (logits * probe[chosen]).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    got = gradients(range(len(names)), adapter_names=list(names), subspaces=subspaces)
    expected = [torch.zeros_like(p) for p in parameters]
    for row, name in enumerate(names):
        with mixed.use(name):
            own = gradients([row], subspaces=[subspaces[row]])
            expected = [a + b for a, b in zip(expected, own, strict=True)]
    assert sum(bool(g.any()) for g in got) > 0.8 * len(got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


# One pass


class Counting(TorchDispatchMode):
    """Counts the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@torch.no_grad()
def calls(model, **kwargs) -> Counter[str]:
    with Counting() as counting:
        model(**kwargs)
    return counting.calls


@pytest.mark.parametrize("settings", [{}, {"positions": "all"}, {"intervention": "red"}, {"act_fn": "gelu"}], ids=str)
def test_the_number_of_operations_does_not_grow_with_the_adapters(settings):
    mixed = peft_model(tiny.llama(), {f"a{i}": settings for i in range(16)})
    ids = torch.tensor(sequences(("ppppp",) * 16))
    counts = [
        calls(mixed.model, input_ids=ids, adapter_names=[f"a{i % adapters}" for i in range(16)]) for adapters in (2, 16)
    ]
    assert counts[0] == counts[1]
    # The tokens are selected once for all layers.
    assert counts[0]["argsort"] + counts[0]["sort"] <= 1
    # The products of the layers are a handful more than the base model's.
    with mixed.model.disable_adapter():
        bare = calls(mixed.model, input_ids=ids)
    more = (counts[0] - bare)["bmm"] + (counts[0] - bare)["baddbmm"] + (counts[0] - bare)["mm"]
    assert more <= 4 * LAYERS


def test_a_decode_step_runs_the_operations_of_the_base_model():
    """Edits of the prompt do not touch generated tokens: same operations on the same shapes."""
    prompt_only = {"a": {}, "b": {"positions": "f1+l3", "share_weights": False, "r": 2}, "c": {"intervention": "red"}}
    mixed = peft_model(tiny.llama(), prompt_only)
    names = ["a", "b", "c", BASE, "a", "b"]
    ids = torch.tensor(sequences(("ppppp",) * len(names)))

    def steps(count: int, **kwargs) -> Counter[str]:
        with Counting() as counting:
            mixed.model.generate(input_ids=ids, **GENERATE | {"eos_token_id": None, "max_new_tokens": count}, **kwargs)
        return counting.calls

    with_adapters = steps(9, adapter_names=names) - steps(4, adapter_names=names)
    with mixed.model.disable_adapter():
        bare = steps(9) - steps(4)
    assert with_adapters == bare


# Refusals


def message(model, error=ValueError, **kwargs) -> str:
    with pytest.raises(error) as raised:
        model(**kwargs)
    return str(raised.value)


def two(config, **settings):
    return peft_model(tiny.llama(), {"a": settings, "b": settings}, config=config)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    "names", [["a", "nobody"], ["c", "nobody"], ["a"], ["a", "b", "a"]], ids=["unknown", "several", "few", "many"]
)
def test_refused_in_the_words_of_lora(names, call):
    def refusal(config) -> str:
        model = two(config).model
        return message(model if call == "forward" else model.generate, input_ids=IDS, adapter_names=names)

    assert refusal(reft) == refusal(lora)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_training_mode_is_refused_in_the_words_of_lora(call):
    def refusal(config) -> str:
        model = two(config).model.train()
        return message(model if call == "forward" else model.generate, input_ids=IDS, adapter_names=["a", "b"])

    assert refusal(reft) == f"{refusal(lora)} Call model.eval() first."


def test_merged_adapters_are_refused_in_the_words_of_lora():
    def refusal(config, **settings) -> str:
        model = two(config, **settings).model
        model.merge_adapter(["a"])
        return message(model, input_ids=IDS, adapter_names=["a", "b"])

    assert refusal(reft, positions="all", component="mlp_output") == refusal(lora)


def test_the_base_model_route_refuses_the_same():
    model = two(reft).model
    base = model.get_base_model()
    for names in (["a", "nobody"], ["a"]):
        expected = message(model, input_ids=IDS, adapter_names=names)
        assert message(base, input_ids=IDS, adapter_names=names) == expected
        assert message(base.generate, input_ids=IDS, adapter_names=names) == expected
    expected = message(model.train(), input_ids=IDS, adapter_names=["a", "b"])
    assert message(base, input_ids=IDS, adapter_names=["a", "b"]) == expected


def test_subspaces_are_checked():
    model = peft_model(tiny.llama(), GROUPS).model
    assert "Unknown subspace(s) nothing" in message(model, input_ids=IDS, subspaces=[["x"], ["nothing"]])
    assert "`subspaces`" in message(model, input_ids=IDS, subspaces=[["x"]])
    assert "both need one" in message(model, input_ids=IDS, subspaces=[["x"]], adapter_names=["a", "b"])


@torch.no_grad()
@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
def test_disabled_adapters_do_nothing(config):
    model = two(config).model
    bare = tiny.llama()(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, adapter_names=["a", "b"]).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("route", ["peft", "base"])
def test_an_exception_leaves_nothing_behind(route, call):
    head = {"modules_to_save": ["lm_head"]}
    mixed = ROUTES[route](tiny.llama(), {"a": head, "b": head | {"positions": "all"}})
    before = mixed.model(input_ids=IDS).logits
    hooks = hooks_of(mixed.model)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = mixed.model.get_submodule(next(n for n, _ in mixed.model.named_modules() if n.endswith("layers.1.mlp")))
    handle = handle.register_forward_hook(fail)
    method = mixed.model if call == "forward" else mixed.model.generate
    with pytest.raises(RuntimeError, match="in the middle"):
        method(input_ids=IDS, adapter_names=["b", BASE])
    handle.remove()
    assert hooks_of(mixed.model) == hooks
    assert torch.equal(mixed.model(input_ids=IDS).logits, before)
    tracker = layers_of(mixed.model)[0].tracker
    assert tracker.own.requests is None
    assert tracker.own.generation is None
    assert tracker.innermost() is None


def hooks_of(model) -> dict[str, tuple[int, int]]:
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


def test_threads_take_turns():
    head = {"modules_to_save": ["lm_head"]}
    mixed = peft_model(tiny.llama(), {"a": head, "b": head | {"positions": "all"}, "c": head | {"positions": "l1"}})
    with torch.no_grad():
        for name, parameter in mixed.model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    ids = torch.tensor(sequences(("ppppp",) * 3))
    requests = [["a", "b", "c"], ["c", BASE, "a"], [BASE, "a", "b"], ["b", "c", BASE]]
    options = GENERATE | {"max_new_tokens": 16, "eos_token_id": None}

    def ask(names):
        return mixed.model.generate(input_ids=ids, adapter_names=names, **options)

    expected = [ask(names) for names in requests]
    answers: dict[int, torch.Tensor] = {}
    start = threading.Barrier(len(requests))

    def client(number: int) -> None:
        start.wait()
        answers[number] = ask(requests[number])

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        assert torch.equal(answers[number], wanted), requests[number]


class Linear(torch.nn.Module):
    """A model of no kind that Transformers knows."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, X):
        return self.linear(X)


@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
@pytest.mark.parametrize("names", [[BASE] * 2, ["default"] * 2, ["default"] * 5], ids=["base", "2", "5"])
def test_a_model_without_known_tokens_wants_a_name_for_each_row_too(names, config):
    settings = {"positions": "all"} if config is reft else {}
    model = get_peft_model(Linear(), config(target_modules=["linear"], task_type=None, **settings)).eval()
    # Two names for four rows are no beams: nothing generates here.
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(X=torch.ones(4, 8), adapter_names=names)
