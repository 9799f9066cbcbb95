"""Edits land on the same tokens, with the same values, by whichever route a sequence passes through the model.

Every test compares with the loop reference on each sequence alone; its id names the row of the table and the positions.
"""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
import transformers
from peft import inject_adapter_in_model
from reference import gradients
from routes import (
    GENERATE,
    ROLES,
    SPECS,
    assert_same_gradients,
    assert_same_pass,
    make_pair,
    pad,
    pair_with_reference,
    probe,
    sequences,
)
from tiny import EOS, PAD, VOCAB, ZOO, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CompileConfig, DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline
from transformers.generation.streamers import BaseStreamer

from peft_reft import ReftConfig

every_spec = pytest.mark.parametrize(("spec", "shared"), SPECS.values(), ids=SPECS.keys())


def rows_of(logits: torch.Tensor, where: list[torch.Tensor]) -> list[torch.Tensor]:
    return [logits[row, tokens] for row, tokens in enumerate(where)]


def causal_4d(mask: torch.Tensor, fill: float) -> torch.Tensor:
    """Additive mask [batch, 1, tokens, tokens], as a caller prepares it; rows without any key are opened."""
    tokens = mask.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, fill)


PADDING = {
    "none": {},
    "left": {"left": "all"},
    "right": {},
    "both": {"left": 2, "right": 3},
    "left-and-more-right": {"left": "all", "right": 2},
}


@every_spec
@pytest.mark.parametrize("padding", PADDING)
def test_padding(padding, spec, shared):
    pair = make_pair(spec, shared)
    roles = ROLES[2:3] * 2 if padding == "none" else ROLES
    ids = sequences(roles)
    batch = pad(roles, ids, **PADDING[padding])
    logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), roles, ids)


@every_spec
def test_attention_mask_absent(spec, shared):
    pair = make_pair(spec, shared)
    roles = ROLES[2:3] * 2
    ids = sequences(roles)
    batch = pad(roles, ids)
    logits = pair.peft(input_ids=batch.ids, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), roles, ids)


@every_spec
@pytest.mark.parametrize("fill", [torch.finfo(torch.float64).min, -1e4, -65504.0], ids=["lowest", "-1e4", "fp16"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_4d_mask_prepared_by_the_caller(padding, fill, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences()
    batch = pad(ROLES, ids, **PADDING[padding])
    mask = causal_4d(batch.mask, fill)
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    logits = pair.peft(input_ids=batch.ids, attention_mask=mask, position_ids=positions, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), ROLES, ids)


@every_spec
def test_inputs_embeds(spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences()
    batch = pad(ROLES, ids)
    embeds = pair.peft.get_input_embeddings()(batch.ids)
    logits = pair.peft(inputs_embeds=embeds, attention_mask=batch.mask, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), ROLES, ids)


@every_spec
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompt_mask(padding, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences()
    batch = pad(ROLES, ids, **PADDING[padding])
    logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, prompt_mask=batch.prompt).logits
    assert_same_pass(pair, rows_of(logits, batch.where), ROLES, ids)


def packed(roles, ids):
    """One row of consecutive documents, with position ids that restart."""
    flat = torch.tensor([[token for tokens in ids for token in tokens]])
    positions = torch.tensor([[i for tokens in ids for i in range(len(tokens))]])
    supervised = torch.tensor([[role == "c" for document in roles for role in document]])
    labels = flat.masked_fill(~supervised, -100)
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
    where = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
    return flat, positions, labels, ~supervised, ends.int(), where


# Documents of one token (a prompt without answer) and of two among them.
PACKED_ROLES = ("pppcc", "p", "pc", *ROLES, "pp")


@every_spec
@pytest.mark.parametrize("told_by", ["labels", "prompt_mask"])
def test_packed(told_by, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PACKED_ROLES)
    flat, positions, labels, prompt, _, where = packed(PACKED_ROLES, ids)
    told = {"labels": labels} if told_by == "labels" else {"prompt_mask": prompt}
    logits = pair.peft(input_ids=flat, position_ids=positions, use_cache=False, **told).logits
    assert_same_pass(pair, [logits[0, w] for w in where], PACKED_ROLES, ids)


@every_spec
def test_padding_free_with_cu_seq_lens(spec, shared):
    # Flash attention reads cu_seq_lens; other attentions read the position ids, so both are passed, as collators do.
    pair = make_pair(spec, shared)
    ids = sequences(PACKED_ROLES)
    flat, positions, labels, _, ends, where = packed(PACKED_ROLES, ids)
    longest = max(map(len, ids))
    logits = pair.peft(
        input_ids=flat,
        position_ids=positions,
        labels=labels,
        use_cache=False,
        cu_seq_lens_q=torch.cat([ends, ends[-1:]]),  # some collators repeat the end
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    ).logits
    assert_same_pass(pair, [logits[0, w] for w in where], PACKED_ROLES, ids)


TURNS = ("pppccppc", "ppcpcccc", "pcpppppcc", "ppppppccc")


@every_spec
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_several_turns(padding, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(TURNS)
    batch = pad(TURNS, ids, **PADDING[padding])
    logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), TURNS, ids)


@every_spec
def test_several_turns_packed(spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(TURNS)
    flat, positions, labels, _, _, where = packed(TURNS, ids)
    logits = pair.peft(input_ids=flat, position_ids=positions, labels=labels, use_cache=False).logits
    assert_same_pass(pair, [logits[0, w] for w in where], TURNS, ids)


def test_unsupervised_tokens_behind_the_last_label_are_no_prompt():
    pair = make_pair("f2+l3", True)
    ids = sequences(("pppccpp",))
    labels = torch.tensor(ids).masked_fill(torch.tensor([[1, 1, 1, 0, 0, 1, 1]]).bool(), -100)
    logits = pair.peft(input_ids=torch.tensor(ids), labels=labels).logits
    assert_same_pass(pair, [logits[0]], ("pppcccc",), ids)


CHECKPOINTING = {"off": None, "re-entrant": True, "non-re-entrant": False}
# On the blocks, and on modules inside them, whose hooks every Transformers version replays in the backward pass.
CHECKPOINTED_SITES = {
    "blocks": ("model.layers.0", "model.layers.2"),
    "inside": ("model.layers.0.mlp", "model.layers.2.self_attn"),
}


@every_spec
@pytest.mark.parametrize("sites", CHECKPOINTED_SITES)
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_checkpointing_two_forwards_then_one_backward(kind, sites, spec, shared):
    pair = make_pair(spec, shared, sites=CHECKPOINTED_SITES[sites])
    pair.peft.train()
    if CHECKPOINTING[kind] is not None:
        pair.peft.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[kind]})
        pair.peft.enable_input_require_grads()
    ids = sequences(), sequences(TURNS)
    first = pad(ROLES, ids[0])
    second = pad(TURNS, ids[1], left="all")
    logits = []
    for batch in (first, second):
        out = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).logits
        logits += rows_of(out, batch.where)
    with torch.no_grad():  # an evaluation in between must not disturb the backward pass
        pair.peft(input_ids=first.ids[:1, :3])
    assert_same_pass(pair, logits, ROLES + TURNS, ids[0] + ids[1])


@every_spec
def test_checkpoint_wrapped_by_the_user(spec, shared):
    """`torch.utils.checkpoint` around whole blocks, as FSDP's activation checkpointing does: block hooks replay too."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    pair = make_pair(spec, shared)
    layers = pair.peft.base_model.model.model.layers
    parameters = pair.parameters()
    for index, block in enumerate(layers):
        layers[index] = checkpoint_wrapper(block)
    pair.parameters = lambda: parameters
    ids = sequences(), sequences(TURNS)
    logits = []
    for roles, tokens in ((ROLES, ids[0]), (TURNS, ids[1])):
        batch = pad(roles, tokens)
        out = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).logits
        logits += rows_of(out, batch.where)
    assert_same_pass(pair, logits, ROLES + TURNS, ids[0] + ids[1])


@every_spec
def test_training_loss_gradient(spec, shared):
    """The gradient of the model's own loss, as a trainer takes it."""
    pair = make_pair(spec, shared)
    ids = sequences()
    batch = pad(ROLES, ids)
    pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
    total = count = 0
    for role, tokens in zip(ROLES, ids, strict=True):
        logits = pair.reference.logits(tokens, role).log_softmax(-1)
        for i, letter in enumerate(role):
            if letter == "c":
                total = total - logits[i - 1, tokens[i]]
                count += 1
    assert_same_gradients(pair, gradients(pair.reference, total / count), rtol=1e-7)


# Generation. The reference generates each sequence alone and without a cache.

PROMPTS = ("p", "pp", "pppppppp", "ppp")


def generated(pair, batch, **kwargs) -> torch.Tensor:
    """New tokens [rows, new] of a left-padded batch."""
    out = pair.peft.generate(input_ids=batch.ids, attention_mask=batch.mask, **GENERATE | kwargs)
    return out[:, batch.ids.shape[1] :]


def expected_tokens(pair, ids, **kwargs) -> list[torch.Tensor]:
    return [pair.reference.generate(tokens, **GENERATE | kwargs)[:, len(tokens) :] for tokens in ids]


def assert_same_tokens(got: torch.Tensor, expected: list[torch.Tensor]) -> None:
    rows = [row for block in expected for row in block]
    assert len(got) == len(rows)
    for number, (row, wanted) in enumerate(zip(got, rows, strict=True)):
        # A batch goes on with padding behind rows that have ended; beam search may cut the end token off alone.
        assert row[: len(wanted)].tolist() == wanted.tolist(), f"row {number}"
        assert set(row[len(wanted) :].tolist()) <= {PAD, EOS}, f"row {number}"


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "offloaded": {"cache_implementation": "offloaded"},
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CACHE_ROWS = [pytest.param(c, marks=[pytest.mark.gpu, needs_cuda] if c == "offloaded" else []) for c in CACHES]
DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def adapter_changes_what_is_generated():
    """The comparisons below would prove nothing if the adapter did not matter to the generated tokens."""
    for spec, shared in SPECS.values():
        pair = make_pair(spec, shared)
        with pair.peft.disable_adapter():
            base = generated(pair, pad(PROMPTS, sequences(PROMPTS), left="all"))
        assert not torch.equal(base, generated(pair, pad(PROMPTS, sequences(PROMPTS), left="all")))


@every_spec
@pytest.mark.parametrize("cache", CACHE_ROWS)
@pytest.mark.usefixtures("adapter_changes_what_is_generated")
def test_generate_greedy(cache, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS)
    batch = pad(PROMPTS, ids, left="all")
    assert_same_tokens(generated(pair, batch, **CACHES[cache]), expected_tokens(pair, ids))


@every_spec
@pytest.mark.skipif(not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="no such cache on a CPU")
def test_generate_with_a_quantized_cache(spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for prompt in ids:
        got = pair.peft.generate(input_ids=torch.tensor([prompt]), **options, **GENERATE)
        # The cache loses precision, so the reference needs it too.
        assert got.tolist() == pair.reference.generate(prompt, cached=True, **options, **GENERATE).tolist()


@every_spec
@pytest.mark.parametrize("cache", ["dynamic", "none"])
@pytest.mark.parametrize("decoding", ["beams", "beams-returned"])
def test_generate_beams(decoding, cache, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS[:3])
    batch = pad(PROMPTS[:3], ids, left="all")
    options = DECODING[decoding]
    assert_same_tokens(generated(pair, batch, **options, **CACHES[cache]), expected_tokens(pair, ids, **options))


@every_spec
def test_generate_sampling_with_a_seed(spec, shared):
    pair = make_pair(spec, shared)
    for prompt in sequences(PROMPTS):
        options = {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2}
        torch.manual_seed(11)
        got = pair.peft.generate(input_ids=torch.tensor([prompt]), **GENERATE | options)
        torch.manual_seed(11)
        assert_same_tokens(got, [pair.reference.generate(prompt, **GENERATE | options)])


@every_spec
def test_generate_without_attention_mask(spec, shared):
    """Transformers infers the mask from padding ids."""
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS)
    batch = pad(PROMPTS, ids, left="all")
    out = pair.peft.generate(input_ids=batch.ids, **GENERATE)[:, batch.ids.shape[1] :]
    assert_same_tokens(out, expected_tokens(pair, ids))


@every_spec
def test_generate_from_inputs_embeds(spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS)
    batch = pad(PROMPTS, ids, left="all")
    embeds = pair.peft.get_input_embeddings()(batch.ids)
    out = pair.peft.generate(inputs_embeds=embeds, attention_mask=batch.mask, **GENERATE)
    assert_same_tokens(out, expected_tokens(pair, ids))


@every_spec
def test_generate_with_positional_inputs(spec, shared):
    pair = make_pair(spec, shared)
    (prompt,) = sequences(PROMPTS[2:3])
    out = pair.peft.base_model.model.generate(torch.tensor([prompt]), **GENERATE)
    assert_same_tokens(out[:, len(prompt) :], expected_tokens(pair, [prompt]))


@every_spec
def test_generate_with_prompt_lookup(spec, shared):
    pair = make_pair(spec, shared)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    out = pair.peft.generate(input_ids=torch.tensor([prompt]), prompt_lookup_num_tokens=3, **GENERATE)
    assert_same_tokens(out[:, len(prompt) :], expected_tokens(pair, [prompt]))


@every_spec
def test_generate_assisted(spec, shared):
    pair = make_pair(spec, shared)
    assistant = llama(num_hidden_layers=1).to(torch.float64)
    for prompt in sequences(PROMPTS):
        out = pair.peft.generate(input_ids=torch.tensor([prompt]), assistant_model=assistant, **GENERATE)
        assert_same_tokens(out[:, len(prompt) :], expected_tokens(pair, [prompt]))


@every_spec
def test_generate_with_a_custom_decoding_loop(spec, shared):
    """A user's decoding function, which calls the model itself."""

    def decode(model, input_ids, generation_config=None, **model_kwargs):
        cache = DynamicCache(config=model.config)
        fresh = input_ids
        for _ in range(generation_config.max_new_tokens):
            logits = model(input_ids=fresh, past_key_values=cache).logits[:, -1]
            fresh = logits.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, fresh], dim=1)
        return input_ids

    pair = make_pair(spec, shared)
    for prompt in sequences(PROMPTS):
        out = pair.peft.generate(input_ids=torch.tensor([prompt]), custom_generate=decode, **GENERATE)
        (wanted,) = expected_tokens(pair, [prompt])
        assert_same_tokens(out[:, len(prompt) :][:, : wanted.shape[1]], [wanted])


@every_spec
def test_generate_streaming_in_a_thread(spec, shared):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    pair = make_pair(spec, shared)
    (prompt,) = sequences(PROMPTS[2:3])
    streamer = Collector()
    call = {"input_ids": torch.tensor([prompt]), "streamer": streamer, **GENERATE}
    thread = threading.Thread(target=pair.peft.generate, kwargs=call)
    thread.start()
    thread.join()
    assert_same_tokens(torch.tensor([streamer.tokens[len(prompt) :]]), expected_tokens(pair, [prompt]))


@every_spec
def test_generate_in_several_threads_at_once(spec, shared):
    pair = make_pair(spec, shared)
    prompts = sequences(PROMPTS)
    results = {}

    def run(number):
        out = pair.peft.generate(input_ids=torch.tensor([prompts[number]]), **GENERATE)
        results[number] = out[:, len(prompts[number]) :]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(expected_tokens(pair, prompts)):
        assert_same_tokens(results[number], [expected])


@every_spec
@pytest.mark.parametrize("kept", ["dynamic", "static"])
@pytest.mark.parametrize("handed", ["everything", "only-new"])
def test_generate_continued_from_a_cache_equals_multi_turn_training(handed, kept, spec, shared):
    """Two turns of a chat with a kept cache edit what one training pass over both turns edits."""
    pair = make_pair(spec, shared)
    first, more = sequences(("ppppp", "ppp"))
    model = pair.peft.base_model.model
    cache = (
        StaticCache(config=model.config, max_cache_len=40) if kept == "static" else DynamicCache(config=model.config)
    )
    options = GENERATE | {"eos_token_id": None, "past_key_values": cache, "max_new_tokens": 3}
    turn_one = pair.peft.generate(input_ids=torch.tensor([first]), **options)
    conversation = torch.cat([turn_one, torch.tensor([more])], dim=1)
    roles = "p" * len(first) + "ccc" + "p" * len(more)
    inputs = {"input_ids": conversation}
    if handed == "only-new":
        new = conversation[:, cache.get_seq_length() :]
        inputs = {"input_ids": new, "attention_mask": torch.ones_like(conversation)}
    out = pair.peft.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)

    tokens = conversation[0].tolist() + out.sequences[0, -3:].tolist()
    expected = pair.reference.logits(tokens, roles + "ccc")
    got = torch.stack(out.logits, dim=1)[0]
    torch.testing.assert_close(got.double(), expected[-4:-1], rtol=1e-4, atol=1e-4)
    training = pair.peft(
        input_ids=torch.tensor([tokens]),
        labels=torch.tensor([[t if r == "c" else -100 for t, r in zip(tokens, roles + "ccc", strict=True)]]),
    ).logits
    torch.testing.assert_close(training[0], expected, rtol=1e-5, atol=1e-5)


# An answer of which the first tokens are handed over: `c<n>` counts on from them.


@every_spec
@pytest.mark.parametrize("told_by", ["prompt_mask", "cache"])
def test_generate_goes_on_with_an_answer(told_by, spec, shared):
    pair = make_pair(spec, shared)
    roles = "ppppc"
    (tokens,) = sequences((roles,))
    options = GENERATE | {"eos_token_id": None}
    if told_by == "prompt_mask":
        out = pair.peft.generate(
            input_ids=torch.tensor([tokens]), prompt_mask=torch.tensor([[r == "p" for r in roles]]), **options
        )
    else:
        cache = DynamicCache(config=pair.peft.base_model.model.config)
        first = pair.peft.generate(
            input_ids=torch.tensor([tokens[:4]]), past_key_values=cache, **options | {"max_new_tokens": 1}
        )
        tokens = first[0].tolist()
        out = pair.peft.generate(input_ids=first, past_key_values=cache, **options)
    expected = pair.reference.generate(tokens, roles, **options)
    assert out.tolist() == expected.tolist()


@every_spec
def test_scoring_an_answer_on_a_cached_prompt(spec, shared):
    pair = make_pair(spec, shared)
    roles = "ppppccc"
    (tokens,) = sequences((roles,))
    cache = DynamicCache(config=pair.peft.base_model.model.config)
    prompt, answer = torch.tensor([tokens[:4]]), torch.tensor([tokens[4:]])
    pair.peft(input_ids=prompt, past_key_values=cache)
    logits = pair.peft(input_ids=answer, past_key_values=cache, labels=answer).logits[0]
    torch.testing.assert_close(logits, pair.reference.logits(tokens, roles)[4:], rtol=1e-5, atol=1e-5)


@every_spec
def test_a_decoding_loop_of_the_users_with_prompt_mask(spec, shared):
    pair = make_pair(spec, shared)
    roles = "ppppccc"
    (tokens,) = sequences((roles,))
    cache = DynamicCache(config=pair.peft.base_model.model.config)
    rows = [pair.peft(input_ids=torch.tensor([tokens[:4]]), past_key_values=cache).logits[0]]
    for i in range(4, 7):
        rows.append(
            pair.peft(
                input_ids=torch.tensor([[tokens[i]]]),
                past_key_values=cache,
                prompt_mask=torch.tensor([[role == "p" for role in roles[: i + 1]]]),
            ).logits[0]
        )
    torch.testing.assert_close(torch.cat(rows), pair.reference.logits(tokens, roles), rtol=1e-5, atol=1e-5)


def test_a_generate_inside_generate_has_a_prompt_of_its_own():
    pair = make_pair("l1")
    outer, inner = sequences(("pppppp", "ppp"))
    seen = []

    def judge(input_ids, scores, **kwargs):
        seen.append(pair.peft.generate(input_ids=torch.tensor([inner]), **GENERATE))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    out = pair.peft.generate(input_ids=torch.tensor([outer]), stopping_criteria=[judge], **GENERATE)
    assert out.tolist() == pair.reference.generate(outer, **GENERATE).tolist()
    assert seen[-1].tolist() == pair.reference.generate(inner, **GENERATE).tolist()


def test_a_cache_cropped_to_the_prompt_starts_a_new_turn_there():
    pair = make_pair("f2+l3", True)
    first, more = sequences(("ppppp", "ppp"))
    cache = DynamicCache(config=pair.peft.base_model.model.config)
    options = GENERATE | {"eos_token_id": None, "past_key_values": cache}
    turn_one = pair.peft.generate(input_ids=torch.tensor([first]), **options)
    kept = len(first) + 2
    cache.crop(kept - cache.get_seq_length())
    conversation = torch.cat([turn_one[:, :kept], torch.tensor([more])], dim=1)
    got = pair.peft.generate(input_ids=conversation, **options)[0, conversation.shape[1] :]
    expected = pair.reference.generate(
        conversation[0].tolist(), "p" * len(first) + "cc" + "p" * len(more), **GENERATE | {"eos_token_id": None}
    )
    assert got.tolist() == expected[0, conversation.shape[1] :].tolist()


def test_generate_takes_a_prompt_mask():
    """A whole conversation is passed in: its earlier answers are not prompt."""
    pair = make_pair("f2+l3", True)
    roles = "pppccppp"
    (tokens,) = sequences((roles,))
    mask = torch.tensor([[role == "p" for role in roles]])
    out = pair.peft.generate(input_ids=torch.tensor([tokens]), prompt_mask=mask, **GENERATE)
    assert_same_tokens(out[:, len(tokens) :], [pair.reference.generate(tokens, roles, **GENERATE)[:, len(tokens) :]])


# Entry: the same adapter, whichever object is called.


def whole_batch(pair, call) -> None:
    ids = sequences()
    batch = pad(ROLES, ids)
    logits = call(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    assert_same_pass(pair, rows_of(logits, batch.where), ROLES, ids)


def prompts_alone(pair, generate) -> None:
    ids = sequences(PROMPTS)
    batch = pad(PROMPTS, ids, left="all")
    out = generate(input_ids=batch.ids, attention_mask=batch.mask, **GENERATE)
    assert_same_tokens(out[:, batch.ids.shape[1] :], expected_tokens(pair, ids))


@every_spec
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_entry_peft_model(task_type, spec, shared):
    pair = make_pair(spec, shared, task_type=task_type)
    whole_batch(pair, pair.peft)
    prompts_alone(pair, pair.peft.generate)


@every_spec
def test_entry_injected_model(spec, shared):
    base = llama().to(torch.float64)
    reference_model = copy.deepcopy(base)
    sites = ["model.layers.0", "model.layers.2"]
    config = ReftConfig(r=3, positions=spec, share_weights=shared, target_modules=sites, init_weights=False)
    model = inject_adapter_in_model(config, base).to(torch.float64)
    pair = pair_with_reference(model, reference_model, sites, spec, shared, prefix="")
    whole_batch(pair, model)
    prompts_alone(pair, model.generate)


@every_spec
def test_entry_transformers_load_adapter(tmp_path, spec, shared):
    make_pair(spec, shared).peft.save_pretrained(tmp_path)
    model = llama().to(torch.float64)
    model.load_adapter(tmp_path, is_trainable=True)
    model = model.to(torch.float64)
    sites = ["model.layers.0", "model.layers.2"]
    pair = pair_with_reference(model, llama().to(torch.float64), sites, spec, shared, prefix="")
    whole_batch(pair, model)
    prompts_alone(pair, model.generate)


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"<{i}>": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<3>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<2>", padding_side="left")


@every_spec
def test_entry_pipeline(tokenizer, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences(PROMPTS)
    generator = pipeline("text-generation", model=pair.peft.base_model.model, tokenizer=tokenizer)
    texts = [" ".join(f"<{token}>" for token in tokens) for tokens in ids]
    outputs = generator(texts, batch_size=len(texts), return_full_text=False, **GENERATE)
    for output, expected in zip(outputs, expected_tokens(pair, ids), strict=True):
        words = [f"<{token}>" for token in expected[0].tolist() if token not in (PAD, EOS)]
        assert output[0]["generated_text"].split() == words


# Encoder-decoder models: the encoder's tokens are the prompt, the decoder's the completion.

SEQ2SEQ = {
    "t5": (("encoder.block.0", "encoder.block.2"), ("decoder.block.0", "decoder.block.1")),
    "bart": (
        ("model.encoder.layers.0", "model.encoder.layers.2"),
        ("model.decoder.layers.0", "model.decoder.layers.1"),
    ),
}
SOURCES = ("ppp", "p", "ppppppp")
TARGETS = ("cccc", "cc", "c")


def seq2seq_pair(family: str, spec: str, shared: bool):
    encoder, decoder = SEQ2SEQ[family]
    words = {word.rstrip("123") for word in spec.split("+")}
    sites = encoder if words & {"f", "l", "prompt", "all"} else ()
    sites += decoder if words & {"c", "completion", "all"} else ()
    pair = make_pair(spec, shared, base=ZOO[family].build(), sites=sites, task_type="SEQ_2_SEQ_LM")
    return pair, encoder


def seq2seq_roles(pair, encoder, source: int) -> dict[str, str]:
    return {site: "p" * source if site in encoder else "c" for site in pair.reference.sites}


@every_spec
# BART's positions are absolute: left padding would change the base model.
@pytest.mark.parametrize(("family", "padding"), [("t5", "left"), ("t5", "right"), ("bart", "right")])
def test_encoder_decoder_training(family, padding, spec, shared):
    pair, encoder = seq2seq_pair(family, spec, shared)
    sources, targets = sequences(SOURCES), sequences(TARGETS, seed=4)
    batch = pad(SOURCES, sources, **PADDING[padding])
    answers = pad(TARGETS, targets)
    logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=answers.labels).logits

    objective = expected_objective = 0.0
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        with pair.reference.editing(seq2seq_roles(pair, encoder, len(source))) as model:
            expected = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
        got = logits[row, : len(target)]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        weights = probe(len(target), row, torch.float64)
        objective = objective + (got * weights).sum()
        expected_objective = expected_objective + (expected * weights).sum()
    objective.backward()
    assert_same_gradients(pair, gradients(pair.reference, expected_objective))


@every_spec
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "none"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoder_generate(family, cache, beams, spec, shared):
    pair, encoder = seq2seq_pair(family, spec, shared)
    sources = sequences(SOURCES)
    batch = pad(SOURCES, sources)
    options = GENERATE | {"num_beams": beams}
    got = pair.peft.generate(input_ids=batch.ids, attention_mask=batch.mask, **options, **CACHES[cache])
    expected = []
    for source in sources:
        with pair.reference.editing(seq2seq_roles(pair, encoder, len(source))) as model:
            expected.append(model.generate(input_ids=torch.tensor([source]), use_cache=False, **options))
    assert_same_tokens(got, expected)


# Recurrent states have no length to read.


@every_spec
@pytest.mark.parametrize("cache", ["dynamic", "none"])
def test_generate_with_a_state_space_model(cache, spec, shared):
    pair = make_pair(spec, shared, base=ZOO["mamba"].build(), sites=("backbone.layers.0", "backbone.layers.2"))
    for prompt in sequences(PROMPTS):
        got = pair.peft.generate(input_ids=torch.tensor([prompt]), **GENERATE, **CACHES[cache])
        assert_same_tokens(got[:, len(prompt) :], expected_tokens(pair, [prompt]))


# Compiled. The backend runs the captured graph as it is: what is at stake is the capture.


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compiled_pair(spec: str, shared: bool):
    # Capture costs seconds a layer.
    sites = ("model.layers.0", "model.layers.1")
    return make_pair(spec, shared, base=llama(num_hidden_layers=2), sites=sites)


@every_spec
def test_compiled_forward_in_one_graph(dynamo, spec, shared):
    pair = compiled_pair(spec, shared)
    whole_batch(pair, torch.compile(pair.peft.base_model.model, backend="eager", fullgraph=True))
    assert dynamo["stats"]["unique_graphs"] == 1


def test_compiled_peft_model_in_one_graph(dynamo):
    pair = compiled_pair("f2+l3", False)
    whole_batch(pair, torch.compile(pair.peft, backend="eager", fullgraph=True))
    assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@every_spec
def test_compiled_by_inductor(dynamo, spec, shared):
    """Compiled to machine code, the backward pass too."""
    pair = compiled_pair(spec, shared)
    whole_batch(pair, torch.compile(pair.peft.base_model.model, fullgraph=True))


@every_spec
def test_compiled_decode_with_a_static_cache_does_not_recompile_per_step(dynamo, spec, shared):
    pair = compiled_pair(spec, shared)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    ids = sequences(PROMPTS)
    batch = pad(PROMPTS, ids, left="all")
    graphs = []
    for steps in (4, 10):
        more = options | {"max_new_tokens": steps, "eos_token_id": None}
        got = generated(pair, batch, **more)
        assert_same_tokens(got, expected_tokens(pair, ids, max_new_tokens=steps, eos_token_id=None))
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[0] >= 1, "nothing was compiled"
    # The hook and the model are a graph each, once more for another length of the cache. Steps add nothing.
    assert graphs[0] <= 2
    assert graphs[1] - graphs[0] <= 2


# Low precision


@every_spec
@pytest.mark.parametrize("route", ["bf16 base", "autocast"])
def test_low_precision(route, spec, shared):
    dtype = torch.bfloat16 if route == "bf16 base" else torch.float32
    pair = make_pair(spec, shared, dtype=dtype)
    pair.peft.to(dtype)
    ids = sequences()
    batch = pad(ROLES, ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=route == "autocast"):
        logits = pair.peft(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
        expected = [pair.reference.logits(t, r) for t, r in zip(ids, ROLES, strict=True)]
        with pair.peft.disable_adapter():
            base = pair.peft(input_ids=batch.ids, attention_mask=batch.mask).logits
    for row, (got, wanted) in enumerate(zip(rows_of(logits, batch.where), expected, strict=True)):
        # A bfloat16 keeps 8 bits; the adapter's own effect is far above that.
        error = (got - wanted).float().norm() / wanted.float().norm()
        assert error < 0.03, f"row {row}"
    assert (logits - base).float().norm() > 0.3 * base.float().norm()
