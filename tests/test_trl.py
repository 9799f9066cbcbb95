"""TRL's trainers with a ReftConfig in place of a LoraConfig. Tokens and values are compared with the reference."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from adapters import IDS, generated, logits, lora, reft, trainable
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from reference import gradients
from routes import Pair, assert_same_gradients, pair_with_reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainers import ON_A_CPU
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental import cpo, gkd, gold, online_dpo, orpo, tpo
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import sft_trainer
from trl.trainer.utils import use_adapter

from peft_reft import ReftConfig
from peft_reft.arguments import ReftArguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENIZER = tiny.tokenizer()
# Float32 all along: one order of magnitude above what another order of summation makes.
NOISE = {"rtol": 1e-4, "atol": 1e-5}


# Data: the answer to every prompt is the same, so prompts of any length teach it.

WORDS = ["w8 w9", "w11 w12 w13", "w14", "w15 w16 w17 w18 w19", "w20 w21 w22 w23", "w24 w25"]
ANSWER, OTHER = "w40 w50 w60", "w30 w31"


def user(words: str) -> list[dict]:
    return [{"role": "user", "content": words}]


def assistant(words: str = ANSWER) -> list[dict]:
    return [{"role": "assistant", "content": words}]


TEXT = [{"prompt": f"{words} ", "completion": ANSWER} for words in WORDS]
CHAT = [{"prompt": user(words), "completion": assistant()} for words in WORDS]
TURNS = [{"messages": user(a) + assistant() + user(b) + assistant()} for a, b in zip(WORDS, WORDS[::-1], strict=True)]
PREFERENCES = [{"prompt": user(w), "chosen": assistant(), "rejected": assistant(OTHER)} for w in WORDS]
LABELED = [
    {"prompt": user(w), "completion": assistant(answer), "label": answer == ANSWER}
    for w in WORDS
    for answer in (ANSWER, OTHER)
]
QUESTIONS = [{"prompt": user(w)} for w in WORDS]

FORMATS = {
    "text": (TEXT, {}),
    "chat": (CHAT, {}),
    "completion_only": (CHAT, {"completion_only_loss": True}),
    "assistant_only": (TURNS, {"assistant_only_loss": True}),
    "packing": (CHAT, {"packing": True, "max_length": 24}),
    "packed_turns": (TURNS, {"packing": True, "max_length": 64, "assistant_only_loss": True}),
    "padding_free": (CHAT, {"padding_free": True, "max_length": None}),
}


# Trainers

DEFAULTS = ON_A_CPU | {
    "max_steps": 10,
    "per_device_train_batch_size": 6,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


def build(kind, config_class, rows, folder, config=None, model=None, eval_rows=None, callbacks=None, **settings):
    """A trainer of `kind` for a tiny model; `model` may carry an adapter already."""
    model = tiny.llama() if model is None else model
    if config is None and not isinstance(model, PeftModel):
        config = reft(init_weights=True)
    extra = {
        name: settings.pop(name) for name in ("reward_funcs", "data_collator", "compute_metrics") if name in settings
    }
    return kind(
        model=model,
        args=config_class(output_dir=str(folder), **DEFAULTS | settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=copy.deepcopy(TOKENIZER),
        peft_config=config,
        callbacks=callbacks,
        **extra,
    )


def sft(rows, folder, **settings) -> SFTTrainer:
    return build(SFTTrainer, SFTConfig, rows, folder, **settings)


def dpo(folder, rows=None, **settings) -> DPOTrainer:
    return build(DPOTrainer, DPOConfig, rows or PREFERENCES, folder, **settings)


def history(trainer, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_only_the_adapter_learned(trainer, before: dict[str, torch.Tensor], prefix: str = "reft_") -> None:
    """Every trainable parameter moved, and nothing else in the model by a single bit."""
    learns, after = trainable(trainer.model), state(trainer.model)
    assert learns
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name not in learns), name
    base = tiny.llama().state_dict()
    ours = {name.removeprefix("base_model.model."): tensor for name, tensor in after.items()}
    assert all(prefix in name for name in learns)
    assert all(torch.equal(ours[name], tensor) for name, tensor in base.items() if name in ours)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_gradients(make, *args, **settings) -> dict[str, torch.Tensor]:
    keeper = Gradients()
    trainer = make(*args, callbacks=[keeper], max_steps=1, max_grad_norm=0, **settings)
    trainer.train()
    assert keeper.grads.keys() == trainable(trainer.model)
    return keeper.grads


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, **NOISE, msg=lambda m, n=name: f"{n}: {m}")


# The right tokens


def reference_of(trainer, spec: str, shared: bool = True) -> Pair:
    """The trainer's model, and the reference with the same parameters on the same layers."""
    prefix = "base_model.model."
    sites = [
        n.removeprefix(prefix).removesuffix(".reft") for n, _ in trainer.model.named_modules() if n.endswith(".reft")
    ]
    return pair_with_reference(trainer.model, tiny.llama(), tuple(sites), spec, shared)


def documents(batch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every sequence of a collated batch, without padding and apart from its neighbors."""
    rows = []
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        if "position_ids" in batch:
            begins = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            pieces = [slice(a, b) for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
        else:
            pieces = [batch["attention_mask"][row] == 1]
        rows += [(ids[piece].tolist(), labels[piece].tolist()) for piece in pieces]
    return rows


def log_probs(pair: Pair, ids: list[int], labels: list[int]) -> torch.Tensor:
    """The reference's log-probabilities of the labels that are not -100."""
    roles = "".join("p" if label == -100 else "c" for label in labels)
    table = pair.reference.logits(ids, roles)[:-1].log_softmax(-1)
    return torch.stack([table[i - 1, label] for i, label in enumerate(labels) if label != -100])


@pytest.mark.parametrize("spec", ["f2+l2", "l1", "c2", "prompt", "all"])
@pytest.mark.parametrize("name", FORMATS)
def test_training_edits_what_each_sequence_alone_has_edited(name, spec, tmp_path):
    rows, settings = FORMATS[name]
    trainer = sft(rows, tmp_path, config=reft(positions=spec), **settings)
    pair = reference_of(trainer, spec)
    batch = next(iter(trainer.get_train_dataloader()))
    found = documents(batch)
    assert len(found) == len(rows)
    turns = 2 if name in ("assistant_only", "packed_turns") else 1
    answer = [40, 50, 60, tiny.EOS]
    assert all([i for i in labels if i != -100] == answer * turns for _, labels in found)

    expected = -torch.cat([log_probs(pair, *document) for document in found]).mean()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    torch.testing.assert_close(loss, expected, **NOISE)
    loss.backward()
    assert_same_gradients(pair, gradients(pair.reference, expected), rtol=1e-4)


def test_evaluation_edits_what_training_edits(tmp_path):
    trainer = sft(CHAT, tmp_path, config=reft(), eval_rows=CHAT[:4], per_device_eval_batch_size=4)
    pair = reference_of(trainer, "f2+l2")
    found = documents(next(iter(trainer.get_eval_dataloader())))
    expected = -torch.cat([log_probs(pair, *document) for document in found]).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate(Dataset.from_list(CHAT[:4]))["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("positions", ["f2+l2", "c1"])
def test_data_without_a_prompt_is_refused(positions, tmp_path):
    trainer = sft([{"text": f"{w} {ANSWER}"} for w in WORDS], tmp_path, config=reft(positions=positions))
    with pytest.raises(ValueError, match=r"no prompt.*completion data.*assistant_only_loss.*'all'"):
        trainer.train()


def test_data_without_a_prompt_trains_an_edit_of_every_token(tmp_path):
    rows = [{"text": f"{w} {ANSWER}"} for w in WORDS]
    trainer = sft(rows, tmp_path, config=reft(positions="all", init_weights=True))
    before = state(trainer.model)
    trainer.train()
    assert history(trainer)[-1] < 0.7 * history(trainer)[0]
    assert_only_the_adapter_learned(trainer, before)


# SFTTrainer learns

WAYS = FORMATS | {
    "dft": (CHAT, {"loss_type": "dft"}),
    "accumulation": (CHAT, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    "checkpointing": (CHAT, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", WAYS)
def test_sft_learns_with_the_adapter_alone(name, tmp_path):
    rows, settings = WAYS[name]
    trainer = sft(rows, tmp_path, **settings)
    before = state(trainer.model)
    trainer.train()
    losses = history(trainer)
    # DFT weighs by the probability, so that its loss grows before it falls.
    assert losses[-1] < 0.8 * losses[0] or name == "dft"
    accuracies = history(trainer, "mean_token_accuracy")
    assert accuracies[-1] > accuracies[0] + 0.1
    assert_only_the_adapter_learned(trainer, before)


def test_what_sft_teaches_is_what_generate_answers(tmp_path):
    rows = [{"prompt": user(words), "completion": assistant("w40")} for words in WORDS]
    config = reft(positions="l1+c1", r=8, share_weights=False, init_weights=True)
    trainer = sft(rows, tmp_path, config=config, max_steps=100, learning_rate=3e-2)
    trainer.train()
    model = trainer.model.eval()
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.padding_side = "left"
    prompts = [row["prompt"] for row in rows]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    batch = tokenizer.apply_chat_template(prompts, **options)

    def answers():
        new = model.generate(**batch, max_new_tokens=2, do_sample=False)[:, -2:]
        return [TOKENIZER.decode(row) for row in new]

    assert answers() == ["w40 </s>"] * len(rows)
    with model.disable_adapter():
        assert "w40 </s>" not in answers()


@pytest.mark.parametrize("make", [lambda *a, **s: sft(CHAT, *a, **s), dpo], ids=["sft", "dpo"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize(
    "settings",
    # Hooks inside a block run again in the backward pass, which in DPO comes after the reference's forward pass.
    [{"positions": "f1+c2", "share_weights": False}, {"positions": "all"}, {"target_modules": ["mlp"]}],
    ids=["f1+c2", "all", "mlp"],
)
def test_gradient_checkpointing_gives_the_same_gradients(make, reentrant, settings, tmp_path):
    def grads(**arguments):
        torch.manual_seed(5)
        return first_gradients(make, tmp_path, config=reft(**settings), **arguments)

    checkpointed = grads(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(checkpointed, grads())


@pytest.mark.parametrize("name", ["accumulation", "padding_free", "packing"])
def test_the_ways_of_batching_give_the_same_gradients(name, tmp_path):
    rows, settings = WAYS[name]
    # One packed row has room for all sequences: shuffled rows of two would make other batches.
    settings = settings | ({"max_length": 64} if name == "packing" else {})

    def grads(config, **settings):
        torch.manual_seed(5)
        return first_gradients(sft, rows, tmp_path, config=config(), **settings)

    # Transformers before 5.19 divides TRL's loss by the accumulation steps once too often, whatever the adapter is.
    name, with_lora = next(iter(grads(lora).items()))
    scale = (grads(lora, **settings)[name].norm() / with_lora.norm()).item()
    assert_close(grads(reft, **settings), {n: scale * grad for n, grad in grads(reft).items()})


def _offloading_from_the_cpu(model):
    """TRL's hooks, told that the CPU is an accelerator; they know no CPU otherwise."""
    with mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cpu")):
        return get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False, min_offload_size=1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_activation_offloading_gives_the_same_gradients(device, tmp_path, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device == "cpu":
        monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", _offloading_from_the_cpu)
        monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)

    def grads(**settings):
        torch.manual_seed(5)
        return first_gradients(sft, CHAT, tmp_path, config=reft(), use_cpu=device == "cpu", **settings)

    assert_close(grads(activation_offloading=True), grads())


# Checkpoints


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2, "seed": 1}
    settings |= {"lr_scheduler_type": "linear", "config": reft(init_weights=True, dropout=0.1)}
    whole = sft(CHAT, tmp_path / "whole", **settings)
    whole.train()

    resumed = sft(CHAT, tmp_path / "resumed", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    assert len(history(whole)) == 8
    # Those of the first half come from the checkpoint.
    assert history(resumed) == pytest.approx(history(whole), rel=1e-5)
    assert_close(state(resumed.model), state(whole.model))

    def optimizer(name):
        saved = torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt", weights_only=True)
        assert len(saved["state"]) == len(trainable(whole.model))
        return {f"{n} {key}": value for n, entry in saved["state"].items() for key, value in entry.items()}

    assert_close(optimizer("resumed"), optimizer("whole"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    # Evaluated on another answer than the one that is trained, so the first checkpoint is the best.
    others = [row | {"completion": assistant(OTHER)} for row in CHAT]
    trainer = sft(
        CHAT,
        tmp_path,
        config=reft(positions="all", init_weights=True),
        learning_rate=0.1,
        eval_rows=others,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = history(trainer, "eval_loss")
    best = 2 * (losses.index(min(losses)) + 1)
    assert best < 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    loaded = PeftModel.from_pretrained(tiny.llama(), trainer.state.best_model_checkpoint)
    assert torch.equal(logits(trainer.model.eval()), logits(loaded.eval()))


def test_the_saved_folder_is_an_adapter_that_loads_anywhere(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = SFTTrainer(
        model=str(tmp_path / "base"),
        args=SFTConfig(output_dir=str(tmp_path / "out"), **DEFAULTS | {"save_strategy": "steps", "save_steps": 5}),
        train_dataset=Dataset.from_list(CHAT),
        peft_config=reft(init_weights=True),
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-10"):
        files = {path.name for path in folder.iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
        assert not files & {"model.safetensors", "pytorch_model.bin"}
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))
        assert torch.equal(generated(loaded), generated(trainer.model))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "REFT"
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_saved_model_card_is_that_of_trl_and_tells_how_to_load_the_adapter(tmp_path):
    trainer = sft(CHAT, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        assert card.text.count("import peft_reft") == 1
        assert {"reft", "peft_reft"} <= set(card.data.tags)
    card = ModelCard.load(tmp_path / "README.md")
    assert "trained using [TRL]" in card.text
    assert {"trl", "sft", "reft"} <= set(card.data.tags)
    # TRL writes its card anew when it pushes; saving adds ours again.
    trainer.create_model_card(model_name="name")
    assert "import peft_reft" not in ModelCard.load(tmp_path / "README.md").text
    trainer.save_model()
    assert ModelCard.load(tmp_path / "README.md").text.count("import peft_reft") == 1


def test_sft_quantizes_the_base_model_and_trains_on_it(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = SFTTrainer(
        model=str(tmp_path / "base"),
        args=SFTConfig(output_dir=str(tmp_path / "out"), **DEFAULTS),
        train_dataset=Dataset.from_list(CHAT),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=reft(init_weights=True),
    )
    linear = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    before = state(trainer.model)
    learns = trainable(trainer.model)
    trainer.train()
    assert history(trainer)[-1] < 0.8 * history(trainer)[0]
    for name, tensor in state(trainer.model).items():
        assert torch.equal(tensor, before[name]) == (name not in learns), name


# Passes that TRL makes without labels


def _with_prompt_mask(collate):
    def collator(rows):
        batch = collate(rows)
        return batch | {"prompt_mask": (batch["labels"] == -100) & (batch["attention_mask"] == 1)}

    return collator


def _byte_level():
    """A tokenizer of bytes, the only kind that GOLD takes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "chat_template": TOKENIZER.chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **special)


def _distilling(kind, config_class, rows, folder, tokenizer=TOKENIZER, **settings):
    arguments = config_class(output_dir=str(folder), **DEFAULTS | {"max_steps": 1} | settings)
    return kind(
        model=tiny.llama(vocab_size=len(tokenizer)),
        teacher_model=tiny.llama(vocab_size=len(tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=reft(),
    )


def _by_length(completions, **columns):
    return [float(len(str(completion))) for completion in completions]


CHOSEN = [{"messages": row["prompt"] + row["chosen"]} for row in PREFERENCES]
UNTOLD = {
    "ORPO": lambda folder: build(orpo.ORPOTrainer, orpo.ORPOConfig, PREFERENCES, folder, max_steps=1),
    "CPO": lambda folder: build(cpo.CPOTrainer, cpo.CPOConfig, PREFERENCES, folder, max_steps=1),
    "TPO": lambda folder: build(
        tpo.TPOTrainer, tpo.TPOConfig, [row | {"reference": row["chosen"]} for row in PREFERENCES], folder, max_steps=1
    ),
    "GKD": lambda folder: _distilling(gkd.GKDTrainer, gkd.GKDConfig, CHOSEN, folder),
    "GOLD": lambda folder: _distilling(gold.GOLDTrainer, gold.GOLDConfig, CHOSEN, folder, _byte_level()),
    "Distillation": lambda folder: _distilling(DistillationTrainer, DistillationConfig, QUESTIONS, folder),
    "OnlineDPO": lambda folder: build(
        online_dpo.OnlineDPOTrainer, online_dpo.OnlineDPOConfig, QUESTIONS, folder, max_steps=1, reward_funcs=_by_length
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_trainers_that_tell_no_prompt_are_refused_by_name(name, tmp_path):
    trainer = UNTOLD[name](tmp_path)
    with pytest.raises(ValueError, match=f"{name}Trainer gives the model neither labels nor prompt_mask"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packing_that_cuts_samples_is_refused_by_name(strategy, tmp_path):
    trainer = sft(CHAT, tmp_path, config=reft(), packing=True, packing_strategy=strategy, max_length=16, max_steps=1)
    with pytest.raises(ValueError, match=f"packing_strategy='{strategy}' cuts long samples"):
        trainer.train()


def test_label_smoothing_leaves_out_the_labels_and_is_refused(tmp_path):
    trainer = sft(CHAT, tmp_path, config=reft(), label_smoothing_factor=0.1, max_steps=1)
    with pytest.raises(ValueError, match=r"SFTTrainer gives .* neither labels nor prompt_mask \(label_smoothing"):
        trainer.train()


def test_a_collator_may_hand_over_the_prompt_where_labels_are_left_out(tmp_path):
    def grads(mask, **settings):
        torch.manual_seed(5)
        plain = sft(CHAT, tmp_path).data_collator
        return first_gradients(
            sft, CHAT, tmp_path, config=reft(), data_collator=_with_prompt_mask(plain) if mask else None, **settings
        )

    # Smoothed so little that the gradients are those of the plain loss, in which labels tell the prompt.
    smoothing = {"label_smoothing_factor": 1e-9}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prompt.*", category=UserWarning)
        assert_close(grads(True, **smoothing), grads(False))


# Tokens that a chat template adds


@pytest.mark.parametrize("config", [reft, lora], ids=["reft", "lora"])
def test_tokens_of_a_cloned_chat_template_are_trained_as_with_lora(config, tmp_path):
    source = tiny.tokenizer()
    source.add_tokens(["<turn>"], special_tokens=True)
    source.chat_template = source.chat_template.replace("<user>", "<turn>")
    source.save_pretrained(tmp_path / "template")
    start = {"init_weights": True} if config is reft else {"init_lora_weights": True}
    trainer = sft(CHAT, tmp_path, config=config(**start), chat_template_path=str(tmp_path / "template"))
    new = trainer.processing_class.convert_tokens_to_ids("<turn>")
    assert new in trainer.train_dataset[0]["input_ids"]
    learns = trainable(trainer.model)
    assert any("trainable_tokens" in name for name in learns)
    assert any("lm_head" in name for name in learns)
    embedded = trainer.model.get_input_embeddings()(torch.tensor([new, 8])).detach().clone()
    trainer.train()
    assert history(trainer)[-1] < 0.8 * history(trainer)[0]
    after = trainer.model.get_input_embeddings()(torch.tensor([new, 8]))
    assert not torch.equal(after[0], embedded[0])
    assert torch.equal(after[1], embedded[1])

    trainer.save_model(str(tmp_path / "adapter"))
    base = tiny.llama()
    base.resize_token_embeddings(trainer.model.config.vocab_size)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = IDS.clone().index_fill(1, torch.tensor([0]), new)
    torch.testing.assert_close(logits(loaded, ids), logits(trainer.model.eval(), ids), **NOISE)


# Preferences


def assert_log_probs_of_the_reference(trainer, logps, batch, pair: Pair) -> None:
    """Sums over the completion of each row of a DPO or KTO batch."""
    for row, got in enumerate(logps):
        real = batch["attention_mask"][row] == 1
        labels = batch["input_ids"][row].masked_fill(batch["completion_mask"][row] == 0, -100)
        expected = log_probs(pair, batch["input_ids"][row][real].tolist(), labels[real].tolist()).sum()
        torch.testing.assert_close(got, expected, **NOISE)


@pytest.mark.parametrize("spec", ["f2+l2", "c2"])
def test_dpo_scores_what_each_answer_alone_scores(spec, tmp_path):
    trainer = dpo(tmp_path, config=reft(positions=spec), rows=PREFERENCES[:3])
    batch = next(iter(trainer.get_train_dataloader()))
    pair = reference_of(trainer, spec)
    trainer.ref_model = trainer.model  # scored like any reference, with the adapter on
    with torch.no_grad():
        logps = torch.cat(trainer.compute_ref_log_probs(trainer.model.eval(), batch))
        assert_log_probs_of_the_reference(trainer, logps, batch, pair)
    trainer.ref_model = None
    pair.reference.sites = {}
    with torch.no_grad():
        logps = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        assert_log_probs_of_the_reference(trainer, logps, batch, pair)


@pytest.mark.parametrize("precompute", [False, True], ids=["on-the-fly", "precomputed"])
def test_dpo_with_a_fresh_adapter_learns_against_the_base_model(precompute, tmp_path):
    trainer = dpo(tmp_path, precompute_ref_log_probs=precompute)
    before = state(trainer.model)
    trainer.train()
    assert history(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
    assert history(trainer)[-1] < 0.7 * math.log(2)
    assert history(trainer, "rewards/margins")[-1] > 0.5
    assert history(trainer, "rewards/accuracies")[-1] == 1
    assert_only_the_adapter_learned(trainer, before)


def loaded(folder, config=None):
    """A model with an adapter that was saved and is trained further, and that adapter's outputs."""
    get_peft_model(tiny.llama(), config or reft()).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_a_loaded_adapter_is_its_own_reference(kind, checkpointing, tmp_path):
    model = loaded(tmp_path / "start", reft(positions="f1+c2", share_weights=False))
    start = logits(model.eval())
    settings = {"model": model, "max_steps": 4, "gradient_checkpointing": checkpointing}
    if kind == "dpo":
        trainer = dpo(tmp_path, **settings)
    elif kind == "kto":
        trainer = build(KTOTrainer, KTOConfig, LABELED, tmp_path, **settings)
    else:
        trainer = grpo(tmp_path, beta=0.1, **settings)
    assert set(model.peft_config) == {"default", "ref"}
    assert all(".default." in name for name in trainable(model))
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model.eval()), start)
    before = state(model)
    trainer.train()
    assert not torch.equal(logits(model.eval()), start)
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model.eval()), start)
    assert_only_the_adapter_learned(trainer, before)
    if kind == "dpo":
        assert history(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)


def test_a_run_on_a_loaded_adapter_resumes_as_with_lora(tmp_path):
    """Transformers 5.5 forgets the adapter `default` where a checkpoint has others; newer versions load both."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}

    def resumes(config) -> bool:
        folder = tmp_path / config.__name__
        model = loaded(folder / "start", config())
        whole = dpo(folder / "whole", model=model, **settings)
        whole.train()
        again = PeftModel.from_pretrained(tiny.llama(), folder / "start", is_trainable=True)
        resumed = dpo(folder / "resumed", model=again, **settings)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
        same = history(resumed) == pytest.approx(history(whole), rel=1e-5)
        if same:
            assert_close(state(again), state(model))
        return same

    assert resumes(reft) == resumes(lora)


def test_kto_learns_against_the_base_model(tmp_path):
    trainer = build(KTOTrainer, KTOConfig, LABELED, tmp_path, config=reft(init_weights=True), max_steps=20)
    before = state(trainer.model)
    trainer.train()
    assert history(trainer, "rewards/margins")[-1] > 0.3
    assert history(trainer)[-1] < 0.95 * history(trainer)[0]
    assert_only_the_adapter_learned(trainer, before)


@pytest.mark.parametrize("spec", ["f2+l2", "c2"])
def test_kto_scores_what_each_answer_alone_scores(spec, tmp_path):
    trainer = build(KTOTrainer, KTOConfig, LABELED[:4], tmp_path, config=reft(positions=spec))
    batch = next(iter(trainer.get_train_dataloader()))
    pair = reference_of(trainer, spec)
    trainer.ref_model = trainer.model
    with torch.no_grad():
        logps, _ = trainer.compute_ref_log_probs(trainer.model.eval(), batch)
        assert_log_probs_of_the_reference(trainer, logps, batch, pair)


# Reward models


def classifier() -> LlamaForSequenceClassification:
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = 1
    return tiny.build(LlamaForSequenceClassification, config)


def test_a_reward_model_learns_and_saves_its_head(tmp_path):
    trainer = build(
        RewardTrainer,
        RewardConfig,
        PREFERENCES,
        tmp_path,
        model=classifier(),
        config=reft(init_weights=True, task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    before = state(trainer.model)
    trainer.train()
    assert history(trainer)[-1] < 0.5 * history(trainer)[0]
    assert history(trainer, "accuracy")[-1] == 1
    learns = trainable(trainer.model)
    assert {"score" in name or "reft_" in name for name in learns} == {True}
    assert any("score" in name for name in learns)
    for name, tensor in state(trainer.model).items():
        assert torch.equal(tensor, before[name]) == (name not in learns), name

    trainer.save_model()
    fresh = classifier()
    assert not torch.equal(logits(fresh), logits(trainer.model.eval()))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path).eval()), logits(trainer.model.eval()))


def test_rewards_are_those_of_each_conversation_alone(tmp_path):
    trainer = build(
        RewardTrainer, RewardConfig, PREFERENCES, tmp_path, model=classifier(), config=reft(task_type="SEQ_CLS")
    )
    batch = next(iter(trainer.get_train_dataloader()))
    together = logits(trainer.model.eval(), batch["input_ids"], attention_mask=batch["attention_mask"])
    prefix = "base_model.model."
    pair = pair_with_reference(
        trainer.model, classifier(), tuple(f"model.layers.{i}" for i in range(tiny.LAYERS)), "f2+l2", True, prefix
    )
    for got, ids, mask in zip(together, batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = ids[mask == 1].tolist()
        with torch.no_grad(), pair.reference.editing("p" * len(tokens)) as model:
            expected = model(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(got, expected, **NOISE)


# GRPO


def count_of_one_word(completion_ids, **kwargs) -> list[float]:
    return [float(ids.count(40)) for ids in completion_ids]


def grpo(folder, **settings) -> GRPOTrainer:
    settings = {
        "reward_funcs": count_of_one_word,
        "num_generations": 6,
        "max_completion_length": 6,
        "per_device_train_batch_size": 12,
    } | settings
    return build(GRPOTrainer, GRPOConfig, QUESTIONS, folder, **settings)


def test_grpo_learns_with_its_own_generation(tmp_path):
    trainer = grpo(tmp_path, max_steps=25, learning_rate=3e-2, per_device_train_batch_size=36)
    before = state(trainer.model)
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5
    assert_only_the_adapter_learned(trainer, before)


@pytest.mark.parametrize("spec", ["f2+l2", "prompt", "f1+c2", "completion", "all"])
def test_grpo_trains_on_the_log_probabilities_that_it_generated_with(spec, tmp_path):
    # Two optimizer steps for each batch of completions make TRL compute the log-probabilities it clips with.
    trainer = grpo(tmp_path, config=reft(positions=spec), max_steps=1, num_iterations=2)
    generate, score = trainer.model.generate, trainer._get_per_token_logps_and_entropies
    masks, generated_with, trained_on = [], {}, []

    def recording_generate(**kwargs):
        output = generate(**kwargs, output_logits=True, return_dict_in_generate=True)
        masks.append(kwargs["attention_mask"])
        tokens = kwargs["input_ids"].shape[1]
        new = output.sequences[:, tokens:]
        table = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, new[..., None]).squeeze(-1)
        for ids, mask, answer, logps in zip(kwargs["input_ids"], masks[-1], new, table, strict=True):
            ends = (answer == tiny.EOS).nonzero().flatten().tolist()
            length = ends[0] + 1 if ends else len(answer)
            generated_with[(*ids[mask == 1].tolist(), *answer[:length].tolist())] = logps[:length]
        return output.sequences

    def recording_score(model, ids, mask, *args, **kwargs):
        result = score(model, ids, mask, *args, **kwargs)
        trained_on.extend(zip(ids, mask, result[0].detach(), strict=True))
        return result

    trainer.model.generate = recording_generate
    trainer._get_per_token_logps_and_entropies = recording_score
    trainer.train()

    assert any(mask.min() == 0 for mask in masks), "nothing was padded"
    assert all((mask[:, -1] == 1).all() for mask in masks), "the padding is not on the left"
    assert len(trained_on) == 24  # 12 completions, scored without gradients and in the training step
    for ids, mask, got in trained_on:
        expected = generated_with[tuple(ids[mask == 1].tolist())]
        torch.testing.assert_close(got[: len(expected)], expected, **NOISE)


# Example scripts

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "sft": r"Exact matches with the data's answers: base model \d, with adapter (\d) of 8",
    "dpo": r"Held-out pairs: reward margin (-?[\d.]+) \(base model 0.00\), positive in \d+%",
    "reward": r"Held-out pairs in which the chosen answer scores higher: \d+% before, (\d+)% after",
    "grpo": r"Mean reward on held-out prompts: base model [\d.]+, with adapter ([\d.]+)",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_takes_flags_and_trains_the_model_that_it_is_told(name, tmp_path, monkeypatch, capsys):
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    flags = {"model_name_or_path": tmp_path / "base", "output_dir": tmp_path / "out", "max_steps": 1}
    flags |= {"reft_r": 3, "reft_positions": "f1+l1", "reft_share_weights": False, "reft_layers": 1}
    line = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    monkeypatch.setattr("sys.argv", [name, *line])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(SCRIPTS[name], capsys.readouterr().out)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = {"r": 3, "positions": "f1+l1", "share_weights": False, "layers_to_transform": [1]}
    assert {key: config[key] for key in expected} == expected
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("name", [*SCRIPTS, "quickstart", "steering"])
def test_a_script_says_in_a_line_that_there_is_no_such_model(name, monkeypatch):
    flag = "--model" if name in ("quickstart", "steering") else "--model_name_or_path"
    monkeypatch.setattr("sys.argv", [name, flag, "no/such-model"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert stop.value.code.startswith(f"{flag} no/such-model: ")
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_nothing_that_stands_beside_it(name, tmp_path, monkeypatch):
    copy = Path(shutil.copy(EXAMPLES / f"{name}.py", tmp_path))
    monkeypatch.setitem(sys.modules, "smollm2", None)
    program = runpy.run_path(str(copy), run_name="copied")
    assert program["default_model"]() == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_flags_are_the_options_of_a_config():
    flags = {option.name.removeprefix("reft_") for option in dataclasses.fields(ReftArguments)} - {"layers"}
    assert flags <= {option.name for option in dataclasses.fields(ReftConfig)}
    assert ReftArguments().config() == ReftConfig()
    found = ReftArguments(reft_r=3, reft_layers=[1], reft_use_bias=False).config(task_type="SEQ_CLS")
    assert found == ReftConfig(r=3, layers_to_transform=[1], use_bias=False, task_type="SEQ_CLS")


# What the last line has to say at least.
BAR = {"sft": 4, "dpo": 0.5, "reward": 100, "grpo": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_teaches_the_bundled_model(name, tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--output_dir", tmp_path],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = re.search(SCRIPTS[name], run.stdout.splitlines()[-1])
    assert float(found[1]) >= BAR[name], run.stdout


# vLLM


def test_handing_a_prompt_bounded_adapter_to_vllm_names_the_cause(tmp_path):
    trainer = grpo(tmp_path, config=reft())
    # TRL's own way of handing weights to vLLM, without its engine.
    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model = trainer.model
    sync._dist = SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
    before = state(trainer.model)
    with pytest.raises(ValueError, match=r"cannot be merged.*tokens"):
        list(sync._iter_named_params())
    after = state(trainer.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
