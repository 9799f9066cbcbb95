"""The README's versions are those that ran, and CI distinguishes a change's failures from a release's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import versions

CI = Path(__file__).parent.parent / ".ci"


def test_the_readme_has_the_table_that_the_script_makes():
    text = versions.README.read_text(encoding="utf-8")
    assert versions.with_table(text) == text


def test_the_pinned_versions_are_those_that_ran():
    lines = (CI / "pinned.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    ran = versions.recorded()["pinned"]["packages"]
    # The name of a build, as in 2.13.0+cpu, is not pinned.
    assert {name: number.split("+")[0] for name, number in ran.items()} == {name: pinned[name] for name in ran}


# `release` is what a package says in its newest version, and said "old" when the versions were recorded.
RECORDED = "from release import word\ndef test_word(): assert word == 'old'\ndef test_sum(): assert 1 + 1 == 2\n"
FAILURES = {
    "a change": (RECORDED.replace("1 + 1", "1 + 2"), "old", 1),
    "a change that cannot be imported": ("import nothing\n" + RECORDED, "old", 1),
    "a release": (RECORDED, "new", 0),
    "a release that cannot be imported": (RECORDED, None, 0),
    "a release, seen by a new test": (RECORDED + "def test_other(): assert word == 'old'\n", "new", 0),
    "both": (RECORDED.replace("1 + 1", "1 + 2"), "new", 1),
}


@pytest.mark.parametrize(("now", "release", "code"), FAILURES.values(), ids=FAILURES)
def test_a_failure_on_the_newest_versions_counts_if_a_commit_caused_it(now, release, code, tmp_path):
    repository, folder = tmp_path / "repository", tmp_path / "run"
    (repository / "tests").mkdir(parents=True)
    (folder / "newest" / "bin").mkdir(parents=True)
    python = folder / "newest" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={folder}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "release.py").write_text(f"word = {release!r}" if release else "raise ImportError")

    def run(*command, **options):
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, **options)

    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    run("git", "init")
    (repository / "tests" / "versions.json").write_text("{}")
    (repository / "tests" / "test_it.py").write_text(RECORDED)
    run("git", "add", ".")
    run(*git, "commit", "-m", "recorded")
    (repository / "tests" / "test_it.py").write_text(now)
    run(*git, "commit", "-am", "now")
    assert run(python, "-m", "pytest", "tests", "-o", f"cache_dir={folder / 'cache'}").returncode != 0
    judged = run(sys.executable, CI / "whose_failure.py", folder)
    assert judged.returncode == code, judged.stdout + judged.stderr
    assert ("A NEW RELEASE IS THE CAUSE" in judged.stdout) == (code == 0)


def test_with_the_recorded_versions_no_release_is_the_cause(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "newest" / "bin").mkdir(parents=True)
    python = tmp_path / "newest" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    recorded = {"newest": {"packages": {"pytest": pytest.__version__}}}
    (tmp_path / "tests" / "versions.json").write_text(json.dumps(recorded))
    command = [sys.executable, CI / "whose_failure.py", tmp_path]
    judged = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert judged.returncode == 1
    assert "this repository's own" in judged.stdout
