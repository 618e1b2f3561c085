"""A small network with its first variables."""

import jax
import pytest
from small_resnet import SMALL

from flaxtransfer.models.registry import resnet


@pytest.fixture(scope="session")
def small():
    model = resnet(SMALL)
    return model, model.init(jax.random.key(0))
