"""A real file of torchvision's to damage, and the golden folder."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def basic():
    """The arrays of a torchvision network with basic blocks, under its keys."""
    return load_file(GOLDEN / "torchvision_basic" / "model.safetensors")


@pytest.fixture
def write(tmp_path):
    """Writes arrays as a `.safetensors` file in an empty folder and returns its path."""

    def write(arrays, name="weights.safetensors", **options):
        path = tmp_path / name
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, **options
        )
        return path

    return write
