"""Malicious folders: `convert` says which file is wrong, runs no code from it and takes little memory."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_reft.convert import convert
from peft_reft.convert.files import read_json, read_tensors

FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "tiny-llama"
MIB = 2**20
# A process that only imports and reads small files grows by some of these.
MOST_MEMORY = 64 * MIB

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def pyreft(folder: Path) -> Path:
    return shutil.copytree(FIXTURES / "pyreft" / "loreft_shared" / "ckpt", folder / "source")


def adapterhub(folder: Path, kind: str = "noreft_tied") -> Path:
    return shutil.copytree(FIXTURES / "adapterhub" / kind / "adapter", folder / "source")


def first(source: Path) -> Path:
    return min(source.glob("intkey_*.bin"))


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What a conversion imports on its way, once for all processes to come."""
    options = {"base_model": BASE}
    convert(adapterhub(tmp_path_factory.mktemp("a")), tmp_path_factory.mktemp("b"), intervention="noreft", **options)


def attempt(source: Path, connection) -> None:
    options = {"base_model": BASE}
    if (source / "adapter_config.json").is_file():
        options["intervention"] = "noreft"
    else:
        options |= {"positions": "f2+l2", "share_weights": True}
    unit = 1 if sys.platform == "darwin" else 1024
    before, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    try:
        convert(source, source.parent / "target", **options)
    except BaseException as caught:
        error = caught
    grown = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    connection.send((error and (isinstance(error, (ValueError, OSError)), type(error).__name__, str(error)), grown))


def outcome(source: Path) -> tuple | None:
    """The error of a conversion in a new process, None if it succeeds; limits its time and memory."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(source, sender))
    process.start()
    try:
        assert receiver.poll(60), "it hangs"
        error, grown = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert grown < MOST_MEMORY
    assert (error is None) == (source.parent / "target").exists()
    return error


def refused(source: Path, message: str = "", name: str = "") -> None:
    error = outcome(source)
    assert error is not None, "it was converted"
    expected, kind, text = error
    assert expected, (kind, text)
    assert str(source / name if name else source) in text
    assert message in text


# Tensors


TENSORS = {
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "on the meta device": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "whole numbers": lambda t: t.to(torch.int64),
    "bool": lambda t: t.bool(),
    "wide, of one stored number": lambda t: torch.zeros(1).expand(len(t), 2 * 10**7),
    "wide, of one stored row": lambda t: torch.zeros(1, 4).expand(10**7, 4),
    "a scalar": lambda t: torch.tensor(1.0),
    "of no width": lambda t: t[:0],
    "of no rank": lambda t: t[:, :0],
    "of a rank whose Gram matrix takes 20 GB": lambda t: torch.ones(1, 50_000),
    "nan": lambda t: t * torch.nan,
    "inf": lambda t: t / 0,
    "too large for float32": lambda t: t.double() * 1e300,
    "a list": lambda t: t.tolist(),
    "none": lambda t: None,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_odd_tensors_are_refused(kind, tmp_path):
    source = pyreft(tmp_path)
    state = torch.load(first(source))
    torch.save({**state, "rotate_layer": TENSORS[kind](state["rotate_layer"])}, first(source))
    refused(source, name=first(source).name)


@pytest.mark.parametrize(("rank", "width"), [(0, 32), (50_000, 1), (33, 32), (4, 0)])
def test_a_rank_that_does_not_fit_the_width_is_refused(rank, width, tmp_path):
    source = pyreft(tmp_path)
    for path in source.glob("intkey_*.bin"):
        shapes = {"rotate_layer": (width, rank), "weight": (rank, width), "bias": (rank,)}
        torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    refused(source, f"the rank is {rank}")


@pytest.mark.parametrize("key", [7, ("a", "b"), None, "k" * 5000, "model." + ".0.reft_layer.refts." * 10**5])
def test_odd_keys_are_refused(key, tmp_path):
    source = pyreft(tmp_path)
    torch.save({**torch.load(first(source)), key: torch.ones(1)}, first(source))
    refused(source, "has a key that is not a string, or longer", first(source).name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["adapter", "head"])
def test_values_that_are_not_finite_are_refused_in_heads_too(name, value, tmp_path):
    source = adapterhub(tmp_path)
    path = source / f"pytorch_{'model_head' if name == 'head' else 'adapter'}.bin"
    state = torch.load(path)
    state[next(iter(state))].view(-1)[0] = value
    torch.save(state, path)
    refused(source, "not finite", path.name)


# Files of torch.save


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Storage:
    """Pickles as a storage of 16 numbers, of which the file has that many."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(value, Storage) else None


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, {})


CALLS = {
    "an array of a terabyte": lambda: Call(bytearray, 10**12),
    "a storage of a terabyte": lambda: Call(torch.FloatStorage, 10**12),
    "a counter": lambda: Call(itertools.count, 1),
    "a shape that the file does not have": lambda: tensor((10**9, 4), (4, 1)),
    "a shape that overflows": lambda: tensor((2**40, 2**40), (2**40, 1)),
    "a stride that reaches behind the file": lambda: tensor((4, 4), (2**40, 1)),
    "a negative shape": lambda: tensor((-4, 4), (4, 1)),
    "an offset behind the file": lambda: tensor((4, 4), (4, 1), 2**50),
    "overlapping rows": lambda: tensor((10**6, 16), (0, 1)),
}


def archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", b"little")
        made.writestr("archive/data/0", bytes(64))
        made.writestr("archive/version", b"3\n")
    return file.getvalue()


def pickled(value) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("call", CALLS)
def test_pickles_that_ask_for_more_than_the_file_has_are_refused(call, tmp_path):
    source = pyreft(tmp_path)
    first(source).write_bytes(archive(pickled({"rotate_layer": CALLS[call]()})))
    refused(source, name=first(source).name)


def test_these_archives_are_what_torch_reads(tmp_path):
    (tmp_path / "plain.bin").write_bytes(archive(pickled({"a": tensor((4, 4), (4, 1))})))
    assert torch.equal(read_tensors(tmp_path / "plain.bin")["a"], torch.zeros(4, 4))


def bomb(content: bytes) -> bytes:
    """The archive with its entries compressed, and a storage of a quarter of a gigabyte."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as entry:
                for _ in range(256 if name.endswith("data/0") else 0):
                    entry.write(bytes(MIB))
                entry.write(old.read(name))
    return made.getvalue()


def overlapping(content: bytes, rename: bool = False) -> bytes:
    """The archive with a directory that names the entry with the weights 100 times more, maybe under other names."""
    end = content.rindex(b"PK\x05\x06")
    size, begin = struct.unpack("<II", content[end + 12 : end + 20])
    directory = content[begin : begin + size]
    position = directory.index(b"/data/0")
    entry = directory[directory.rindex(b"PK\x01\x02", 0, position) :]
    entry = entry[: entry.index(b"PK\x01\x02", 4)]
    more = b"".join(entry.replace(b"/data/0", b"/%06d" % n) if rename else entry for n in range(100))
    count = 100 + struct.unpack("<H", content[end + 10 : end + 12])[0]
    sizes = struct.pack("<HHII", count, count, size + len(more), begin)
    return content[:begin] + directory + more + content[end : end + 8] + sizes + content[end + 20 :]


def old_format(content: bytes) -> bytes:
    made = io.BytesIO()
    torch.save({"a": torch.ones(4)}, made, _use_new_zipfile_serialization=False)
    return made.getvalue()


ARCHIVES = {
    "compressed to a thousandth": bomb,
    "with one entry under one name": overlapping,
    "with one entry under many names": partial(overlapping, rename=True),
    "the format before PyTorch 1.6": old_format,
    "a pickle alone": lambda content: pickle.dumps({"a": 1}),
    "nothing": lambda content: b"",
    "half of it": lambda content: content[: len(content) // 2],
    "all but the last byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"Not Found",
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("name", ["intkey", "pytorch_model.bin"])
def test_archives_that_torch_save_does_not_write_are_refused(kind, name, tmp_path):
    source = pyreft(tmp_path)
    path = first(source) if name == "intkey" else source / name
    path.write_bytes(ARCHIVES[kind](first(source).read_bytes()))
    refused(source, name=path.name)


@pytest.mark.parametrize("part", [0, 7, 100, 0.5, 0.99])
def test_truncated_safetensors_are_refused(part, tmp_path):
    source = adapterhub(tmp_path, "loreft_suffix_bert")
    path = source / "adapter.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    with pytest.raises(ValueError, match=path.name):
        read_tensors(path)


def test_a_header_of_safetensors_that_promises_more_than_the_file_has_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10], "data_offsets": [0, 4 * 10**10]}}).encode()
    for length in (len(header), 10**15):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(100))
        with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
            read_tensors(tmp_path / "a.safetensors")


# JSON


JSONS = {
    "endless": b'{"a":' * 50_000,
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "as deep as Python can read": b'{"representations": [' + b"[" * 400 + b"]" * 400 + b"]}",
    "a key twice": b'{"a": {"b": 1, "b": 2}}',
    "no UTF-8": '{"a": "\u00e9"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "large": b'{"a": "' + b" " * (17 * MIB) + b'"}',
    "a list": b"[]",
    "null": b"null",
    "zeros": bytes(100),
    "empty": b"",
}


@pytest.mark.parametrize("kind", JSONS)
def test_odd_configurations_are_refused(kind, tmp_path):
    source = pyreft(tmp_path)
    (source / "config.json").write_bytes(JSONS[kind])
    refused(source, name="config.json")


def test_a_file_that_is_large_without_taking_room_on_the_disk_is_refused(tmp_path):
    source = pyreft(tmp_path)
    with (source / "config.json").open("wb") as file:
        file.truncate(2**36)
    refused(source, name="config.json")


# Values of every kind that JSON has, at every place of the configurations.
VALUES = [None, True, False, -1, 0, 1, 10**30, 1e308, float("nan"), "", "x", "../x", [], [[]], [None], {}, {"a": []}]


def places(value, path=()):
    """Paths to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


CONFIGS = {"pyreft": "config.json", "adapter": "adapter_config.json", "head": "head_config.json"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_value_anywhere_in_a_configuration_is_read_or_refused(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    original = json.loads(((pyreft if kind == "pyreft" else adapterhub)(folder) / CONFIGS[kind]).read_text())

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.sampled_from(list(places(original))), st.sampled_from(VALUES))
    def check(place, value):
        source = (pyreft if kind == "pyreft" else adapterhub)(tmp_path_factory.mktemp("changed"))
        config = json.loads((source / CONFIGS[kind]).read_text())
        holder = config
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        (source / CONFIGS[kind]).write_text(json.dumps(config))
        error = outcome(source)
        if error is not None:
            assert error[0], error
            assert str(source) in error[2]

    check()


@pytest.mark.parametrize("labels", [10**9, 2**16 + 1, 0, -1, True, 2.0, "2"])
def test_a_number_of_labels_that_would_fill_the_memory_is_refused(labels, tmp_path):
    source = adapterhub(tmp_path)
    config = json.loads((source / "head_config.json").read_text())
    (source / "head_config.json").write_text(json.dumps(config | {"num_labels": labels}))
    refused(source, "'num_labels' is", "head_config.json")


# Places that are no files


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_dead_link(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def zeros_without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


NO_FILES = [a_folder, a_loop, a_dead_link, os.mkfifo, zeros_without_end]


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["intkey", "config.json", "pytorch_model.bin"])
def test_what_is_no_file_is_refused(name, make, tmp_path):
    source = pyreft(tmp_path)
    path = first(source) if name == "intkey" else source / name
    path.unlink(missing_ok=True)
    make(path)
    refused(source, name=path.name)


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "head_config.json", "pytorch_adapter.bin", "pytorch_model_head.bin"]
)
def test_what_is_no_file_is_refused_in_folders_of_adapters(name, make, tmp_path):
    source = adapterhub(tmp_path)
    (source / name).unlink()
    make(source / name)
    refused(source, name=name)


# Two meanings


def test_two_files_for_one_place_are_refused(tmp_path):
    source = pyreft(tmp_path)
    (source / "config.json").unlink()
    shutil.copy(first(source), source / first(source).name.replace("layer_0", "layer_00"))
    refused(source, "edits the same place as another file")


def test_a_place_named_by_its_number_and_from_the_end_is_refused(tmp_path):
    source = pyreft(tmp_path)
    (source / "config.json").unlink()
    shutil.copy(first(source), source / first(source).name.replace("layer_0", "layer_-4"))
    refused(source)


def test_two_adapters_in_one_file_are_refused(tmp_path):
    source = adapterhub(tmp_path)
    state = torch.load(source / "pytorch_adapter.bin")
    others = {key.replace(".refts.", ".refts.other_"): tensor for key, tensor in state.items()}
    torch.save(state | others, source / "pytorch_adapter.bin")
    refused(source, "has two adapters for one layer", "pytorch_adapter.bin")


# Any bytes


def small(path: Path) -> bytes:
    """The bytes of a file of torch.save, of safetensors or of JSON."""
    tensors = {"rotate_layer": torch.ones(4, 2), "bias": torch.ones(2)}
    if path.suffix == ".json":
        path.write_text(json.dumps({"representations": [[0, "block_output", "pos", 1]], "mode": "parallel"}))
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".json"])
def test_changed_bytes_are_read_or_refused(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    content = small(path)
    position = st.integers(0, len(content) - 1)

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(position, st.binary(min_size=1, max_size=4)), min_size=1, max_size=3), position)
    def check(changes, cut):
        changed = bytearray(content)
        for begin, new in changes:
            changed[begin : begin + len(new)] = new
        path.write_bytes(changed[: None if cut % 2 else cut])
        error, found = None, {}
        try:
            found = read_json(path) if suffix == ".json" else read_tensors(path)
        except (ValueError, OSError) as caught:
            error = caught
        assert error is None or str(path) in str(error)
        assert suffix == ".json" or sum(tensor.nbytes for tensor in found.values()) <= len(content)

    check()


def test_the_folders_of_these_tests_are_converted_unchanged(tmp_path):
    for number, source in enumerate((pyreft, adapterhub)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert outcome(source(folder)) is None
        assert load_file(folder / "target" / "adapter_model.safetensors")
