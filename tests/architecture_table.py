"""The table of the manual that `architectures.py` writes: what is edited in each family of models."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping

import peft
import torch
import transformers

_HEAD = """# Architectures

What `tests/architectures.py` found in the model classes of Transformers' automatic mappings, each tiny and random:
language models, with images and sound too, sequence to sequence, masked words, classifiers of texts, images and sounds,
CTC, and bare models. Other heads use the same blocks. Transformers {transformers}, PEFT {peft}, torch {torch}
({processor}). The checks compare with the base model, with rows alone instead of in a padded batch, with Transformers'
own hidden states, and with generation by other routes.

{counts}

A row is a family, by its `model_type`. *Blocks* are the modules that `component="block_output"` edits, *attention* and
*MLP* the modules of `attention_output` and `mlp_output` (N is the number of a layer). *Classes* counts those that pass.
*Remarks* says what could not be compared, because the base model itself differs there, and what is refused.

## What represents a token

Blocks return `[batch, tokens, hidden size]`. Where they do not, the layout is known when an adapter is attached:

{layouts}

Images and sounds among the tokens of a language model count as tokens of the prompt.

## Families

| family | blocks | attention | MLP | classes | remarks |
|---|---|---|---|---|---|
"""
_LAYOUTS = [
    ("where the tokens are", "families", "what is edited"),
    ("---", "---", "---"),
    ("`[tokens, batch, d]`, `[batch, d, tokens]`", "XLNet, FSMT; SqueezeBert", "the token"),
    (
        "several residual streams: `[b, t, s, d]`, `[s, b, t, d]`, `[b, t, s * d]`",
        "DeepSeek-V4, HY-V4, GLM-5-Next; Gemma 3n; Qwen4-Exp",
        "all streams of the token, concatenated to one vector of width `s * d`",
    ),
    ("padded inside the model", "Longformer, LED, Pegasus-X, BigBird, Reformer", "the tokens of the input"),
    (
        "with additional tokens of the model",
        "CPM-Ant; with an image ViLT, VisualBERT, LayoutLMv2, LayoutLMv3",
        "the tokens of the input",
    ),
    ("every token several times", "ProphetNet's decoder", "every repetition gets the same edit"),
    (
        "ids of several codebooks, `[batch * codebooks, tokens]` or `[batch, tokens, codebooks]`",
        "MusicGen; audio models such as CSM",
        "the token that all of its codes stand for",
    ),
    (
        "one vector for several tokens, or none for any",
        "Canine, Perceiver, Funnel after its first blocks",
        'everything (`positions="all"`); words that count tokens are refused when attaching',
    ),
    (
        "grids, in any order of axes",
        "vision and audio models",
        'every place (`positions="all"`); without tokens `f<n>` counts places row by row',
    ),
]
_STATES = {
    "ok": "pass all checks that the base model allows",
    "known": "fail, for the reason that the sweep lists",
    "FAIL": "fail",
    "base": "are not built or do not run here (their base model needs a package or inputs that the sweep lacks)",
}


def table(rows: Iterable[Mapping], states: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """The page, from the rows of the sweep, the state of each class, and the reasons of those that fail."""
    families: dict[str, list[Mapping]] = {}
    for row in rows:
        families.setdefault(row["model_type"], []).append(row)
    counts = Counter(states.values())
    said = "; ".join(f"{counts[state]:,} {what}" for state, what in _STATES.items() if counts[state])
    head = _HEAD.format(
        transformers=transformers.__version__,
        peft=peft.__version__,
        torch=torch.__version__,
        processor=platform.machine(),
        layouts="\n".join(f"| {' | '.join(cells)} |" for cells in _LAYOUTS),
        counts=f"Of {sum(counts.values()):,} classes, {said}.",
    )
    return head + "".join(_line(name, families[name], states, reasons) for name in sorted(families))


def _line(family: str, rows: list[Mapping], states: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    first = max(rows, key=lambda row: len(row.get("checks", {})))
    notes = first.get("notes", {})
    whole = sum(states[row["class"]] == "ok" for row in rows)
    cells = [
        f"`{family}`",
        _sites(notes.get("sites")),
        _sites(notes.get("attention_output")),
        _sites(notes.get("mlp_output")),
        f"{whole} of {len(rows)}",
        "; ".join([*dict.fromkeys(reasons[row["class"]] for row in rows if row["class"] in reasons), *_remarks(first)]),
    ]
    return f"| {' | '.join(cells)} |\n"


def _sites(names: list[str] | None) -> str:
    return ", ".join(f"`{name}`" for name in names or ())


def _remarks(row: Mapping) -> list[str]:
    """What could not be compared, or is refused."""
    checks, notes = row.get("checks", {}), row.get("notes", {})
    unseen = ("lora", "checkpointing")
    said = [f"{name}: {how}" for name, how in checks.items() if name not in unseen and not how.startswith("FAIL")]
    shown = [text for text in said if not text.endswith(": ok")]
    if "error" in notes:
        shown.append(f"base model: {notes['error'].partition(' (')[0][:100]}")
    return [text.replace("|", "\\|").replace("\n", " ") for text in shown]
