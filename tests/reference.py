"""The oracle: the paper's equations in plain Python loops, one sequence at a time, sharing no code with the package.

A sequence is described by its *roles*, one letter a token: "p" for prompt, "c" for completion, such as "pppcc" or, with
two turns, "pppccppc". Interventions are dictionaries of `projection` [units, r, d], `weight` [units, r, d] and `bias`
[units, r].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


def edited_tokens(spec: str, roles: str, breaks: Collection[int] = ()) -> dict[int, int]:
    """Token index -> number of the word of `spec` that selects it; tokens in `breaks` open a new run of the prompt."""
    spans = []  # [first, behind last] of each run of prompt tokens
    for i, role in enumerate(roles):
        if role != "p":
            continue
        if spans and spans[-1][1] == i and i not in breaks:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1])

    words = spec.split("+")
    firsts = [int(word[1:]) for word in words if word[0] == "f"]
    lasts = [int(word[1:]) for word in words if word[0] == "l"]
    chosen = {}
    for number, word in enumerate(words):
        if word == "all":
            chosen.update(dict.fromkeys(range(len(roles)), number))
        elif word == "prompt":
            chosen.update({i: number for i, role in enumerate(roles) if role == "p"})
        elif word == "completion":
            chosen.update({i: number for i, role in enumerate(roles) if role == "c"})
        elif word[0] == "c":
            since = 0
            for i, role in enumerate(roles):
                since = 0 if role == "p" else since + 1
                if role == "c" and since <= int(word[1:]):
                    chosen[i] = number
        else:
            for turn, (begin, end) in enumerate(spans):
                if word[0] == "f" and turn > 0:
                    continue
                count = min(int(word[1:]), end - begin)
                if turn == 0 and firsts and lasts and end - begin < firsts[0] + lasts[0]:
                    count = min(count, (end - begin) // 2)
                tokens = range(begin, begin + count) if word[0] == "f" else range(end - count, end)
                chosen.update(dict.fromkeys(tokens, number))
    return chosen


def gram_schmidt(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows with the same span, first row first; [r, d]."""
    orthonormal: list[torch.Tensor] = []
    for row in rows:
        for earlier in orthonormal:
            row = row - (row @ earlier) * earlier
        orthonormal.append(row / row.norm())
    return torch.stack(orthonormal)


def loreft(h: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Equation 2 of the ReFT paper for one hidden representation [d]: h + R^T (W h + b - R h), R being `rows`."""
    return h + rows.T @ (weight @ h + bias - rows @ h)


def edited(method: str, h: torch.Tensor, params: dict[str, torch.Tensor], act=lambda x: x) -> torch.Tensor:
    """One hidden representation [d] after the edit of one unit, for each method as in its paper (or pyreft).

    `params`: `projection` [r, d], `weight` [r, d] and `bias` [r], if the method has them; `scale` and `bias` [d] for
    RED. R is the orthonormalized projection, P the projection itself.
    """
    if method == "red":
        return torch.stack([g * x + b for g, x, b in zip(params["scale"], h, params["bias"], strict=True)])
    projection, bias = params["projection"], params["bias"]
    rows = projection if method.startswith("no") else gram_schmidt(projection)
    coordinates = {
        "loreft": lambda: act(params["weight"] @ h + bias) - rows @ h,
        "noreft": lambda: act(params["weight"] @ h + bias) - rows @ h,
        "direft": lambda: act(params["weight"] @ h + bias),
        "nodireft": lambda: act(params["weight"] @ h + bias),
        "consreft": lambda: bias - rows @ h,
        "lobireft": lambda: bias,
    }[method]()
    for coordinate, row in zip(coordinates, rows, strict=True):
        h = h + coordinate * row
    return h


def edit_sequence(
    hidden: torch.Tensor, spec: str, roles: str, shared: bool, params: dict[str, torch.Tensor], start: int = 0
) -> torch.Tensor:
    """Hidden representations [tokens, d] of one sequence from its token `start` on, edited."""
    chosen = edited_tokens(spec, roles)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = [gram_schmidt(projection.to(dtype)) for projection in params["projection"]]
    edited = []
    for i, h in enumerate(hidden, start):
        if i in chosen:
            unit = 0 if shared else chosen[i]
            before = h.to(dtype)
            after = loreft(before, rows[unit], params["weight"][unit].to(dtype), params["bias"][unit].to(dtype))
            h = h + (after - before).to(h.dtype)
        edited.append(h)
    return torch.stack(edited)


class Reference:
    """A separate base model, with modules whose output is edited token by token.

    Args:
        model: the base model; no other code may use it.
        sites: module name -> parameters of its intervention.
        spec, shared: the positions, and whether one intervention serves all words.
        inputs: like `sites`, for modules whose input is edited.
    """

    def __init__(
        self,
        model,
        sites: dict[str, dict[str, torch.Tensor]],
        spec: str,
        shared: bool = True,
        inputs: dict[str, dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.spec = spec
        self.shared = shared
        self.inputs = inputs or {}

    @contextmanager
    def editing(self, roles: str | dict[str, str], cached: bool = False) -> Iterator[torch.nn.Module]:
        """The model, whose rows all have these roles (all sites, or each its own); tokens after them are completion.

        `cached`: every pass continues where the previous one ended; otherwise every pass holds the whole sequence.
        """
        roles = roles if isinstance(roles, dict) else dict.fromkeys([*self.sites, *self.inputs], roles)
        handles = [
            self.model.get_submodule(name).register_forward_hook(self._hook(roles[name], params, cached))
            for name, params in self.sites.items()
        ]
        handles += [
            self.model.get_submodule(name).register_forward_pre_hook(
                self._input_hook(roles[name], params, cached), with_kwargs=True
            )
            for name, params in self.inputs.items()
        ]
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, roles: str, params: dict[str, torch.Tensor], cached: bool):
        edit = self._editor(roles, params, cached)

        def hook(module, args, output):
            if isinstance(output, torch.Tensor):
                return edit(output)
            return (edit(output[0]), *output[1:])

        return hook

    def _input_hook(self, roles: str, params: dict[str, torch.Tensor], cached: bool):
        edit = self._editor(roles, params, cached)

        def hook(module, args, kwargs):
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return hook

    def _editor(self, roles: str, params: dict[str, torch.Tensor], cached: bool):
        seen = 0

        def edit(hidden):
            nonlocal seen
            if hidden.dim() == 2:  # all tokens on one axis
                return edit(hidden.unflatten(0, (-1, len(roles)))).flatten(0, 1)
            start = seen if cached else 0
            seen += hidden.shape[1]
            known = roles[: start + hidden.shape[1]].ljust(start + hidden.shape[1], "c")
            rows = (edit_sequence(row, self.spec, known, self.shared, params, start) for row in hidden)
            return torch.stack(list(rows))

        return edit

    def logits(self, ids: list[int], roles: str) -> torch.Tensor:
        """[tokens, vocabulary] of one sequence, without a cache."""
        with self.editing(roles) as model:
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def generate(self, ids: list[int], roles: str | None = None, cached: bool = False, **kwargs) -> torch.Tensor:
        """The output of Transformers' own `generate` for one sequence."""
        with self.editing(roles or "p" * len(ids), cached) as model:
            return model.generate(input_ids=torch.tensor([ids]), use_cache=cached, **kwargs)


def gradients(reference: Reference, objective: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """Gradients of `objective` with respect to every parameter of the interventions."""
    names = [(site, name) for site, params in reference.sites.items() for name in params]
    leaves = [reference.sites[site][name] for site, name in names]
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    zero = (torch.zeros_like(leaf) for leaf in leaves)
    return {name: empty if grad is None else grad for name, grad, empty in zip(names, grads, zero, strict=True)}
