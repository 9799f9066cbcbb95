"""`directions_from_pairs`: differences of means over the chosen tokens, compared with loops over single texts."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from peft_reft import directions_from_pairs

TOKENIZER = tiny.tokenizer()
PAIRS = {
    "in the middle": ("w6 w7 w8 w9", "w6 w10 w8 w9"),
    "longer": ("w6 w7 w8 w9 w11", "w6 w7 w9"),
    "at the start": ("w12 w7", "w13 w7 w8"),
    "goes on": ("w6 w7 w8", "w6 w7"),
}
# Where each pair begins to differ; a text that the other one begins with counts with its last token.
BEGINS = {"in the middle": (1, 1), "longer": (2, 2), "at the start": (0, 0), "goes on": (2, 1)}


@torch.no_grad()
def state(text: str, layer: int) -> torch.Tensor:
    """The output of a block, `[tokens, d]`."""
    model, seen = tiny.llama(), []
    model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(input_ids=torch.tensor([TOKENIZER(text).input_ids]))
    return seen[0]


@pytest.mark.parametrize("tokens", ["last", "mean", "differing"])
def test_directions_are_differences_of_means(tokens):
    positive, negative = (list(texts) for texts in zip(*PAIRS.values(), strict=True))
    begins = {
        "last": [(-1, -1)] * len(PAIRS),
        "mean": [(0, 0)] * len(PAIRS),
        "differing": list(BEGINS.values()),
    }[tokens]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = directions_from_pairs(tiny.llama(), TOKENIZER, positive, negative, [0, 2], tokens)
    for layer in (0, 2):
        means = [
            torch.stack([state(text, layer)[begin[i] :].mean(0) for text, begin in zip(texts, begins, strict=True)])
            for i, texts in enumerate((positive, negative))
        ]
        torch.testing.assert_close(got[layer][0], means[0].mean(0) - means[1].mean(0), atol=1e-5, rtol=1e-4)


def test_special_tokens_at_the_start_do_not_count_in_a_mean():
    got = directions_from_pairs(tiny.llama(), TOKENIZER, ["<s> w6 w7"], ["<s> w8"], [1], "mean")[1][0]
    expected = state("<s> w6 w7", 1)[1:].mean(0) - state("<s> w8", 1)[1:].mean(0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_text_of_special_tokens_alone_counts():
    got = directions_from_pairs(tiny.llama(), TOKENIZER, ["<s> </s>"], ["w8"], [1], "mean")[1][0]
    torch.testing.assert_close(got, state("<s> </s>", 1).mean(0) - state("w8", 1).mean(0), atol=1e-5, rtol=1e-4)


def test_texts_that_end_differently_are_warned_of():
    with pytest.warns(UserWarning, match=r"lists end differently.*'w8', only negative ones in 'w9'.*'differing'"):
        directions_from_pairs(tiny.llama(), TOKENIZER, ["w6 w8", "w7 w8"], ["w6 w9"], [0], "last")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directions_from_pairs(tiny.llama(), TOKENIZER, ["w6 w9", "w7 w9"], ["w8 w9"], [0], "last")
        for tokens in ("mean", "differing"):
            directions_from_pairs(tiny.llama(), TOKENIZER, ["w6 w8"], ["w6 w9"], [0], tokens)


@pytest.mark.parametrize(
    ("positive", "negative", "tokens", "message"),
    [
        (["w6"], ["w7"], "first", r"tokens='first': allowed are \['differing', 'mean', 'last'\]"),
        (["w6", "w7"], ["w8"], "differing", "got 2 positive and 1 negative texts; choose tokens='mean'"),
        (["w6", "w7"], ["w8", "w7"], "differing", "the texts of pair 1 are the same"),
        (["w6", ""], ["w8"], "mean", "The text '' has no tokens"),
        ([], ["w8"], "mean", "got 0 positive"),
    ],
)
def test_lists_that_give_no_direction_are_refused(positive, negative, tokens, message):
    with pytest.raises(ValueError, match=message):
        directions_from_pairs(tiny.llama(), TOKENIZER, positive, negative, [0], tokens)
