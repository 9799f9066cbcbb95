"""The adapter of a request: the forms that callers write, and the one that goes to the scheduler and the workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

from peft_reft.integrations.vllm.adapters import Adapter, check
from peft_reft.integrations.vllm.plan import Editing
from peft_reft.integrations.vllm.settings import ADAPTERS, REQUEST
from peft_reft.tokens.positions import parse

# Children of "vllm" get its log format.
logger = logging.getLogger("vllm.peft_reft")

_parsed = lru_cache(maxsize=1024)(parse)
_FORMS = f"extra_args={{'{REQUEST}': 'name'}}, or {{'{REQUEST}': {{'name': 'name', 'strength': 0.5}}}}"


@dataclass(frozen=True)
class Resolved:
    """The adapter of a request, even if its name changes its meaning later.

    Attributes:
        name: its name in the request.
        fingerprint: identifies its contents, see `Adapter.fingerprint`.
        positions, share_weights: as in `ReftConfig`.
        strength: factor of its edits.
    """

    name: str
    fingerprint: str
    positions: str
    share_weights: bool
    strength: float = 1.0

    @classmethod
    def of(cls, sampling_params: Any) -> Resolved | None:
        """The adapter in vLLM's `SamplingParams`, once it has been resolved; None for the base model."""
        asked = (getattr(sampling_params, "extra_args", None) or {}).get(REQUEST)
        return None if asked is None else cls(**asked)

    def editing(self, prompt: int) -> Editing:
        """How a request with `prompt` prompt tokens is edited."""
        return Editing(self.fingerprint, self.strength, _parsed(self.positions, self.share_weights), prompt)


class Registry:
    """The adapters that requests can name, in the process that receives requests.

    Args:
        model, hidden_size, layers: name, hidden size and number of layers of the served model.
    """

    def __init__(self, model: str, hidden_size: int, layers: int) -> None:
        self.model, self.hidden_size, self.layers = model, hidden_size, layers
        self.adapters: dict[str, Resolved] = {}
        self.sources: dict[str, str] = {}

    def load(self, name: str, source: str) -> Adapter:
        """Read an adapter that fits the model; `enter` registers it.

        Raises:
            ValueError: it cannot be read, or does not fit.
        """
        adapter = Adapter.load(source)
        self.check(name, adapter)
        return adapter

    def check(self, name: str, adapter: Adapter) -> None:
        """Raise a `ValueError` for an adapter that does not fit the model, see `adapters.check`."""
        check(name, adapter, self.hidden_size, self.layers)

    def enter(self, name: str, adapter: Adapter, source: str) -> str | None:
        """Let requests name an adapter; returns the fingerprint that has no name any longer, None if there is none."""
        if adapter.base_model and _last_part(adapter.base_model) != _last_part(self.model):
            # Not refused: a copy of the model may have any name. PEFT and vLLM's LoRA do not compare names at all.
            logger.warning(
                "The ReFT adapter %r was trained on %r, but %r is served. Sizes agree; if these are different models, "
                "its edits are meaningless.",
                name,
                adapter.base_model,
                self.model,
            )
        known = Resolved(name, adapter.fingerprint, adapter.positions, adapter.share_weights)
        before = self.adapters.get(name)
        self.adapters[name], self.sources[name] = known, source
        return self._unused(before)

    def leave(self, name: str) -> str | None:
        """Forget a name; returns the same as `enter`.

        Raises:
            ValueError: no adapter has this name.
        """
        before = self.resolve(name)
        del self.adapters[name], self.sources[name]
        return self._unused(before)

    def _unused(self, before: Resolved | None) -> str | None:
        if before is None or any(known.fingerprint == before.fingerprint for known in self.adapters.values()):
            return None
        return before.fingerprint

    def resolve(self, asked: Any) -> Resolved:
        """The adapter that a request asks for: a name, `{"name": ..., "strength": ...}`, or `[name, strength]`.

        Raises:
            ValueError: an unknown name, or another form.
        """
        if isinstance(asked, (list, tuple)) and len(asked) == 2:
            asked = dict(zip(("name", "strength"), asked, strict=True))
        if isinstance(asked, str):
            asked = {"name": asked}
        named = isinstance(asked, Mapping) and isinstance(asked.get("name"), str)
        if not named or not asked.keys() <= {"name", "strength"}:
            raise ValueError(f"{REQUEST}={asked!r} names no adapter; write {_FORMS}.")
        known, strength = self.adapters.get(asked["name"]), asked.get("strength", 1.0)
        if known is None:
            raise ValueError(
                f"There is no ReFT adapter {asked['name']!r}; loaded are {sorted(self.adapters)}. Name it in "
                f"{ADAPTERS} of additional_config, or add it with peft_reft.integrations.vllm.add_adapter."
            )
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not isfinite(strength):
            raise ValueError(f"The strength of the ReFT adapter {known.name!r} must be a number, got {strength!r}.")
        return Resolved(**asdict(known) | {"strength": float(strength)})


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()
