"""The README's first command, end to end: the bundled model learns to answer in emojis."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parent.parent


def _is_emoji(text):
    kinds = {unicodedata.category(character) for character in text.replace(" ", "")}
    return "So" in kinds and kinds <= {"So", "Mn", "Cf", "Sk"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["42", "1", "2", "3", "4"])
def test_quickstart_teaches_emojis(tmp_path, seed):
    output = tmp_path / "adapter"
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", "--output", output, "--seed", seed],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )
    assert run.returncode == 0, run.stderr

    # The first line of an answer: the adapter's on the left, the base model's on the right.
    lines = run.stdout.splitlines()
    answers = [lines[i + 2].split(maxsplit=1) for i, line in enumerate(lines) if line.startswith("  > ")]
    assert len(answers) == 2
    for adapted, base in answers:
        assert _is_emoji(adapted), run.stdout
        assert base.isascii(), run.stdout

    weights = output / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert f"{parameters:,}  this LoReFT adapter" in run.stdout
    assert weights.stat().st_size < 4 * parameters + 4096
