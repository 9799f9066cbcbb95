"""Every entry point: however a pass reaches the model, it edits the same tokens, or says why it cannot.

The expected output is the same model's for each sequence alone, called in the ordinary way, which `test_routes.py`
compares with the loop reference.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable

import pytest
import tiny
import torch
import transformers
from peft import get_peft_model
from routes import TOLERANCE
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from peft_reft import ReftConfig, prompt_mask_of
from peft_reft.attach import tracker_of

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
SPECS = ["f2+l2", "l1", "prompt", "completion", "c2", "all"]
every_spec = pytest.mark.parametrize("spec", SPECS)


def adapted(spec: str = "f2+l2", base: nn.Module | None = None, **settings) -> nn.Module:
    """A PEFT model with a random adapter, in float64 and evaluation mode."""
    torch.manual_seed(5)
    settings = {"r": 2, "positions": spec, "init_weights": False, "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(tiny.llama() if base is None else base, ReftConfig(**settings)).double().eval()


def encoder(spec: str = "f1+l2") -> tuple[nn.Module, nn.Module]:
    """An encoder with an adapter, and the PEFT model around it."""
    torch.manual_seed(4)
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    base = BertModel(BertConfig(**sizes, num_attention_heads=4))
    return base, adapted(spec, base, task_type=None)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


IDS = torch.arange(3, 11)[None]
LABELS = torch.where(torch.arange(8)[None] < 5, -100, IDS)
# Two rows of different length, padded on either side, with answers.
SHORT, LONG = [9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27]
PADDED = torch.tensor([[*SHORT, 0, 0, 0], LONG])
MASK = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
ANSWERS = torch.tensor([[-100, -100, -100, 12, 13, -100, -100, -100], [-100] * 5 + [25, 26, 27]])


# `forward` in place of a call


@torch.no_grad()
@every_spec
def test_forward_of_the_model_edits_what_a_call_edits(spec):
    model = adapted(spec)
    base = model.get_base_model()
    for told in ({"labels": ANSWERS}, {"prompt_mask": (ANSWERS == -100) & MASK.bool()}):
        expected = model(input_ids=PADDED, attention_mask=MASK, **told).logits
        for door in (model.forward, model.base_model.forward, base.forward, base):
            assert torch.equal(door(input_ids=PADDED, attention_mask=MASK, **told).logits, expected)
        assert torch.equal(base.forward(PADDED, MASK, **told).logits, expected), "by position"
        embeds = base.get_input_embeddings()(PADDED)
        assert torch.equal(base.forward(inputs_embeds=embeds, attention_mask=MASK, **told).logits, expected)


@torch.no_grad()
@every_spec
def test_the_part_that_owns_the_blocks_edits_alike_called_or_by_its_forward(spec):
    inner = adapted(spec).get_base_model().model
    mask = MASK.bool()
    expected = inner(input_ids=PADDED, attention_mask=MASK, prompt_mask=mask)[0]
    assert torch.equal(inner.forward(input_ids=PADDED, attention_mask=MASK, prompt_mask=mask)[0], expected)
    for row, tokens in enumerate((SHORT, LONG)):
        alone = inner.forward(input_ids=torch.tensor([tokens]), prompt_mask=torch.ones(1, len(tokens)).bool())[0]
        close(expected[row, : len(tokens)], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("door", ["call", "forward", "part in between", "its forward", "embeddings"])
def test_an_encoder_gives_a_text_the_same_state_alone_and_in_a_batch(door):
    base, _ = encoder()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if door == "call":
            return base(input_ids=ids, attention_mask=mask)[0]
        if door == "forward":
            return base.forward(input_ids=ids, attention_mask=mask)[0]
        if door == "embeddings":
            return base.forward(inputs_embeds=base.embeddings.word_embeddings(ids), attention_mask=mask)[0]
        part = base.encoder if door == "part in between" else base.encoder.forward
        opened = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, torch.finfo(torch.float64).min)
        return part(base.embeddings(ids), attention_mask=opened[:, None, None, :].expand(-1, 1, mask.shape[1], -1))[0]

    together = run(PADDED, MASK)
    for row, tokens in enumerate((SHORT, LONG)):
        alone = base(input_ids=torch.tensor([tokens]))[0]
        close(together[row, : len(tokens)], alone[0])


@torch.no_grad()
def test_a_functional_call_edits_with_the_parameters_it_is_given():
    model = adapted()
    base = model.get_base_model()
    expected = base(input_ids=IDS, labels=LABELS).logits
    same = dict(base.named_parameters())
    got = torch.func.functional_call(base, same, (), {"input_ids": IDS, "labels": LABELS}).logits
    assert torch.equal(got, expected)
    off = {
        name: torch.zeros_like(p) if ".reft_intervention." in name and "projection" not in name else p
        for name, p in same.items()
    }
    other = torch.func.functional_call(base, off, (), {"input_ids": IDS, "labels": LABELS}).logits
    assert not torch.equal(other, expected)
    assert torch.equal(base(input_ids=IDS, labels=LABELS).logits, expected)


class Net(nn.Module):
    """Modules that a method other than `forward` calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.body(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("trained", [False, True])
def test_a_method_other_than_forward_sees_the_settings_of_now(trained):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 8)
    want = net.features(x).detach()
    model = get_peft_model(net, ReftConfig(r=2, positions="all", target_modules=["proj"], init_weights=False))
    if trained:
        model.train()(x).sum().backward()
        model.eval()
    with torch.no_grad():
        edited = net.features(x)
        assert not torch.allclose(edited, want)
        torch.testing.assert_close(net.head(edited), model(x))
        with model.disable_adapter():
            torch.testing.assert_close(net.features(x), want)
        with model.base_model.rescaled("default", 0.5):
            torch.testing.assert_close(net.features(x), (edited + want) / 2)


@torch.no_grad()
@every_spec
def test_a_block_alone_takes_its_input_for_a_prompt(spec):
    model = adapted(spec, layers_to_transform=[1])
    inner = model.get_base_model().model
    hidden = torch.randn(2, 6, tiny.llama().config.hidden_size, dtype=torch.float64)
    rotary = inner.rotary_emb(hidden, torch.arange(6)[None])
    with model.disable_adapter():
        plain = inner.layers[1](hidden, position_embeddings=rotary)
    edited = inner.layers[1](hidden, position_embeddings=rotary)
    changed = (edited != plain).any(-1)
    chosen = {"f2+l2": [0, 1, 4, 5], "l1": [5], "completion": [], "c2": []}.get(spec, list(range(6)))
    assert changed.nonzero().tolist() == [[row, token] for row in range(2) for token in chosen]


@torch.no_grad()
def test_a_block_alone_leaves_padding_alone():
    model = adapted("l1", layers_to_transform=[1])
    inner = model.get_base_model().model
    hidden = torch.randn(2, 8, tiny.llama().config.hidden_size, dtype=torch.float64)
    rotary = inner.rotary_emb(hidden, torch.arange(8)[None])
    allowed = torch.ones(8, 8).tril().bool() & MASK[:, None, None, :].bool()
    options = {"position_embeddings": rotary, "attention_mask": allowed}
    with model.disable_adapter():
        plain = inner.layers[1](hidden, **options)
    changed = (inner.layers[1](hidden, **options) != plain).any(-1)
    assert changed.nonzero().tolist() == [[0, 4], [1, 7]]


def test_stand_ins_keep_signature_and_documentation():
    base = tiny.llama()
    expected = {
        name: (inspect.signature(getattr(base, name)), getattr(base, name).__doc__) for name in ("forward", "generate")
    }
    model = get_peft_model(base, ReftConfig(r=2, task_type="CAUSAL_LM"))
    for twin in (base, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        for name, (signature, documentation) in expected.items():
            assert inspect.signature(getattr(twin, name)) == signature
            assert getattr(twin, name).__doc__ == documentation
            assert getattr(twin, name).__name__ == name
    model.unload()
    assert not {"forward", "generate"} & vars(base).keys()


@torch.no_grad()
def test_a_forward_that_somebody_puts_in_place_later_still_edits():
    """Like Liger, whose forward takes the labels itself."""
    model = adapted("l1")
    base = model.get_base_model()
    expected = model(input_ids=IDS, labels=LABELS).logits

    def theirs(input_ids, labels=None, **kwargs):
        assert "prompt_mask" not in kwargs
        return type(base).forward(base, input_ids=input_ids, labels=labels, **kwargs)

    own = base.forward
    base.forward = theirs
    assert torch.equal(model(input_ids=IDS, labels=LABELS).logits, expected)
    assert torch.equal(base(input_ids=IDS, prompt_mask=LABELS == -100).logits, expected)
    base.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert torch.equal(model(input_ids=IDS, labels=LABELS).logits, expected)
    assert torch.equal(base(input_ids=IDS, prompt_mask=LABELS == -100).logits, expected)
    assert tracker_of(base).innermost() is None


# Scoring


@torch.no_grad()
@every_spec
def test_a_prompt_mask_can_be_told_around_code_that_cannot_be_given_one(spec):
    model = adapted(spec)
    mask = (ANSWERS == -100) & MASK.bool()
    expected = model(input_ids=PADDED, attention_mask=MASK, prompt_mask=mask).logits
    for told in (model, model.base_model, model.get_base_model()):
        with prompt_mask_of(told, mask), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = model(input_ids=PADDED, attention_mask=MASK).logits
        assert torch.equal(got, expected)
    with prompt_mask_of(model, mask), pytest.raises(ValueError, match="prompt_mask must have the shape"):
        model(input_ids=IDS)
    with prompt_mask_of(model, ~mask & MASK.bool()):
        assert torch.equal(model(input_ids=PADDED, attention_mask=MASK, prompt_mask=mask).logits, expected)
    answer = model.generate(input_ids=IDS, max_new_tokens=3, prompt_mask=LABELS == -100, **GREEDY)
    with prompt_mask_of(model, LABELS == -100):
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY), answer)


def test_a_prompt_mask_is_told_to_models_with_adapters_only():
    with pytest.raises(ValueError, match="no ReFT adapter"), prompt_mask_of(tiny.llama(), torch.ones(1, 4)):
        pass


# Passes within passes


def call_inside(model: nn.Module, how: str) -> Callable[[], torch.Tensor]:
    """A pass of another text, with other settings, through the same model."""
    base = model.get_base_model()

    def other() -> torch.Tensor:
        ids = torch.arange(30, 34)[None]
        if how == "model":
            return model(input_ids=ids).logits
        if how == "inner model":
            return base.model(input_ids=ids)[0]
        if how == "same tokens, adapter off":
            with model.disable_adapter():
                return base.model(input_ids=IDS)[0]
        if how == "mixed":
            return model(input_ids=ids, adapter_names=["__base__"]).logits
        return model.generate(input_ids=ids, max_new_tokens=2, **GREEDY)

    return other


@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "inner model", "same tokens, adapter off", "mixed", "generate"])
@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.1", "model.embed_tokens", "model", "lm_head"])
def test_a_pass_inside_a_hook_disturbs_nobody(place, how):
    model = adapted()
    base = model.get_base_model()
    other = call_inside(model, how)
    want, inside = model(input_ids=IDS, labels=LABELS).logits, other()
    seen, busy = [], []

    def hook(*_):
        if not busy:
            busy.append(1)
            seen.append(other())
            busy.pop()

    handle = base.get_submodule(place).register_forward_hook(hook)
    assert torch.equal(model(input_ids=IDS, labels=LABELS).logits, want)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], inside)


KINDS = {"off": None, "re-entrant": True, "non-re-entrant": False}


def checkpointing(model: nn.Module, kind: str) -> None:
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
        model.enable_input_require_grads()


def gradients_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("component", ["block_output", "attention_output"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_inside_the_loss_function_does_not_disturb_replays(kind, component, with_gradients):
    def gradients(kind: str) -> torch.Tensor:
        model = adapted(component=component).train()
        checkpointing(model, kind)
        base = model.get_base_model()
        plain = base.loss_function
        inside = []

        def loss_function(logits, labels, **kwargs):
            if inside:
                return plain(logits, labels, **kwargs)
            inside.append(1)
            with torch.set_grad_enabled(with_gradients), model.base_model.rescaled("default", 0.5):
                ref = model(input_ids=IDS[:, :6], labels=IDS[:, :6].masked_fill(torch.arange(6) < 3, -100)).logits
            inside.pop()
            return plain(logits, labels, **kwargs) + (logits[:, :6] - ref).square().mean()

        base.loss_function = loss_function
        model(input_ids=IDS, labels=LABELS, use_cache=False).loss.backward()
        return gradients_of(model)

    close(gradients(kind), gradients("off"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_with_other_settings_before_one_backward(kind):
    def gradients(kind: str) -> torch.Tensor:
        model = adapted(component=["block_output", "mlp_output"]).train()
        checkpointing(model, kind)
        first = model(input_ids=IDS, labels=LABELS, use_cache=False).loss
        with model.base_model.rescaled("default", 0.25):
            second = model(input_ids=IDS[:, :6], prompt_mask=torch.arange(6)[None] < 2, use_cache=False).logits
        (first + second.square().mean()).backward()
        return gradients_of(model)

    close(gradients(kind), gradients("off"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_within_checkpoints_replay_their_pass(reentrant):
    def gradients(wrap: bool) -> torch.Tensor:
        model = adapted(component="mlp_output").train()
        inner = model.get_base_model().model
        model.enable_input_require_grads()
        if wrap:
            for block in inner.layers:
                for part in (block.mlp, block):
                    part.forward = _checkpointed(part, reentrant)
        loss = model(input_ids=IDS, labels=LABELS, use_cache=False).loss
        with torch.no_grad():
            model(input_ids=IDS[:, :3])
        loss.backward()
        return gradients_of(model)

    close(gradients(True), gradients(False))


def _checkpointed(module: nn.Module, reentrant: bool) -> Callable:
    own = module.forward
    return lambda *args, **kwargs: checkpoint(lambda *a: own(*a, **kwargs), *args, use_reentrant=reentrant)


def test_a_backward_pass_inside_a_pass_replays_the_pass_that_it_belongs_to():
    def gradients(kind: str) -> torch.Tensor:
        model = adapted(component="attention_output").train()
        checkpointing(model, kind)
        loss = model(input_ids=IDS, labels=LABELS, use_cache=False).loss
        done = []

        def hook(*_):
            if not done:
                done.append(1)
                loss.backward()

        handle = model.get_base_model().model.layers[0].register_forward_hook(hook)
        model(input_ids=IDS[:, :4], prompt_mask=torch.arange(4)[None] < 1, use_cache=False)
        handle.remove()
        return gradients_of(model)

    close(gradients("non-re-entrant"), gradients("off"))


@torch.no_grad()
@pytest.mark.parametrize("who", ["logits processor", "stopping criterion", "streamer", "nested generate"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_pass_inside_generate_is_not_taken_for_one_of_its_own(cached, who):
    model = adapted("f2+c2")
    ids = torch.arange(3, 8)[None]
    other, labels = torch.arange(20, 30)[None], torch.where(torch.arange(10)[None] < 8, -100, 20)
    calls = [
        lambda: model(input_ids=other, labels=labels).logits,
        lambda: model(input_ids=other).logits,
        lambda: model(input_ids=other[:, :1]).logits,
        lambda: model(input_ids=other, cache=DynamicCache()).logits,
        lambda: model.get_base_model().model(input_ids=other)[0],
    ]
    if who == "nested generate":
        calls = [lambda: model.generate(input_ids=other, max_new_tokens=3, **GREEDY)]
    want = model.generate(input_ids=ids, max_new_tokens=4, use_cache=cached, **GREEDY)
    outside, seen = [call() for call in calls], []

    def look(*args):
        seen.append([call() for call in calls])
        return args[1] if len(args) > 1 else torch.zeros(1, dtype=torch.bool)

    class Streamer(BaseStreamer):
        def put(self, value):
            look(None)

        def end(self):
            pass

    options = {
        "logits processor": lambda: {"logits_processor": LogitsProcessorList([look])},
        "nested generate": lambda: {"logits_processor": LogitsProcessorList([look])},
        "stopping criterion": lambda: {"stopping_criteria": StoppingCriteriaList([lambda *args, **kwargs: look(None)])},
        "streamer": lambda: {"streamer": Streamer()},
    }[who]()
    got = model.generate(input_ids=ids, max_new_tokens=4, use_cache=cached, **options, **GREEDY)
    assert torch.equal(got, want)
    assert len(seen) >= 4
    for inside in seen:
        assert all(map(torch.equal, inside, outside))


@torch.no_grad()
def test_two_models_within_each_other():
    first, second = adapted("f2+l2"), adapted("completion")
    want = [model(input_ids=IDS, labels=LABELS).logits for model in (first, second)]
    seen = []

    def hook(*_):
        seen.append(second(input_ids=IDS, labels=LABELS).logits)

    first.get_base_model().model.layers[0].register_forward_hook(hook)
    assert torch.equal(first(input_ids=IDS, labels=LABELS).logits, want[0])
    assert torch.equal(seen[0], want[1])


# Interruptions

INTERRUPTIONS = [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError]


@pytest.mark.parametrize("error", INTERRUPTIONS)
@pytest.mark.parametrize("place", ["model", "model.layers.0", "model.layers.1.mlp", "lm_head", ""])
@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
@pytest.mark.parametrize("call", ["forward", "training", "generate", "mixed"])
def test_after_an_interruption_every_door_is_as_before(call, kind, place, error):
    heads = {"modules_to_save": ["lm_head"]}
    model = adapted(**heads)
    model.add_adapter("b", ReftConfig(r=2, positions="all", init_weights=False, task_type="CAUSAL_LM", **heads))
    model.base_model.model.lm_head.modules_to_save["b"].double().weight.data.add_(1.0)
    base = model.get_base_model()
    doors = {
        "model": lambda: model(input_ids=IDS, labels=LABELS).logits,
        "inner model": lambda: base.model(input_ids=IDS)[0],
        "block": lambda: _lone_block(base),
        "generate": lambda: model.generate(input_ids=IDS, max_new_tokens=2, **GREEDY),
        "mixed": lambda: model(input_ids=IDS, labels=LABELS, adapter_names=["b"]).logits,
    }
    with torch.no_grad():
        before = {name: door() for name, door in doors.items()}
    hooks = _hooks(model)
    module = base.get_submodule("lm_head.original_module" if place == "lm_head" and call != "mixed" else place)
    module = base.lm_head if place == "lm_head" else module

    def interrupt(*_):
        raise error

    handle = (module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook)(interrupt)
    calls = {
        "forward": doors["model"],
        "training": lambda: model.train()(input_ids=IDS, labels=LABELS).loss,
        "generate": doors["generate"],
        "mixed": doors["mixed"],
    }
    with torch.set_grad_enabled(call == "training"), pytest.raises(error):
        calls[call]()
    handle.remove()
    model.eval()
    assert _hooks(model) == hooks
    own = tracker_of(base).own
    assert (own.passes, own.generation, own.requests, own.prompt_mask) == ([], None, None, None)
    with torch.no_grad():
        for name, door in doors.items():
            assert torch.equal(door(), before[name]), name


def _lone_block(base: nn.Module) -> torch.Tensor:
    hidden = torch.ones(1, 4, base.config.hidden_size, dtype=torch.float64)
    return base.model.layers[0](hidden, position_embeddings=base.model.rotary_emb(hidden, torch.arange(4)[None]))


def _hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


# Decoding loops of the user's own


@torch.no_grad()
@every_spec
@pytest.mark.parametrize("chunks", [(7,), (3, 4), (1, 1, 5)])
def test_a_decoding_loop_that_tells_its_prompt_gives_what_generate_gives(chunks, spec):
    model = adapted(spec)
    ids = torch.arange(3, 10)[None]
    want = model.generate(input_ids=ids, max_new_tokens=6, **GREEDY)
    # A chunked prompt tells where its last words are in its last chunk.
    if len(chunks) > 1 and spec in ("f2+l2", "l1"):
        pytest.skip("last words of a prompt are known once it ends: hand it over whole, or to generate")
    cache, out = None, None
    for part in ids.split(chunks, dim=1):
        continued = {_cache_name(model): cache} if cache else {}
        out = model(input_ids=part, use_cache=True, prompt_mask=torch.ones_like(part), **continued)
        cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
    tokens = ids
    for _ in range(6):
        new = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        out = model(input_ids=new, prompt_mask=torch.zeros_like(new), **{_cache_name(model): cache})
    assert torch.equal(tokens, want)


def _cache_name(model: nn.Module) -> str:
    names = inspect.signature(model.get_base_model().forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in names)


# Sites that a model does not call


class GoingRound(nn.Module):
    """A part whose weight the model uses without calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        return self.first(hidden) @ self.second.weight.T


def test_a_site_that_is_never_called_is_said_once():
    config = ReftConfig(r=2, positions="all", target_modules=["first", "second"])
    model = get_peft_model(GoingRound(), config).eval()
    with pytest.warns(UserWarning, match="GoingRound did not call 'second'"):
        model(torch.ones(2, 3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.ones(2, 3, 8))


def test_sites_that_are_called_are_not_spoken_of():
    for model in (adapted("l1"), adapted("completion"), encoder()[1]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(input_ids=IDS)
            model.train()(input_ids=IDS)
        assert not [w for w in caught if "did not call" in str(w.message)]


def test_a_head_that_training_goes_round_is_refused():
    model = adapted("all", target_modules=["lm_head"]).train()
    base = model.get_base_model()

    def fused(input_ids, labels=None, **kwargs):
        hidden = base.model(input_ids=input_ids)[0]
        return transformers.modeling_outputs.CausalLMOutput(loss=(hidden @ base.lm_head.weight.T).mean())

    base.forward = fused
    with pytest.raises(ValueError, match="computed without a call of 'lm_head'"):
        model(input_ids=IDS, labels=LABELS)


# Graphs


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("spec", [*SPECS, "f1+c1"])
def test_a_compiled_forward_with_a_static_cache_makes_no_more_graphs_than_the_bare_model(dynamo, spec):
    from torch._dynamo.utils import counters

    def run(model: nn.Module, compiled: bool) -> tuple[torch.Tensor, int]:
        dynamo.reset()
        counters.clear()
        if compiled:
            model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        options = GREEDY | {"max_new_tokens": 8, "cache_implementation": "static"}
        return model.generate(input_ids=torch.arange(3, 8)[None], **options), counters["stats"]["unique_graphs"]

    _, bare = run(tiny.llama(), True)
    model = adapted(spec).get_base_model()
    want, _ = run(model, False)
    got, graphs = run(model, True)
    assert torch.equal(got, want)
    assert graphs <= max(bare, 3)


@torch.no_grad()
@pytest.mark.parametrize("how", ["module", "forward", "function"])
def test_a_model_compiled_and_run_before_it_gets_an_adapter_edits(dynamo, how):
    base = tiny.llama().double().eval()
    options = {"backend": "eager"}
    call = base
    if how == "module":
        base.compile(**options)
    elif how == "forward":
        base.forward = torch.compile(base.forward, **options)
    else:
        call = torch.compile(base, **options)
    bare = call(input_ids=IDS, labels=LABELS).logits
    adapted("l1", base)
    got = call(input_ids=IDS, labels=LABELS).logits
    want = adapted("l1")(input_ids=IDS, labels=LABELS).logits
    close(got, want)
    assert not torch.allclose(got, bare)


@every_spec
def test_an_exported_program_follows_new_labels(spec):
    model = adapted(spec).get_base_model()
    program = torch.export.export(
        model, (), {"input_ids": IDS, "labels": LABELS, "use_cache": False, "return_dict": False}, strict=False
    ).module()
    for first in (3, 5):
        labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < first, -100)
        want = model(input_ids=IDS, labels=labels, use_cache=False).logits
        close(program(input_ids=IDS, labels=labels, use_cache=False, return_dict=False)[1], want)


@torch.no_grad()
@every_spec
def test_blocks_that_are_compiled_on_their_own_edit_as_the_whole_model(dynamo, spec):
    model = adapted(spec)
    prompt, options = torch.arange(3, 8)[None], GREEDY | {"max_new_tokens": 5}
    want = model(input_ids=IDS, labels=LABELS).logits
    generated = model.generate(input_ids=prompt, **options)
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        close(model(input_ids=IDS, labels=LABELS).logits, want)
    assert torch.equal(model.generate(input_ids=prompt, **options), generated)


@every_spec
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_model_follows_new_labels_and_has_the_gradients(spec, grad):
    model = adapted(spec)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, labels):
            return self.model(input_ids=ids, labels=labels, use_cache=False).logits

    call = Call()

    def gradients(run: Callable) -> torch.Tensor:
        model.zero_grad()
        run(IDS, LABELS).sin().sum().backward()
        return gradients_of(model)

    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        try:
            with model.disable_adapter():
                torch.jit.trace(call, (IDS, LABELS), check_trace=False)
        except IndexError:
            pytest.skip(f"Transformers {transformers.__version__} cannot trace the masks of the base model")
        traced = torch.jit.trace(call, (IDS, LABELS), check_trace=False)
        for first in (3, 5):
            labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < first, -100)
            close(traced(IDS, labels), call(IDS, labels))
    if grad:
        close(gradients(traced), gradients(call))
