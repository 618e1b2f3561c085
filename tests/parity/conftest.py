"""The peers: torch, torchvision, timm and transformers, imported only when a test asks."""

import importlib.util
from pathlib import Path

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
    """Torch on both cores, beside JAX."""
    import torch

    torch.set_num_threads(2)
    return torch


@pytest.fixture(scope="session")
def torchvision(torch, making):
    """torchvision, whether or not its compiled part fits this torch."""
    making.declare_operators()
    import torchvision

    return torchvision
