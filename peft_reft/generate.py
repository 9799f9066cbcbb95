"""Replaces a model's `generate`.

model.generate(...) --> GenerateEntry --> opens a Generation, to which the passes in between belong
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from peft_reft.families import codebooks_of
from peft_reft.tokens.generation import Generation
from peft_reft.tokens.requests import RowRequests
from peft_reft.tracker import ARGUMENTS, StandIn, Tracker

# Arguments of `generate` that replace token ids.
_INPUTS = ("inputs_embeds", "input_features", "input_values")


class GenerateEntry(StandIn):
    """Replaces `model.generate`: the same call, with the prompt known to the model's `ReftLayer`s.

    Args:
        model: the model.
        tracker: the tracker of the model.
        decoder_only: whether prompt and generated tokens are one sequence, in which the prompt has to be found.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, decoder_only: bool) -> None:
        super().__init__(model, "generate")
        self.tracker = tracker
        self.decoder_only = decoder_only

    def attach(self) -> None:
        """Replace the model's `generate`. Mutates the model; `detach` undoes it."""
        self.put("generate")

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Restore a model's own `generate`. Mutates the model."""
        entry = vars(model).get("generate")
        if isinstance(entry, cls):
            entry.take_off("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`.

        Raises:
            RuntimeError: the tokens of its passes do not add up to its result.
        """
        tracker = self.tracker
        with tracker.lock:
            generate = self.original
            outer = tracker.own.generation
            if getattr(kwargs.get("generation_config"), "is_assistant", False) and outer is not None:
                # The model drafts for itself (early exit): the prompt is that of the outer call.
                with self._generating(outer.draft()):
                    return generate(*args, **kwargs)
            ids = next((v for v in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if v is not None), None)
            own = {name: kwargs.pop(name) for name in self._arguments & kwargs.keys()}
            prompt_mask = own.pop("prompt_mask", tracker.own.prompt_mask)
            requests = self._requests(ids, kwargs, own)
            with nullcontext() if requests is None else tracker.asking(requests):
                if self.decoder_only:
                    return self._generate(generate, args, kwargs, ids, prompt_mask)
                return generate(*args, **kwargs)

    @contextmanager
    def _generating(self, generation: Generation) -> Iterator[None]:
        """Within the `with` block, the passes that the model makes belong to `generation`."""
        own = self.tracker.own
        outer, own.generation = own.generation, generation
        try:
            yield
        finally:
            own.generation = outer

    @property
    def _arguments(self) -> set[str]:
        # Encoder-decoder models raise their own error if they are passed `prompt_mask`.
        return ARGUMENTS if self.decoder_only else ARGUMENTS - {"prompt_mask"}

    def _requests(
        self, ids: torch.Tensor | None, kwargs: Mapping[str, Any], own: Mapping[str, Any]
    ) -> RowRequests | None:
        requests = RowRequests.of(own, self.tracker.own.requests) if own else self.tracker.own.requests
        if requests is not None:
            given = next((v for v in (ids, *map(kwargs.get, _INPUTS)) if v is not None), None)
            batch = None if given is None else given.shape[0]
            requests.check(self.tracker.adapters, self.module.training, batch)
            # From here on beams and returned sequences repeat rows.
            requests.checked = True
        return requests

    def _generate(
        self,
        generate: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        ids: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
    ) -> Any:
        _refuse_guidance(kwargs)
        mask = kwargs.get("attention_mask")
        codebooks = codebooks_of(self.module)
        plain = ids is not None and ids.dim() == 2 and codebooks == 1
        if mask is None and plain and kwargs.get("inputs_embeds") is None:
            mask = self._inferred_mask(ids, kwargs)
        positions = {adapter.positions for adapter in self.tracker.adapters.values()}
        generation = Generation.of(ids, mask, prompt_mask, kwargs, positions, codebooks)
        with self._generating(generation):
            result = generate(*args, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        if isinstance(sequences, torch.Tensor):
            returned = {} if isinstance(result, torch.Tensor) else dict(result)
            generation.end(returned or kwargs, sequences, sequences.shape[1] - (0 if ids is None else ids.shape[1]))
        return result

    def _inferred_mask(self, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The attention mask that Transformers infers: padding ids are masked, unless they also end sequences."""

        def token_ids(name: str) -> list[int]:
            configs = (kwargs.get("generation_config"), self.module.generation_config)
            # An argument that is None overrides the configurations.
            values = [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
            value = next((value for value in values if value is not None), [])
            return torch.as_tensor(value).flatten().tolist()

        pad, eos = token_ids("pad_token_id"), token_ids("eos_token_id")
        if not pad or pad[0] in eos:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad[0]


def _refuse_guidance(kwargs: Mapping[str, Any]) -> None:
    scale = kwargs.get("guidance_scale") or getattr(kwargs.get("generation_config"), "guidance_scale", None)
    if scale not in (None, 1, 1.0):
        raise NotImplementedError(
            f"guidance_scale={scale}: classifier-free guidance runs a second prompt through the model in the same "
            "generate call, and ReFT's positions cannot distinguish the two. Leave guidance_scale out."
        )
