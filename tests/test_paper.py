"""The paper's suites: prompts, answers, metrics and presets as in its recipe, and runs that resume."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel, TrainerCallback

from peft_reft import ReftConfig

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))

import answering
import choices
import commonsense
import glue
import instruct
import likelihood
import numpy as np
import presets
import suites
from methods import METHODS, peft_config
from peft import get_peft_model
from suites import Arithmetic, Commonsense, Instruct

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "examples" / "paper"


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Prompts and answers


def test_commonsense_prompt_is_the_instruction_and_a_line_break():
    row = {"instruction": "Sun or moon?\n\nAnswer format: answer1/answer2", "answer": "answer2", "output": "wrong"}
    assert Commonsense.prompt(row) == "Sun or moon?\n\nAnswer format: answer1/answer2\n"
    assert Commonsense.completion(row) == "the correct answer is answer2"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Sun or moon?\nthe correct answer is answer2", "answer2"),
        ("Sun or moon?\nthe correct answer is  answer2 \n", "answer2"),
        # Cut after the first mark, and nothing else: what follows the answer makes it wrong.
        (
            "Sun or moon?\nthe correct answer is answer2 the correct answer is answer1",
            "answer2 the correct answer is answer1",
        ),
        ("Sun or moon?\nthe correct answer is answer2.", "answer2."),
        ("Sun or moon?\nanswer2", ""),
        ("Sun or moon?\nThe correct answer is answer2", ""),
        # The mark may stand in the question.
        (
            "Is 'the correct answer is no' true?\nthe correct answer is answer2",
            "no' true?\nthe correct answer is answer2",
        ),
    ],
)
def test_commonsense_answer_follows_the_first_mark(text, answer):
    assert Commonsense.extract(text, "answer2") == answer
    assert Commonsense.correct(answer, "answer2") == (answer == "answer2")


def response(text):
    return Arithmetic.prompt({"instruction": "Add 3 and 4, or C and D."}) + text


def test_arithmetic_prompt_is_alpacas_without_input():
    assert response("") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 3 and 4, or C and D.\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("text", "gold", "answer", "right"),
    [
        ("3 + 4 = 7. The answer is 7.", "7.0", "7.", True),
        ("The answer is 7 apples, not 8", "7.0", "8", False),
        ("It is $1,234.50 in all", "1234.5", "1234.50", True),
        ("That leaves -12", "-12", "-12", True),
        ("About 0.3333", "0.333333333", "0.3333", True),
        ("About 0.332", "0.333333333", "0.332", False),
        ("I do not know", "7.0", "", False),
        ("", "7.0", "", False),
        # Letters: the first of A to E anywhere, also within a word.
        ("The answer is (B).", "B", "B", True),
        ("either C or B", "B", "C", False),
        ("Because of this, D", "D", "B", False),
        ("the answer is unknown", "D", "", False),
        ("so 5 of 7, hence E", "E", "E", True),
    ],
)
def test_arithmetic_answers(text, gold, answer, right):
    assert Arithmetic.extract(response(text), gold) == answer
    assert Arithmetic.correct(answer, gold) is right


def test_numbers_of_the_question_are_not_the_answer():
    assert Arithmetic.extract(response("no number"), "7.0") == ""
    assert Arithmetic.extract("Add 3 and 4 = 7", "7.0") == ""


def test_instruct_prompt_with_and_without_input():
    without = Instruct.prompt({"instruction": "Rhyme.", "input": "", "output": "x"})
    assert without.endswith("### Instruction:\nRhyme.\n\n### Response:\n")
    assert "### Input" not in without
    both = Instruct.prompt({"instruction": "Rhyme.", "input": "moon", "output": "x"})
    assert "paired with an input" in both
    assert both.endswith("### Instruction:\nRhyme.\n\n### Input:\nmoon\n\n### Response:\n")


def test_model_outputs_have_what_alpaca_eval_reads():
    rows = [{"instruction": "Rhyme.", "input": "moon"}, {"instruction": "Count.", "dataset": "koala"}]
    texts = [Instruct.prompt(rows[0]) + " soon\n", Instruct.prompt(rows[1]) + "1\n2"]
    assert instruct.model_outputs(rows, texts, "tiny-loreft", "kept back") == [
        {"instruction": "Rhyme.\n\nmoon", "output": "soon", "generator": "tiny-loreft", "dataset": "kept back"},
        {"instruction": "Count.", "output": "1\n2", "generator": "tiny-loreft", "dataset": "koala"},
    ]


def test_majority_is_the_share_of_the_most_frequent_answer():
    assert suites.majority(["true", "false", "true", "true"]) == 75


# GLUE


@pytest.mark.parametrize(("rows", "first"), [(277, 138), (5000, 2500), (5001, 1000), (9815, 1000)])
def test_validation_is_split_in_two(rows, first):
    pick, scored = suites.validation_halves(rows, seed=42)
    assert len(pick) == first
    assert sorted(pick + scored) == list(range(rows))
    assert suites.validation_halves(rows, seed=42) == (pick, scored)
    assert suites.validation_halves(rows, seed=43) != (pick, scored)


def one_hot(predicted, classes=2):
    return np.eye(classes)[predicted]


def test_glue_metrics_by_hand():
    predicted, labels = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 1])
    tp, tn, fp, fn = 3, 3, 1, 1
    assert suites.glue_metrics("rte", one_hot(predicted), labels) == {"accuracy": 75, "score": 75}
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert suites.glue_metrics("cola", one_hot(predicted), labels)["score"] == pytest.approx(100 * mcc)
    f1 = tp / (tp + (fp + fn) / 2)
    metrics = suites.glue_metrics("mrpc", one_hot(predicted), labels)
    assert metrics == pytest.approx({"accuracy": 75, "f1": 100 * f1, "score": (75 + 100 * f1) / 2})
    assert suites.glue_metrics("cola", one_hot(np.ones(8, dtype=int)), labels)["score"] == 0

    numbers, gold = np.array([[0.0], [1.0], [1.0], [3.0]]), np.array([0.0, 2.0, 1.0, 9.0])
    metrics = suites.glue_metrics("stsb", numbers, gold)
    assert metrics["pearson"] == pytest.approx(100 * np.corrcoef(numbers[:, 0], gold)[0, 1])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    assert metrics["spearmanr"] == pytest.approx(100 * np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert metrics["score"] == pytest.approx((metrics["pearson"] + metrics["spearmanr"]) / 2)


# Presets: the paper's tables once more, in their own layout


GLUE_ORDER = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
GLUE_TABLE = {
    "roberta-base": (
        "f1 f3 f3 f3 f11 f11 f3 f3",
        "6e-4 6e-4 3e-4 4e-4 9e-4 6e-4 9e-4 6e-4",
        ".05 .10 .05 .20 .05 .05 .05 .05",
        ".06 .1 0 .005 .1 0 0 .03",
        "40 40 40 60 20 40 60 60",
    ),
    "roberta-large": (
        "f1 f3 f3 f3 f11 f11 f3 f3",
        "6e-4 6e-4 3e-4 1e-4 9e-4 6e-4 6e-4 8e-4",
        ".05 .05 .20 .20 .05 .05 .05 .05",
        "0 .10 .06 .20 .10 .06 0 .20",
        "20 20 30 30 20 20 30 30",
    ),
}


@pytest.mark.parametrize("preset", GLUE_TABLE)
def test_glue_presets_are_the_papers(preset):
    columns = zip(GLUE_ORDER, *(line.split() for line in GLUE_TABLE[preset]), strict=True)
    for task, position, rate, dropout, warmup, epochs in columns:
        recipe = presets.recipe("glue", preset, task)
        training = recipe.training
        assert (recipe.positions, recipe.dropout) == (position, float(dropout))
        assert training["learning_rate"] == float(rate)
        assert training["warmup_steps"] == float(warmup)
        assert training["num_train_epochs"] == int(epochs)
        assert (recipe.rank, recipe.layers, recipe.max_length) == (1, None, 256)
        assert (training["per_device_train_batch_size"], training["weight_decay"]) == (32, 0)
        assert recipe.model.endswith(preset)


@pytest.mark.parametrize(
    ("suite", "preset", "model", "rank", "layers", "positions", "tied", "batch", "epochs", "warmup", "length"),
    [
        ("commonsense", "llama-7b", "yahma/llama-7b-hf", 8, None, "f7+l7", True, (16, 2), 6, 0.1, 512),
        ("commonsense", "llama-13b", "yahma/llama-13b-hf", 8, None, "f7+l7", True, (16, 2), 6, 0.1, 512),
        ("arithmetic", "llama-7b", "yahma/llama-7b-hf", 8, None, "f7+l7", True, (16, 2), 12, 0.1, 512),
        ("arithmetic", "llama-13b", "yahma/llama-13b-hf", 8, None, "f7+l7", True, (16, 2), 12, 0.1, 512),
        ("instruct", "llama-7b", "meta-llama/Llama-2-7b-hf", 4, [3, 9, 18, 24], "f5+l5", False, (4, 32), 9, 0, 768),
    ],
)
def test_generation_presets_are_the_papers(
    suite, preset, model, rank, layers, positions, tied, batch, epochs, warmup, length
):
    recipe = presets.recipe(suite, preset)
    training = recipe.training
    assert (recipe.model, recipe.rank, recipe.layers, recipe.positions) == (model, rank, layers, positions)
    assert (recipe.share_weights, recipe.dropout, recipe.max_length) == (tied, 0, length)
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == batch
    assert (training["num_train_epochs"], training["warmup_steps"]) == (epochs, warmup)
    assert (training["learning_rate"], training["lr_scheduler_type"], training["weight_decay"]) == (9e-4, "linear", 0)
    expected = {
        "commonsense": {"max_new_tokens": 32},
        "arithmetic": {"max_new_tokens": 512},
        "instruct": {"no_repeat_ngram_size": 5, "repetition_penalty": 1.1, "max_length": 2048},
    }
    assert recipe.generation == expected[suite]


def test_unknown_preset_is_refused():
    with pytest.raises(SystemExit, match=r"no recipe for --preset llama-13b in instruct; there are llama-7b, smollm2"):
        presets.recipe("instruct", "llama-13b")


@pytest.mark.parametrize(("script", "flags"), [(glue, ["--max_length"]), (commonsense, ["--dev_rows", "--packing"])])
def test_help_names_the_trainers_flags_too(script, flags, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    for flag in (*flags, "--method", "--learning_rate", "--per_device_train_batch_size"):
        assert flag in text


@pytest.mark.parametrize("method", METHODS)
def test_methods_make_the_adapters_they_name(method):
    config = peft_config(method, "CAUSAL_LM", 2, "f1+l2", [0, 2], False, 0.1, "pyreft")
    if method in ("full", "none"):
        assert config is None
        return
    assert config.peft_type == {"lora-all": "LORA", "dora": "LORA", "lora": "LORA", "ia3": "IA3"}.get(method, "REFT")
    if isinstance(config, ReftConfig):
        assert (config.intervention, config.r, config.positions) == (method, 2, "f1+l2")
        assert (config.layers_to_transform, config.share_weights, config.dropout) == ([0, 2], False, 0.1)
        assert config.init_weights == "pyreft"
    elif method != "ia3":
        assert (config.r, config.use_dora, config.lora_dropout) == (2, method == "dora", 0.1)


# The samples of --quick


SAMPLES = PAPER / "data"


@pytest.mark.parametrize("task", suites.COMMONSENSE_TASKS)
def test_commonsense_samples_have_gold_answers_among_their_options(task):
    kind = "heldout" if task == "hellaswag" else "test"
    rows = rows_of(SAMPLES / "commonsense" / f"{task}.{kind}.jsonl.gz")
    assert len(rows) == 16
    for row in rows:
        options = re.search(r"Answer format: (\S+)$", row["instruction"]).group(1).split("/")
        assert row["answer"] in options
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert Commonsense.correct(Commonsense.extract(Commonsense.prompt(row) + row["output"], ""), row["answer"])


@pytest.mark.parametrize("task", suites.ARITHMETIC_TASKS)
def test_arithmetic_samples_have_gold_answers_of_their_kind(task):
    rows = rows_of(SAMPLES / "arithmetic" / f"{task}.test.jsonl.gz")
    assert len(rows) == 16
    for row in rows:
        gold = row["answer"]
        assert gold in tuple("ABCDE") if task == "AQuA" else math.isfinite(float(gold))
        assert Arithmetic.correct(Arithmetic.extract(response(f"so {gold}"), gold), gold)


def test_training_samples():
    train = rows_of(SAMPLES / "commonsense" / "train.jsonl.gz")
    assert len(train) == 200
    assert set(Counter(row["task"] for row in train)) == {
        "boolq",
        "hellaswag",
        "openbookqa",
        "ARC-Easy",
        "ARC-Challenge",
    }
    train = rows_of(SAMPLES / "arithmetic" / "train.jsonl.gz")
    assert len(train) == 120
    # There the last number of the solution is the answer.
    for row in train:
        text = Arithmetic.prompt(row) + row["output"]
        if suites.is_number(row["answer"]):
            assert Arithmetic.correct(Arithmetic.extract(text, row["answer"]), row["answer"])
    assert len(rows_of(SAMPLES / "instruct" / "train.jsonl.gz")) == 240
    for task in ("sst2", "rte", "stsb"):
        for split, number in (("train", 240), ("validation", 80)):
            rows = rows_of(SAMPLES / "glue" / f"{task}.{split}.jsonl.gz")
            assert len(rows) == number
            assert set(rows[0]) == {*suites.GLUE_TASKS[task].columns, "label"}
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*")) < 300_000


# Runs of tiny models


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def words(number):
    return " ".join(f"w{6 + (number * step) % 50}" for step in (1, 3, 7, 11)[: 2 + number % 3])


@pytest.fixture
def encoder(tmp_path):
    """A tiny encoder and data of four kinds of tasks, in folders."""
    folder = tmp_path / "encoder"
    config = tiny.transformers.BertConfig(**tiny._BERT)
    tiny.build(BertModel, config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    for task in ("sst2", "mrpc", "stsb", "mnli"):
        spec = suites.GLUE_TASKS[task]
        rows = [
            {name: words(number + place) for place, name in enumerate(spec.columns)}
            | {"label": number / 8 if spec.num_labels == 1 else number % spec.num_labels}
            for number in range(40)
        ]
        write_rows(tmp_path / "data" / f"{task}.train.jsonl.gz", rows)
        write_rows(tmp_path / "data" / f"{task}.validation.jsonl.gz", rows[::-1])
    return ["--model", str(folder), "--data", str(tmp_path / "data"), "--per_device_train_batch_size", "8"]


@pytest.fixture
def decoder(tmp_path):
    """A tiny language model and commonsense data, in folders."""
    folder = tmp_path / "decoder"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    rows = [{"instruction": words(number), "answer": f"w{20 + number % 2}"} for number in range(24)]
    write_rows(tmp_path / "data" / "train.jsonl.gz", rows)
    write_rows(tmp_path / "data" / "boolq.test.jsonl.gz", rows[:10])
    write_rows(tmp_path / "data" / "piqa.test.jsonl.gz", rows[10:15])
    return [
        *("--model", str(folder), "--data", str(tmp_path / "data"), "--max_new_tokens", "6"),
        *("--per_device_train_batch_size", "4", "--positions", "f1+l1", "--rank", "2"),
    ]


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    """Simulates the end of the process at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def interrupting(trainer_class, step):
    class InterruptedTrainer(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Interrupt(step)], **kwargs)

    return InterruptedTrainer


def assert_same_run(one, other):
    weights, others = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor)


def losses(results):
    return [entry["loss"] for entry in results["log"] if "loss" in entry]


def test_glue_resumes_as_if_nothing_had_happened(encoder, tmp_path, monkeypatch):
    flags = [*encoder, "--tasks", "sst2", "--num_train_epochs", "3", "--logging_steps", "1"]
    whole = glue.main([*flags, "--output_dir", str(tmp_path / "whole")])["tasks"]["sst2"]
    with monkeypatch.context() as patch:
        patch.setattr(glue, "Trainer", interrupting(glue.Trainer, 8))
        with pytest.raises(Interrupted):
            glue.main([*flags, "--output_dir", str(tmp_path / "parts")])
    # And a checkpoint that was not written to its end.
    unfinished = tmp_path / "parts" / "sst2" / "checkpoint-8"
    shutil.copytree(unfinished.with_name("checkpoint-5"), unfinished)
    (unfinished / "trainer_state.json").unlink()
    parts = glue.main([*flags, "--output_dir", str(tmp_path / "parts")])["tasks"]["sst2"]
    assert parts["resumed"]
    assert not whole["resumed"]
    assert_same_run(tmp_path / "whole" / "sst2" / "adapter", tmp_path / "parts" / "sst2" / "adapter")
    assert losses(parts) == pytest.approx(losses(whole))
    assert parts["scores"] == whole["scores"]
    assert parts["picking_scores"]["score"] == max(
        entry["eval_score"] for entry in parts["log"] if "eval_score" in entry
    )

    again = glue.main([*flags, "--output_dir", str(tmp_path / "whole"), "--eval-only"])["tasks"]["sst2"]
    assert again["scores"] == whole["scores"]
    assert again["trainable_parameters"] == whole["trainable_parameters"]


def test_generation_resumes_as_if_nothing_had_happened(decoder, tmp_path, monkeypatch):
    flags = [*decoder, "--num_train_epochs", "3", "--logging_steps", "1", "--dev_rows", "4", "--learning_rate", "0.004"]
    whole = commonsense.main([*flags, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(answering, "SFTTrainer", interrupting(answering.SFTTrainer, 8))
        with pytest.raises(Interrupted):
            commonsense.main([*flags, "--output_dir", str(tmp_path / "parts")])
    parts = commonsense.main([*flags, "--output_dir", str(tmp_path / "parts")])
    assert parts["resumed"]
    assert_same_run(tmp_path / "whole" / "adapter", tmp_path / "parts" / "adapter")
    assert losses(parts) == pytest.approx(losses(whole))
    assert parts["tasks"] == whole["tasks"]

    # An evaluation that ended early goes on with the rows that are left.
    file = tmp_path / "parts" / "generations" / "boolq.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 10
    # The last one was not written to its end.
    file.write_text("\n".join(lines[:6])[:-3])
    monkeypatch.setattr(answering, "generate", counting := Counting(answering.generate))
    assert commonsense.main([*flags, "--output_dir", str(tmp_path / "parts")])["tasks"] == whole["tasks"]
    assert counting.prompts == {"boolq": 6, "piqa": 0}
    assert sorted(file.read_text().splitlines()[1:]) == sorted(lines[1:])

    with pytest.raises(
        SystemExit, match=r"holds a run with learning_rate = 0\.004, this one has 0\.01: choose another"
    ):
        commonsense.main([*flags, "--output_dir", str(tmp_path / "parts"), "--learning_rate", "0.01"])


class Counting:
    def __init__(self, function):
        self.function, self.prompts = function, {}

    def __call__(self, model, tokenizer, prompts, batch_size, max_prompt, title, **options):
        self.prompts[title] = len(prompts)
        return self.function(model, tokenizer, prompts, batch_size, max_prompt, title, **options)


def test_generation_in_batches_is_that_of_each_prompt_alone(decoder):
    tokenizer = answering.load_tokenizer(decoder[1])
    model = answering.AutoModelForCausalLM.from_pretrained(decoder[1])
    prompts = [words(number) for number in range(7)]
    texts = dict(suites.generate(model, tokenizer, prompts, 3, 64, "all", max_new_tokens=5))
    for number, prompt in enumerate(prompts):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        assert texts[number] == tokenizer.decode(alone[0], skip_special_tokens=True)
        assert texts[number].startswith(prompt)


def test_generation_ends_with_the_tokenizers_end_as_training_does(decoder):
    """Training makes the model's configuration the tokenizer's; a model that is loaded again has its own."""
    tokenizer = answering.load_tokenizer(decoder[1])
    model = answering.AutoModelForCausalLM.from_pretrained(decoder[1])
    inputs = tokenizer("w9 w10", return_tensors="pt")
    first, second = model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, -2:].tolist()
    assert first != second
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(second)
    texts = dict(suites.generate(model, tokenizer, ["w9 w10"], 1, 64, "one", max_new_tokens=5))
    assert texts[0].split() == ["w9", "w10", *tokenizer.convert_ids_to_tokens([first, second])]


def test_generated_texts_are_kept_whatever_is_in_them(tmp_path):
    """Characters that end lines elsewhere, but not in JSON."""
    head, prompts = {"model": "tiny"}, ["one\u2028two", "three\x85\r\nfour"]
    lines = [{"number": number, "prompt": prompt, "text": f"{prompt}\u2029"} for number, prompt in enumerate(prompts)]
    file = tmp_path / "texts.jsonl"
    assert answering._read_generations(file, head, prompts) == {}
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(answering._json_line(line) for line in lines)
        stream.write('{"number": 1, "pro')
    for _ in range(2):
        assert answering._read_generations(file, head, prompts) == {line["number"]: line["text"] for line in lines}
    file.write_text("")
    assert answering._read_generations(file, head, prompts) == {}


def test_answers_of_another_model_are_not_taken(decoder, tmp_path):
    other = tmp_path / "other"
    tiny.build(tiny.LlamaForCausalLM, tiny.LlamaConfig(**tiny._LLAMA), seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    flags = [*decoder, "--method", "none", "--eval_only", "--output_dir", str(tmp_path / "run")]
    file = tmp_path / "run" / "generations" / "boolq.jsonl"
    commonsense.main(flags)
    texts = file.read_text().splitlines()[1:]
    commonsense.main([*flags, "--model", str(other)])
    assert len(texts) == 10
    assert not set(texts) & set(file.read_text().splitlines()[1:])


RESULTS = {
    *("suite", "preset", "model", "method", "data", "seed", "scores", "tasks", "trainable_parameters"),
    *("head_parameters", "base_parameters", "trainable_percent", "adapter_bytes", "seconds", "processor_seconds"),
    *("peak_memory_mib", "resumed", "machine", "versions", "configuration", "log"),
}


def test_results_of_a_generation_run(decoder, tmp_path):
    results = commonsense.main([*decoder, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")])
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == RESULTS
    # Per layer R and W of [2, hidden] and b of [2].
    assert results["trainable_parameters"] == tiny.LAYERS * (2 * 2 * tiny.HIDDEN + 2)
    assert results["base_parameters"] == sum(parameter.numel() for parameter in tiny.llama().parameters())
    assert results["adapter_bytes"] == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert set(results["tasks"]) == {"boolq", "piqa"}
    scores = [task["score"] for task in results["tasks"].values()]
    assert results["scores"]["average"] == pytest.approx(sum(scores) / 2)
    assert results["tasks"]["boolq"]["rows"] == 10
    assert results["tasks"]["piqa"]["majority"] == 60
    configuration = results["configuration"]
    assert configuration["arguments"]["rank"] == 2
    assert configuration["training_arguments"]["seed"] == results["seed"] == 42
    assert configuration["adapter"]["positions"] == "f1+l1"

    base = commonsense.main([*decoder, "--method", "none", "--output_dir", str(tmp_path / "base")])
    assert (base["trainable_parameters"], base["adapter_bytes"], base["log"]) == (0, 0, [])


@pytest.mark.parametrize("method", ["lora", "full", "none"])
def test_results_of_a_glue_run(encoder, tmp_path, method):
    flags = [*encoder, "--method", method, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    both = glue.main([*flags, "--tasks", "sst2", "stsb"])
    head, hidden = tiny.HIDDEN + 1, tiny.HIDDEN
    model = BertForSequenceClassification.from_pretrained(encoder[1], num_labels=2)
    for task, results in both["tasks"].items():
        assert results == json.loads((tmp_path / "run" / task / "results.json").read_text())
        expected = (RESULTS - {"tasks"}) | {"picking_scores", "rows"}
        assert results.keys() == expected
        assert results["rows"] == {"picking": 20, "scoring": 20}
        assert set(results["scores"]) == {"score", "standard_error", *suites.GLUE_TASKS[task].metrics}
        assert results["head_parameters"] == head * suites.GLUE_TASKS[task].num_labels
    sst2 = both["tasks"]["sst2"]
    everything = sum(parameter.numel() for parameter in model.parameters())
    extra = {"lora": tiny.LAYERS * 2 * 2 * 8 * hidden, "full": everything - 2 * head, "none": 0}[method]
    assert sst2["trainable_parameters"] == 2 * head + extra
    assert sst2["base_parameters"] == everything
    again = glue.main([*flags, "--tasks", "sst2", "--eval_only"])
    assert again["tasks"]["sst2"]["scores"] == sst2["scores"]


def test_glue_trains_all_of_robertas_head(encoder, tmp_path):
    """It has two layers."""
    folder = tmp_path / "roberta"
    config = tiny.transformers.RobertaConfig(**tiny._BERT)
    tiny.build(tiny.transformers.RobertaModel, config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    flags = [*encoder, "--model", str(folder), "--preset", "roberta-base", "--tasks", "sst2"]
    flags += ["--num_train_epochs", "1", "--output_dir"]
    results = glue.main([*flags, str(tmp_path / "run")])["tasks"]["sst2"]
    glue.main([*flags, str(tmp_path / "still"), "--learning_rate", "0"])
    assert results["head_parameters"] == (tiny.HIDDEN + 1) * tiny.HIDDEN + 2 * (tiny.HIDDEN + 1)
    assert results["trainable_parameters"] - results["head_parameters"] == tiny.LAYERS * (2 * tiny.HIDDEN + 1)
    weights, begin = (
        load_file(tmp_path / run / "sst2" / "adapter" / "adapter_model.safetensors") for run in ("run", "still")
    )
    head = {name for name in weights if "classifier" in name}
    assert len(head) == 4
    assert all((weights[name] != begin[name]).any() for name in head)
    assert glue.main([*flags, str(tmp_path / "run"), "--eval_only"])["tasks"]["sst2"]["scores"] == results["scores"]


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_glue_takes_a_decoder_without_a_padding_token(encoder, tmp_path, unknown):
    folder = tmp_path / "decoder"
    tiny.llama(pad_token_id=None).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = None, unknown
    tokenizer.save_pretrained(folder)
    assert glue.load_tokenizer(folder).pad_token == (unknown or "</s>")
    flags = [*encoder, "--model", str(folder), "--tasks", "mrpc", "--num_train_epochs", "1"]
    flags += ["--output_dir", str(tmp_path / "run")]
    results = glue.main(flags)
    assert glue.main([*flags, "--eval_only"])["tasks"]["mrpc"]["scores"] == results["tasks"]["mrpc"]["scores"]


def test_missing_data_are_told_before_training(encoder, decoder, tmp_path, monkeypatch):
    def train(*args):
        raise AssertionError

    monkeypatch.setattr(answering.Run, "train", train)
    flags = [*decoder, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="no test data of hellaswag in "):
        commonsense.main([*flags, "--tasks", "boolq", "hellaswag"])
    with pytest.raises(SystemExit, match="--dev_rows 24 leaves none of 24 rows to train on"):
        commonsense.main([*flags, "--dev_rows", "24"])
    with pytest.raises(SystemExit, match="no train and validation data of any task in "):
        glue.main([*encoder, "--data", str(tmp_path / "decoder")])
    with pytest.raises(SystemExit, match="no train and validation data of cola in "):
        glue.main([*encoder, "--tasks", "sst2", "cola", "--quick"])


def test_glue_takes_pairs_and_three_classes(encoder, tmp_path):
    results = glue.main([*encoder, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")])
    assert set(results["tasks"]) == {"sst2", "mrpc", "stsb", "mnli"}
    assert results["tasks"]["mnli"]["head_parameters"] == 3 * (tiny.HIDDEN + 1)
    scores = [task["scores"]["score"] for task in results["tasks"].values()]
    assert results["scores"]["average"] == pytest.approx(sum(scores) / 4)


def test_rows_without_room_for_an_answer_are_left_out(decoder, tmp_path, capsys):
    flags = [*decoder, "--num_train_epochs", "1", "--max_length", "3", "--output_dir", str(tmp_path / "run")]
    commonsense.main(flags)
    # A third of the prompts each has two, three and four words.
    assert "Left out 16 rows with prompts of 3 tokens and more" in capsys.readouterr().out


def test_instruct_answers_rows_it_did_not_train_on(decoder, tmp_path, monkeypatch):
    rows = [{"instruction": f"{words(number)} w{number + 6}", "output": words(number + 1)} for number in range(24)]
    write_rows(tmp_path / "data" / "train.jsonl.gz", rows)
    trained = []
    pairs = answering.GenerationRun.pairs
    monkeypatch.setattr(answering.GenerationRun, "pairs", lambda run, rows: trained.append(rows) or pairs(run, rows))
    flags = [*decoder, "--num_train_epochs", "1", "--dev_rows", "5", "--output_dir", str(tmp_path / "run")]
    results = instruct.main(flags)
    outputs = json.loads((tmp_path / "run" / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in rows[-5:]]
    assert trained == [rows[:-5], rows[-5:]]
    assert {(row["generator"], row["dataset"]) for row in outputs} == {("decoder-loreft", "kept back")}
    assert results["rows"] == 5

    questions = tmp_path / "alpaca_eval.json"
    questions.write_text(json.dumps([{"instruction": "w9 w10", "output": "other", "dataset": "koala"}]))
    instruct.main([*flags, "--eval_only", "--eval_data", str(questions)])
    (row,) = json.loads((tmp_path / "run" / "model_outputs.json").read_text())
    assert (row["instruction"], row["dataset"]) == ("w9 w10", "koala")
    assert row["output"] != "other"


def test_another_adapter_is_evaluated_and_not_trained(decoder, tmp_path):
    flags = [*decoder, "--num_train_epochs", "1", "--learning_rate", "0.1"]
    trained = commonsense.main([*flags, "--output_dir", str(tmp_path / "run")])
    adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match=r"is for --eval_only"):
        commonsense.main([*flags, *adapter])
    other = commonsense.main([*flags, *adapter, "--eval_only"])
    assert other["trainable_parameters"] == trained["trainable_parameters"]
    texts = [(tmp_path / run / "generations" / "boolq.jsonl").read_text().splitlines()[1:] for run in ("run", "other")]
    assert texts[0] == texts[1]


def test_results_of_another_adapter_are_its_own(decoder, tmp_path):
    flags = [*decoder, "--num_train_epochs", "1"]
    run, lora = tmp_path / "run", tmp_path / "lora"
    commonsense.main([*flags, "--output_dir", str(run)])
    trained = commonsense.main([*flags, "--method", "lora", "--output_dir", str(lora)])
    adapter = ["--eval_only", "--adapter", str(lora / "adapter"), "--output_dir", str(run)]
    results = commonsense.main([*flags, *adapter])
    for name in ("trainable_parameters", "adapter_bytes", "tasks"):
        assert results[name] == trained[name]
    assert results["configuration"]["adapter"]["peft_type"] == "LORA"
    assert (results["log"], results["seconds"]["train"]) == ([], None)


def test_a_run_is_evaluated_as_it_was_trained(decoder, tmp_path):
    flags = [*decoder, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    commonsense.main([*flags, "--learning_rate", "0.01"])
    again = commonsense.main([*flags, "--eval_only"])
    assert again["configuration"]["training_arguments"]["learning_rate"] == 0.01
    for flag, name in (("--rank", "rank = 2"), ("--seed", "seed = 42")):
        with pytest.raises(SystemExit, match=rf"holds a run with {name}, this one has 7: evaluate it with that"):
            commonsense.main([*flags, "--eval_only", flag, "7"])
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "data", other)
    assert commonsense.main([*flags, "--eval_only", "--data", str(other)])["tasks"] == again["tasks"]
    with pytest.raises(SystemExit, match=r"holds a run with data = "):
        commonsense.main([*flags, "--learning_rate", "0.01", "--data", str(other)])


def test_what_has_not_begun_can_be_put_right(decoder, tmp_path):
    flags = [*decoder, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="there is no layer 7"):
        commonsense.main([*flags, "--layers", "7"])
    assert commonsense.main([*flags, "--layers", "2"])["configuration"]["arguments"]["layers"] == [2]


def test_a_checkout_of_llm_adapters_is_read(decoder, tmp_path):
    root = tmp_path / "LLM-Adapters"
    rows = rows_of(tmp_path / "data" / "train.jsonl.gz")
    for name, part in (("ft-training_set/commonsense_170k.json", rows), ("dataset/boolq/test.json", rows[:4])):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(json.dumps(part))
    flags = [*decoder, "--data", str(root), "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    results = commonsense.main(flags)
    assert {task: found["rows"] for task, found in results["tasks"].items()} == {"boolq": 4}
    assert results["log"][-1]["step"] == 24 / 4


# Answers by log-likelihood


@pytest.mark.parametrize("task", choices.CommonsenseChoices.tasks)
def test_commonsense_choices_are_those_of_the_papers_prompt(task):
    suite = choices.CommonsenseChoices
    kind = "heldout" if task == "hellaswag" else "test"
    for row in rows_of(SAMPLES / "commonsense" / f"{task}.{kind}.jsonl.gz"):
        names = re.search(r"Answer format: (\S+)$", row["instruction"]).group(1).split("/")
        answers = suite.choices(row)
        assert len(answers) == len(names)
        assert all(answer in row["instruction"] or task == "boolq" for answer in answers)
        assert suite.prompt(row).count("Please") == 0
        assert not any(answer in suite.prompt(row) for answer in names[1:])
        expected = {"false": "no", "true": "yes"}.get(row["answer"])
        if expected is None:
            expected = re.search(
                rf"{row['answer']}: (.*?)\s*(?:\w+\d: |Answer format)", row["instruction"], re.I | re.S
            )[1]
        assert suite.completion(row) == f" {expected}"


def test_commonsense_questions_are_the_harnesss():
    row = {"task": "ARC-Easy", "answer": "answer2"}
    row["instruction"] = (
        "Please choose the correct answer to the question: Sun or moon?\n\nAnswer1: sun Answer2: the moon\n\n"
        "Answer format: answer1/answer2"
    )
    suite = choices.CommonsenseChoices
    assert suite.prompt(row) == "Question: Sun or moon?\nAnswer:"
    assert suite.choices(row) == ["sun", "the moon"]
    assert (suite.gold(row), suite.completion(row)) == (1, " the moon")
    assert suite.prompt(row | {"task": "openbookqa"}) == "Sun or moon?"
    assert suite.prompt(row | {"task": "social_i_qa"}) == "Q: Sun or moon?\nA:"


def test_label_words():
    rte = choices.QUESTIONS["rte"]
    row = {"sentence1": "It rains. ", "sentence2": "It is wet.", "label": 1}
    assert rte.prompt(row) == "It rains.\nQuestion: It is wet. True or False?\nAnswer:"
    assert (rte.choices(row), rte.gold(row), rte.completion(row)) == (["True", "False"], 1, " False")
    assert choices.QUESTIONS["sst2"].completion({"sentence": "fine", "label": 1}) == " positive"


@pytest.mark.parametrize("positions", [None, "f1+l1", "all"])
def test_log_likelihoods_are_those_of_each_answer_alone(decoder, positions):
    tokenizer = answering.load_tokenizer(decoder[1])
    model = answering.AutoModelForCausalLM.from_pretrained(decoder[1])
    if positions is not None:
        config = ReftConfig(r=2, positions=positions, init_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    prompts = [words(number) for number in range(5)]
    # Of one token, so that answers share a pass, and of several.
    answers = [["w9", "w10"], ["w9 w10 w11", "w7"], ["w6", "w7"], ["w8 w9", "w9 w8"], ["w12"]]
    found = choices.log_likelihoods(model, tokenizer, prompts, answers, 3)
    for prompt, texts, values in zip(prompts, answers, found, strict=True):
        for text, value in zip(texts, values, strict=True):
            start, tokens = (tokenizer(part)["input_ids"] for part in (prompt, f"{prompt} {text}"))
            labels = [-100] * len(start) + tokens[len(start) :]
            loss = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels])).loss.item()
            assert value == pytest.approx(-loss * (len(tokens) - len(start)), rel=1e-4)


def test_accuracy_of_answers_by_hand():
    scores, gold = [[-1.0, -2.0], [-3.0, -2.0], [-1.0, -2.0], [-2.0, -2.5]], [0, 0, 0, 1]
    found = choices.accuracy(scores, gold, [["a", "b"], ["a", "b"], ["a", "b"], ["a", "bb"]])
    # Per character the last row's second answer is likelier.
    assert (found["score"], found["score_normalized"]) == (50, 75)
    assert found["standard_error"] == pytest.approx(25)
    assert found["standard_error_normalized"] == pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)


def test_a_likelihood_run_scores_all_validation_rows(decoder, tmp_path, monkeypatch):
    suite = choices.LabelWords(("sst2",), "{sentence} w6", ("w7", "w8"))
    monkeypatch.setitem(likelihood.QUESTIONS, "sst2", suite)
    rows = [{"sentence": f"w{9 + number % 2} {words(number)}", "label": number % 2} for number in range(48)]
    write_rows(tmp_path / "data" / "sst2.train.jsonl.gz", rows[:40])
    write_rows(tmp_path / "data" / "sst2.validation.jsonl.gz", rows[8:])
    flags = [*decoder, "--num_train_epochs", "20", "--learning_rate", "0.05", "--dev_rows", "8"]
    results = likelihood.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert results.keys() == RESULTS
    task = results["tasks"]["sst2"]
    assert (task["rows"], task["majority"], task["source"]) == (40, 50, "sst2.validation.jsonl.gz")
    # The word that decides is one of those that are edited.
    assert results["scores"]["score"] == task["score"] == task["score_normalized"] > 90
    assert any("eval_loss" in entry for entry in results["log"])
    again = likelihood.main([*flags, "--output_dir", str(tmp_path / "run"), "--eval_only"])
    assert again["tasks"] == results["tasks"]
    none = likelihood.main([*flags, "--output_dir", str(tmp_path / "run"), "--eval_rows", "0"])
    assert (none["scores"], none["log"]) == ({}, results["log"])
    with pytest.raises(SystemExit, match="no test data of rte in "):
        likelihood.main([*flags, "--questions", "rte", "--output_dir", str(tmp_path / "rte")])


def test_glue_scores_all_validation_rows_if_training_rows_pick_the_epoch(encoder, tmp_path):
    flags = [*encoder, "--tasks", "sst2", "--num_train_epochs", "1", "--train_rows", "20", "--dev_rows", "12"]
    results = glue.main([*flags, "--output_dir", str(tmp_path / "run")])["tasks"]["sst2"]
    assert results["rows"] == {"picking": 12, "scoring": 40}
    again = glue.main([*flags, "--output_dir", str(tmp_path / "run"), "--eval_only"])["tasks"]["sst2"]
    assert (again["scores"], again["picking_scores"]) == (results["scores"], results["picking_scores"])
    train, picking, scoring = glue.split_rows(
        argparse.Namespace(data=str(tmp_path / "data"), dev_rows=12, train_rows=20, eval_rows=None), "sst2", 42, True
    )
    assert (len(train), len(picking), len(scoring)) == (20, 12, 40)
    with pytest.raises(SystemExit, match="--dev_rows 40 leaves none of 40 rows"):
        glue.main([*encoder, "--tasks", "sst2", "--dev_rows", "40", "--output_dir", str(tmp_path / "none")])


def test_standard_error_does_not_depend_on_the_order_of_the_rows():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 2)), generator.integers(2, size=50)
    order = generator.permutation(50)
    assert suites.metrics_with_error("sst2", logits[order], labels[order]) == suites.metrics_with_error(
        "sst2", logits, labels
    )


def test_standard_error_of_accuracy_is_the_binomial_one():
    labels = np.arange(400) % 2
    predicted = np.where(np.arange(400) % 5 == 0, 1 - labels, labels)
    metrics = suites.metrics_with_error("rte", one_hot(predicted), labels)
    assert metrics["score"] == 80
    assert metrics["standard_error"] == pytest.approx(100 * (0.8 * 0.2 / 400) ** 0.5, rel=0.1)


# PEFT's own benchmark


COMPARISON = ROOT / "examples" / "method_comparison"
EXPERIMENTS = sorted((COMPARISON / "experiments").glob("*/*"))


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_experiments_load_as_the_benchmark_loads_them(folder):
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, ReftConfig)
    assert (config.positions, config.task_type) == ("all", "CAUSAL_LM")
    method, rank = re.search(r"-(\w+)-rank(\d+)$", folder.name).groups()
    assert config.intervention == {"loreft": "loreft", "direft": "nodireft"}[method]
    assert config.r == int(rank)
    training = json.loads((folder / "training_params.json").read_text())
    assert training == {"optimizer_kwargs": {"lr": 9e-4, "weight_decay": 0.0}}
    # The README's count, of Llama-3.2-3B: 28 layers of 3,072.
    parameters = 28 * (2 * config.r * 3072 + config.r)
    assert f"`reft/{folder.name}` | " in (readme := (COMPARISON / "README.md").read_text())
    assert f"{parameters:,}" in next(line for line in readme.splitlines() if folder.name in line)


def test_experiments_train_on_questions_too():
    """What the benchmark does: labels on every token, which positions at the prompt's end refuse."""
    from peft import PeftConfig

    ids = torch.randint(6, tiny.VOCAB, (2, 9))
    config = PeftConfig.from_pretrained(EXPERIMENTS[0])
    model = get_peft_model(tiny.llama(), config)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    config.positions = "f7+l7"
    with pytest.raises(ValueError, match="positions"):
        get_peft_model(tiny.llama(), config)(input_ids=ids, labels=ids)


def test_readmes_command_runs_their_script_with_reft_known(tmp_path):
    """With a stand-in for the benchmark's `run.py` that loads the configuration it is given, as that does."""
    command = re.search(r"^python -c '(.*)' -v (\S+)$", (COMPARISON / "README.md").read_text(), re.MULTILINE)
    shutil.copytree(COMPARISON / "experiments", tmp_path / "experiments")
    (tmp_path / "helper.py").write_text("from peft import PeftConfig\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom helper import PeftConfig\n"
        "if __name__ == '__main__':\n    print(sys.argv[1:], PeftConfig.from_pretrained(sys.argv[2]).peft_type.value)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", command.group(1), "-v", command.group(2)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"['-v', '{command.group(2)}'] REFT"


# The real models


@pytest.mark.slow
@pytest.mark.parametrize("script", ["glue", "commonsense", "arithmetic", "instruct", "likelihood"])
def test_quick_runs_offline(script, tmp_path):
    command = [sys.executable, PAPER / f"{script}.py", "--quick", "--output_dir", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    if script == "instruct":
        outputs = json.loads((tmp_path / "model_outputs.json").read_text())
        assert len(outputs) == results["rows"] > 0
        assert all(set(row) == {"instruction", "output", "generator", "dataset"} for row in outputs)
    else:
        tasks = {"glue": {"sst2", "rte", "stsb"}, "arithmetic": set(suites.ARITHMETIC_TASKS), "likelihood": {"sst2"}}
        assert set(results["tasks"]) == tasks.get(script, set(suites.COMMONSENSE_TASKS))
        assert 0 <= results["scores"]["score" if script == "likelihood" else "average"] <= 100
    log = results["log"] if script != "glue" else results["tasks"]["sst2"]["log"]
    first, *_, last = [entry["loss"] for entry in log if "loss" in entry]
    assert last < first
