"""lm-evaluation-harness: a request's scores are those of the request alone, whatever the batch, for every adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm_eval: bash tests/run.sh lm_eval makes an environment with it")

import lm_eval
import tiny
from adapters import lora, reft
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model

from peft_reft import ReftConfig, prompt_mask_of
from peft_reft.integrations.lm_eval import ReftLM

SPECS = ["f3+l3", "l1", "prompt", "c2", "completion", "f2+c2", "all"]
CHOICES = ["w7", "w8 w9", "w10 w11 w12 w13 w14", "w7 w20"]
CONTEXTS = ["w6", "w20 w21 w22 w23 w24 w25 w26", "w30 w31 w32", "w40 <pad> w41", ""]
# Words are told apart by spaces.
PAIRS = [(context, f" {choice}") for context in CONTEXTS for choice in CHOICES]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, i, task_name="test") for i, pair in enumerate(arguments)]


def scores(model_type, model, batch_size: int, pairs=PAIRS, **options) -> list[float]:
    lm = model_type(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=batch_size, device="cpu", **options)
    with torch.no_grad():
        return [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]


@torch.no_grad()
def alone(model, context: list[int], continuation: list[int]) -> float:
    """The score of one request, by the model itself: `context` is the prompt."""
    ids = torch.tensor([context + continuation])
    with prompt_mask_of(model, torch.arange(ids.shape[1])[None] < len(context)):
        logits = model(input_ids=ids).logits[0]
    places = range(len(context) - 1, ids.shape[1] - 1)
    return sum(logits[place].log_softmax(-1)[ids[0, place + 1]].item() for place in places)


def encoded(context: str, continuation: str) -> tuple[list[int], list[int]]:
    tokenizer = tiny.tokenizer()
    return tokenizer(context or "<s>").input_ids, tokenizer(continuation).input_ids


def edited(**settings):
    return get_peft_model(tiny.llama(), reft(**settings)).eval()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("spec", SPECS)
def test_a_score_is_that_of_the_request_alone(spec, batch_size):
    model = edited(positions=spec)
    expected = [alone(model, *encoded(*pair)) for pair in PAIRS]
    assert scores(ReftLM, model, batch_size) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_without_the_model_type_scores_depend_on_the_batch_and_the_answer():
    model = edited(positions="f3+l3")
    expected = [alone(model, *encoded(*pair)) for pair in PAIRS]
    one, eight = scores(HFLM, model, 1), scores(HFLM, model, 8)
    off = [abs(a - b) > 0.1 for a, b in zip(one, eight, strict=True)]
    wrong = [abs(a - b) > 0.1 for a, b in zip(one, expected, strict=True)]
    assert sum(off) > len(PAIRS) // 4
    assert sum(wrong) > len(PAIRS) // 4


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("build", [tiny.llama, lambda: get_peft_model(tiny.llama(), lora()).eval()])
def test_other_models_have_the_scores_of_hf_to_the_last_digit(build, batch_size):
    model = build()
    assert scores(ReftLM, model, batch_size) == scores(HFLM, model, batch_size)


def test_the_same_tokens_with_two_prompts_are_two_requests():
    model = edited(positions="l1")
    pairs = [
        ("w6 w7", " w8 w9"),
        ("w6", " w7 w8 w9"),
        ("w6 w7 w8", " w9"),
        ("w6 w7 w8", " w10"),
        ("w6 w7", " w8 <pad>"),
    ]
    expected = [alone(model, *encoded(*pair)) for pair in pairs]
    assert scores(ReftLM, model, 8, pairs) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len({round(score, 3) for score in expected[:3]}) == 3


def test_a_prompt_that_is_cut_from_the_left_stays_a_prompt():
    model = edited(positions="f2+l2")
    context, continuation = " ".join(f"w{n}" for n in range(6, 40)), " w41 w42"
    tokens, answer = encoded(context, continuation)
    # The harness feeds `max_length` tokens, without the last one of the answer.
    expected = alone(model, tokens[-(16 + 1 - 2) :], answer)
    found = scores(ReftLM, model, 4, [(context, continuation)], max_length=16)
    assert found == pytest.approx([expected], rel=1e-4)


def test_batch_sizes_are_found_by_itself():
    model = edited(positions="f3+l3")
    expected = [alone(model, *encoded(*pair)) for pair in PAIRS]
    assert scores(ReftLM, model, "auto", max_batch_size=4) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_generation_is_that_of_the_request_alone(spec, batch_size):
    model = edited(positions=spec)
    lm = ReftLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=batch_size, device="cpu")
    contexts = [context for context in CONTEXTS if context]
    options = {"until": ["<none>"], "max_gen_toks": 5}
    found = lm.generate_until(requests("generate_until", [(c, options) for c in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = torch.tensor([tiny.tokenizer()(context).input_ids])
        mask = torch.ones_like(ids)
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert text == tiny.tokenizer().decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_whole_texts_need_an_adapter_of_all_tokens():
    texts = requests("loglikelihood_rolling", [("w6 w7 w8",)])
    with pytest.raises(ValueError, match=r"'f2\+l2' needs to know where the prompt ends.*positions='all'"):
        ReftLM(pretrained=edited(), tokenizer=tiny.tokenizer(), device="cpu").loglikelihood_rolling(texts)
    model = edited(positions="all")
    rolling = [
        kind(pretrained=model, tokenizer=tiny.tokenizer(), device="cpu").loglikelihood_rolling(texts)
        for kind in (ReftLM, HFLM)
    ]
    assert rolling[0] == rolling[1]


def test_it_is_registered_beside_hf():
    assert get_model("hf-reft") is ReftLM
    assert get_model("hf") is HFLM


# A real model, from the command line.

QUESTIONS = [
    ("What is the capital of France?", ["Paris", "London, of course", "Berlin is the capital of France"]),
    ("Which animal barks?", ["A cat does that", "A dog", "The fish in the sea"]),
    ("How many days are in one week?", ["Five", "Seven days", "Twelve, I think"]),
    ("What color is the sky on a clear day?", ["Green", "Blue", "It is entirely black"]),
    ("Is ice cold?", ["No", "Yes, very"]),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from smollm2 import smollm2_folder

    return smollm2_folder()


@pytest.fixture(scope="module")
def adapters(smollm2, tmp_path_factory) -> dict[str, Path]:
    """Adapters of SmolLM2 that visibly change it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "reft": ReftConfig(r=4, positions="f3+l3", task_type="CAUSAL_LM", init_weights="pyreft"),
        "lora": lora(target_modules=["q_proj", "v_proj"]),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), config)
        model.peft_config["default"].base_model_name_or_path = str(smollm2)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in configs}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "label": 1}) for q, c in QUESTIONS]
    (folder / "test.jsonl").write_text("\n".join(lines))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "test.jsonl"}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
    (folder / "choose.yaml").write_text(
        f"""task: choose{common}output_type: multiple_choice
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
    )
    (folder / "answer.yaml").write_text(
        f"""task: answer{common}output_type: generate_until
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(tasks, smollm2, adapters):
    """Name of each task -> the harness's record of each of its documents; each task runs once."""
    manager, kept = TaskManager(include_path=str(tasks)), {}

    def run(model: str, adapter: str | None, batch_size: int, chat: bool = False) -> dict[str, list]:
        key = (model, adapter, batch_size, chat)
        if key not in kept:
            arguments = {"pretrained": str(smollm2), "dtype": "float32"}
            arguments |= {"peft": str(adapters[adapter])} if adapter else {}
            results = lm_eval.simple_evaluate(
                model,
                arguments,
                ["choose", "answer"],
                batch_size=batch_size,
                device="cpu",
                task_manager=manager,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
            kept[key] = {
                task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
                for task, samples in results["samples"].items()
            }
        return kept[key]

    return run


def numbers(samples: list) -> list[float]:
    return [float(score) for sample in samples for score, _ in sample]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_real_task_does_not_depend_on_the_batch_size(chat, evaluated):
    one, eight = (evaluated("hf-reft", "reft", size, chat) for size in (1, 8))
    assert numbers(one["choose"]) == pytest.approx(numbers(eight["choose"]), abs=1e-3)
    assert one["answer"] == eight["answer"]
    assert one["answer"] == evaluated("hf", "reft", 8, chat)["answer"]


def test_a_real_task_without_the_model_type_depends_on_the_batch_size(evaluated):
    one, eight = (numbers(evaluated("hf", "reft", size)["choose"]) for size in (1, 8))
    assert max(abs(a - b) for a, b in zip(one, eight, strict=True)) > 0.1


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_real_task_of_another_model_has_the_results_of_hf(adapter, evaluated):
    results = evaluated("hf-reft", adapter, 8)
    assert results == evaluated("hf", adapter, 8)
    assert numbers(results["choose"]) != pytest.approx(numbers(evaluated("hf-reft", "reft", 8)["choose"]), abs=0.1)


def test_the_command_line_gives_the_same(evaluated, smollm2, adapters, tasks, tmp_path):
    arguments = f"pretrained={smollm2},dtype=float32,peft={adapters['reft']}"
    command = [sys.executable, "-m", "peft_reft.run", "lm_eval", "--model", "hf-reft", "--model_args", arguments]
    command += ["--tasks", "choose", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "8"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_choose_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda s: s["doc_id"])
    found = numbers([sample["filtered_resps"] for sample in samples])
    assert found == pytest.approx(numbers(evaluated("hf-reft", "reft", 8)["choose"]), abs=1e-4)
