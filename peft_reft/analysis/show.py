"""Shows which tokens of a text an adapter edits, for example to check a chat template."""

from __future__ import annotations

import html
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_reft.components import DECODER
from peft_reft.layer import ReftLayer
from peft_reft.tokens.positions import Positions
from peft_reft.tokens.prompts import CallTokens, Told

Messages = Sequence[dict[str, Any]]

# ANSI background colors and their HTML equivalents, one for each unit.
_COLORS = ((42, "#a6e3a1"), (44, "#89b4fa"), (45, "#f5c2e7"), (43, "#f9e2af"), (46, "#94e2d5"))


@dataclass(frozen=True)
class _Edits:
    """The edits of one adapter: the code of each token (0 for no edit, else 1 + the unit's index), and the number of
    layers.
    """

    adapter: str
    positions: Positions
    layers: int
    codes: list[int]

    def legend(self) -> list[str]:
        lines = [f"adapter {self.adapter!r}: positions {self.positions}, at {self.layers} layer(s)"]
        words = [str(self.positions)] if self.positions.shared else [word.text for word in self.positions.words]
        for code, word in enumerate(words, 1):
            tokens = [i for i, found in enumerate(self.codes) if found == code]
            lines.append(f"  unit {code} ({word}): {len(tokens)} of {len(self.codes)} tokens{_ranges(tokens)}")
        return lines


def show_positions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text_or_messages: str | Messages | torch.Tensor
) -> None:
    """Print a text in which the tokens that active adapters edit are marked by unit, and the number of edited layers.

    A text, or messages that end with the user's turn, are shown as `generate` sees them: all of it is prompt. In
    messages that end with the assistant's turn, that turn is the completion, as in prompt/completion training data.
    Token ids, such as a processor's for a text with images, are a prompt too: every image token counts. The output is
    colored in a terminal, HTML in a notebook, and marked with `[brackets]` elsewhere.

    Args:
        model: a PEFT model with ReFT adapters, or a model that they were injected into.
        tokenizer: its tokenizer; messages need its chat template.
        text_or_messages: a string, messages with `role` and `content`, or token ids `[tokens]`.

    Raises:
        ValueError: no active ReFT adapter on the model.
    """
    ids, prompt_length = _tokenize(tokenizer, text_or_messages)
    edits = _edits(model, ids, prompt_length)
    if not edits:
        raise ValueError("The model has no active ReFT adapter: nothing is edited. Add one, or call set_adapter.")
    pieces = [tokenizer.decode([token]) for token in ids]
    if _in_notebook():
        from IPython.display import HTML, display

        display(HTML(_to_html(pieces, edits)))
    else:
        print(_to_text(pieces, edits, colored=sys.stdout.isatty()))


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text_or_messages: str | Messages | torch.Tensor
) -> tuple[list[int], int]:
    """Token ids, and how many of them are prompt."""
    if isinstance(text_or_messages, torch.Tensor):
        return text_or_messages.tolist(), len(text_or_messages)
    if isinstance(text_or_messages, str):
        ids = tokenizer(text_or_messages)["input_ids"]
        return ids, len(ids)

    def template(messages: Messages, generate: bool) -> list[int]:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if text_or_messages[-1]["role"] != "assistant":
        ids = template(text_or_messages, True)
        return ids, len(ids)
    return template(text_or_messages, False), len(template(text_or_messages[:-1], True))


def _edits(model: nn.Module, ids: list[int], prompt_length: int) -> list[_Edits]:
    input_ids = torch.tensor([ids])
    prompt_mask = torch.arange(len(ids)).unsqueeze(0) < prompt_length
    layers: Counter[tuple[str, Positions, str]] = Counter()
    for layer in model.modules():
        if isinstance(layer, ReftLayer) and not layer.disable_adapters:
            adapters = [name for name in layer.active_adapters if name in layer.reft_settings]
            layers.update((name, layer.reft_settings[name].positions, layer.stream) for name in adapters)
    edits = []
    for (adapter, positions, stream), count in layers.items():
        call = {"input_ids": input_ids} | ({"prompt_mask": prompt_mask} if stream == DECODER else {})
        tokens = CallTokens.of(call)
        told = Told(tokens.shape, tokens=tokens)
        edits.append(_Edits(adapter, positions, count, told.grid(positions)[0].tolist()))
    return edits


def _ranges(tokens: list[int]) -> str:
    runs: list[list[int]] = []
    for token in tokens:
        if runs and runs[-1][1] == token - 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    return f" ({', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)})" if runs else ""


def _to_text(pieces: list[str], edits: list[_Edits], colored: bool) -> str:
    lines = []
    for edit in edits:
        lines += edit.legend()
        marked = (_mark(piece, code, colored) for piece, code in zip(pieces, edit.codes, strict=True))
        lines += ["", "".join(marked), ""]
    return "\n".join(lines)


def _mark(piece: str, code: int, colored: bool) -> str:
    if code == 0:
        return piece
    # A colored line break would color the rest of the line, so a symbol stands for it.
    shown = piece.replace("\n", "⏎")
    breaks = "\n" * piece.count("\n")
    if colored:
        return f"\033[30;{_COLORS[(code - 1) % len(_COLORS)][0]}m{shown}\033[0m{breaks}"
    return f"[{shown}]{code if code > 1 else ''}{breaks}"


def _to_html(pieces: list[str], edits: list[_Edits]) -> str:
    blocks = []
    for edit in edits:
        legend = "<br>".join(html.escape(line) for line in edit.legend())
        spans = []
        for piece, code in zip(pieces, edit.codes, strict=True):
            shown = html.escape(piece.replace("\n", "⏎\n" if code else "\n"))
            color = _COLORS[(code - 1) % len(_COLORS)][1]
            spans.append(f'<span style="background:{color};color:black">{shown}</span>' if code else shown)
        blocks.append(f'<div>{legend}</div><pre style="white-space:pre-wrap">{"".join(spans)}</pre>')
    return "\n".join(blocks)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
