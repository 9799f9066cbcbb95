"""Reads untrusted files: runs no code from them, and takes no more memory than their size on disk justifies."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_MOST_JSON = 2**24
_DEEPEST_JSON = 32
_LONGEST_KEY = 1000
# The globals in pickles of plain tensors. torch.load with weights_only=True allows more: tensors that are sparse,
# quantized or on the meta device, whose shapes take no space in the file, and buffers of any size.
_PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch [A-Za-z0-9]+Storage"
)


def present(path: Path) -> bool:
    """Whether a path exists, if only as a broken link."""
    return path.exists() or path.is_symlink()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, is larger than 16 MiB, nested deeper than 32 levels, or has a key twice;
            the message names it.
    """
    _check_is_file(path)
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a configuration.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of a JSON object.")
    level: list[Any] = [value]
    for _ in range(_DEEPEST_JSON):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise ValueError(f"{path} is nested deeper than {_DEEPEST_JSON} levels.")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise ValueError(f"the key {key!r} occurs {count} times")
    return dict(pairs)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A dictionary of tensors from a file of safetensors or `torch.save`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds anything but plain tensors; the message names it.
    """
    _check_is_file(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load_archive(path)
    except _Refused as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except Exception as error:  # parsers raise many kinds of errors for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read, it seems broken: {reason}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of a dictionary of tensors.")
    for key, tensor in state.items():
        if not isinstance(key, str) or len(key) > _LONGEST_KEY:
            raise ValueError(f"{path} has a key that is not a string, or longer than {_LONGEST_KEY} characters.")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__} instead of a tensor.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key!r} {list(tensor.shape)} is larger than its data in the file.")
    return {key: tensor.detach() for key, tensor in state.items()}


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'not a file' if present(path) else 'missing'}.")


class _Refused(Exception):
    """Raised for a file that is not broken, but contains something that no file of tensors needs."""


def _load_archive(path: Path) -> Any:
    _check_archive(path)
    # With mmap the tensors are views of the file, so a pickle cannot give them a larger shape.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_archive(path: Path) -> None:
    """Raise `_Refused` for anything that `torch.save` does not write: compression, entries that share bytes, pickles of
    other objects.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise _Refused("it is compressed, or larger inside than outside, which torch.save does not do.")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise _Refused("it has several entries with the same name.")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                _check_pickle(archive.read(entry))


def _check_pickle(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(argument):
            raise _Refused(
                f"its pickle names {argument.replace(' ', '.')}. Plain tensors do not need it; it could run code "
                "(which has not happened), or take more memory than the file."
            )
