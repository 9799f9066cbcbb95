"""The position language: the words that say which tokens of a sequence an adapter edits.

| word | tokens |
|---|---|
| `f<n>`, `l<n>` | the first / last n of the prompt (all of it, when it is shorter) |
| `f<n>+l<m>` | both; in a prompt shorter than n + m each side takes at most half of it (floor) |
| `prompt` | every prompt token |
| `completion`, `c<n>` | every token after the prompt / the first n of them |
| `all` | every real token |

Words combine with `+` as long as no token can belong to two of them. In a sequence with several turns a *span* is a run
of prompt tokens: first-words sit at the start of the first span, last-words at the end of every span, `c<n>` counts
from the end of the latest span.

`runs.py` finds these tokens in a batch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

_WORD = re.compile(r"(?P<whole>all|prompt|completion)|(?P<kind>[flc])(?P<count>[1-9][0-9]*)")
_KINDS = {"f": "first", "l": "last", "c": "count", "all": "all", "prompt": "prompt", "completion": "completion"}
# Longer than any sequence, and the sum of two counts fits into 32 bits.
_MOST = 10**9
_ALLOWED = "f<n>, l<n>, c<n> (n >= 1), prompt, completion and all, combined with '+', for example 'f7+l7' or 'f3+c2'"
# Two words of one group could select the same token.
_GROUPS = (
    {"first", "prompt", "all"},
    {"last", "prompt", "all"},
    {"count", "completion", "all"},
)


@dataclass(frozen=True)
class Word:
    """One word of a position spec: its `kind`, its count where it has one, and how it was written."""

    kind: str
    count: int
    text: str


class Positions:
    """A parsed position spec. Equal specs are one object.

    `units` interventions serve its words: one for all, or one for each word.

    Attributes:
        words: the words.
        key: identifies the spec; graphs can look it up.
        shared: whether one intervention serves all of them.
        units: number of interventions.
        kinds: kind of word -> (its count, the code of its unit); codes start at 1, 0 means no edit.
        needs_prompt: whether the tokens depend on where the prompt ends.
        tail: code of the unit that edits every token far after the prompt, 0 if none does.
        counted: how many tokens right after the prompt `c<n>` selects, 0 without such a word.
        last_edited_offset: how far after the prompt edits can reach, in tokens; later decoding steps edit nothing.
    """

    def __init__(self, words: tuple[Word, ...], shared: bool = True) -> None:
        self.words = words
        self.key = ("+".join(word.text for word in words), shared)
        self.shared = shared
        self.units = 1 if shared else len(words)
        self.kinds = {word.kind: (word.count, 1 if shared else i) for i, word in enumerate(words, 1)}
        self.needs_prompt = "all" not in self.kinds
        self.tail = self.kinds.get("all", self.kinds.get("completion", (0, 0)))[1]
        self.counted = self.kinds.get("count", (0, 0))[0]
        self.last_edited_offset: float = math.inf if self.tail else self.counted

    def __reduce__(self) -> tuple[Any, ...]:
        return _the_one_of, (self.words, self.shared)

    def only(self, prompt: bool, completion: bool) -> Positions:
        """The words that can select a token where there is only a prompt, or only a completion."""
        kinds = {"all"} | ({"first", "last", "prompt"} if prompt else set())
        kinds |= {"completion", "count"} if completion else set()
        return _the_one_of(tuple(word for word in self.words if word.kind in kinds), self.shared)

    def __str__(self) -> str:
        return self.key[0]


@cache
def _the_one_of(words: tuple[Word, ...], shared: bool) -> Positions:
    return Positions(words, shared)


def parse(spec: str, shared: bool = True) -> Positions:
    """Parse a position spec such as `"f7+l7"`.

    Args:
        spec: words joined by `+`.
        shared: whether one intervention serves all words.

    Raises:
        ValueError: an unknown word (the message points at the character), an n above 1,000,000,000, or two words that
            overlap.
        TypeError: `spec` is not a string.
    """
    if not isinstance(spec, str):
        raise TypeError(f"positions must be a string such as 'f7+l7', got {spec!r} of type {type(spec).__name__}.")
    words: list[Word] = []
    offset = 0
    for part in spec.split("+"):
        text = part.strip()
        match = _WORD.fullmatch(text)
        if match is None:
            column = offset + len(part) - len(part.lstrip())
            raise ValueError(
                f"Unknown word {text!r} in positions, at character {column}:\n  {spec}\n  {' ' * column}^\n"
                f"Allowed are {_ALLOWED}."
            )
        kind = _KINDS[match["whole"] or match["kind"]]
        words.append(Word(kind, _count(match["count"] or "0", text), text))
        _check_overlap(words, spec)
        offset += len(part) + 1
    return _the_one_of(tuple(words), shared)


def _count(digits: str, word: str) -> int:
    # `int` rejects thousands of digits with its own error.
    if len(digits) > len(str(_MOST)) or int(digits) > _MOST:
        shown = word if len(word) <= 40 else f"{word[:20]}... ({len(digits)} digits)"
        raise ValueError(
            f"positions: {shown!r} counts further than {_MOST:,}, the most that is allowed; 'prompt' and 'completion' "
            "select all tokens there are."
        )
    return int(digits)


def _check_overlap(words: list[Word], spec: str) -> None:
    *earlier, new = words
    for word in earlier:
        if any({word.kind, new.kind} <= group for group in _GROUPS) or word.kind == new.kind:
            raise ValueError(
                f"positions={spec!r}: {word.text!r} and {new.text!r} can select the same token; keep one of them."
            )
