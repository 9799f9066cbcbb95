"""The README and the manual: every snippet runs, every command and option exists, every link leads somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import snippets
import yaml
from messages import GAP, messages
from snippets import PAGES, ROOT, blocks
from transformers.utils import logging

import peft_reft

DOCS = ROOT / "docs"
# The names that a shell command of the pages may begin with, and what checks its arguments.
CHECKS = {}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    snippets.create_workspace(folder)
    return folder


@pytest.fixture
def workspace(models, tmp_path, monkeypatch):
    """The current folder, in which hub ids are folders of tiny models."""
    for publisher in models.iterdir():
        (tmp_path / publisher.name).symlink_to(publisher)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_snippets_run_from_top_to_bottom(page, workspace):
    for needed in ("vllm", "bitsandbytes", "torchao"):
        if re.search(rf"^(from|import) {needed}\b", "".join(block.code for block in blocks(page)), re.MULTILINE):
            pytest.importorskip(needed)
    level = logging.get_verbosity()
    try:
        snippets.run(page)
    finally:
        logging.set_verbosity(level)


# Commands


def check(*programs):
    def register(function):
        CHECKS.update(dict.fromkeys(programs, function))
        return function

    return register


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Each command of a page's shell blocks, with the number of its line."""
    for block in blocks(page):
        if block.language == "bash":
            for number, line in enumerate(block.code.replace("\\\n", "  ").splitlines()):
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    yield block.line + number, words[:end]
                    words = words[end + 1 :]


COMMANDS = [
    pytest.param(argv, id=f"{page.name}:{line}")
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    for line, argv in commands(page)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_well_formed(page):
    parsers = {"json": json.loads, "yaml": yaml.safe_load, "bash": _parse_shell}
    for block in blocks(page):
        assert block.language in (*parsers, "python", "setup", "text", "bibtex"), f"{page.name}:{block.line}"
        parsers.get(block.language, str)(block.code)


def _parse_shell(code: str) -> None:
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)


@pytest.mark.parametrize("argv", COMMANDS)
def test_commands_and_their_options_exist(argv, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert argv[0] in CHECKS or (ROOT / argv[0]).is_file(), f"unknown program {argv[0]!r}"
    CHECKS.get(argv[0], lambda argv: None)(argv)


@check("bash")
def _check_script(argv):
    assert (ROOT / argv[1]).is_file()
    if argv[1].endswith("quickstart.sh"):
        _check_python(["python", "examples/quickstart.py", *argv[2:]])


@check("python", ".venv/bin/python")
def _check_python(argv):
    module = argv[1] == "-m"
    target, arguments = (argv[2], argv[3:]) if module else (argv[1], argv[2:])
    if module and target == "pytest":
        return
    if module and target == "peft_reft.run":
        _check_peft_reft(["peft-reft", "run", *arguments])
        return
    assert module or (ROOT / target).is_file()
    help_text = _help(target, module)
    for option in _options(arguments):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text), f"{target} has no {option}"


def _options(arguments: list[str]) -> list[str]:
    return [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]


@functools.cache
def _help(target: str, module: bool) -> str:
    """What a script or module prints with --help, run in this process."""
    output, path, argv = io.StringIO(), list(sys.path), sys.argv
    try:
        sys.argv = [target, "--help"]
        sys.path.insert(0, str((ROOT / target).parent))
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            if module:
                runpy.run_module(target, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / target), run_name="__main__")
    finally:
        sys.path, sys.argv = path, argv
    return output.getvalue()


@check("peft-reft")
def _check_peft_reft(argv):
    command, *rest = argv[1:]
    if command == "run":
        # A file of the reader's own stands for itself; other programs need environments of their own.
        assert rest[0] in ("trl", "lm_eval") or rest[0].endswith(".py")
    else:
        _check_python(["python", "-m", f"peft_reft.{command}", *rest])


@check("accelerate")
def _check_accelerate(argv):
    from accelerate.commands.launch import launch_command_parser

    assert argv[1] == "launch"
    # A script that is the reader's own stands for itself.
    arguments, unknown = launch_command_parser().parse_known_args(argv[2:])
    assert arguments.config_file is None or (ROOT / arguments.config_file).is_file()
    if arguments.training_script.startswith("examples/"):
        _check_python(["python", arguments.training_script, *arguments.training_script_args])
    else:
        assert not unknown


@check("pip")
def _check_pip(argv):
    assert argv[1] == "install"
    known = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    for extra in re.findall(r"^(?:\.|peft-reft)\[(.*)\]$", "\n".join(argv), re.MULTILINE):
        for name in extra.split(","):
            assert re.search(rf"^{name} = ", known[1], re.MULTILINE), f"no extra {name!r}"


@check("vllm")
def _check_vllm(argv):
    from peft_reft.integrations.vllm.settings import Settings

    assert argv[1] == "serve"
    given = json.loads(argv[argv.index("--additional-config") + 1])
    assert Settings.of(given).adapters == given["reft_adapters"]


@check(".venv/bin/ruff")
def _check_ruff(argv):
    assert argv[1] in ("check", "format")


# Text


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("*.md"))]


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


def test_the_readme_is_read_in_three_minutes():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 1300


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "positions.md"], ids=lambda page: page.stem)
def test_the_table_of_positions_has_words_that_exist(page):
    words = snippets.words_of_the_table(page.read_text(encoding="utf-8"))
    assert words == ["f3", "l3", "f3+l2", "prompt", "c3", "completion", "all"]


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: peft_reft\.(\w+)$", text, re.MULTILINE))
    assert named >= set(peft_reft.__all__)


def phrases() -> list[str]:
    """The first column of the tables of the troubleshooting page: the phrase that identifies a message."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]


def test_every_message_is_in_the_troubleshooting_page():
    known = phrases()
    missing = {
        text: place
        for text, place in messages().items()
        if len(re.findall(r"[a-z]{2,}", text.replace(GAP, ""))) > 1 and not any(phrase in text for phrase in known)
    }
    lines = [f"{place}: {text}" for text, place in missing.items()]
    assert not missing, "\n".join(["docs/troubleshooting.md needs a row for each of these:", *lines])


def test_the_troubleshooting_page_has_no_message_that_is_gone():
    texts = list(messages())
    assert [phrase for phrase in phrases() if not any(phrase in text for text in texts)] == []


def test_pictures_are_those_that_their_script_draws():
    drawn = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["pictures"]()
    assert set(drawn) == {file.name for file in (DOCS / "pictures").glob("*.svg")}
    for name, picture in drawn.items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == picture, f"run docs/pictures/draw.py: {name}"


def cells() -> list[str]:
    """The notebook's code, without the magics that show figures."""
    notebook = json.loads((ROOT / "examples" / "inspect_adapter.ipynb").read_text(encoding="utf-8"))
    sources = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return [re.sub(r"^%.*$", "", source, flags=re.MULTILINE) for source in sources]


def run_notebook() -> dict:
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells()):
        exec(compile(cell, f"cell {number}", "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_cell_by_cell(workspace):
    names = run_notebook()
    edited = (names["norms"].values[0] > 0).any(-1)
    assert edited.nonzero().flatten().tolist() == [len(edited) - 3, len(edited) - 2, len(edited) - 1]


@pytest.mark.slow
def test_the_notebook_teaches_scales_and_steers(workspace, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from smollm2 import smollm2_folder

    (workspace / "HuggingFaceTB").unlink()
    (workspace / "HuggingFaceTB").mkdir()
    (workspace / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(smollm2_folder())
    names = run_notebook()
    assert names["scaled"][0].isascii()  # the base model's words
    assert not any(letter.isascii() and letter.isalpha() for letter in names["scaled"][1])  # emojis
    assert len(set(names["moods"].values())) > 2
