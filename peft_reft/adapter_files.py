"""Checks an adapter's folder before PEFT loads it, and names the file or option that is wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_reft.config import ReftConfig
from peft_reft.tokens.positions import parse

_CHECKED = "_checks_reft_adapters"
# Options that the meaning of the weights depends on; a loaded adapter of the same name must have the same.
_MEANING = ("intervention", "r", "share_weights", "act_fn", "use_bias", "subspaces")


def check_adapters_before_loading() -> None:
    """Have `PeftModel.load_adapter` (and so `from_pretrained`) check ReFT adapters first. Mutates the class, once."""
    if not hasattr(PeftModel.load_adapter, _CHECKED):
        PeftModel.load_adapter = _checking(PeftModel.load_adapter)


def _checking(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_adapter)
    def checked(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if (options := _reft_options(folder)) is not None:
            _check_file(folder)
            _check_same_options(self.peft_config.get(adapter_name), options, adapter_name, folder)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    setattr(checked, _CHECKED, True)
    return checked


def _reft_options(folder: Path) -> dict[str, Any] | None:
    """The stored options of a ReFT adapter in a local folder; None for anything else, which is left to PEFT."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return None
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file that can be read: {error}.") from error
    return options if isinstance(options, dict) and options.get("peft_type") == "REFT" else None


def _check_file(folder: Path) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            raise FileNotFoundError(
                f"{folder} holds no weights of the adapter: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}, but "
                f"{found}."
            )
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is broken: {error}. Copy or download it again; a file of about a "
            "hundred bytes may be a git-lfs pointer."
        ) from error


def _check_same_options(existing: Any, options: Mapping[str, Any], adapter_name: str, folder: Path) -> None:
    """Raise a ValueError if an adapter of this name has other options: PEFT would keep them with the new weights."""
    if not isinstance(existing, ReftConfig):
        return
    stored = {name: options[name] for name in _MEANING if name in options}
    here = {name: getattr(existing, name) for name in stored}
    if "positions" in options and parse(options["positions"]) != parse(existing.positions):
        stored["positions"], here["positions"] = options["positions"], existing.positions
    for name, value in stored.items():
        if value != here[name]:
            raise ValueError(
                f"The adapter {adapter_name!r} exists with {name}={here[name]!r}, but {folder} has {name}={value!r}: "
                "loading would replace its weights and keep its options. Choose another adapter_name, or call "
                f"delete_adapter({adapter_name!r}) first."
            )
