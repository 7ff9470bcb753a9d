"""Requests, checkpoints and answers for the tests of served models; `make test-vllm` runs them beside vLLM."""

import json
import os
from pathlib import Path

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

DIFFERENCES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser):
    parser.addoption(
        "--differences", type=Path, help="write the worst difference of every comparison to this file"
    )


def pytest_configure(config):
    config.stash[DIFFERENCES] = {}


def pytest_sessionfinish(session):
    """Write what was compared: the worst difference of a log-probability, by test."""
    file = session.config.getoption("--differences")
    if file is not None:
        rows = dict(sorted(session.config.stash[DIFFERENCES].items()))
        command = "python -m pytest tests/served --differences docs/results/served_differences.json"
        file.write_text(json.dumps({"command": command, "worst": rows}, indent=1) + "\n")


@pytest.fixture
def note(request):
    """Keeps the worst difference of the running test."""

    def keep(worst):
        request.config.stash[DIFFERENCES][request.node.name] = worst

    return keep
