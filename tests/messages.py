"""The messages that the package raises, warns of and logs, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import peft_reft

PACKAGE = Path(peft_reft.__file__).parent
GAP = "…"  # for what is filled in at run time
_LOGS = {"warn", "warning", "warning_once", "info", "error"}
# The reasons that messages quote: functions that return them as strings.
_REASONS = {"obstacle", "_tied"}


def messages() -> dict[str, str]:
    """Each message, with `GAP` for what is filled in -> file and line of one place that it comes from.

    A message is an argument of `raise`, a warning or a log: a string, a constant of the module, or the return value of
    a function of the package. An exception that is passed on, or has no text, gives none.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
    constants, returned = {}, {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.FunctionDef):
                values = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
                returned.setdefault(node.name, []).extend(values)
    found = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            for text in _of(node, constants, returned):
                found[text] = f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"
    return found


def _of(node: ast.AST, constants: dict[str, ast.expr], returned: dict[str, list[ast.expr]]) -> Iterator[str]:
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield from _texts(node.exc, constants, returned)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in _LOGS:
        yield from _texts(node, constants, returned)
    elif isinstance(node, ast.FunctionDef) and node.name in _REASONS:
        for value in returned[node.name]:
            yield from _texts(value, constants, returned)


def _texts(value: ast.expr, constants: dict[str, ast.expr], returned: dict[str, list[ast.expr]]) -> Iterator[str]:
    if isinstance(value, ast.IfExp):
        yield from _texts(value.body, constants, returned)
        yield from _texts(value.orelse, constants, returned)
    elif (text := _template(value)) is not None:
        if " " in text:
            yield text
    elif isinstance(value, ast.Name) and _template(constants.get(value.id)):
        yield from _texts(constants[value.id], constants, returned)
    elif isinstance(value, ast.Call):
        name = getattr(value.func, "attr", getattr(value.func, "id", None))
        if name == "format":
            yield from _texts(value.func.value, constants, returned)
        for each in returned.get(name, ()):
            yield from _texts(each, constants, returned)
        for argument in value.args:
            yield from _texts(argument, constants, returned)


def _template(value: ast.expr | None) -> str | None:
    """The text of a string expression with `GAP`s; None for anything else."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.sub(r"(?<!\{)\{\w*(?:![rs])?(?::[^}]*)?\}(?!\})|%[.\w]+", GAP, value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in value.values)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        sides = [_template(side) or GAP for side in (value.left, value.right)]
        return None if sides == [GAP, GAP] else "".join(sides)
    return None


if __name__ == "__main__":
    for text, place in messages().items():
        print(f"{place}: {text}")
