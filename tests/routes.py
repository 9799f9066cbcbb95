"""A model with an adapter and its reference, and batches to send through both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from reference import Reference, gradients
from tiny import EOS, PAD, VOCAB, llama

from peft_reft import ReftConfig

# Prompts of one token, shorter than the spec, and longer; answers of several lengths.
ROLES = ("pccc", "ppcc", "ppppppppcccc", "pppcc")
SPECS = {
    "f2+l3": ("f2+l3", True),
    "f2+l3-unshared": ("f2+l3", False),
    "l1": ("l1", True),
    "prompt": ("prompt", True),
    "completion": ("completion", True),
    "c2": ("c2", True),
    "all": ("all", True),
    "f3+c2-unshared": ("f3+c2", False),
}
# Llama normalizes and rotates in float32 whatever the dtype of the model.
TOLERANCE = 1e-5
PARAMETERS = ("projection", "weight", "bias")


@dataclass
class Pair:
    """A PEFT model and the reference of its active adapter, with equal parameters."""

    peft: torch.nn.Module
    reference: Reference
    prefix: str = "base_model.model."
    names: list[str] = field(default_factory=list)

    def parameters(self) -> dict[tuple[str, str], torch.nn.Parameter]:
        modules = dict(self.peft.named_modules())
        return {
            (site, name): getattr(modules[f"{self.prefix}{site}.reft"].reft_intervention["default"], name)
            for site in self.reference.sites
            for name in PARAMETERS
        }

    def gradients(self) -> dict[tuple[str, str], torch.Tensor]:
        return {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in self.parameters().items()}


def make_pair(
    spec: str,
    shared: bool = True,
    base=None,
    sites: tuple[str, ...] = ("model.layers.0", "model.layers.2"),
    task_type: str | None = "CAUSAL_LM",
    dtype: torch.dtype = torch.float64,
) -> Pair:
    """A random adapter on `sites` of a tiny Llama (or `base`)."""
    base = (llama() if base is None else base).to(dtype)
    reference_model = copy.deepcopy(base)
    config = ReftConfig(
        r=3,
        positions=spec,
        share_weights=shared,
        target_modules=list(sites),
        init_weights=False,
        task_type=task_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = get_peft_model(base, config).to(dtype)
    return pair_with_reference(model, reference_model, sites, spec, shared)


def pair_with_reference(model, reference_model, sites, spec, shared, prefix: str = "base_model.model.") -> Pair:
    modules = dict(model.named_modules())
    params = {}
    for site in sites:
        intervention = modules[f"{prefix}{site}.reft"].reft_intervention["default"]
        params[site] = {name: getattr(intervention, name).detach().clone().requires_grad_() for name in PARAMETERS}
    return Pair(model, Reference(reference_model, params, spec, shared), prefix)


def sequences(roles=ROLES, seed: int = 3) -> list[list[int]]:
    """Random token ids for each of the given roles, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (len(r),), generator=generator).tolist() for r in roles]


@dataclass
class Batch:
    """Padded sequences: `ids`, `mask`, `labels`, `prompt` are [batch, tokens]; `where` tells the real tokens."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    prompt: torch.Tensor
    where: list[torch.Tensor]


def pad(roles, ids, left: int | str = 0, right: int = 0) -> Batch:
    """Pad to the longest; `left="all"` pads on the left, numbers pad further on both sides."""
    longest = max(map(len, ids))
    rows = len(ids)
    extra = left if isinstance(left, int) else 0
    tokens = longest + extra + right
    batch = Batch(
        torch.full((rows, tokens), PAD),
        torch.zeros(rows, tokens, dtype=torch.long),
        torch.full((rows, tokens), -100),
        torch.zeros(rows, tokens, dtype=torch.bool),
        [],
    )
    for row, (role, tokens_of_row) in enumerate(zip(roles, ids, strict=True)):
        begin = tokens - right - len(tokens_of_row) if left == "all" else extra
        where = torch.arange(begin, begin + len(tokens_of_row))
        batch.where.append(where)
        batch.ids[row, where] = torch.tensor(tokens_of_row)
        batch.mask[row, where] = 1
        supervised = torch.tensor([r == "c" for r in role])
        batch.labels[row, where[supervised]] = batch.ids[row, where[supervised]]
        batch.prompt[row, where[~supervised]] = True
    return batch


def probe(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Random weights of the logits: an objective that depends on every token and every logit."""
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same_pass(pair: Pair, logits: list[torch.Tensor], roles, ids, rtol: float = TOLERANCE) -> None:
    """Logits of each sequence, and gradients of every adapter parameter, equal the reference's alone."""
    objective = expected_objective = 0.0
    for number, (got, role, tokens) in enumerate(zip(logits, roles, ids, strict=True)):
        expected = pair.reference.logits(tokens, role)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, msg=lambda m, n=number: f"sequence {n}: {m}")
        weights = probe(len(tokens), number, got.dtype)
        objective = objective + (got * weights).sum()
        expected_objective = expected_objective + (expected * weights).sum()
    pair.peft.zero_grad()
    objective.backward()
    assert_same_gradients(pair, gradients(pair.reference, expected_objective), rtol)


def assert_same_gradients(pair: Pair, expected, rtol: float = TOLERANCE) -> None:
    for key, grad in pair.gradients().items():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(
            grad, expected[key], rtol=rtol, atol=rtol * max(scale, 1.0), msg=lambda m, k=key: f"{k}: {m}"
        )


GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
