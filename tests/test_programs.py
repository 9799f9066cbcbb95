"""Programs and helpers around models, with ReFT as with LoRA: pipelines, automatic classes, device maps, a chat."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from adapters import BOTH, IDS, generated, layers_of, logits, lora, reft
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from tiny import ZOO
from transformers import TextIteratorStreamer, pipeline

TEXT = "w6 w7 w8 w9 w10 w11"
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=[reft, lora], ids=["reft", "lora"])
def folder(request, tmp_path) -> Path:
    """An adapter's folder with its tokenizer; the base model is in another folder."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny.llama(), request.param())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "adapter"


def answer(model, text: str = TEXT) -> str:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_pipeline_loads_an_adapters_folder(folder):
    model = PeftModel.from_pretrained(tiny.llama(), folder).eval()
    expected = answer(model)
    assert expected != answer(tiny.llama())
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    assert generate(TEXT, return_full_text=False, **OPTIONS)[0]["generated_text"].strip() == expected.strip()
    around = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), device="cpu")
    assert around(TEXT, return_full_text=False, **OPTIONS)[0]["generated_text"].strip() == expected.strip()


def test_a_pipeline_answers_in_batches_as_it_does_alone(folder):
    texts = [TEXT, "w20 w21", "w30 w31 w32 w33 w34 w35 w36 w37 w38"]
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    generate.tokenizer.padding_side = "left"
    alone = [generate(text, return_full_text=False, **OPTIONS)[0]["generated_text"] for text in texts]
    batch = generate(texts, return_full_text=False, batch_size=3, **OPTIONS)
    assert [outputs[0]["generated_text"] for outputs in batch] == alone


def test_automatic_classes_load_the_base_model_too(folder):
    expected = logits(PeftModel.from_pretrained(tiny.llama(), folder).eval())
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval()), expected)


@BOTH
def test_the_automatic_class_of_a_classifier_has_its_head(config, tmp_path):
    base = ZOO["llama_classifier"].build()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="SEQ_CLS"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


@BOTH
def test_the_automatic_class_without_a_task(config, tmp_path):
    base = ZOO["bert"].build()
    base.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["query"]} if config is lora else {}
    model = get_peft_model(base, config(task_type=None, **settings))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.peft_config["default"].auto_mapping = {
        "base_model_class": "BertModel",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        outputs = [m(input_ids=IDS).last_hidden_state for m in (loaded, model.eval())]
    assert torch.equal(*outputs)


@BOTH
def test_a_device_map_keeps_adapters_with_their_blocks(config, tmp_path):
    model = get_peft_model(tiny.llama(), config()).eval()
    expected, tokens = logits(model), generated(model)
    block = "LlamaDecoderLayer"
    sizes = compute_module_sizes(model)
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": int(0.6 * sizes[""]), "disk": 10**9}, no_split_module_classes=[block]
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == block]
    assert all(sum(key.startswith(name) for key in device_map) <= 1 for name in blocks)
    dispatched = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    torch.testing.assert_close(logits(dispatched), expected)
    assert torch.equal(generated(dispatched), tokens)


@BOTH
def test_a_terminal_chat_streams_what_generate_answers(config):
    model, tokenizer = get_peft_model(tiny.llama(), config()).eval(), tiny.tokenizer()
    messages: list[dict[str, str]] = []
    for said in ("w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15"):
        messages.append({"role": "user", "content": said})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **OPTIONS})
        thread.start()
        streamed = "".join(streamer).strip()
        thread.join()
        whole = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        assert streamed == tokenizer.decode(whole, skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": streamed})


def test_steering_reaches_a_model_inside_a_pipeline(tmp_path):
    from peft_reft.steering import rescaled

    model = get_peft_model(tiny.llama(), reft()).eval()
    generate = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), device="cpu")
    with rescaled(generate.model, "default", 0):
        off = generate(TEXT, return_full_text=False, **OPTIONS)[0]["generated_text"]
    assert off.strip() == answer(tiny.llama()).strip()
    assert layers_of(generate.model)[0].scaling == {"default": 1}
