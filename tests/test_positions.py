"""The position language and its tensor functions, against the loop reference, for whatever hypothesis comes up with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import edited_tokens

from peft_reft.tokens import positions as pos
from peft_reft.tokens.runs import Runs, Segments

counts = st.integers(1, 6)
firsts = counts.map("f{}".format)
lasts = counts.map("l{}".format)
completions = counts.map("c{}".format)
prompt_words = st.one_of(firsts, lasts, st.just("prompt"), st.tuples(firsts, lasts).map("+".join))
completion_words = st.one_of(completions, st.just("completion"))
specs = st.one_of(
    st.just("all"), prompt_words, completion_words, st.tuples(prompt_words, completion_words).map("+".join)
)
# Sequences begin with a prompt; a prompt without an answer is one of them.
turns = st.lists(st.tuples(counts, st.integers(1, 4)), min_size=1, max_size=3)
roles = st.one_of(
    turns.map(lambda pairs: "".join("p" * prompt + "c" * answer for prompt, answer in pairs)),
    counts.map(lambda n: "p" * n),
)
paddings = st.tuples(st.integers(0, 3), st.integers(0, 3))


def expected_codes(spec: str, shared: bool, sequence: str) -> list[int]:
    chosen = edited_tokens(spec, sequence)
    return [0 if i not in chosen else 1 if shared else chosen[i] + 1 for i in range(len(sequence))]


def grid(rows: list[tuple[str, tuple[int, int]]]):
    """Padded rows as tensors: labels, real tokens, and the slices where the sequences are."""
    tokens = max(len(row) + left for row, (left, _) in rows) + max(right for _, (_, right) in rows)
    labels = torch.full((len(rows), tokens), pos.IGNORE_INDEX)
    real = torch.zeros(len(rows), tokens, dtype=torch.bool)
    slices = []
    for i, (row, (left, _)) in enumerate(rows):
        where = slice(left, left + len(row))
        real[i, where] = True
        labels[i, where] = torch.tensor([9 if role == "c" else pos.IGNORE_INDEX for role in row])
        slices.append(where)
    return labels, real, slices


def codes_of(parsed, labels, real, starts=None):
    """Codes and prompt, of which the tensor functions and the runs think alike."""
    prompt = pos.prompt_from_labels(labels, real, starts)
    codes = pos.assign(parsed, prompt, pos.completion_of(prompt, real, starts), starts)
    for runs in (Runs.of_labels(labels, real, starts), Runs.of_prompt(prompt, real, starts)):
        assert not runs.promptless
        segments = runs.segments(parsed)
        assert torch.equal(segments.grid(), codes)
        rows, units = segments.tokens()
        assert torch.equal(rows, codes.flatten().nonzero().squeeze(1))
        assert torch.equal(units, codes.flatten()[rows])
        assert segments.edited == len(rows)
        for past in (1, codes.shape[1] - 1):
            assert torch.equal(segments.without_past(past).grid(), codes[:, past:])
        assert torch.equal(Segments.of(codes).grid(), codes)
    return codes, prompt


@settings(max_examples=300, deadline=None)
@given(spec=specs, shared=st.booleans(), rows=st.lists(st.tuples(roles, paddings), min_size=1, max_size=4))
def test_padded_rows_equal_the_loop_version(spec, shared, rows):
    labels, real, slices = grid(rows)
    codes, prompt = codes_of(pos.parse(spec, shared), labels, real)
    assert not codes[~real].any(), "padding is edited"
    for i, (row, _) in enumerate(rows):
        assert codes[i, slices[i]].tolist() == expected_codes(spec, shared, row)
        assert prompt[i, slices[i]].tolist() == [role == "p" for role in row]


@settings(max_examples=300, deadline=None)
@given(spec=specs, shared=st.booleans(), documents=st.lists(roles, min_size=1, max_size=5))
def test_packed_rows_equal_the_loop_version(spec, shared, documents):
    labels, real, _ = grid([("".join(documents), (0, 0))])
    position_ids = torch.tensor([[i for document in documents for i in range(len(document))]])
    codes, _ = codes_of(pos.parse(spec, shared), labels, real, pos.sequence_starts(position_ids))
    assert codes[0].tolist() == [code for document in documents for code in expected_codes(spec, shared, document)]


@settings(max_examples=200, deadline=None)
@given(spec=specs, shared=st.booleans(), rows=st.lists(st.tuples(roles, paddings), min_size=1, max_size=4))
def test_words_stay_on_their_side_and_units_are_unique(spec, shared, rows):
    labels, real, _ = grid(rows)
    parsed = pos.parse(spec, shared)
    codes, prompt = codes_of(parsed, labels, real)
    assert codes.dtype == torch.int8
    assert set(codes.flatten().tolist()) <= set(range(parsed.units + 1))
    for kind in ("first", "last", "prompt"):
        if kind in parsed.kinds and not shared:
            assert prompt[codes == parsed.kinds[kind][1]].all()
    for kind in ("count", "completion"):
        if kind in parsed.kinds and not shared:
            assert not prompt[codes == parsed.kinds[kind][1]].any()


@settings(max_examples=100, deadline=None)
@given(first=counts, last=counts, length=st.integers(1, 20))
def test_first_and_last_words_never_overlap(first, last, length):
    labels, real, _ = grid([("p" * length + "c", (0, 0))])
    codes, _ = codes_of(pos.parse(f"f{first}+l{last}", shared=False), labels, real)
    heads, tails = (codes == 1).sum().item(), (codes == 2).sum().item()
    if length >= first + last:
        assert (heads, tails) == (first, last)
    else:
        assert (heads, tails) == (min(first, length // 2), min(last, length // 2))


@given(spec=specs, shared=st.booleans())
def test_a_spec_prints_as_it_was_written(spec, shared):
    assert str(pos.parse(spec, shared)) == spec


@settings(max_examples=300, deadline=None)
@given(spec=specs, shared=st.booleans(), data=st.data())
def test_runs_say_the_same_as_tensor_functions_of_any_tokens(spec, shared, data):
    rows, tokens = data.draw(st.tuples(counts, st.integers(1, 12)))

    def mask():
        flags = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
        return torch.tensor(data.draw(flags)).reshape(rows, tokens)

    real, chosen = mask(), mask()
    starts = mask() if data.draw(st.booleans()) else None
    turn = data.draw(st.integers(0, tokens - 1))
    parsed, labels = pos.parse(spec, shared), torch.where(chosen, 9, pos.IGNORE_INDEX)
    told = pos.prompt_from_labels(labels, real, starts)
    breaks = torch.arange(tokens) == turn if turn else None
    known = Runs.of_prompt(chosen & real, real, starts, turn), chosen & real
    for runs, prompt in ((Runs.of_labels(labels, real, starts, turn), told), known):
        completion = pos.completion_of(prompt, real, starts)
        codes = pos.assign(parsed, prompt, completion, starts, breaks)
        if spec == "all":
            # Real tokens ahead of any prompt are neither prompt nor completion.
            codes = real.to(torch.int8)
        assert torch.equal(runs.segments(parsed).grid(), codes)


@pytest.mark.parametrize(
    ("labels", "starts", "bad"),
    [
        ([[9, 9, 9]], None, (0,)),
        ([[-100, 9, 9], [9, -100, -100]], None, (1,)),
        ([[-100, -100, -100]], None, ()),
        ([[-100, -100, 9, 9], [-100, 9, 9, 9]], [[1, 0, 0, 0], [1, 0, 1, 0]], (1,)),
    ],
    ids=["no prompt", "prompt", "no labels", "second document"],
)
def test_the_first_token_of_a_sequence_without_prompt_is_found(labels, starts, bad):
    labels = torch.tensor(labels)
    starts = None if starts is None else torch.tensor(starts).bool()
    assert Runs.of_labels(labels, torch.ones_like(labels).bool(), starts).promptless == bad


def test_a_supervised_first_token_behind_left_padding_is_found():
    labels, real = torch.tensor([[-100, -100, 9, 9]]), torch.tensor([[0, 0, 1, 1]]).bool()
    assert Runs.of_labels(labels, real).promptless == (0,)


def test_a_break_opens_a_new_span_right_behind_the_old_one():
    prompt = torch.ones(1, 6, dtype=torch.bool)
    breaks = torch.arange(6) == 4
    codes = pos.assign(pos.parse("f2+l1", shared=False), prompt, ~prompt, breaks=breaks)
    assert codes[0].tolist() == [1, 1, 0, 2, 0, 2]


@pytest.mark.parametrize(
    ("spec", "pointed_at"),
    [("f7+x3", "x3"), ("", ""), ("f0", "f0"), ("7f", "7f"), ("f7++l7", ""), ("prompts", "prompts"), ("f7,l7", "f7,l7")],
)
def test_an_unknown_word_is_refused_and_pointed_at(spec, pointed_at):
    with pytest.raises(ValueError, match="Unknown word") as error:
        pos.parse(spec)
    message = str(error.value)
    assert repr(pointed_at) in message
    _, shown, caret, _ = message.split("\n")
    assert shown[2:] == spec
    assert spec[caret.index("^") - 2 :].startswith(pointed_at)
    for word in ("f<n>", "l<n>", "c<n>", "prompt", "completion", "all"):
        assert word in message


@pytest.mark.parametrize("spec", ["f3+f5", "prompt+l2", "all+f1", "c2+completion", "f1+all", "l1+l1", "prompt+prompt"])
def test_words_that_could_select_the_same_token_are_refused(spec):
    with pytest.raises(ValueError, match="can select the same token") as error:
        pos.parse(spec)
    for word in spec.split("+"):
        assert repr(word) in str(error.value)


def test_positions_must_be_a_string():
    with pytest.raises(TypeError, match="positions must be a string"):
        pos.parse(7)
