"""Saving: nothing outside the adapter's folder is touched, and a killed process leaves an adapter that loads."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from adapters import lora, reft
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

CARDS_ABOVE = {
    "a card of PEFT's": b"---\nlibrary_name: peft\nlicense: mit  # asked legal\n---\n# My collection\n",
    "no UTF-8": "library_name: peft\nCaf\u00e9".encode("latin-1"),
    "broken YAML": b"---\nlibrary_name: peft\n: [\n---\n",
    "none": None,
}


@pytest.fixture
def opened(monkeypatch):
    """The paths that are opened from here on, by Python."""
    paths = []

    def recorder(file, *args, original=io.open, **kwargs):
        paths.append(Path(os.fsdecode(file)) if not isinstance(file, int) else file)
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", recorder)
    monkeypatch.setattr(io, "open", recorder)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Nothing outside


@pytest.mark.parametrize("above", CARDS_ABOVE)
@pytest.mark.parametrize("save", ["model", "config"])
def test_saving_reads_and_writes_nothing_outside_the_folder(above, save, tmp_path, opened):
    (tmp_path / "neighbor.txt").write_text("not yours")
    if CARDS_ABOVE[above] is not None:
        (tmp_path / "README.md").write_bytes(CARDS_ABOVE[above])
    before = contents(tmp_path)
    saved = reft() if save == "config" else get_peft_model(tiny.llama(), reft())
    opened.clear()
    for _ in range(2):
        saved.save_pretrained(tmp_path / "adapter")
    own = {path for path in opened if tmp_path in path.parents}
    assert own
    assert all((tmp_path / "adapter") in path.parents for path in own)
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith("adapter")} == before


@pytest.mark.parametrize("above", ["a card of PEFT's", "none"])
def test_the_card_above_named_adapters_is_the_one_of_lora(above, tmp_path):
    for name, config in (("reft", reft), ("lora", lora)):
        (tmp_path / name).mkdir()
        if CARDS_ABOVE[above] is not None:
            (tmp_path / name / "README.md").write_bytes(CARDS_ABOVE[above])
        model = get_peft_model(tiny.llama(), config(), adapter_name="chat")
        model.add_adapter("other", config())
        model.save_pretrained(tmp_path / name)
    mine, of_lora = (ModelCard.load(tmp_path / name / "README.md") for name in ("reft", "lora"))
    assert mine.text == of_lora.text
    assert mine.data.to_dict() | {"tags": None} == of_lora.data.to_dict() | {"tags": None}
    assert set(mine.data.tags) == set(of_lora.data.tags) - {"lora"}
    for name in ("chat", "other"):
        assert ModelCard.load(tmp_path / "reft" / name / "README.md").content.count("import peft_reft") == 1


def test_an_old_file_that_is_a_link_is_replaced_not_followed(tmp_path):
    config = reft()
    (tmp_path / "elsewhere.json").write_text("theirs")
    (tmp_path / "elsewhere.md").write_text("theirs")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG_NAME).symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "adapter" / "README.md").symlink_to(tmp_path / "elsewhere.md")
    config.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "elsewhere.json").read_text() == (tmp_path / "elsewhere.md").read_text() == "theirs"
    assert PeftConfig.from_pretrained(tmp_path / "adapter").r == config.r


def test_the_folder_holds_no_more_than_the_files_of_the_adapter(tmp_path):
    model = get_peft_model(tiny.llama(), reft())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    plain = tmp_path.parent / "plain"
    plain.write_text("")
    assert (tmp_path / CONFIG_NAME).stat().st_mode == plain.stat().st_mode


# A card that cannot be read


@pytest.mark.parametrize("card", ["no UTF-8", "broken YAML", "a header that is a list", "a folder"])
def test_a_card_that_cannot_be_read_stays_as_it_is_and_the_adapter_is_saved(card, tmp_path):
    path = tmp_path / "README.md"
    if card == "a folder":
        path.mkdir()
    else:
        path.write_bytes(CARDS_ABOVE.get(card, b"---\n- library_name\n---\n"))
    before = contents(tmp_path)
    config = reft()
    with pytest.warns(UserWarning, match="README.md is no model card that can be read.*import peft_reft"):
        config.save_pretrained(tmp_path)
    assert {name: content for name, content in contents(tmp_path).items() if name != CONFIG_NAME} == before
    assert PeftConfig.from_pretrained(tmp_path).r == config.r


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(FileExistsError, match="adapter"):
        reft().save_pretrained(tmp_path / "adapter")


# Killed in the middle


def is_file_operation(function) -> bool:
    if function.__name__ in ("write", "flush", "close", "__exit__"):
        return isinstance(function.__self__, (io.TextIOWrapper, io.BufferedWriter, io.FileIO))
    return function.__name__ in ("open", "replace", "rename", "mkdir", "rmdir", "unlink", "serialize_file")


def save_and_be_killed(model, folder: Path, step: int) -> None:
    """Save, and kill this process right before (even steps) or after (odd ones) its `step // 2`-th file operation."""
    steps = itertools.count()

    def profile(frame, event, argument):
        if event in ("c_call", "c_return") and is_file_operation(argument) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    model.save_pretrained(folder)
    sys.setprofile(None)


def folders_of_killed_saves(folder: Path, old, new):
    """What is left of `old` when `new` is saved over it and killed: at the first step, the second, ..., never."""
    for step in itertools.count():
        place = folder / str(step)
        old.save_pretrained(place)
        process = multiprocessing.get_context("fork").Process(target=save_and_be_killed, args=(new, place, step))
        process.start()
        process.join()
        yield place
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_wherever_saving_is_killed_weights_and_config_are_whole(tmp_path):
    models = {dropout: get_peft_model(tiny.llama(), reft(dropout=dropout)) for dropout in (0.1, 0.2)}
    weights = {dropout: get_peft_model_state_dict(model) for dropout, model in models.items()}
    left = []
    for place in folders_of_killed_saves(tmp_path, *models.values()):
        found = load_file(place / SAFETENSORS_WEIGHTS_NAME)
        (of_weights,) = (d for d, own in weights.items() if all(torch.equal(found[key], own[key]) for key in own))
        left.append((of_weights, PeftConfig.from_pretrained(place).dropout))
    # PEFT writes the weights before the config; with the same config the mixture is the new adapter.
    assert [state for state, _ in itertools.groupby(left)] == [(0.1, 0.1), (0.2, 0.1), (0.2, 0.2)]


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    reft(dropout=0.1).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dumps", no_space)
    with pytest.raises(OSError, match="No space left"):
        reft(dropout=0.2).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
