"""Models that see and hear: images and sounds among the tokens, trained by Transformers' Trainer and TRL's SFT."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tiny
import torch
import transformers
from adapters import layers_of
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
    """Two rows, each with an image after its first token; the second is shorter, padded on the right."""
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


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "reft_" in name}


def assert_trained(model, before: dict[str, torch.Tensor]) -> None:
    after = adapter_of(model)
    assert after.keys() == before.keys()
    assert not [name for name in before if torch.equal(after[name], before[name])]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_positions_count_the_places_of_images(name, tmp_path):
    family = FAMILIES[name]
    base = build(family.model_type, family.model)
    config = ReftConfig(r=2, positions="f2+l1", layers_to_transform=[1], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    before, after = watch(base, [f"{family.blocks}.1"])
    batch, fresh = batch_of(family, base.config.image_token_id), adapter_of(model)
    one_step(model, batch, tmp_path)
    changed = (before[f"{family.blocks}.1"] != after[f"{family.blocks}.1"]).any(-1)
    places = 1 + family.image_tokens  # behind the image
    assert [row.nonzero().flatten().tolist() for row in changed] == [[0, 1, places + 1], [0, 1, places]]
    assert_trained(model, fresh)


def test_positions_of_a_text_with_an_image_are_shown(capsys):
    model = get_peft_model(tiny.ZOO["llava"].build(), ReftConfig(r=2, positions="f2+l1", task_type="CAUSAL_LM"))
    tokenizer = tiny.tokenizer()
    show_positions(model, tokenizer, torch.tensor([7, *[tiny.IMAGE_TOKEN] * 3, 8]))
    assert "3 of 5 tokens (0-1, 4)" in capsys.readouterr().out


def tokenizer_with(*words: str) -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer with further special words, the first of which its template writes for an image."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(words)})
    macro = (
        "{% macro words(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    ).replace("IMAGE", words[0])
    tokenizer.chat_template = macro + tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{{ words(message) }}"
    )
    return tokenizer


def processor_of_llava() -> transformers.LlavaProcessor:
    tokenizer, size = tokenizer_with("<image>"), {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=tokenizer.chat_template, **settings)


def processor_of_gemma3() -> transformers.Gemma3Processor:
    tokenizer = tokenizer_with("<begin>", "<image>", "<end>")
    for name, word in {"boi": "<begin>", "image": "<image>", "eoi": "<end>"}.items():
        setattr(tokenizer, f"{name}_token", word)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(word))
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return transformers.Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)


class Qwen2_5VLProcessorOfImages(transformers.Qwen2_5_VLProcessor):
    """Without one of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor_of_qwen2_5_vl() -> transformers.Qwen2_5_VLProcessor:
    tokenizer = tokenizer_with("<image>", "<video>")
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    images = transformers.Qwen2VLImageProcessor(patch_size=8, temporal_patch_size=2, merge_size=2, size=size)
    return Qwen2_5VLProcessorOfImages(images, tokenizer, chat_template=tokenizer.chat_template)


def processor_of_idefics3() -> transformers.Idefics3Processor:
    tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    edge = {"longest_edge": 32}
    try:
        images = transformers.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    except ImportError:
        pytest.skip(f"the image processor of Transformers {transformers.__version__} needs torchvision")
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


PROCESSORS = {
    "llava": processor_of_llava,
    "gemma3": processor_of_gemma3,
    "qwen2.5-vl": processor_of_qwen2_5_vl,
    "idefics3": processor_of_idefics3,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_sft_of_trl_with_images_edits_where_it_was_asked_for(name, tmp_path):
    family, processor = FAMILIES[name], PROCESSORS[name]()
    base = build(family.model_type, family.model)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    base.config.image_token_id = image_token
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    rows = [
        {
            "images": [picture],
            "prompt": [{"role": "user", "content": " ".join(f"w{n}" for n in range(8, 9 + i))}],
            "completion": [{"role": "assistant", "content": "w20 w21"}],
        }
        for i in range(2)
    ]
    block = f"{family.blocks}.1"
    # Four tokens reach into the image, whatever stands around it.
    config = ReftConfig(r=2, positions="f4+l2", layers_to_transform=[1], init_weights=False, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(output_dir=str(tmp_path), max_length=None, **OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=config,
    )
    seen, fresh = [], adapter_of(trainer.model)
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    before, after = watch(base, [block])
    trainer.train()
    ids, labels, mask = (seen[0][key] for key in ("input_ids", "labels", "attention_mask"))
    assert not mask.all()
    changed = (before[block] != after[block]).any(-1)
    for row in range(2):
        places = (ids[row] == image_token).nonzero().flatten().tolist()
        assert len(places) == family.image_tokens
        first, answer = int(mask[row].nonzero()[0]), int((labels[row] != -100).nonzero()[0])
        assert places[0] < first + 4
        edited = [*range(first, first + 4), answer - 2, answer - 1]
        assert changed[row].nonzero().flatten().tolist() == edited
    assert_trained(trainer.model, fresh)


# Models of text with an image behind it.
BEHIND_TEXT = {"vilt": "ViltModel", "visual_bert": "VisualBertModel", "layoutlmv3": "LayoutLMv3Model"}


@torch.no_grad()
@pytest.mark.parametrize("family", BEHIND_TEXT)
def test_places_of_an_image_behind_the_text_are_no_tokens(family):
    base = build(family, BEHIND_TEXT[family])
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if family == "visual_bert":
        seen = torch.randn(2, 3, base.config.visual_embedding_dim)
        batch = {"visual_embeds": seen, "visual_attention_mask": torch.ones(2, 3)}
    if family == "layoutlmv3":
        size = base.config.input_size
        batch = {"pixel_values": torch.randn(2, 3, size, size), "bbox": torch.zeros(2, 6, 4, dtype=torch.long)}
    batch["input_ids"] = torch.randint(10, 60, (2, 6))
    batch["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    for positions, edited in {"f1+l2": [[0, 4, 5], [0, 2, 3]], "all": [[*range(6)], [*range(4)]]}.items():
        model = get_peft_model(base, ReftConfig(r=2, positions=positions, layers_to_transform=0, init_weights=False))
        block = layers_of(model.eval())[0].site_name
        before, after = watch(base, [block])
        model(**batch)
        assert after[block].shape[1] > 6
        changed = (before[block] != after[block]).any(-1)
        assert [row.nonzero().flatten().tolist() for row in changed] == edited
        base = model.unload()


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
