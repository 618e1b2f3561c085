"""The peers: torch, torchvision, timm and transformers, imported only when a test asks."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "make_golden.py"


@pytest.fixture(scope="session")
def making():
    """The functions that made the golden files: narrow networks, random statistics."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def torch():
    """Torch on one core, for two processes share the tests."""
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def torchvision(torch, making):
    """torchvision, whether or not its compiled part fits this torch."""
    making.declare_operators()
    import torchvision

    return torchvision


@pytest.fixture
def agree(record_property):
    """Asserts that two results agree, and keeps by how much for the table at the end."""

    def agree(ours, theirs, limit, what="logits"):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert theirs.std() > 1e-3  # of constant logits any network would be a match
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        record_property(what, difference)
        assert difference <= limit

    return agree


def pytest_terminal_summary(terminalreporter):
    """The largest difference of every comparison, relative to the largest number of the peer."""
    rows = [
        (report.nodeid.split("::", 1)[1], what, difference)
        for report in terminalreporter.stats.get("passed", [])
        for what, difference in report.user_properties
    ]
    if rows:
        terminalreporter.section("differences from the peers")
        for name, what, difference in sorted(rows):
            terminalreporter.write_line(f"{difference:9.1e}  {what:<9}  {name}")
