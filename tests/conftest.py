"""Shared fixtures. Everything runs without a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import versions

# Tiny models gain nothing from threads, and the workers of pytest-xdist would fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="if all tests pass, write down with which versions they do")


def pytest_configure(config):
    if config.getoption("record") and (config.option.keyword or "VERSION_SET" not in os.environ):
        raise pytest.UsageError("--record is for tests/run.sh and all tests: no -k")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if config.getoption("record") and exitstatus == 0:
        counts = (len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "skipped"))
        versions.record(os.environ["VERSION_SET"], *counts)
