"""ReFT and LoRA together: two PeftModels around one base model, whose adapters have different names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from adapters import IDS, NEEDS_ADD_ADAPTER, generated, logits, lora, reft, trainable
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale

LABELS = IDS.index_fill(1, torch.tensor([0, 1, 2]), -100)


def both(base=None, **settings) -> tuple[PeftModel, PeftModel]:
    """The LoRA wrapper, and the ReFT wrapper around the same model."""
    base = tiny.llama() if base is None else base
    inner = get_peft_model(base, lora(), adapter_name="lora")
    outer = get_peft_model(base, reft(**settings), adapter_name="reft")
    inner.set_adapter("lora")
    return inner.eval(), outer.eval()


def load(folder, order=("lora", "reft")) -> PeftModel:
    base = tiny.llama()
    for name in order:
        model = PeftModel.from_pretrained(base, folder / name, adapter_name=name)
    return model


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model, count: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(count):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_one_optimizer_trains_both_and_nothing_else():
    _, model = both()
    before = snapshot(model)
    step(model)
    changed = moved(before, snapshot(model))
    assert changed == {name for name in before if "lora_" in name or "reft_" in name}
    assert changed == trainable(model)
    assert any("lora_" in name for name in changed)
    assert any("reft_" in name for name in changed)


def test_gradients_are_those_of_both_adapters_in_one_graph():
    """LoRA's change of the weights written out in the base model, under the same ReFT adapter."""
    _, model = both()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    inner, merged = both()
    merged.load_state_dict(model.state_dict())
    inner.merge_adapter()
    merged(input_ids=IDS, labels=LABELS).loss.backward()
    theirs = {n: p.grad for n, p in merged.named_parameters() if "reft_" in n}
    assert theirs
    for name, parameter in model.named_parameters():
        if "reft_" in name:
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_each_is_switched_off_alone():
    inner, outer = both()
    together, lora_alone = logits(outer), get_peft_model(tiny.llama(), lora(), adapter_name="lora").eval()
    reft_alone = get_peft_model(tiny.llama(), reft(), adapter_name="reft").eval()
    for alone in (lora_alone, reft_alone):
        state = {name: value for name, value in outer.state_dict().items() if "lora_" in name or "reft_" in name}
        assert len(alone.load_state_dict(state, strict=False).unexpected_keys) < len(state)
    with rescale_adapter_scale(inner, 0.0), outer.rescaled("reft", 1):
        torch.testing.assert_close(logits(outer), logits(reft_alone))
    with outer.rescaled("reft", 0):
        assert torch.equal(logits(outer), logits(lora_alone))
    assert torch.equal(logits(outer), together)
    for alone in (lora_alone, reft_alone):
        assert not torch.allclose(logits(alone), together)
        assert not torch.allclose(logits(alone), logits(tiny.llama()))


@pytest.mark.parametrize("which", [0, 1], ids=["lora", "reft"])
def test_disable_adapter_of_either_gives_the_base_model(which):
    """PEFT disables the adapters of all methods."""
    wrappers = both()
    outer = wrappers[1]
    before, names = logits(outer), trainable(outer)
    with wrappers[which].disable_adapter():
        assert torch.equal(logits(outer), logits(tiny.llama()))
    assert torch.equal(logits(outer), before)
    assert trainable(outer) == names


def test_saved_apart_by_name(tmp_path):
    _, model = both()
    for name, other in (("lora", "reft_"), ("reft", "lora_")):
        assert not any(other in key for key in get_peft_model_state_dict(model, adapter_name=name))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["lora", "reft"]
    want, answer = logits(model), generated(model)
    for order in (("lora", "reft"), ("reft", "lora")):
        assert torch.equal(logits(load(tmp_path, order)), want)
        assert torch.equal(generated(load(tmp_path, order)), answer)


@NEEDS_ADD_ADAPTER
def test_loaded_through_transformers(tmp_path):
    _, model = both()
    model.save_pretrained(tmp_path)
    base = tiny.llama()
    for name in ("lora", "reft"):
        base.load_adapter(str(tmp_path / name), adapter_name=name)
    base.set_adapter(["lora", "reft"])
    assert torch.equal(logits(base), logits(model))


FRESH = """
import sys
import torch
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import peft_reft
from test_with_lora import IDS, load, logits
folder = Path(sys.argv[1])
expected = torch.load(folder / "logits.pt", weights_only=True)
assert torch.equal(logits(load(folder)), expected)
print("equal")
"""


def test_trained_saved_and_loaded_in_a_new_process(tmp_path):
    _, model = both()
    step(model)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), str(here), str(here.parent)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_training_goes_on_after_loading(tmp_path):
    """The same as without an interruption, with an optimizer without state."""

    def descend(model):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    _, model = both()
    descend(model)
    model.save_pretrained(tmp_path)
    base = tiny.llama()
    inner = PeftModel.from_pretrained(base, tmp_path / "lora", adapter_name="lora", is_trainable=True)
    again = PeftModel.from_pretrained(base, tmp_path / "reft", adapter_name="reft", is_trainable=True)
    inner.set_adapter("lora")
    again.eval()
    assert trainable(again) == trainable(model)
    descend(model)
    descend(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", ["block_output", "attention_output"])
def test_lora_is_merged_below_reft(component):
    inner, outer = both(component=component)
    before = logits(outer)
    inner.merge_adapter()
    torch.testing.assert_close(logits(outer), before, rtol=1e-4, atol=1e-4)
    inner.unmerge_adapter()
    inner.merge_and_unload()
    assert not any("lora" in name for name, _ in outer.named_modules())
    torch.testing.assert_close(logits(outer), before, rtol=1e-4, atol=1e-4)
    with outer.disable_adapter():
        assert not torch.allclose(logits(outer), logits(tiny.llama()))


def test_reft_is_taken_off_above_lora(tmp_path):
    inner, outer = both()
    with outer.rescaled("reft", 0):
        want = logits(outer)
    base = outer.unload()
    assert not any("reft" in name for name, _ in base.named_modules())
    assert torch.equal(logits(inner), want)
    inner.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["lora"]
    assert torch.equal(logits(load(tmp_path, ["lora"])), want)
    assert not torch.equal(want, logits(tiny.llama()))


def test_merging_reft_with_lora_beneath_it():
    inner, outer = both(positions="all", target_modules=["down_proj"])
    before = logits(outer)
    outer.merge_adapter()
    torch.testing.assert_close(logits(outer), before, rtol=1e-4, atol=1e-4)
    outer.unmerge_adapter()
    assert torch.equal(logits(outer), before)
    assert inner.active_adapters == ["lora"]


@torch.no_grad()
def test_rows_choose_among_reft_adapters_and_lora_stays_on():
    _, model = both()
    model.add_adapter("other", reft(positions="all", r=2))
    got = model(input_ids=IDS, adapter_names=["other", "__base__"]).logits
    model.set_adapter("other")
    torch.testing.assert_close(got[:1], logits(model, IDS[:1]), rtol=1e-5, atol=1e-5)
    with model.rescaled("other", 0):
        torch.testing.assert_close(got[1:], logits(model, IDS[1:]), rtol=1e-5, atol=1e-5)


def test_one_name_for_both_is_refused():
    base = tiny.llama()
    get_peft_model(base, lora())
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"adapter 'default' of another method \(peft\.tuners\.lora.*adapter_name"):
        get_peft_model(base, reft())
    assert [name for name, _ in base.named_modules()] == names


def test_a_peft_model_as_the_base_is_refused():
    inner = get_peft_model(tiny.llama(), lora())
    with pytest.raises(ValueError, match=r"get_peft_model\(model\.get_base_model\(\)"):
        get_peft_model(inner, reft(), adapter_name="reft")


def test_sft_trainer_trains_and_saves_both(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    _, model = both()
    before = snapshot(model)
    rows = [{"input_ids": ids, "completion_mask": [0] * 4 + [1] * 4} for ids in IDS.tolist()]
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        completion_only_loss=True,
    )
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "both"))
    model.eval()
    changed = moved(before, snapshot(model))
    assert changed == {name for name in before if "lora_" in name or "reft_" in name}
    assert torch.equal(logits(load(tmp_path / "both")), logits(model))


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t4"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2", bos_token="t1")
