#!/usr/bin/env bash
# Runs the tests in an environment of their own, which it creates first if need be.
#   usage: tests/run.sh [newest|pinned|oldest|all] [pytest arguments]
#          tests/run.sh vllm|lm_eval|sentence_transformers|diffusers [pytest arguments]   # with a program that needs its own
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in vllm|lm_eval|sentence_transformers|diffusers)
    program=$1
    shift
    environment=${REFT_ENV:-.venv-$program}
    ".ci/environment-$program" "$environment"
    tests=tests/test_$program.py
    if [[ $program == vllm ]]; then tests=tests/vllm_plugin; fi
    OMP_NUM_THREADS=1 exec "$environment/bin/python" -m pytest "$tests" "$@"
esac
versions=newest
case ${1:-} in newest|pinned|oldest|all) versions=$1; shift ;; esac

sets=("$versions")
if [[ $versions == all ]]; then sets=(newest pinned oldest); fi
for set in "${sets[@]}"; do
    if [[ $set == newest ]]; then environment=.venv; else environment=.venv-$set; fi
    environment=${REFT_ENV:-$environment}
    .ci/environment "$environment" "$set"
    "$environment/bin/python" -m pip list | grep -E '^(torch|peft|transformers|trl) '
    # Each worker computes in one thread: threads that outnumber the cores wait for each other.
    VERSION_SET=$set OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest tests -n 2 "$@"
done
