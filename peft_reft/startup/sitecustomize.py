"""Registers ReFT in the child processes of a program that `peft_reft.run` runs, such as accelerate and trl.

`peft_reft.run` puts this folder on PYTHONPATH, so each child imports this module when it starts. It waits until the
process imports `peft`, and imports `peft_reft` right after that.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


class _AfterPeft(MetaPathFinder):
    """Finds `peft` as usual, and has `peft_reft` imported after it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> object:
        return self.loader.create_module(spec)

    def exec_module(self, module: object) -> None:
        # Restore the original loader, because other code reads it from modules.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("peft_reft")


sys.meta_path.insert(0, _AfterPeft())

# Python imports only one `sitecustomize`, so this one runs the next one on the path.
_others = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
_next = PathFinder.find_spec("sitecustomize", _others)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
