"""Every test: the repository root is importable, one thread, the same random numbers.

`@pytest.mark.needs("timm")` marks a test that compares with a package outside requirements.txt: it is skipped where
that package is not installed, and `pytest -m needs` runs these tests alone (as .ci/run does, which installs them)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(package, ...): skipped where one of these is not installed")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if not importlib.util.find_spec(package):
                pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
