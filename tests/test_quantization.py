"""Quantized base models: gradients, training, saving and loading, TRL's preparation, the precision of the adapter."""

from __future__ import annotations

import copy
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import tiny
import torch
import transformers
from adapters import IDS, NEEDS_ADD_ADAPTER, layers_of, logits, reft, trainable, without_packing
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.functional import cast_adapter_dtype
from routes import pair_with_reference
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_reft.quantized import allow_packing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Blocks of 64 weights have one scale, and packing takes 32 rows at a time.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
LABELS = IDS.index_fill(1, torch.tensor([0, 1, 2, 3]), -100)


def four_bits(**settings) -> BitsAndBytesConfig:
    defaults = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **defaults | settings)


def eight_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


on_gpu = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
DEVICES = pytest.mark.parametrize("device", ["cpu", on_gpu])
BITS = pytest.mark.parametrize("bits", [four_bits, eight_bits], ids=["nf4", "int8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny.llama(**SIZES).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def load(folder: str, config: BitsAndBytesConfig, device: str = "cpu"):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": device}, dtype=torch.float32
    ).eval()


def quantized_layers(model) -> dict[str, nn.Module]:
    kinds = (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized(model) -> nn.Module:
    """A copy with ordinary linear layers of the same, dequantized weights."""
    twin = copy.deepcopy(model)
    for name, module in quantized_layers(twin).items():
        if isinstance(module, Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            weight = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device=weight.device)
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        twin.set_submodule(name, linear)
    return twin


def adapter_gradients(model) -> torch.Tensor:
    """Gradients of all trainable parameters, one after the other, of a loss on `LABELS`."""
    model.zero_grad()
    device = next(model.parameters()).device
    model(input_ids=IDS.to(device), labels=LABELS.to(device)).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one, other, dim=0).item()


def with_adapter(model, config=reft, seed: int = 7):
    torch.manual_seed(seed)
    return get_peft_model(model, config())


def base_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".reft." not in name}


def train(model, steps: int = 10, lr: float = 2e-2) -> list[float]:
    """The losses of some steps of AdamW."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS.to(device), labels=LABELS.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


# Gradients


@DEVICES
@BITS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_gradients_are_those_through_the_dequantized_weights(folder, bits, device, training):
    base = load(folder, bits(), device)
    twin = with_adapter(dequantized(base)).train(training)
    model = with_adapter(base).train(training)
    assert cosine(adapter_gradients(model), adapter_gradients(twin)) > 0.99


@pytest.fixture
def repacking(monkeypatch):
    """bitsandbytes as on a CPU with AVX512-BF16, with a fake kernel: right values, no gradient."""

    def kernel(A, B, out=None, state=None):
        with torch.no_grad():
            rows, columns = state.shape
            packed = B.view(torch.uint8).reshape(rows // 32, columns // 2, 32)
            # The lower halves of 32 bytes are 16 rows of two columns, the upper halves the other 16.
            codes = torch.cat([packed & 15, packed >> 4], -1).reshape(rows // 32, columns // 2, 32, 2)
            codes = codes.transpose(1, 2).reshape(rows, columns)
            scales = state.absmax.float().T.repeat_interleave(state.blocksize, 1)
            return nn.functional.linear(A, (state.code[codes.int()] * scales).to(A.dtype))

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.autograd._functions.F.gemv_4bit", kernel)


def is_packed(model) -> set[bool]:
    states = [module.weight.quant_state for module in quantized_layers(model).values()]
    return {getattr(state, "packing_format_for_cpu", False) for state in states}


def packs(model) -> set[bool]:
    return {module.support_avx512bf16_for_cpu for module in quantized_layers(model).values()}


def test_without_protection_an_evaluation_spoils_the_gradients(folder, repacking):
    """The bug that the tests below guard against. If this fails, bitsandbytes has fixed it."""
    base = load(folder, four_bits())
    twin, model = with_adapter(dequantized(base)), with_adapter(base)
    expected = adapter_gradients(twin.train())
    allow_packing(model)
    assert cosine(adapter_gradients(model.train()), expected) > 0.99
    with model.disable_adapter():
        right = logits(dequantized(model).eval())
        assert (logits(model.eval()) - right).norm() < 0.05 * right.norm()
    assert is_packed(model) == {True}
    assert cosine(adapter_gradients(model.train()), expected) < 0.9


def test_gradients_stay_right_after_an_evaluation(folder, repacking):
    base = load(folder, four_bits())
    assert packs(base) == {True}
    twin, model = with_adapter(dequantized(base)), with_adapter(base)
    expected = adapter_gradients(twin.train())
    logits(model.eval())
    assert cosine(adapter_gradients(model.train()), expected) > 0.99
    assert cosine(adapter_gradients(model.eval()), expected) > 0.99
    with model.disable_adapter():
        logits(model)
    assert is_packed(model) == {False}


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_base_evaluated_before_it_got_an_adapter_is_unpacked(folder, repacking, double, storage):
    config = four_bits(bnb_4bit_use_double_quant=double, bnb_4bit_quant_storage=storage)
    base, fresh = load(folder, config), load(folder, config)
    twin = with_adapter(dequantized(base))
    before = logits(base)
    assert is_packed(base) == {True}
    with pytest.warns(UserWarning, match="repacked 21 of its 4-bit layers"):
        model = with_adapter(base)
    assert is_packed(model) == {False}
    assert cosine(adapter_gradients(model.train()), adapter_gradients(twin.train())) > 0.99
    with model.eval().disable_adapter():
        # What is lost: eight bits of the scales remain.
        torch.testing.assert_close(logits(model), before, rtol=0.02, atol=0.02)
    for name, module in quantized_layers(fresh).items():
        unpacked = model.base_model.model.get_submodule(name)
        assert torch.equal(unpacked.weight.data.view(torch.uint8), module.weight.data.view(torch.uint8))
        expected = dequantized(nn.ModuleList([module]))[0].weight
        torch.testing.assert_close(dequantized(nn.ModuleList([unpacked]))[0].weight, expected, rtol=2**-8, atol=0)


def test_every_way_to_attach_protects_and_unload_gives_back(folder, repacking, tmp_path):
    model = with_adapter(load(folder, four_bits()))
    model.save_pretrained(tmp_path)
    assert packs(model) == {False}
    assert packs(copy.deepcopy(model)) == {False}
    assert packs(model.unload()) == {True}
    assert packs(PeftModel.from_pretrained(load(folder, four_bits()), tmp_path)) == {False}
    loaded = load(folder, four_bits())
    loaded.load_adapter(str(tmp_path))
    assert packs(loaded) == {False}


@NEEDS_ADD_ADAPTER
def test_add_adapter_protects(folder, repacking):
    model = load(folder, four_bits())
    model.add_adapter(reft())
    assert packs(model) == {False}


def test_unload_leaves_the_choice_of_others_alone(folder, repacking):
    base = load(folder, four_bits())
    own, *others = quantized_layers(base).values()
    own.support_avx512bf16_for_cpu = False
    attributes = [set(vars(module)) for module in base.modules()]
    base = with_adapter(base).unload()
    assert not own.support_avx512bf16_for_cpu
    assert all(module.support_avx512bf16_for_cpu for module in others)
    assert [set(vars(module)) for module in base.modules()] == attributes


# Training, saving, loading


@DEVICES
@BITS
def test_trains_saves_and_loads_into_a_fresh_base(folder, bits, device, tmp_path):
    model = with_adapter(load(folder, bits(), device), lambda: reft(init_weights=True))
    before = base_state(model)
    losses = train(model)
    assert losses[-1] < losses[0] / 2
    after = base_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, bits(), device), tmp_path).eval()
    ids = IDS.to(device)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), logits(without_packing(load(folder, bits(), device)), ids))


@BITS
def test_a_fresh_adapter_leaves_the_quantized_base_as_it_is(folder, bits):
    base = without_packing(load(folder, bits()))
    expected = logits(base)
    model = with_adapter(base, lambda: reft(init_weights=True)).eval()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@DEVICES
@BITS
@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not_reentrant", "no_checkpointing"])
def test_prepare_model_for_kbit_training(folder, bits, device, reentrant):
    plain = with_adapter(prepare_model_for_kbit_training(load(folder, bits(), device), False))
    base = prepare_model_for_kbit_training(
        load(folder, bits(), device), reentrant is not None, {"use_reentrant": reentrant}
    )
    model = with_adapter(base)
    assert model.train().is_gradient_checkpointing == (reentrant is not None)
    expected = adapter_gradients(plain.train())
    torch.testing.assert_close(adapter_gradients(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    losses = train(model)
    assert losses[-1] < losses[0] / 2
    assert all(".reft." in name for name in trainable(model))


# TRL, which casts trainable parameters on a quantized base to bfloat16

ROWS = [{"prompt": f"w{n} w{n + 1} ", "completion": "w40 w50 w60"} for n in range(6, 12)]


def sft_trainer(folder: str, output, bits=four_bits, config=None, **settings) -> SFTTrainer:
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"},
    }
    return SFTTrainer(
        model=folder,
        args=SFTConfig(output_dir=str(output), **defaults | settings),
        train_dataset=Dataset.from_list(ROWS),
        quantization_config=bits(),
        peft_config=config or reft(init_weights=True),
    )


def losses_of(trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def adapter_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@BITS
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_trl_trains_saves_and_loads(folder, bits, checkpointing, tmp_path):
    trainer = sft_trainer(folder, tmp_path, bits, gradient_checkpointing=checkpointing)
    model = trainer.model
    before, start = base_state(model), adapter_state(model)
    assert {p.dtype for p in start.values()} == {torch.bfloat16}
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(value, before[name]) for name, value in base_state(model).items())
    assert all(not torch.equal(p, start[name]) for name, p in adapter_state(model).items())
    trainer.save_model()
    loaded = PeftModel.from_pretrained(load(folder, bits()), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=0, atol=0)


def test_the_edit_is_computed_in_float32_from_bfloat16_parameters(folder, tmp_path):
    bits = partial(four_bits, bnb_4bit_compute_dtype=torch.float32)
    config = reft(target_modules=["model.layers.0", "model.layers.2"])
    model = sft_trainer(folder, tmp_path, bits, config).model.eval()
    pair = pair_with_reference(model, load(folder, bits()), config.target_modules, "f2+l2", shared=True)
    assert {p.dtype for p in pair.parameters().values()} == {torch.bfloat16}
    # An edit that is rounded to bfloat16 on its way would be off by up to 0.4 %.
    expected = torch.stack([pair.reference.logits(ids, "p" * len(ids)) for ids in IDS.tolist()])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_parameters_lose_small_updates_and_cast_adapter_dtype_keeps_them(folder, tmp_path):
    """Entries of W and R are about d ** -0.5, and bfloat16 resolves a 256th of that."""
    small = {"learning_rate": 1e-4, "gradient_checkpointing": False}
    rounded, kept = (sft_trainer(folder, tmp_path, **small) for _ in range(2))
    cast_adapter_dtype(kept.model, "default")
    moved = {}
    for name, trainer in {"rounded": rounded, "kept": kept}.items():
        start = adapter_state(trainer.model)
        trainer.train()
        changes = [(p != start[key]).float().mean() for key, p in adapter_state(trainer.model).items()]
        moved[name] = torch.stack(changes).mean()
    assert {p.dtype for p in adapter_state(kept.model).values()} == {torch.float32}
    assert moved["kept"] == 1
    assert moved["rounded"] < 0.7
    assert losses_of(kept)[-1] < losses_of(rounded)[-1] < losses_of(rounded)[0]
    kept.save_model()
    loaded = PeftModel.from_pretrained(load(folder, four_bits()), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(kept.model.eval()))


def test_a_fresh_adapter_in_bfloat16_is_the_identity_up_to_its_rounding(folder, tmp_path):
    model = sft_trainer(folder, tmp_path).model
    hidden = torch.randn(100, 64)
    for layer in layers_of(model):
        intervention = layer.reft_intervention["default"]
        edit = intervention(hidden)
        subspace = hidden @ intervention.subspace()[0].mT
        assert 0 < edit.norm() < 2**-8 * subspace.norm()


# Other quantizers: a hook needs nothing of the weights.


def torchao_config(kind: str, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(getattr(quantization, kind)(**settings))


def quanto_config(weights: str):
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights=weights)


OTHERS = {
    "torchao_int8": partial(torchao_config, "Int8WeightOnlyConfig"),
    "torchao_float8": partial(torchao_config, "Float8WeightOnlyConfig"),
    "torchao_int4": partial(torchao_config, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto_int8": partial(quanto_config, "int8"),
    "quanto_int4": partial(quanto_config, "int4"),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_other_quantizers(folder, config, tmp_path):
    base, twin = load(folder, config()), tiny.llama(**SIZES)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = base.get_submodule(name).weight.dequantize().float()
    model, twin = with_adapter(base), with_adapter(twin)
    assert cosine(adapter_gradients(model.train()), adapter_gradients(twin.train())) > 0.99
    losses = train(model)
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, config()), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


# The example script

SCRIPT = Path(__file__).parent.parent / "examples" / "qlora_sft.py"
LAST_LINE = r"Exact matches with the data's answers: base model \d, with adapter (\d) of 4"


def test_the_script_trains_a_float32_adapter_on_a_base_in_four_bits(tmp_path, monkeypatch, capsys):
    tiny.llama(max_position_embeddings=512, **SIZES).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    flags = {"model_name_or_path": tmp_path / "base", "output_dir": tmp_path, "max_steps": 1, "save_strategy": "no"}
    line = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    monkeypatch.setattr("sys.argv", ["qlora_sft", *line])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    saved = []
    monkeypatch.setattr(SFTTrainer, "save_model", lambda self: saved.append(self.model))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert re.search(LAST_LINE, capsys.readouterr().out.splitlines()[-1])
    (model,) = saved
    layers = quantized_layers(model)
    assert len(layers) == 21
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in layers.values())
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}


@pytest.mark.slow
def test_the_script_teaches_the_bundled_model(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", tmp_path], capture_output=True, text=True, timeout=1800, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(re.search(LAST_LINE, run.stdout.splitlines()[-1])[1]) >= 3, run.stdout
