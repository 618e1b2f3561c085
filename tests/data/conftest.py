"""The prepared digits, once for all tests of the data."""

import pytest

from flaxtransfer.data import open_source


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory):
    """A cache folder in which the digits are prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    open_source("digits", cache_dir=folder)
    return folder


@pytest.fixture(scope="session")
def digits(digits_cache):
    """The handwritten digits."""
    return open_source("digits", cache_dir=digits_cache)
