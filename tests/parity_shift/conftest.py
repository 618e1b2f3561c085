"""The peers are imported only where they are asked for."""

import importlib
import re
import warnings

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leaves the folder out unless the marker is asked for, as `make parity-shift` does."""
    if not re.search(r"(?<!not )\bparity_shift", config.getoption("markexpr")):
        return True
    with warnings.catch_warnings():
        # Python warns of escapes in their sources when it compiles them, the first time only.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for peer in ("abstention", "ot", "quapy"):
            importlib.import_module(peer)
    return None
