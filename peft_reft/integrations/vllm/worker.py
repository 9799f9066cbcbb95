"""The state of a worker: the adapters' factors at each place of its model, and how each running request is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.logger import init_logger

from peft_reft.integrations.vllm.adapters import Adapter, check
from peft_reft.integrations.vllm.edits import Kind, Table, edit_rows, factors_of, kind_of
from peft_reft.integrations.vllm.plan import Chunk, Editing, Entry, Layout, Plan
from peft_reft.integrations.vllm.requests import Resolved
from peft_reft.integrations.vllm.settings import MEMORY
from peft_reft.integrations.vllm.sites import Target

# Children of "vllm" get its log format.
logger = init_logger("vllm.peft_reft")

MIB = 1 << 20

_running: WorkerState | None = None


class Site:
    """A place of the model: a table for each kind of intervention, and where each adapter is in them."""

    def __init__(self) -> None:
        self.tables: dict[Kind, Table] = {}
        self.entries: dict[str, Entry] = {}
        self.layout: Layout = frozenset()

    def add(self, fingerprint: str, kind: Kind, factors: dict[str, torch.Tensor]) -> None:
        table = self.tables.setdefault(kind, Table(kind))
        self.entries[fingerprint] = Entry(kind, len(table))
        table.append(factors)
        self.layout = frozenset(self.entries.items())

    def remove(self, fingerprint: str) -> None:
        entry = self.entries.pop(fingerprint, None)
        if entry is None:
            return
        table = self.tables[entry.kind]
        behind = [own.first for own in self.entries.values() if own.kind == entry.kind and own.first > entry.first]
        end = min(behind, default=len(table))
        table.remove(entry.first, end)
        for other, own in self.entries.items():
            if own.kind == entry.kind and own.first > entry.first:
                self.entries[other] = own._replace(first=own.first - (end - entry.first))
        if not len(table):
            del self.tables[entry.kind]
        self.layout = frozenset(self.entries.items())


class WorkerState:
    """The plug-in's state in one worker.

    Args:
        names: the places in this worker's part of the model that can be edited.
        targets: the places that can be edited in any layer.
        local: numbers of the layers that this worker has.
        hidden_size, layers: hidden size and number of layers of the whole model.
        device: where the factors are kept.
        memory_mib: the maximum memory for them, in MiB.
    """

    def __init__(
        self,
        names: Iterable[str],
        targets: Iterable[Target],
        local: set[int],
        hidden_size: int,
        layers: int,
        device: torch.device,
        memory_mib: int,
    ) -> None:
        self.sites = {name: Site() for name in names}
        self.targets, self.local = set(targets), local
        self.hidden_size, self.layers = hidden_size, layers
        self.device, self.memory_mib = device, memory_mib
        self.plan: Plan | None = None
        self.requests: dict[str, Editing] = {}
        # fingerprint -> bytes of its factors
        self.adapters: dict[str, int] = {}
        # fingerprint -> unfinished requests that still need an adapter that was removed
        self.retired: dict[str, set[str]] = {}
        # Adapters until `try_out`; the places that are called during it; the places that are never called after it.
        self._untried: list[tuple[str, Adapter]] = []
        self._called: set[str] | None = None
        self._never_called: set[str] | None = None

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter.

        Raises:
            ValueError: it does not fit the model, or takes too much memory.
        """
        self.retired.pop(adapter.fingerprint, None)
        if adapter.fingerprint in self.adapters:
            return
        check(name, adapter, self.hidden_size, self.layers)
        self._check_targets(name, adapter)
        if self._never_called is None:
            self._untried.append((name, adapter))
        else:
            self._check_called(name, adapter)
        made = list(self._made(adapter))
        size = sum(factor.nbytes for _, _, factors in made for factor in factors.values())
        total = size + sum(self.adapters.values())
        if total > self.memory_mib * MIB:
            raise ValueError(
                f"The adapter {name!r} takes {size / MIB:.1f} MiB, with which all adapters would take "
                f"{total / MIB:.1f} MiB, more than {MEMORY}={self.memory_mib} allows. Raise it in additional_config, "
                "or remove an adapter."
            )
        for site, kind, factors in made:
            site.add(adapter.fingerprint, kind, factors)
        self._share_layouts()
        self.adapters[adapter.fingerprint] = size
        logger.info(
            "ReFT adapter %r: %s on %r at %d places of this worker, %.1f MiB (%d adapters, %.1f of %d MiB).",
            name,
            adapter.intervention,
            adapter.positions,
            len(made),
            size / MIB,
            len(self.adapters),
            total / MIB,
            self.memory_mib,
        )

    def _check_targets(self, name: str, adapter: Adapter) -> None:
        for place in adapter.places:
            if Target(place.module, place.side) not in self.targets:
                raise ValueError(
                    f"The adapter {name!r} edits the {place.side} of {place.module or 'layers'!r}, for which the "
                    "engine was not prepared when it started: name its component in reft_components of "
                    "additional_config, or load an adapter with that component at the start."
                )
            if place.layer in self.local and str(place) not in self.sites:
                raise ValueError(
                    f"The adapter {name!r} edits {place.module!r}, which layer {place.layer} does not have."
                )

    def _made(self, adapter: Adapter) -> Iterator[tuple[Site, Kind, dict[str, torch.Tensor]]]:
        for place in adapter.places:
            site = self.sites.get(str(place))
            if site is not None:  # else another pipeline stage has it
                intervention = adapter.intervention_at(place)
                factors = {name: factor.to(self.device) for name, factor in factors_of(intervention).items()}
                yield site, kind_of(intervention), factors

    def retire(self, fingerprint: str, requests: Iterable[str]) -> None:
        """Remove an adapter as soon as these requests are finished."""
        if fingerprint in self.adapters:
            self.retired[fingerprint] = set(requests)
            self._drop_unused()

    def _share_layouts(self) -> None:
        """Make equal layouts one object, which dictionaries find faster."""
        layouts: dict[Layout, Layout] = {}
        for site in self.sites.values():
            site.layout = layouts.setdefault(site.layout, site.layout)

    def _drop_unused(self) -> None:
        for fingerprint in [fingerprint for fingerprint, waiting in self.retired.items() if not waiting]:
            for site in self.sites.values():
                site.remove(fingerprint)
            del self.retired[fingerprint], self.adapters[fingerprint]
        self._share_layouts()

    def follow(self, scheduler_output: Any) -> None:
        """Register the new requests of vLLM's `SchedulerOutput`, and drop finished ones."""
        for request in scheduler_output.finished_req_ids:
            self.requests.pop(request, None)
            for waiting in self.retired.values():
                waiting.discard(request)
        if self.retired:
            self._drop_unused()
        for new in scheduler_output.scheduled_new_reqs:
            asked = Resolved.of(new.sampling_params)
            # A request comes again after a preemption (in the second model runner), and with a longer prompt.
            self.requests.pop(new.req_id, None)
            if asked is not None and asked.strength != 0:
                self.requests[new.req_id] = asked.editing(new.prompt_len)

    def prepare(self, chunks: Iterable[Chunk]) -> None:
        """Plan the next pass."""
        self.plan = Plan(self.requests, chunks, self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a step runs, edits use this worker's plan, which is dropped after it."""
        global _running
        outer, _running = _running, self
        try:
            yield
        finally:
            _running, self.plan = outer, None

    def try_out(self, dummy_pass: Callable[[], Any]) -> None:
        """Find out which modules the model calls: it may use a module's weight without calling it, past the edits.

        Args:
            dummy_pass: runs a pass through the model.

        Raises:
            ValueError: an adapter edits a module that is never called.
        """
        self._called = called = set()
        with self.running():
            dummy_pass()
        self._never_called = self.sites.keys() - called
        self._called = None
        for name, adapter in self._untried:
            self._check_called(name, adapter)
        self._untried.clear()

    def _check_called(self, name: str, adapter: Adapter) -> None:
        missed = [place for place in adapter.places if str(place) in self._never_called]
        if missed:
            raise ValueError(
                f"The adapter {name!r} edits the {missed[0].side} of {missed[0].module or 'layers'!r}, which vLLM's "
                f"model does not call ({missed[0]} and {len(missed) - 1} others): it fuses the module with the one "
                "before or after it, and nothing would be edited. Edit the layers' output (block_output) instead."
            )

    def edit(self, hidden: torch.Tensor, residual: torch.Tensor | None, name: str) -> None:
        site = self.sites[name]
        if self._called is not None:
            self._called.add(name)
        if self.plan is not None and self.plan.rows and site.entries:
            batches, whole = self.plan.at(site.layout)
            edit_rows(hidden, residual, [(site.tables[kind], batch) for kind, batch in batches], whole)


def edit_running(hidden: torch.Tensor, residual: torch.Tensor | None, name: str) -> None:
    """Edit a place's output in the running worker's model, in place. Outside of steps (warm-ups) it does nothing."""
    if _running is not None:
        _running.edit(hidden, residual, name)


def _edit_nothing(hidden: torch.Tensor, residual: torch.Tensor | None, name: str) -> None:
    """Fake implementation for the compiler."""


# One opaque operation, which compiled models call without tracing into it.
_library = torch.library.Library("peft_reft", "FRAGMENT")
_library.define("edit(Tensor(a!) hidden, Tensor(b!)? residual, str name) -> ()")
_library.impl("edit", edit_running, "CompositeExplicitAutograd")
torch.library.register_fake("peft_reft::edit", _edit_nothing, lib=_library)

edit = torch.ops.peft_reft.edit
