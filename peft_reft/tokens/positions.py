"""The position language: which tokens of a sequence an adapter edits. Pure tensor functions, no model.

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

All functions work on a grid of `[batch, tokens]`. A row may hold several packed sequences, told apart by `starts`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

IGNORE_INDEX = -100

_WORD = re.compile(r"(?P<whole>all|prompt|completion)|(?P<kind>[flc])(?P<count>[1-9]\d*)")
_KINDS = {"f": "first", "l": "last", "c": "count", "all": "all", "prompt": "prompt", "completion": "completion"}
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


@dataclass(frozen=True)
class Positions:
    """A parsed position spec. `units` interventions serve its words: one for all, or one for each word."""

    words: tuple[Word, ...]
    shared: bool = True

    @property
    def units(self) -> int:
        return 1 if self.shared else len(self.words)

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind of word -> (its count, the code of its unit); codes start at 1, 0 means no edit."""
        return {word.kind: (word.count, 1 if self.shared else i + 1) for i, word in enumerate(self.words)}

    @property
    def needs_prompt(self) -> bool:
        """Whether the tokens depend on where the prompt ends."""
        return "all" not in self.kinds

    @property
    def tail(self) -> int:
        """Code of the unit that edits every token far behind the prompt, 0 if none does."""
        return self.kinds.get("all", self.kinds.get("completion", (0, 0)))[1]

    @property
    def counted(self) -> int:
        """How many tokens right after the prompt `c<n>` selects, 0 without such a word."""
        return self.kinds.get("count", (0, 0))[0]

    def only(self, prompt: bool, completion: bool) -> Positions:
        """The words that can select a token where there is only a prompt, or only a completion."""
        kinds = {"all"} | ({"first", "last", "prompt"} if prompt else set())
        kinds |= {"completion", "count"} if completion else set()
        return Positions(tuple(word for word in self.words if word.kind in kinds), self.shared)

    def __str__(self) -> str:
        return "+".join(word.text for word in self.words)


def parse(spec: str, shared: bool = True) -> Positions:
    """Parse a position spec such as `"f7+l7"`.

    Args:
        spec: words joined by `+`.
        shared: whether one intervention serves all words.

    Raises:
        ValueError: an unknown word (the message points at the character), or two words that overlap.
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
        words.append(Word(kind, int(match["count"] or 0), text))
        _check_overlap(words, spec)
        offset += len(part) + 1
    return Positions(tuple(words), shared)


def _check_overlap(words: list[Word], spec: str) -> None:
    *earlier, new = words
    for word in earlier:
        if any({word.kind, new.kind} <= group for group in _GROUPS) or word.kind == new.kind:
            raise ValueError(
                f"positions={spec!r}: {word.text!r} and {new.text!r} can select the same token; keep one of them."
            )


def sequence_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """First tokens of packed sequences: where `position_ids` `[batch, tokens]` does not continue by one; bool."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def prompt_from_labels(labels: torch.Tensor, real: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """The prompt that `labels` describe: real tokens without a label that a labeled token of their sequence follows.

    Args:
        labels: `[batch, tokens]`, -100 where nothing is supervised.
        real: bool `[batch, tokens]`, False on padding.
        starts: bool `[batch, tokens]`, first tokens of packed sequences, or None for one sequence a row.

    Returns:
        Bool `[batch, tokens]`. A sequence without any label is all prompt: it has no completion.
    """
    supervised = (labels != IGNORE_INDEX) & real
    first, last = _sequence_bounds(real, starts)
    index = _index_like(real)
    tokens = real.shape[1]
    following = _reverse_cummin(torch.where(supervised, index, tokens))
    preceding = torch.where(supervised, index, -1).cummax(-1).values
    leads = following <= last
    labeled = leads | (preceding >= first)
    return real & ~supervised & (leads | ~labeled)


def assign(
    positions: Positions,
    prompt: torch.Tensor,
    completion: torch.Tensor,
    starts: torch.Tensor | None = None,
    breaks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which unit edits which token.

    Args:
        positions: the parsed spec.
        prompt: bool `[batch, tokens]`, prompt tokens.
        completion: bool `[batch, tokens]`, real tokens after a prompt; disjoint from `prompt`.
        starts: bool `[batch, tokens]`, first tokens of packed sequences, or None for one sequence a row.
        breaks: bool broadcastable to `[batch, tokens]`, tokens that open a new span even right behind a prompt token.

    Returns:
        int8 `[batch, tokens]`: 0 for no edit, else 1 + the index of the unit.
    """
    codes = torch.zeros_like(prompt, dtype=torch.int8)
    for kind, (count, code) in positions.kinds.items():
        if kind in ("first", "last"):
            selected = _edge_words(kind, positions, prompt, starts, breaks)
        elif kind == "prompt":
            selected = prompt
        elif kind == "completion":
            selected = completion
        elif kind == "count":
            selected = _counted(count, prompt, completion, starts)
        else:
            selected = prompt | completion
        codes = torch.where(selected, code, codes)
    return codes.to(torch.int8)


def _edge_words(
    kind: str,
    positions: Positions,
    prompt: torch.Tensor,
    starts: torch.Tensor | None,
    breaks: torch.Tensor | None,
) -> torch.Tensor:
    opens = prompt & ~_shift_right(prompt)
    for opening in (starts, breaks):
        if opening is not None:
            opens = opens | (prompt & opening)
    index = _index_like(prompt)
    tokens = prompt.shape[1]
    begin = torch.where(opens, index, -1).cummax(-1).values
    # A span ends where the next token is no prompt token or opens another span.
    closes = prompt & ~_shift_left(prompt & ~opens)
    end = _reverse_cummin(torch.where(closes, index, tokens))
    first_sequence_token, _ = _sequence_bounds(prompt, starts)
    spans = opens.long().cumsum(-1)
    spans_before = (spans - opens.long()).gather(1, first_sequence_token)
    in_first_span = spans - spans_before == 1

    first, last = positions.kinds.get("first", (0, 0))[0], positions.kinds.get("last", (0, 0))[0]
    length = end - begin + 1
    count = torch.full_like(length, first if kind == "first" else last)
    if first and last:
        crowded = in_first_span & (length < first + last)
        count = torch.where(crowded, torch.minimum(count, length // 2), count)
    if kind == "first":
        return prompt & in_first_span & (index - begin < count)
    return prompt & (end - index < count)


def _counted(count: int, prompt: torch.Tensor, completion: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    seen = completion.long().cumsum(-1)
    # `seen` never falls, so its running maximum over prompt tokens is its value at the latest one.
    at_prompt = torch.where(prompt, seen, 0).cummax(-1).values
    first, _ = _sequence_bounds(prompt, starts)
    at_start = (seen - completion.long()).gather(1, first)
    return completion & (seen - torch.maximum(at_prompt, at_start) <= count)


def completion_of(prompt: torch.Tensor, real: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """Real tokens behind the first prompt token of their sequence that are not prompt; bool `[batch, tokens]`."""
    first, _ = _sequence_bounds(real, starts)
    seen = prompt.long().cumsum(-1)
    before = (seen - prompt.long()).gather(1, first)
    return real & ~prompt & (seen > before)


def _sequence_bounds(like: torch.Tensor, starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first and of the last token of each token's sequence, `[batch, tokens]`."""
    index = _index_like(like)
    tokens = like.shape[1]
    if starts is None:
        return torch.zeros_like(index), torch.full_like(index, tokens - 1)
    first = torch.where(starts, index, 0).cummax(-1).values
    following = torch.where(starts, index, tokens)
    following = torch.cat([following[:, 1:], following.new_full((like.shape[0], 1), tokens)], dim=1)
    return first, _reverse_cummin(following) - 1


def _index_like(grid: torch.Tensor) -> torch.Tensor:
    return torch.arange(grid.shape[1], device=grid.device).expand(grid.shape)


def _shift_right(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)


def _shift_left(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def _reverse_cummin(values: torch.Tensor) -> torch.Tensor:
    return values.flip(-1).cummin(-1).values.flip(-1)
