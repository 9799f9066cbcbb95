"""The undocumented parts of PEFT, Transformers, TRL and bitsandbytes that the package uses: renames show up here."""

from __future__ import annotations

import inspect
import itertools
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from adapters import IDS, generated, logits, reft
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from trainers import ON_A_CPU
from transformers import GenerationConfig

from peft_reft import ReftConfig, ReftLayer, ReftModel
from peft_reft.quantized import PACKS, forbid_packing

# PEFT


# What ReftModel overrides and PEFT itself calls: after a rename these would silently not be called any more.
CALLED_BY_PEFT = {
    "_prepare_adapter_config",
    "_prepare_model",
    "_check_target_module_exists",
    "_check_target_module_compatiblity",
    "_create_and_replace",
    "_cast_adapter_dtype",
    "_mark_only_adapters_as_trainable",
    "_enable_peft_forward_hooks",
    "_unload_and_optionally_merge",
    "_replace_module",
    "_add_modules_to_save_to_tie",
    "inject_adapter",
    "disable_adapter_layers",
    "set_adapter",
}
PAIRS = [(ReftModel, BaseTuner), (ReftLayer, BaseTunerLayer), (ReftConfig, PeftConfig)]


def overridden(ours: type, base: type) -> list[str]:
    """Names of the functions and properties of a class that override a base class's."""
    kinds = (staticmethod, classmethod, property)
    return [
        name
        for name, value in vars(ours).items()
        if hasattr(base, name) and (inspect.isfunction(value) or isinstance(value, kinds)) and not name.startswith("__")
    ]


OVERRIDDEN = [(ours, base, name) for ours, base in PAIRS for name in overridden(ours, base)]


def parameters(owner: type, name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a method as its caller sees it."""
    value = inspect.getattr_static(owner, name)
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    found = dict(inspect.signature(function).parameters)
    if not isinstance(value, staticmethod):
        found.pop(next(iter(found)))
    return found


@pytest.mark.parametrize("name", sorted(CALLED_BY_PEFT))
def test_what_peft_calls_is_there_and_overridden(name):
    assert hasattr(BaseTuner, name) or name == "_enable_peft_forward_hooks"
    assert name in vars(ReftModel)


def test_nothing_of_peft_is_overridden_by_accident():
    """A new method of PEFT's may have the name of one of ours."""
    steering = [name for name in vars(ReftModel.__mro__[1]) if not name.startswith("__")]
    assert "set_strength" in steering
    assert not [name for name in steering if hasattr(BaseTuner, name)]
    private = {name for name in overridden(ReftModel, BaseTuner) if name.startswith("_")}
    assert private <= CALLED_BY_PEFT | {"_check_merge_allowed"}


@pytest.mark.parametrize(("ours", "base", "name"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_an_override_takes_what_peft_passes(ours, base, name):
    if isinstance(inspect.getattr_static(base, name), property):
        assert isinstance(inspect.getattr_static(ours, name), property)
        return
    mine, theirs = parameters(ours, name), parameters(base, name)
    kinds = {parameter.kind for parameter in mine.values()}
    shared = [parameter for parameter in theirs if parameter in mine]
    assert list(mine)[: len(shared)] == shared or inspect.Parameter.VAR_POSITIONAL in kinds
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        assert shared == list(theirs)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    extra = [parameter for parameter in mine.values() if parameter.name not in theirs]
    assert all(parameter.default is not parameter.empty or parameter.kind in variable for parameter in extra)


def test_peft_calls_each_of_them(monkeypatch):
    called = set()

    def recorder(name, original):
        def record(self, *args, **kwargs):
            # `forward` is called by torch's Module, a context manager's function by contextlib.
            if sys._getframe(1).f_globals["__name__"].startswith(("peft.", "contextlib", "torch.nn.modules.module")):
                called.add(name)
            return original(self, *args, **kwargs)

        return record

    for name in CALLED_BY_PEFT:
        monkeypatch.setattr(ReftModel, name, recorder(name, vars(ReftModel)[name]))

    settings = {"target_modules": ["o_proj", "down_proj"], "positions": "all", "modules_to_save": ["lm_head"]}
    model = get_peft_model(tiny.llama(), reft(**settings)).eval()
    model.add_adapter("other", reft(**settings))
    model.set_adapter("other")
    logits(model, adapter_names=["other", "default"])
    with model.disable_adapter():
        logits(model)
    model.delete_adapter("other")
    model.set_adapter("default")
    model.merge_and_unload()
    tied = reft(modules_to_save=["lm_head"], ensure_weight_tying=True)
    get_peft_model(tiny.llama(tie_word_embeddings=True), tied)
    assert called == CALLED_BY_PEFT


def test_a_layer_has_what_peft_and_transformers_look_for():
    model = get_peft_model(tiny.llama(), reft(modules_to_save=["lm_head"]))
    layer = next(module for module in model.modules() if isinstance(module, ReftLayer))
    plain = BaseTunerLayer()
    for name in ("_disable_adapters", "_active_adapter", "merged_adapters"):
        assert hasattr(plain, name)
        assert name in vars(layer), f"{name} would be shared by all layers"
    assert ReftModel.tuner_layer_cls is ReftLayer
    assert {"prefix", "tuner_layer_cls"} <= set(BaseTuner.__annotations__)
    wrapper = next(module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    assert wrapper._adapters == {"default"}


def test_peft_tells_excluded_modules_apart_by_the_class_that_is_used_here():
    with pytest.raises(ValueError, match="exclude"):
        get_peft_model(tiny.llama(), reft(target_modules=["mlp"], exclude_modules=["mlp"]))


# Transformers


def captured_mask(model, ids: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `generate` without a mask, and the mask that Transformers infers for it."""
    base, masks = model.get_base_model(), []
    infer = type(base)._prepare_attention_mask_for_generation

    def capturing(*args, **kwargs):
        masks.append(infer(base, *args, **kwargs))
        return masks[-1]

    base._prepare_attention_mask_for_generation = capturing
    try:
        found = scores(model, ids, **options)
    finally:
        del base._prepare_attention_mask_for_generation
    (mask,) = masks
    return found, mask


def scores(model, ids: torch.Tensor, **options) -> torch.Tensor:
    options |= {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(input_ids=ids, **options).logits)


PADDED = {
    "left": [[0, 0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 9]],
    "right": [[5, 6, 7, 8, 0, 0, 0], [3, 4, 5, 6, 7, 8, 9]],
    "inside": [[5, 6, 0, 0, 7, 8, 9], [0, 4, 5, 6, 7, 8, 0]],
    "nowhere": [[5, 6, 4, 3, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]],
    "with ends": [[2, 2, 2, 5, 6, 7, 8], [5, 6, 7, 8, 9, 2, 2]],
}
UNSAID = "unsaid"
# The model's own are 0 and 2.
SAID = list(
    itertools.product(("the call", "a config", "the model"), (UNSAID, None, 0, 2), (UNSAID, None, 2, 0, [2, 3], [2, 0]))
)


@pytest.mark.parametrize(("where", "pad", "eos"), SAID)
def test_without_a_mask_the_prompt_is_what_transformers_infers(where, pad, eos):
    model = get_peft_model(tiny.llama(), reft(positions="l2")).eval()
    said = {name: value for name, value in (("pad_token_id", pad), ("eos_token_id", eos)) if value != UNSAID}
    options = {"the call": said, "a config": {"generation_config": GenerationConfig(**said)}, "the model": {}}[where]
    if where == "the model":
        for name, value in said.items():
            setattr(model.get_base_model().generation_config, name, value)
    for ids in map(torch.tensor, PADDED.values()):
        found, mask = captured_mask(model, ids, **options)
        assert torch.equal(found, scores(model, ids, attention_mask=mask, **options))


def test_an_early_exit_draft_is_still_marked_in_its_config():
    """An inner `generate` for the model's own draft is part of the outer one."""
    base, seen = tiny.llama(), []
    model = get_peft_model(base, reft()).eval()
    prepare = type(base)._prepare_generation_config
    base._prepare_generation_config = lambda config, **kwargs: seen.append(config) or prepare(base, config, **kwargs)
    generated(model, IDS[:1], assistant_early_exit=2)
    marks = [getattr(config, "is_assistant", None) for config in seen]
    assert marks[0] is None
    assert any(marks)


def test_names_of_transformers_that_are_looked_for_are_still_its_names():
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    assert PagedAttentionCache.__name__ == "PagedAttentionCache"
    assert "cu_seq_lens_q" in FlashAttentionKwargs.__annotations__
    # Caches are found by what they can do.
    assert all(hasattr(kind, "get_seq_length") for kind in (transformers.Cache, transformers.DynamicCache))
    assert hasattr(transformers.PreTrainedConfig, "get_text_config")
    assert hasattr(transformers.PreTrainedModel, "get_encoder")
    assert hasattr(transformers.GenerationMixin, "can_generate") or hasattr(
        transformers.PreTrainedModel, "can_generate"
    )


def test_mamba_is_still_known_by_the_names_of_its_parts():
    block = next(module for module in tiny.ZOO["mamba"].build().modules() if hasattr(module, "A_log"))
    assert hasattr(block, "conv1d")


def test_transformers_still_makes_the_prefix_from_the_name_of_the_method():
    assert ReftModel.prefix == ReftConfig().peft_type.value.lower() + "_"


# bitsandbytes


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def test_the_flag_that_keeps_four_bit_layers_from_repacking_is_still_asked(bnb):
    """Without it evaluation repacks the weights on a CPU, and later gradients are wrong without an error."""
    assert PACKS in vars(bnb.nn.Linear4bit(64, 64))
    code = inspect.getsource(bnb.nn.Linear4bit.forward)
    assert f"self.{PACKS}" in code
    assert "_convert_weight_packed_for_cpu" in code
    # Nothing else packs.
    package = Path(bnb.__file__).parent
    callers = [path.name for path in package.rglob("*.py") if "_convert_weight_packed_for_cpu(" in path.read_text()]
    assert sorted(callers) == ["functional.py", "modules.py"]


def test_packed_weights_are_still_known_by_their_flag_and_can_be_unpacked(bnb):
    layer = four_bits(bnb)
    weight = layer.weight.data.clone()
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    assert layer.weight.quant_state.packing_format_for_cpu is True
    setattr(layer, PACKS, True)
    with pytest.warns(UserWarning, match="repacked 1 of its 4-bit layers"):
        forbid_packing(layer)
    assert torch.equal(layer.weight.data, weight)
    assert getattr(layer, PACKS) is False


def four_bits(bnb):
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    return layer


def test_quantized_weights_still_have_what_merging_reads_and_writes(bnb):
    layer = four_bits(bnb)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "quant_state"):
        assert hasattr(layer.weight, name)
    assert {"blocksize", "compress_statistics", "quant_type", "quant_storage", "module"} <= set(
        inspect.signature(bnb.nn.Params4bit.__new__).parameters
    )
    again = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert again.shape == (64, 64)

    weight, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(8, 8))
    int8 = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
    assert torch.equal(int8.SCB, scales)
    assert hasattr(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False).state, "SCB")
    assert bnb.functional.int8_vectorwise_dequant(weight, scales).shape == (8, 8)


# TRL

WORDS = ["w8 w9", "w11 w12 w13", "w14", "w15 w16 w17"]
PROMPTS = [[{"role": "user", "content": words}] for words in WORDS]
ANSWER, OTHER = ([{"role": "assistant", "content": words}] for words in ("w40 w50 w60", "w30 w31"))
ROWS = {
    "SFT": [{"prompt": prompt, "completion": ANSWER} for prompt in PROMPTS],
    "DPO": [{"prompt": prompt, "chosen": ANSWER, "rejected": OTHER} for prompt in PROMPTS],
    "KTO": [{"prompt": prompt, "completion": ANSWER, "label": i % 2 == 0} for i, prompt in enumerate(PROMPTS)],
    "GRPO": [{"prompt": prompt} for prompt in PROMPTS],
}
TRAINING = ON_A_CPU | {"max_steps": 1, "per_device_train_batch_size": 4}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ROWS)
def test_trl_still_tells_the_model_where_the_prompt_ends(name, tmp_path):
    """By labels of -100 on it. Without them an adapter would be trained on other tokens than it is used on."""
    trl = pytest.importorskip("trl")
    base, calls = tiny.llama(), []

    def record(module, args, kwargs):
        if torch.is_grad_enabled() and module.training:
            calls.append(kwargs)

    base.register_forward_pre_hook(record, with_kwargs=True)
    extra = {"reward_funcs": lambda completion_ids, **kwargs: list(map(float, range(len(completion_ids))))}
    settings = {"num_generations": 4, "max_completion_length": 4} if name == "GRPO" else {}
    trainer = getattr(trl, f"{name}Trainer")(
        model=base,
        args=getattr(trl, f"{name}Config")(output_dir=str(tmp_path), **TRAINING | settings),
        train_dataset=Dataset.from_list(ROWS[name]),
        processing_class=tiny.tokenizer(),
        peft_config=reft(),
        **extra if name == "GRPO" else {},
    )
    trainer.train()
    assert calls
    for call in calls:
        labels, ids = call["labels"], call["input_ids"]
        assert labels.shape == ids.shape
        supervised = labels != -100
        assert torch.equal(labels[supervised], ids[supervised])
        for row, chosen in zip(ids.tolist(), supervised.tolist(), strict=True):
            # The prompt ends with the marker of the assistant's turn.
            begin = row.index(4) + 1
            assert not any(chosen[:begin])
            assert chosen[begin]
