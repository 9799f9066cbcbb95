"""The plug-in's options in vLLM's `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_reft.components import COMPONENTS

ADAPTERS, WIDER, MEMORY = "reft_adapters", "reft_components", "reft_memory_mib"
# Written by the plug-in itself: the modules that the first adapters edit, each as its name and its side.
TARGETS = "reft_targets"
# The adapter of a request, in its extra arguments.
REQUEST = "reft"
NOT_SERVED = f'{{}}: this engine serves no ReFT adapters. Start it with additional_config={{{{"{ADAPTERS}": ...}}}}.'

NO_BEAMS = (
    "{}: vLLM's beam search is many requests with growing prompts, in which the edited tokens would move. Sample "
    "instead, or search with Transformers' generate(num_beams=...)."
)


@dataclass(frozen=True)
class Settings:
    """The plug-in's options.

    Attributes:
        adapters: `reft_adapters`, name -> folder or hub id. An empty dictionary prepares the engine for adapters that
            are added later.
        components: `reft_components`, further components that adapters added later may edit, besides `block_output`
            and the components of the first adapters.
        memory_mib: `reft_memory_mib`, the maximum memory for the factors of all adapters on a worker, in MiB.
        targets: see `TARGETS`.
    """

    adapters: Mapping[str, str]
    components: tuple[str, ...] = ()
    memory_mib: int = 1024
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """The options among an engine's `additional_config`; None without `reft_adapters`.

        Raises:
            ValueError: an unknown option, or a value that is not allowed.
        """
        if not isinstance(additional_config, Mapping):
            return None
        given = {name: value for name, value in additional_config.items() if name.startswith("reft_")}
        if unknown := sorted(given.keys() - {ADAPTERS, WIDER, MEMORY, TARGETS}):
            raise ValueError(f"Unknown {unknown[0]!r} in additional_config; known are {[ADAPTERS, WIDER, MEMORY]}.")
        if ADAPTERS not in given:
            return None
        adapters, components, memory = given[ADAPTERS], given.get(WIDER, []), given.get(MEMORY, cls.memory_mib)
        if not isinstance(adapters, Mapping) or not all(isinstance(path, str) for path in adapters.values()):
            raise ValueError(f"{ADAPTERS} must map names to folders or hub ids, got {adapters!r}.")
        if not isinstance(components, list) or not set(components) <= set(COMPONENTS):
            raise ValueError(f"{WIDER} must be a list of some of {list(COMPONENTS)}, got {components!r}.")
        if not isinstance(memory, int) or memory < 1:
            raise ValueError(f"{MEMORY} must be a positive integer, got {memory!r}.")
        return cls(dict(adapters), tuple(components), memory, tuple(given.get(TARGETS, ())))
