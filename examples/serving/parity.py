"""Compares vLLM's answers with those of Transformers, and shows what adapters share in the prefix cache.

    python examples/serving/parity.py                     # the bundled model: prints the tables of README.md
    python examples/serving/parity.py --compiled

Random adapters, all in one batch with the base model. Transformers gets each answer's tokens and reports which tokens
it would have chosen; in bfloat16, both are compared with float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import ReftConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from smollm2 import smollm2_folder

ADAPTERS: dict[str, dict[str, Any]] = {
    "f7+l7, untied": {"positions": "f7+l7", "share_weights": False},
    "all": {"positions": "all"},
    "completion": {"positions": "completion", "intervention": "noreft"},
    "prompt+c2": {"positions": "prompt+c2", "intervention": "direft"},
    "prompt, gelu": {"positions": "prompt", "intervention": "nodireft", "act_fn": "gelu"},
    "l4, attention": {"positions": "l4", "component": "attention_output"},
    "all, MLP": {"positions": "all", "component": "mlp_output", "layers_to_transform": [5, 15, 25]},
    "red": {"positions": "f4+completion", "intervention": "red", "layers_to_transform": [10, 20]},
    "base model": {},
}
BASE = "base model"
TEXTS = [
    "The capital of France is",
    "Write a short poem about the sea and the moon, please:",
    "Once upon a time there was a little girl who",
    "Explain why the sky is blue in a few simple words.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer (default: %(default)s)")
    args = parser.parse_args()
    args.model = args.model or str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with TemporaryDirectory() as root:
        folders = save(args.model, Path(root))
        prompts = [(name, ids) for name in ADAPTERS for ids in tokenizer(TEXTS).input_ids]
        whole = HuggingFace(args.model, folders, torch.float32)
        half = HuggingFace(args.model, folders, torch.bfloat16)
        engine = start(args, folders, "float32")
        print(float32_table(whole, prompts, answers(engine, prompts, args.tokens)), end="\n\n")
        print(sharing_table(engine, (tokenizer(" ".join(TEXTS)).input_ids * 8)[:200]), end="\n\n")
        given = answers(start(args, folders, "bfloat16"), prompts, args.tokens)
        print(bfloat16_table(whole, half, prompts, given))


def save(model: str, root: Path) -> dict[str, str]:
    """Random adapters in folders, by name."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        if settings:
            torch.manual_seed(seed)
            config = ReftConfig(**{"r": 4, "init_weights": False, "task_type": "CAUSAL_LM"} | settings)
            tuned = get_peft_model(base, config)
            tuned.save_pretrained(root / name)
            base = tuned.unload()
    return {name: str(root / name) for name, settings in ADAPTERS.items() if settings}


def start(args: argparse.Namespace, folders: dict[str, str], dtype: str) -> vllm.LLM:
    return vllm.LLM(
        args.model,
        dtype=dtype,
        enforce_eager=not args.compiled,
        kv_cache_memory_bytes=512 << 20,
        block_size=32,
        max_model_len=512,
        additional_config={"reft_adapters": folders},
    )


# tokens, and for each position the log-probabilities of the five best
Answer = tuple[list[int], list[dict[int, float]]]


def answers(engine: vllm.LLM, prompts: list[tuple[str, list[int]]], count: int) -> list[Answer]:
    settings = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 5}
    params = [vllm.SamplingParams(**settings, extra_args=extra_args(name)) for name, _ in prompts]
    outputs = engine.generate([{"prompt_token_ids": ids} for _, ids in prompts], params, use_tqdm=False)
    return [
        (list(o.token_ids), [{token: one.logprob for token, one in place.items()} for place in o.logprobs])
        for o in (output.outputs[0] for output in outputs)
    ]


def extra_args(name: str) -> dict[str, str] | None:
    return None if name == BASE else {"reft": name}


class HuggingFace:
    """The model and its adapters in Transformers."""

    def __init__(self, model: str, folders: dict[str, str], dtype: torch.dtype) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        first, *others = folders
        self.model = PeftModel.from_pretrained(base, folders[first], adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(folders[name], adapter_name=name)

    @torch.no_grad()
    def logprobs(self, name: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Log-probabilities at each token of an answer, float32 `[tokens, vocabulary]`."""
        ids = torch.tensor([[*prompt, *answer]])
        if name == BASE:
            with self.model.disable_adapter():
                logits = self.model(input_ids=ids).logits
        else:
            self.model.set_adapter(name)
            logits = self.model(input_ids=ids, prompt_mask=torch.arange(ids.shape[1])[None] < len(prompt)).logits
        return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def by_name(prompts: list[tuple[str, list[int]]], given: list[Answer]) -> Iterator[tuple[str, list[Any]]]:
    for name in ADAPTERS:
        yield name, [(ids, *answer) for (own, ids), answer in zip(prompts, given, strict=True) if own == name]


def float32_table(whole: HuggingFace, prompts: list[tuple[str, list[int]]], given: list[Answer]) -> str:
    rows = []
    for name, own in by_name(prompts, given):
        gaps, differences = [], []
        for ids, tokens, places in own:
            truth = whole.logprobs(name, ids, tokens)
            gaps += (truth.max(-1).values - truth[range(len(tokens)), tokens]).tolist()
            differences += [abs(truth[i, t].item() - p) for i, place in enumerate(places) for t, p in place.items()]
        others = [gap for gap in gaps if gap > 0]
        ties = f"{len(others)}, at most {max(others):.1e} less likely" if others else "none"
        rows.append([name, f"{len(gaps) - len(others)} of {len(gaps)}", ties, f"{max(differences):.1e}"])
    return table(["float32", "greedy tokens equal", "others", "largest difference of a log-probability"], rows)


def bfloat16_table(whole: HuggingFace, half: HuggingFace, prompts: list, given: list[Answer]) -> str:
    rows = []
    for name, own in by_name(prompts, given):
        here, there, equal, count = [], [], 0, 0
        for ids, tokens, places in own:
            truth, rounded = (model.logprobs(name, ids, tokens) for model in (whole, half))
            equal += (rounded.argmax(-1) == torch.tensor(tokens)).sum().item()
            count += len(tokens)
            for i, place in enumerate(places):
                here += [abs(truth[i, token].item() - logprob) for token, logprob in place.items()]
                there += [abs((truth - rounded)[i, token].item()) for token in place]
        rows.append([name, f"{equal} of {count}", f"{fmean(here):.3f}", f"{fmean(there):.3f}"])
    header = ["bfloat16", "greedy tokens equal", "mean difference from float32, vLLM", "the same, Hugging Face"]
    return table(header, rows)


def sharing_table(engine: vllm.LLM, ids: list[int]) -> str:
    """Prompt tokens that a request finds in the cache when another one with the same prompt came before it."""
    names = list(ADAPTERS)
    rows = []
    for first in names:
        row = [first]
        for second in names:
            engine.reset_prefix_cache()
            for name in (first, second):
                params = vllm.SamplingParams(max_tokens=1, extra_args=extra_args(name))
                (output,) = engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
            row.append(output.num_cached_tokens)
        rows.append(row)
    return table([f"{len(ids)} prompt tokens, first / then", *names], rows)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    main()
