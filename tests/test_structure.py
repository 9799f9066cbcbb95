"""The structure that CONTRIBUTING describes: one-way imports, short functions, passes that seldom change files."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_reft

PACKAGE = Path(peft_reft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
WALK = Path(__file__).parent.parent / "examples" / "benchmarks" / "walk.py"


def _name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(file: Path) -> Iterator[str]:
    """Every module of the package that a file imports, wherever in it; also for type checkers alone."""
    names = {_name(other) for other in FILES}
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in names:
            modules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (module if module in names else node.module for module in modules)


def test_no_import_comes_back_to_where_it_began():
    # Raises a CycleError that names the circle.
    list(TopologicalSorter({_name(file): set(_imported(file)) for file in FILES}).static_order())


def test_no_import_is_relative():
    nodes = (node for tree in TREES.values() for node in ast.walk(tree))
    assert not [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_modules_and_functions_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 450
    functions = (node for node in ast.walk(TREES[file]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    long = {node.name: size for node in functions if (size := node.end_lineno - node.lineno + 1) > 50}
    assert not long


def test_a_pass_seldom_changes_from_one_file_to_another():
    walks = runpy.run_path(str(WALK))["walks"]()
    moves = {name: walk.moves for name, walk in walks.items()}
    # Before the package was laid out so: 58, 82 and 294.
    assert moves["training"] <= 25
    assert moves["generate"] <= 40
    assert moves["mixed"] <= 60
