"""Several processes through Accelerate, and offloaded layers: the same numbers as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload
from adapters import IDS, generated, layers_of, logits, reft
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "accelerate"
# Another order of summation.
NOISE = {"rtol": 1e-5, "atol": 1e-5}
EVERYWHERE = ("shared", "unshared", "accumulated", "checkpointed", "idle", "norms")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def save_models(folder: Path) -> None:
    for name, tied in (("model", False), ("tied", True)):
        tiny.llama(tie_word_embeddings=tied).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)


def launch(config: str, folder: Path, *cases: str) -> None:
    """Two processes on the CPU, with a configuration that examples/ has for GPUs; computes in float32."""
    flags = ["--config_file", CONFIGS / f"{config}.yaml", "--mixed_precision", "no", "--num_processes", "2"]
    command = ["accelerate.commands.launch", *flags, "--main_process_port", "0", distributed_worker.__file__, folder]
    run = subprocess.run(
        [sys.executable, "-m", *command, *cases],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "returned a view" not in run.stderr


def check(distributed: Path, single: Path, name: str) -> None:
    """A distributed run of a case has the same numbers as a run in one process, and its adapter works anywhere."""
    distributed_worker.train(single, name, 1, use_cpu=True)
    adapter, expected = (load_file(folder / name / "adapter_model.safetensors") for folder in (distributed, single))
    torch.testing.assert_close(adapter, expected, **NOISE, msg=lambda text: f"{name}: {text}")
    base = AutoModelForCausalLM.from_pretrained(single / distributed_worker.CASES[name].model)
    model = PeftModel.from_pretrained(base, distributed / name)
    logs = torch.load(single / name / "0.pt")["logs"]
    for rank in range(2):
        seen = torch.load(distributed / name / f"{rank}.pt")
        torch.testing.assert_close(seen["logs"], logs, **NOISE, msg=lambda text: f"{name}: {text}")
        prompt = seen["prompt"]
        torch.testing.assert_close(seen["logits"], logits(model, prompt), **NOISE)
        new_tokens = seen["generated"].shape[1] - prompt.shape[1]
        alone = model.generate(input_ids=prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        assert seen["generated"].tolist() == alone.tolist(), name


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_process_trains(config, tmp_path):
    distributed, single = tmp_path / "distributed", tmp_path / "single"
    for folder in (distributed, single):
        save_models(folder)
    cases = (*EVERYWHERE, "reentrant")
    launch(config, distributed, *cases, "bf16")
    for name in cases:
        check(distributed, single, name)
    check_bfloat16(distributed, single, config)


def check_bfloat16(distributed: Path, single: Path, config: str) -> None:
    """The shipped configurations' mixed precision rounds as much as in one process; the adapter is in float32."""
    distributed_worker.train(single, "bf16", 1, use_cpu=True)
    folders = {"distributed": distributed / "bf16", "single": single / "bf16", "float32": single / "shared"}
    logs = {name: torch.load(folder / "0.pt")["logs"] for name, folder in folders.items()}
    if config == "ddp":
        torch.testing.assert_close(logs["distributed"], logs["single"], **NOISE)
    else:
        # FSDP2 rounds parameters and logits, too: to eight bits.
        cost = (logs["single"] / logs["float32"] - 1).abs().max().item()
        torch.testing.assert_close(logs["distributed"], logs["float32"], rtol=cost + 2**-7, atol=0)
    adapter = load_file(distributed / "bf16" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_deepspeed_trains_what_one_process_trains(config, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is no requirement; it compiles a part of itself at first use")
    distributed, single = tmp_path / "distributed", tmp_path / "single"
    for folder in (distributed, single):
        save_models(folder)
    launch(config, distributed, *EVERYWHERE)
    for name in EVERYWHERE:
        check(distributed, single, name)


def test_an_edited_block_returns_no_view():
    # As the block itself: FSDP2 puts hooks on what it returns.
    model = get_peft_model(tiny.llama(), reft())
    views = []
    for block in model.base_model.model.model.layers:
        block.register_forward_hook(lambda module, args, output: views.append(output._is_view()))
    model(input_ids=IDS)
    assert views == [False] * tiny.LAYERS


def test_a_weight_that_zero3_has_sharded_tells_its_width():
    model = tiny.llama()
    weight = model.model.norm.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    adapted = get_peft_model(model, reft(target_modules=["model.norm"]))
    assert [layer.out_features for layer in layers_of(adapted)] == [tiny.HIDDEN]


# Offloaded layers


def on_disk(folder: Path):
    """Two of three layers on disk."""
    parts = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "offload"
    )


OFFLOADS = {
    "device_map": on_disk,
    "cpu_offload": lambda folder: cpu_offload(tiny.llama(), torch.device("cpu")),
    "disk_offload": lambda folder: disk_offload(tiny.llama(), folder / "offload", torch.device("cpu")),
}


def gradients(model) -> dict[str, torch.Tensor]:
    labels = IDS.clone()
    labels[:, :4] = -100
    model(input_ids=IDS, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_layers_change_nothing(offload, tmp_path):
    expected = get_peft_model(tiny.llama(), reft())
    weights = get_peft_model_state_dict(expected)
    save_models(tmp_path)
    model = get_peft_model(OFFLOADS[offload](tmp_path), reft())
    assert any(p.is_meta for p in model.parameters())
    set_peft_model_state_dict(model, weights)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(tiny.llama()))
    torch.testing.assert_close(gradients(model), gradients(expected), rtol=0, atol=0)
    assert torch.equal(generated(model), generated(expected))
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), weights, rtol=0, atol=0)


def test_loading_into_a_model_on_disk_takes_two_steps(tmp_path):
    save_models(tmp_path)
    expected = get_peft_model(tiny.llama(), reft())
    folder = tmp_path / "adapter"
    expected.save_pretrained(folder)
    with pytest.raises(NotImplementedError, match="two steps"):
        PeftModel.from_pretrained(on_disk(tmp_path), folder)
    model = get_peft_model(on_disk(tmp_path), PeftConfig.from_pretrained(folder))
    set_peft_model_state_dict(model, load_peft_weights(folder))
    assert torch.equal(logits(model), logits(expected))
