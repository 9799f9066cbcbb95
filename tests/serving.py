"""A tiny model and adapters of all kinds in folders, and comparisons of an engine's answers with Transformers'."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from tiny import build, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig

VOCAB, HIDDEN, LAYERS = 64, 64, 4

# Arguments of a small engine.
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "block_size": 32,
    "max_model_len": 256,
    "disable_log_stats": True,
}

# All interventions, all words, all components, ranks mixed.
ADAPTERS: dict[str, dict[str, Any]] = {
    "untied": {"r": 4, "positions": "f3+l3", "share_weights": False},
    "all": {"r": 2, "positions": "all"},
    "completion": {"r": 4, "positions": "completion", "intervention": "noreft"},
    "counted": {"r": 3, "positions": "prompt+c2", "share_weights": False, "intervention": "direft"},
    "active": {"r": 4, "positions": "f2+l2", "intervention": "nodireft", "act_fn": "gelu"},
    "replacing": {"r": 4, "positions": "l3+c3", "act_fn": "relu"},
    "constant": {"r": 1, "positions": "prompt", "intervention": "consreft", "layers_to_transform": [1, -1]},
    "steering": {"r": 2, "positions": "all", "intervention": "lobireft", "layers_to_transform": 2},
    "red": {"positions": "f4+completion", "share_weights": False, "intervention": "red"},
    "into_blocks": {"r": 4, "positions": "f3+l3", "component": ["block_input", "block_output"]},
    "attention": {"r": 8, "positions": "l4", "component": "attention_output"},
    "mlp": {"r": 4, "positions": "all", "component": ["mlp_output", "attention_output"], "layers_to_transform": [0, 3]},
}


def save_model(folder: Path, **settings: Any) -> Path:
    """A tiny Llama with a tokenizer, in a folder."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    build(LlamaForCausalLM, LlamaConfig(**sizes | settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, seed: int = 0, **settings: Any) -> Path:
    """A random adapter of a model, in a folder."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = ReftConfig(**{"init_weights": False, "task_type": "CAUSAL_LM"} | settings)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


class Request(NamedTuple):
    """A prompt, the adapter that it names (None: the base model) and its strength."""

    ids: tuple[int, ...]
    adapter: str | None = None
    strength: float = 1.0

    @property
    def extra_args(self) -> dict[str, Any]:
        if self.adapter is None:
            return {}
        return {"reft": self.adapter if self.strength == 1 else {"name": self.adapter, "strength": self.strength}}


class Answer(NamedTuple):
    """An engine's answer: its tokens, and at each position the log-probabilities of some tokens."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]


class Differences(NamedTuple):
    """How an answer differs from Transformers': tokens that are not its best ones, and log-probabilities.

    `gaps` are the differences between the best token's log-probability and each token's; in a tie either is right.
    """

    gaps: list[float]
    largest: float


class HuggingFace:
    """The model and its adapters in Transformers with this package."""

    def __init__(self, model: Path, adapters: dict[str, Path], dtype: torch.dtype = torch.float32) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        names = list(adapters)
        self.model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapters[name], adapter_name=name)
        self.model.eval()
        self._logprobs = lru_cache(maxsize=None)(self._compute)

    @torch.no_grad()
    def _compute(self, request: Request, tokens: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*request.ids, *tokens]])
        prompt = torch.arange(ids.shape[1])[None] < len(request.ids)
        if request.adapter is None:
            with self.model.disable_adapter():
                logits = self.model(input_ids=ids).logits
        else:
            self.model.set_adapter(request.adapter)
            self.model.set_strength(request.adapter, request.strength)
            logits = self.model(input_ids=ids, prompt_mask=prompt).logits
        return logits[0, len(request.ids) - 1 : -1].float().log_softmax(-1)

    def logprobs(self, request: Request, tokens: tuple[int, ...]) -> torch.Tensor:
        """`[tokens, vocabulary]`, of each of the answer's tokens."""
        return self._logprobs(request, tokens)

    def differences(self, request: Request, answer: Answer) -> Differences:
        own = self.logprobs(request, answer.tokens)
        chosen = own.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        gaps = (own.max(-1).values - chosen).tolist()
        pairs = [
            abs(own[place, token].item() - logprob)
            for place, logprobs in enumerate(answer.logprobs)
            for token, logprob in logprobs.items()
        ]
        return Differences(gaps, max(pairs, default=0.0))

    @torch.no_grad()
    def generate(self, request: Request, count: int) -> tuple[int, ...]:
        ids = torch.tensor([request.ids])
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if request.adapter is None:
            with self.model.disable_adapter():
                output = self.model.generate(input_ids=ids, **options)
        else:
            self.model.set_adapter(request.adapter)
            self.model.set_strength(request.adapter, request.strength)
            output = self.model.generate(input_ids=ids, **options)
        return tuple(output[0, len(request.ids) :].tolist())


def check(truth: HuggingFace, requests: list[Request], given: list[Answer], logprob: float = 1e-4) -> None:
    """Every token is the best one there, or as good as it (a tie); log-probabilities agree."""
    assert len(requests) == len(given)
    for request, answer in zip(requests, given, strict=True):
        gaps, largest = truth.differences(request, answer)
        assert max(gaps) < 2e-5, f"{request.adapter}: a token that is {max(gaps)} less likely than the best"
        assert largest < logprob, f"{request.adapter}: log-probabilities differ by {largest}"


def answers(llm: Any, requests: list[Request], tokens: int = 12, **options: Any) -> list[Answer]:
    """vLLM's greedy answers."""
    return [answer_of(output.outputs[0]) for output in outputs(llm, requests, tokens, **options)]


def outputs(llm: Any, requests: list[Request], tokens: int = 12, **options: Any) -> list[Any]:
    """vLLM's own outputs."""
    prompts = [{"prompt_token_ids": list(request.ids)} for request in requests]
    params = [sampling(request, tokens, **options) for request in requests]
    return llm.generate(prompts, params, use_tqdm=False)


def sampling(request: Request, tokens: int = 12, **options: Any) -> Any:
    from vllm import SamplingParams

    settings = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 5} | options
    return SamplingParams(**settings, extra_args=request.extra_args or None)


def answer_of(output: Any) -> Answer:
    logprobs = ({token: one.logprob for token, one in place.items()} for place in output.logprobs)
    return Answer(tuple(output.token_ids), tuple(logprobs))


def prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 60) -> list[tuple[int, ...]]:
    """Random prompts of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(6, VOCAB, (length,), generator=generator).tolist()) for length in lengths]


def mixed(seed: int = 0, copies: int = 2) -> list[Request]:
    """Requests for every adapter and the base model, in turns."""
    names = [*ADAPTERS, None] * copies
    return [Request(ids, name) for ids, name in zip(prompts(len(names), seed), names, strict=True)]
