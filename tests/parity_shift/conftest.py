"""The peers are imported by the files themselves, and only where they are asked for."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leaves the folder out wherever the marker is left out."""
    return True if "not parity_shift" in config.getoption("markexpr") else None
