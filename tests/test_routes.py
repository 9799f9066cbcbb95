"""Edits land on the same tokens, with the same values, by whichever route a sequence comes through the model.

Every test compares with the loop reference on each sequence alone; its id names the row of the table and the positions.
"""

from __future__ import annotations

import pytest
import torch
from routes import (
    ROLES,
    SPECS,
    assert_same_gradients,
    assert_same_pass,
    make_pair,
    pad,
    sequences,
)

every_spec = pytest.mark.parametrize(("spec", "shared"), SPECS.values(), ids=SPECS.keys())


def rows_of(logits: torch.Tensor, where: list[torch.Tensor]) -> list[torch.Tensor]:
    return [logits[row, tokens] for row, tokens in enumerate(where)]


def causal_4d(mask: torch.Tensor, dtype: torch.dtype, opened: bool) -> torch.Tensor:
    """Additive mask [batch, 1, tokens, tokens], as a caller prepares it; fully masked rows opened or not."""
    tokens = mask.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    if opened:
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    else:
        # A row without any key would be NaN in attention: padding rows attend to key 0 only.
        allowed[..., 0] |= ~allowed.any(-1)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


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
@pytest.mark.parametrize("padding", ["left", "right"])
def test_4d_mask_prepared_by_the_caller(padding, spec, shared):
    pair = make_pair(spec, shared)
    ids = sequences()
    batch = pad(ROLES, ids, **PADDING[padding])
    mask = causal_4d(batch.mask, torch.float64, opened=True)
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    logits = pair.peft(
        input_ids=batch.ids, attention_mask=mask, position_ids=positions, labels=batch.labels
    ).logits
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
    """One row of documents behind each other, with position ids that restart."""
    flat = torch.tensor([[token for tokens in ids for token in tokens]])
    positions = torch.tensor([[i for tokens in ids for i in range(len(tokens))]])
    supervised = torch.tensor([[role == "c" for document in roles for role in document]])
    labels = flat.masked_fill(~supervised, -100)
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
    where = [torch.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
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
        cu_seq_lens_q=ends,
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
    from reference import gradients

    assert_same_gradients(pair, gradients(pair.reference, total / count), rtol=1e-7)
