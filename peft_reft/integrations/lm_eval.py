"""`hf-reft`, a model type for lm-evaluation-harness like `hf` that also passes the prompt of each request.

    python -m peft_reft.run lm_eval --model hf-reft --model_args pretrained=BASE,peft=ADAPTER --tasks ...

`hf` scores an answer without telling the model where the prompt ends, and without an attention mask: an adapter takes
prompt, answer and padding together for the prompt, so the score depends on the length of the answer and on the other
requests of the batch. `hf-reft` takes the same arguments and does the same computations, except that it passes the mask
of the prompt. Models without a ReFT adapter get the same numbers from both.

Importing this module registers the model type; `peft_reft.run` does so for lm_eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from peft_reft.attach import prompt_mask_of, tracker_of
from peft_reft.layer import layers

# A request of the harness: (context, continuation) or None, tokens of the context, tokens of the continuation.
Request = tuple[Any, list[int], list[int]]
# The token id that the harness pads with, on the right.
_PAD = 0


@register_model("hf-reft")
class ReftLM(HFLM):
    """`HFLM`, for models with ReFT adapters. Arguments: see `HFLM`; `peft` names the adapter."""

    # Tokens of a row -> number of its prompt tokens; None while nothing is scored.
    _prompts: dict[tuple[int, ...], int] | None = None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts.

        Raises:
            ValueError: the adapter's positions need a prompt, and such a text has none.
        """
        positions = self._bounded()
        if positions is not None:
            raise ValueError(
                f"positions={positions!r} needs to know where the prompt ends, but loglikelihood_rolling scores whole "
                "texts without a prompt (perplexity tasks such as wikitext). Choose tasks with a prompt, or an adapter "
                "with positions='all'."
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        if self.backend != "causal" or tracker_of(self.model) is None:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        results: dict[int, tuple[float, bool]] = {}
        for group in _unambiguous(requests, self.max_length):
            prompts = dict(_row(requests[i], self.max_length) for i in group)
            with self._telling(prompts):
                scores = super()._loglikelihood_tokens([requests[i] for i in group], *args, **kwargs)
            results.update(zip(group, scores, strict=True))
        return [results[i] for i in range(len(requests))]

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        # It scores made-up tokens, which no request announces.
        with self._telling(None):
            return super()._detect_batch_size(*args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.backend != "causal" or tracker_of(self.model) is None:
            return super()._model_call(inps, *args, **kwargs)
        lengths = torch.tensor([self._prompt_length(row) for row in inps.tolist()], device=inps.device)
        mask = torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]
        with prompt_mask_of(self.model, mask):
            return super()._model_call(inps, *args, **kwargs)

    def _prompt_length(self, row: list[int]) -> int:
        if self._prompts is None:
            return len(row)
        key = _key(row)
        if key not in self._prompts:
            raise RuntimeError(
                "This version of lm_eval asks for the scores of tokens that it has not announced, so their prompt is "
                "unknown. peft_reft was tested with lm_eval 0.4.13."
            )
        return self._prompts[key]

    @contextmanager
    def _telling(self, prompts: dict[tuple[int, ...], int] | None) -> Iterator[None]:
        before, self._prompts = self._prompts, prompts
        try:
            yield
        finally:
            self._prompts = before

    def _bounded(self) -> str | None:
        """Positions of an active adapter that need the end of the prompt, None if there are none."""
        if self.backend != "causal":
            return None
        edits = (edit for layer in layers(self.model) for edit in layer.current_edits().values())
        return next((str(edit.positions) for edit in edits if edit.positions.needs_prompt), None)


def _row(request: Request, most: int) -> tuple[tuple[int, ...], int]:
    """The model's input tokens for a request, without padding, and the number of its prompt tokens.

    The harness drops the last token, and truncates long inputs on the left.
    """
    _, context, continuation = request
    tokens = [*context, *continuation]
    cut = max(0, len(tokens) - (most + 1))
    return _key(tokens[cut:-1]), len(context) - cut


def _key(row: list[int]) -> tuple[int, ...]:
    """A row without trailing tokens that may be padding."""
    end = len(row)
    while end and row[end - 1] == _PAD:
        end -= 1
    return tuple(row[:end])


def _unambiguous(requests: Sequence[Request], most: int) -> list[list[int]]:
    """Indices of requests, in groups within which equal tokens have equal prompts."""
    groups: list[tuple[list[int], dict[tuple[int, ...], int]]] = []
    for i, request in enumerate(requests):
        key, length = _row(request, most)
        for members, known in groups:
            if known.setdefault(key, length) == length:
                members.append(i)
                break
        else:
            groups.append(([i], {key: length}))
    return [members for members, _ in groups]
