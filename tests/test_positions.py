"""The position language and the position finder, against the loop reference, on examples that hypothesis generates."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import edited_tokens

from peft_reft import ReftConfig
from peft_reft.tokens import positions as pos
from peft_reft.tokens.prompts import sequence_starts
from peft_reft.tokens.runs import IGNORE_INDEX, Marks, Segments

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
    labels = torch.full((len(rows), tokens), IGNORE_INDEX)
    real = torch.zeros(len(rows), tokens, dtype=torch.bool)
    slices = []
    for i, (row, (left, _)) in enumerate(rows):
        where = slice(left, left + len(row))
        real[i, where] = True
        labels[i, where] = torch.tensor([9 if role == "c" else IGNORE_INDEX for role in row])
        slices.append(where)
    return labels, real, slices


def codes_of(parsed, labels, real, starts=None):
    """Codes and prompt, checked to be the same however the prompt is given and the finder is called."""
    told = Marks(real, labels=labels, starts=starts)
    prompt = told.prompt_grid()
    codes = told.segments(parsed).grid()
    for marks in (told, Marks(real, prompt=prompt, starts=starts)):
        segments = marks.segments(parsed)
        assert not segments.promptless
        assert torch.equal(segments.grid(), codes)
        flat_index, units = segments.tokens()
        assert torch.equal(flat_index, codes.flatten().nonzero().squeeze(1))
        assert torch.equal(units, codes.flatten()[flat_index])
        assert segments.edited == len(flat_index)
        for past in (0, 1, codes.shape[1] - 1):
            assert torch.equal(marks.segments(parsed, past).grid(), codes[:, past:])
            assert torch.equal(marks.codes(parsed, past), codes[:, past:])
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
    # Where every prompt is one token, it is taken for plain text and refused; tests/test_prompts.py.
    prompts = [words[: words.rindex("c")].count("p") for words in documents if "c" in words]
    assume(not prompts or set(prompts) != {1})
    labels, real, _ = grid([("".join(documents), (0, 0))])
    position_ids = torch.tensor([[i for document in documents for i in range(len(document))]])
    codes, _ = codes_of(pos.parse(spec, shared), labels, real, sequence_starts(position_ids))
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


def role_of_each_token(prompt: list[bool], real: list[bool], labeled: list[bool] | None) -> list[str]:
    """One sequence by plain loops: "p" prompt, "c" completion, "b" ahead of any prompt, "-" padding."""
    count = range(len(real))
    if labeled is not None:
        supervised = [labeled[i] and real[i] for i in count]
        prompt = [real[i] and not supervised[i] and (any(supervised[i:]) or not any(supervised)) for i in count]
    return [
        "-" if not real[i] else "p" if prompt[i] else "c" if any(prompt[n] and real[n] for n in range(i)) else "b"
        for i in count
    ]


def codes_by_loops(spec: str, shared: bool, roles: list[str], turn: int | None) -> list[int]:
    """One sequence: padding does not count, wherever it is; a turn opens a new span."""
    kept = [i for i, role in enumerate(roles) if role != "-"]
    chosen: dict[int, int] = {}
    if spec == "all":
        chosen = dict.fromkeys(range(len(kept)), 0)
    else:
        ahead = sum(roles[i] == "b" for i in kept)
        text = "".join(roles[i] for i in kept[ahead:])
        opens = [n for n, i in enumerate(kept[ahead:]) if turn is not None and i >= turn]
        chosen = {ahead + n: unit for n, unit in edited_tokens(spec, text, opens[:1]).items()}
    codes = [0] * len(roles)
    for n, unit in chosen.items():
        codes[kept[n]] = 1 if shared else unit + 1
    return codes


@settings(max_examples=500, deadline=None)
@given(spec=specs, shared=st.booleans(), data=st.data())
def test_any_tokens_equal_the_loop_version(spec, shared, data):
    rows, tokens = data.draw(st.tuples(counts, st.integers(1, 12)))

    def mask():
        flags = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
        return torch.tensor(data.draw(flags)).reshape(rows, tokens)

    real, chosen = mask(), mask()
    starts = mask() if data.draw(st.booleans()) else None
    turn = data.draw(st.integers(0, tokens - 1))
    parsed, labels = pos.parse(spec, shared), torch.where(chosen, 9, IGNORE_INDEX)
    told = (
        Marks(real, labels=labels, starts=starts, turn=turn),
        Marks(real, prompt=chosen & real, starts=starts, turn=turn),
    )
    for marks, by_labels in zip(told, (True, False), strict=True):
        expected = []
        for row in range(rows):
            begins = [i for i in range(tokens) if i == 0 or (starts is not None and starts[row, i])]
            for begin, end in itertools.pairwise([*begins, tokens]):
                part = slice(begin, end)
                prompt, labeled = (None, chosen) if by_labels else (chosen, None)
                roles = role_of_each_token(
                    None if prompt is None else prompt[row, part].tolist(),
                    real[row, part].tolist(),
                    None if labeled is None else labeled[row, part].tolist(),
                )
                turned = turn - begin if turn and begin < turn < end else None
                expected += codes_by_loops(spec, shared, roles, turned)
        assert marks.segments(parsed).grid().flatten().tolist() == expected


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
    assert Marks(torch.ones_like(labels).bool(), labels=labels, starts=starts).runs().promptless == bad


def test_a_supervised_first_token_behind_left_padding_is_found():
    labels, real = torch.tensor([[-100, -100, 9, 9]]), torch.tensor([[0, 0, 1, 1]]).bool()
    assert Marks(real, labels=labels).runs().promptless == (0,)


def test_a_turn_opens_a_new_span_right_behind_the_old_one():
    prompt = torch.ones(1, 6, dtype=torch.bool)
    marks = Marks(prompt, prompt=prompt, turn=4)
    codes = marks.segments(pos.parse("f2+l1", shared=False)).grid()
    assert codes[0].tolist() == [1, 1, 0, 2, 0, 2]


def test_padding_in_the_middle_of_a_prompt_does_not_end_it():
    real = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    codes = Marks(real, prompt=real).segments(pos.parse("f3+l1", shared=False)).grid()
    assert codes[0].tolist() == [1, 1, 0, 0, 1, 0, 2, 0]


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


@pytest.mark.parametrize("kind", "flc")
@pytest.mark.parametrize("count", ["1000000001", "9223372036854775808", "9" * 19, "9" * 4300, "9" * 5000, "9" * 10**6])
def test_a_count_beyond_all_sequences_is_refused_with_the_bound(kind, count):
    with pytest.raises(ValueError, match=r"positions: .*counts further than 1,000,000,000") as error:
        ReftConfig(positions=f"{kind}{count}")
    assert kind + count[:10] in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("spec", ["f1000000000", "f1000000000+l1000000000", "c1000000000"])
def test_the_largest_counts_select_all_there_is(spec):
    labels, real, _ = grid([("pppcc", (0, 0))])
    codes, _ = codes_of(pos.parse(spec), labels, real)
    # Each of two words has at most a half.
    expected = {"f1000000000": [1, 1, 1, 0, 0], "c1000000000": [0, 0, 0, 1, 1]}.get(spec, [1, 0, 1, 0, 0])
    assert codes.tolist() == [expected]


@pytest.mark.parametrize("spec", ["f1\u0663", "l\uff17", "c1\u00b2"])
def test_digits_of_other_scripts_are_unknown(spec):
    with pytest.raises(ValueError, match="Unknown word"):
        pos.parse(spec)


@pytest.mark.parametrize("spec", ["f3+f5", "prompt+l2", "all+f1", "c2+completion", "f1+all", "l1+l1", "prompt+prompt"])
def test_words_that_could_select_the_same_token_are_refused(spec):
    with pytest.raises(ValueError, match="can select the same token") as error:
        pos.parse(spec)
    for word in spec.split("+"):
        assert repr(word) in str(error.value)


def test_positions_must_be_a_string():
    with pytest.raises(TypeError, match="positions must be a string"):
        pos.parse(7)
