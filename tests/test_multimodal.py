"""Models that see and hear: images and sounds among the tokens, trained by Transformers' Trainer and TRL's SFT."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from subjects import build
from test_sites import watch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig
from peft_reft.analysis.show import show_positions


class Family(NamedTuple):
    """A tiny model of a family, how many tokens an image of 32 x 32 is, and the pixels of two images."""

    model_type: str
    model: str
    blocks: str
    image_tokens: int
    pixels: dict[str, tuple[int, ...]]


FAMILIES = {
    "llava": Family(
        "llava", "LlavaForConditionalGeneration", "model.language_model.layers", 16, {"pixel_values": (2, 3, 32, 32)}
    ),
    "gemma3": Family(
        "gemma3", "Gemma3ForConditionalGeneration", "model.language_model.layers", 4, {"pixel_values": (2, 3, 32, 32)}
    ),
    "qwen2.5-vl": Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "model.language_model.layers",
        4,
        {"pixel_values": (32, 384)},
    ),
    "idefics3": Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "model.text_model.layers",
        4,
        {"pixel_values": (2, 1, 3, 32, 32)},
    ),
}
OPTIONS = {"report_to": "none", "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 1}


def batch_of(family: Family, image_token: int) -> dict[str, torch.Tensor]:
    """Two rows, each with an image behind its first token; the second is shorter, padded on the right."""
    image = [image_token] * family.image_tokens
    rows = [[7, *image, 8, 9, 10, 11], [7, *image, 8, 12]]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    # Of the first row two tokens are the answer, of the second one.
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][0, -2:] = batch["input_ids"][0, -2:]
    batch["labels"][1, len(rows[1]) - 1] = 12
    batch |= {name: torch.randn(shape) for name, shape in family.pixels.items()}
    seen = (batch["input_ids"] == image_token).long()
    batch |= {"token_type_ids": seen} if family.model_type == "gemma3" else {}
    if family.model_type == "qwen2_5_vl":
        batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": seen}
    return batch


class Indices(torch.utils.data.Dataset):
    """Two examples that the collator turns into the batch."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


def one_step(model, batch, folder) -> None:
    arguments = TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **OPTIONS)
    Trainer(model, arguments, train_dataset=Indices(), data_collator=lambda examples: dict(batch)).train()


def assert_trained(model) -> None:
    parameters = [p for name, p in model.named_parameters() if "reft_" in name and "bias" in name]
    assert parameters
    assert all(p.any() for p in parameters)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_positions_count_the_places_of_images(name, tmp_path):
    family = FAMILIES[name]
    base = build(family.model_type, family.model)
    config = ReftConfig(r=2, positions="f2+l1", layers_to_transform=[1], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    before, after = watch(base, [f"{family.blocks}.1"])
    batch = batch_of(family, base.config.image_token_id)
    one_step(model, batch, tmp_path)
    changed = (before[f"{family.blocks}.1"] != after[f"{family.blocks}.1"]).any(-1)
    places = 1 + family.image_tokens  # behind the image
    assert [row.nonzero().flatten().tolist() for row in changed] == [[0, 1, places + 1], [0, 1, places]]
    assert_trained(model)


def test_positions_of_a_text_with_an_image_are_shown(capsys):
    model = get_peft_model(tiny.ZOO["llava"].build(), ReftConfig(r=2, positions="f2+l1", task_type="CAUSAL_LM"))
    tokenizer = tiny.tokenizer()
    show_positions(model, tokenizer, torch.tensor([7, *[tiny.IMAGE_TOKEN] * 3, 8]))
    assert "3 of 5 tokens (0-1, 4)" in capsys.readouterr().out


def processor_of_llava() -> transformers.LlavaProcessor:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    template = tokenizer.chat_template.replace("{{ message['content'] }}", "{{ words(message) }}")
    words = (
        "{% macro words(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words + template,
    )


def test_sft_of_trl_with_images_edits_where_it_was_asked_for(tmp_path):
    processor = processor_of_llava()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    settings = tiny.ZOO["llava"].settings
    text = settings["text_config"] | {"vocab_size": len(processor.tokenizer)}
    base = (
        tiny.ZOO["llava"]._replace(settings=settings | {"text_config": text, "image_token_index": image_token}).build()
    )
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    rows = [
        {
            "images": [picture],
            "prompt": [{"role": "user", "content": f"w8 w{9 + i}"}],
            "completion": [{"role": "assistant", "content": "w20 w21"}],
        }
        for i in range(2)
    ]
    block = f"{tiny.ZOO['llava'].blocks}.1"
    config = ReftConfig(r=2, positions="f1+l2", layers_to_transform=[1], init_weights=False, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(output_dir=str(tmp_path), max_length=None, **OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=config,
    )
    seen = []
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    before, after = watch(base, [block])
    trainer.train()
    ids, labels = seen[0]["input_ids"], seen[0]["labels"]
    assert int((ids[0] == image_token).sum()) == 16
    changed = (before[block] != after[block]).any(-1)
    for row in range(2):
        answer = int((labels[row] != -100).nonzero()[0])
        assert changed[row].nonzero().flatten().tolist() == [0, answer - 2, answer - 1]


def test_whisper_is_trained_by_transformers_trainer(tmp_path):
    base = tiny.WHISPER.build()
    encoder, decoder = f"{tiny.WHISPER.encoder}.1", f"{tiny.WHISPER.blocks}.1"
    model = get_peft_model(base, ReftConfig(r=2, positions="f2+c2", layers_to_transform=1, init_weights=False))
    before, after = watch(base, [encoder, decoder])
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(10, tiny.VOCAB, (2, 4))}
    one_step(model, batch, tmp_path)
    for name in (encoder, decoder):
        changed = (before[name] != after[name]).any(-1)
        assert changed[:, :2].all()
        assert not changed[:, 2:].any()


def test_a_speech_encoder_is_trained_by_transformers_trainer(tmp_path):
    base = build("wav2vec2", "Wav2Vec2ForCTC")
    model = get_peft_model(base, ReftConfig(r=2, positions="all", layers_to_transform=1, init_weights=False))
    block = "wav2vec2.encoder.layers.1"
    before, after = watch(base, [block])
    one_step(model, {"input_values": torch.randn(2, 4000), "labels": torch.randint(10, 30, (2, 4))}, tmp_path)
    assert (before[block] != after[block]).any(-1).all()


def test_block_sparse_attention_pads_and_the_tokens_of_the_input_are_edited():
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    config = transformers.BigBirdConfig(**tiny._BERT | sparse)
    base = tiny.build(transformers.BigBirdModel, config)
    model = get_peft_model(base, ReftConfig(r=2, positions="f1+l2", layers_to_transform=0, init_weights=False)).eval()
    ids = torch.randint(10, tiny.VOCAB, (2, 61))
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    before, after = watch(base, ["encoder.layer.0"])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert after["encoder.layer.0"].shape[1] == 64
    changed = (before["encoder.layer.0"] != after["encoder.layer.0"]).any(-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [[0, 59, 60], [0, 48, 49]]
