"""`peft_reft.run` and the command `peft-reft`: programs that do not know ReFT load its adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from adapters import reft
from peft import get_peft_model

from peft_reft import __main__ as command
from peft_reft import run
from peft_reft.show import main as show

# A program of somebody else's: nothing in it names this package.
PROGRAM = """
import sys
from peft import AutoPeftModelForCausalLM

assert __name__ == "__main__"
print(sys.argv)
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.base_model).__name__)
sys.exit(int(sys.argv[2]))
"""
# Starts the one above in a process of its own, as launchers do.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(tiny.llama(), reft())
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def programs(tmp_path) -> Path:
    package = tmp_path / "programs"
    package.mkdir()
    (package / "loads.py").write_text(PROGRAM)
    (package / "launches.py").write_text(LAUNCHER)
    (package / "beside.py").write_text("import loads")
    return package


def python(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    # The checkout, for children that do not start in it.
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(Path(run.__file__).parent.parent)]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def test_without_it_the_program_fails(adapter, programs):
    done = python(programs / "loads.py", adapter, 3)
    assert done.returncode == 1
    assert "KeyError: 'REFT'" in done.stderr


def test_a_file_runs_with_its_arguments_and_its_exit_code(adapter, programs):
    file = programs / "loads.py"
    done = python("-m", "peft_reft.run", file, adapter, 3)
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"{[str(file), str(adapter), '3']}\nReftModel\n"


def test_a_module_runs_by_name(adapter, programs):
    for arguments in (["loads"], ["-m", "loads"]):
        done = python("-m", "peft_reft.run", *arguments, adapter, 0, cwd=programs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("ReftModel\n")


def test_the_command_runs_modules_of_the_working_directory_too(programs):
    (programs / "says.py").write_text("import sys\nprint(sys.argv[1:])")
    # A console script has no "" on its path.
    code = "import sys; sys.path.remove(''); from peft_reft.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python("-c", code, "run", "-m", "says", "--flag", cwd=programs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--flag']\n"


def test_the_program_finds_what_stands_beside_it(programs):
    (programs / "beside.py").write_text("import launches_nothing\nprint(launches_nothing.VALUE)")
    (programs / "launches_nothing.py").write_text("VALUE = 7")
    assert python("-m", "peft_reft.run", programs / "beside.py").stdout == "7\n"


def test_processes_that_the_program_starts_register_it_too(adapter, programs):
    done = python("-m", "peft_reft.run", programs / "launches.py", programs / "loads.py", adapter, 4)
    assert done.returncode == 4, done.stderr
    assert done.stdout.endswith("ReftModel\n")


def test_accelerate_launch_is_such_a_program(adapter, programs):
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    done = python("-m", "peft_reft.run", *launch, "--dynamo_backend", "no", programs / "loads.py", adapter, 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ReftModel\n")


def test_processes_without_peft_import_nothing(programs):
    (programs / "says.py").write_text("import sys\nprint('torch' in sys.modules, 'peft_reft' in sys.modules)")
    done = python("-m", "peft_reft.run", programs / "launches.py", programs / "says.py")
    assert done.stdout == "False False\n", done.stderr


def test_a_sitecustomize_of_the_users_still_runs(programs, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import builtins\nbuiltins.MINE = 5")
    (programs / "says.py").write_text("print(MINE)")
    arguments = ["-m", "peft_reft.run", programs / "launches.py", programs / "says.py"]
    assert python(*arguments, PYTHONPATH=str(tmp_path / "site")).stdout == "5\n"


def test_a_console_script_runs(tmp_path):
    script = Path(sys.executable).parent / "transformers"
    alone = subprocess.run([script, "env", "--help"], capture_output=True, text=True, check=False)
    if alone.returncode != 0:
        pytest.skip(f"Transformers' own command does not start: {alone.stderr[-200:]}")
    done = python("-m", "peft_reft.run", "transformers", "env", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_what_does_not_exist_is_said_in_a_line():
    done = python("-m", "peft_reft.run", "no_such_program", "--flag")
    assert done.returncode == 1
    assert done.stderr.startswith("There is no program 'no_such_program' to run")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-m"], 2)])
def test_it_tells_how_it_is_used(arguments, code, capsys):
    assert run.main(arguments) == code
    assert "python -m peft_reft.run PROGRAM" in capsys.readouterr().out


# peft-reft


def test_the_command_has_three_commands(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("run", "convert", "show"))
    assert command.main([]) == 2
    assert command.main(["train"]) == 2
    assert "usage: peft-reft" in capsys.readouterr().err
    for name in ("convert", "show"):
        with pytest.raises(SystemExit) as stop:
            command.main([name, "--help"])
        assert stop.value.code == 0


def test_show_tells_what_an_adapter_is(adapter, capsys):
    command.main(["show", str(adapter), "w6 w7 w8 w9 w10 w11"])
    out = capsys.readouterr().out
    assert out.startswith("default: loreft r=4 on f2+l2, 3 of 3 layers, ")
    assert "ReftConfig(intervention='loreft', r=4, positions='f2+l2'" in out
    assert "[w6][w7]w8w9[w10][w11]" in out


@pytest.mark.parametrize("place", [0, 1, 2])
def test_show_applies_the_chat_template(adapter, place, capsys):
    arguments = [str(adapter), "w6 w7 w8 w9 w10 w11"]
    arguments.insert(place, "--chat")
    show(arguments)
    assert "[<user>][w6]w7w8w9w10[w11][<assistant>]" in capsys.readouterr().out


def test_show_says_in_a_line_what_is_wrong(adapter, tmp_path, capsys):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as stop:
            show([str(folder)])
        assert stop.value.code == 1
        assert str(folder) in capsys.readouterr().err


# The import


def test_the_import_says_nothing_of_a_kernel_that_is_not_used(tmp_path):
    # bitsandbytes as it is on a CPU with AVX512-BF16 without the package `kernels`.
    (tmp_path / "bitsandbytes" / "backends" / "cpu").mkdir(parents=True)
    for folder in (tmp_path / "bitsandbytes" / "backends" / "cpu").parents:
        if "bitsandbytes" in folder.parts:
            (folder / "__init__.py").write_text("")
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("import bitsandbytes.backends.cpu.ops\nclass nn: pass")
    (tmp_path / "bitsandbytes" / "backends" / "cpu" / "__init__.py").write_text("")
    (tmp_path / "bitsandbytes" / "backends" / "cpu" / "ops.py").write_text(
        "import logging\n"
        "logger = logging.getLogger(__name__)\n"
        "logger.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'no kernels')\n"
        "logger.warning('Something else')\n"
    )
    for package, heard in (("peft", True), ("peft_reft", False)):
        done = python("-c", f"import {package}", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert ("gemm_4bit_forward" in done.stderr) == heard
        assert "Something else" in done.stderr
