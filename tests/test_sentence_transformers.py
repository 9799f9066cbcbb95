"""sentence-transformers: a text has one embedding, alone and in any batch, before and after training, as with LoRA."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "sentence_transformers", reason="bash tests/run.sh sentence_transformers makes an environment with it"
)

from adapters import lora, reft
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss

from peft_reft.steering import rescaled

TEXTS = [
    "A cat.",
    "The weather in the mountains was much better than anybody in the valley had expected this week.",
    "Trains are late again",
    "She plays the violin in a small orchestra, and sometimes the piano.",
    "Yes",
]
SPECS = ["f3+l3", "l1", "prompt", "all"]


@pytest.fixture(scope="module")
def folder() -> str:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from minilm import minilm_folder

    return str(minilm_folder())


def adapted(folder: str, config) -> SentenceTransformer:
    model = SentenceTransformer(folder, device="cpu")
    torch.manual_seed(0)
    model.add_adapter(config)
    return model


def config(name: str, **settings):
    common = {"task_type": "FEATURE_EXTRACTION"}
    return reft(**settings | common) if name == "reft" else lora(target_modules=["query", "value"], **common)


def assert_alone_as_in_a_batch(model: SentenceTransformer) -> torch.Tensor:
    together = model.encode(TEXTS, batch_size=len(TEXTS), convert_to_tensor=True)
    for text, embedding in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(model.encode(text, convert_to_tensor=True), embedding, atol=1e-5, rtol=1e-4)
    for batch_size in (1, 2):
        again = model.encode(TEXTS, batch_size=batch_size, convert_to_tensor=True)
        torch.testing.assert_close(again, together, atol=1e-5, rtol=1e-4)
    return together


@pytest.mark.parametrize("spec", SPECS)
def test_a_text_has_the_same_embedding_alone_and_in_a_batch(spec, folder):
    base = SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True)
    model = adapted(folder, config("reft", positions=spec))
    embeddings = assert_alone_as_in_a_batch(model)
    assert (embeddings - base).norm(dim=-1).min() > 0.01
    with rescaled(model, "default", 0):
        torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), base)


def trained(model: SentenceTransformer, tmp_path: Path) -> SentenceTransformer:
    """A few steps towards: every text is like the next one, and unlike the one after that."""
    first = TEXTS * 4
    rows = {"sentence1": first, "sentence2": first[1:] + first[:1], "score": [1.0, 0.0] * (len(first) // 2)}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=5, learning_rate=5e-3, report_to="none", use_cpu=True
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(rows), loss=CosineSimilarityLoss(model)
    )
    trainer.train()
    return model


@pytest.mark.parametrize("name", ["reft", "lora"])
def test_training_changes_the_adapter_alone_and_keeps_one_embedding_a_text(name, folder, tmp_path):
    model = adapted(folder, config(name, positions="f3+l3"))
    marker = "reft_" if name == "reft" else "lora_"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = assert_alone_as_in_a_batch(model)
    trained(model, tmp_path)
    assert (assert_alone_as_in_a_batch(model) - start).norm(dim=-1).min() > 1e-3
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(marker in key for key in changed)


@pytest.mark.parametrize("name", ["reft", "lora"])
def test_a_trained_model_is_saved_and_loaded(name, folder, tmp_path):
    model = adapted(folder, config(name, positions="f3+l3"))
    expected = model.encode(TEXTS, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), expected)


@pytest.mark.parametrize("name", ["reft", "lora"])
def test_a_cross_encoder_scores_a_pair_alone_as_in_a_batch(name, folder):
    pairs = list(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))
    model = CrossEncoder(folder, num_labels=1, device="cpu")
    base = torch.from_numpy(model.predict(pairs))
    torch.manual_seed(0)
    settings = config(name, positions="f3+l3")
    settings.task_type = "SEQ_CLS"
    model.model.add_adapter(settings)
    together = torch.from_numpy(model.predict(pairs, batch_size=5))
    assert not torch.allclose(together, base, atol=1e-3)
    for pair, score in zip(pairs, together, strict=True):
        torch.testing.assert_close(torch.tensor(model.predict([pair])[0]), score, atol=1e-5, rtol=1e-4)
