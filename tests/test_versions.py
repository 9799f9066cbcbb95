"""What the README says about versions is what ran."""

from __future__ import annotations

from pathlib import Path

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
