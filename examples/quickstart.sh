#!/usr/bin/env bash
# Runs quickstart.py in the virtual environment .venv, which it creates first if need be. Arguments go to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
.ci/environment .venv
exec .venv/bin/python examples/quickstart.py "$@"
