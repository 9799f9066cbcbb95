"""Tells whether tests fail on the newest versions because of this repository, or because of a new release.

Usage: python .ci/whose_failure.py FOLDER, in the root of the repository. FOLDER has the environment of the failed run
in `newest` and pytest's cache of it in `cache`.

The failed tests run again in that environment, on the last commit that recorded its versions (tests/versions.json),
when all tests passed. Exits with 1 if one passes there: a later commit broke it. A test that fails there too was
broken by a release, and a test that does not exist there may have been. Such failures are printed; they do not keep a
fix from landing. With exactly the versions that were recorded no release can be the cause, so any failure counts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


def failures(cache: Path) -> set[str]:
    """Names of the tests that failed last time, and of files that could not be imported."""
    names = cache / "v" / "cache" / "lastfailed"
    return set(json.loads(names.read_text())) if names.exists() else set()


def last_record() -> str:
    command = ["git", "log", "-1", "--format=%H", "--", "tests/versions.json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def recorded_versions_ran(folder: Path) -> bool:
    """Whether the environment has the very versions with which all tests passed on the last recorded commit."""
    packages = json.loads(Path("tests/versions.json").read_text()).get("newest", {}).get("packages", {})
    ask = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    command = [folder / "newest" / "bin" / "python", "-c", ask, *packages]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return bool(packages) and found == list(packages.values())


def broken_since(commit: str, folder: Path, failed: set[str]) -> set[str]:
    """Those of the failed tests that pass on `commit` in the same environment."""
    recorded, cache = folder / "recorded", folder / "cache_recorded"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", recorded, commit], check=True)
    files = sorted({name.split("::")[0] for name in failed})
    files = [name for name in files if (recorded / name).exists()]
    if not files:
        return set()
    shutil.copytree(folder / "cache", cache)
    python = folder / "newest" / "bin" / "python"
    subprocess.run([python, "-m", "pytest", "--lf", "-o", f"cache_dir={cache}", *files], cwd=recorded, check=False)
    still = failures(cache)
    # The name of a file that can be imported there gives way to the names of its tests.
    return {name for name in failed if not any(f"{other}::".startswith(f"{name}::") for other in still)}


def main(folder: Path) -> int:
    if recorded_versions_ran(folder):
        print("\nThe newest versions are those that were recorded: the failures are this repository's own.")
        return 1
    failed, commit = failures(folder / "cache"), last_record()
    broken = broken_since(commit, folder, failed)
    print(f"\nFailures on the newest versions, and the same tests with the same versions on {commit[:10]}:")
    for name in sorted(failed):
        print(f"  {'passes there' if name in broken else 'fails there or does not exist'}: {name}")
    if not failed:
        print("  none: no test ran. Does pip find newest versions that go together?")
    if broken:
        print(f"{len(broken)} of them broken by a commit since then.")
    else:
        print(
            "A NEW RELEASE IS THE CAUSE, AS FAR AS CAN BE TOLD. It does not fail this run; file an issue and mend it."
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
