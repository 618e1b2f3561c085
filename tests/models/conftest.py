"""A small network with its first variables."""

import jax
import pytest

from flaxtransfer.models.registry import resnet
from tests.support.small_resnet import SMALL


@pytest.fixture(scope="session")
def small():
    model = resnet(SMALL)
    return model, model.init(jax.random.key(0))
