"""Runs a program that loads adapters itself, with ReFT registered: lm_eval, trl, accelerate, a script.

    python -m peft_reft.run PROGRAM [ARGUMENTS...]        # a console script, a file or a module
    python -m peft_reft.run -m MODULE [ARGUMENTS...]

The program runs in this process, under its own name, with its own arguments and exit code. Python processes that it
starts register ReFT too, as soon as they import `peft`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

# Name of a program's package -> the module that registers ReFT with it.
_INTEGRATIONS = {"lm_eval": "peft_reft.integrations.lm_eval"}
_STARTUP = Path(__file__).parent / "startup"


def run(arguments: Sequence[str]) -> Any:
    """Run a program.

    Args:
        arguments: the program (a console script, a file or a module; or `-m` and a module), and its arguments.

    Returns:
        What a console script returns; its exit code, as `sys.exit` takes it.

    Raises:
        SystemExit: there is no such program, or the program raises it.
    """
    import peft_reft  # noqa: F401  registers ReFT

    by_module = arguments[0] == "-m"
    name, *rest = arguments[1:] if by_module else arguments
    start = _module(name) if by_module else _file(name) or _script(name) or _module(name)
    if start is None:
        raise SystemExit(
            f"There is no program {name!r} to run: no console script of an installed package, no file and no module "
            "that can be run has this name. If the program is in another environment, install peft-reft there."
        )
    _for_child_processes()
    sys.argv = [name, *rest]
    return start()


def _file(name: str) -> Callable[[], Any] | None:
    path = Path(name)
    if not path.is_file() and not (path / "__main__.py").is_file():
        return None
    # As `python FILE` does.
    sys.path.insert(0, str((path if path.is_dir() else path.parent).resolve()))
    return lambda: _main(runpy.run_path, name)


def _script(name: str) -> Callable[[], Any] | None:
    found: EntryPoint | None = next(iter(entry_points(group="console_scripts", name=name)), None)
    if found is None:
        return None
    _integrate(found.module)

    def start() -> Any:
        return found.load()()

    return start


def _module(name: str) -> Callable[[], Any] | None:
    # As `python -m` does, unlike the command `peft-reft`.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        runnable = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        runnable = False
    if not runnable:
        return None
    _integrate(name)
    return lambda: _main(runpy.run_module, name, alter_sys=True)


def _main(start: Callable[..., Any], name: str, **options: Any) -> None:
    start(name, run_name="__main__", **options)


def _integrate(module: str) -> None:
    """Import the integration for a program, if there is one."""
    if (integration := _INTEGRATIONS.get(module.partition(".")[0])) is not None:
        importlib.import_module(integration)


def _for_child_processes() -> None:
    """Register ReFT in the Python processes that this one starts. Mutates `os.environ`."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_STARTUP) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_STARTUP), *filter(None, known)])


def main(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(__doc__)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
