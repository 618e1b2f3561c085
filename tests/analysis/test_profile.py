"""What a probe makes of the features of every depth."""

from __future__ import annotations

import numpy as np
import pytest

from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.features import ridge_path, standardisation


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_probe_for_each(kind):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    telling = random.normal(size=(60, 5)) + 6 * np.eye(5)[labels]
    profile = probe_profile({"stem": random.normal(size=(60, 4)), "layer1": telling}, labels,
                            kind=kind)  # fmt: skip
    assert [probe.segment for probe in profile.probes] == ["stem", "layer1"]
    assert profile.best.segment == "layer1"
    assert profile.probes[0].accuracy < 0.6
    if kind == "ridge":
        path = ridge_path(standardisation(telling)(telling), labels)
        assert profile.best.accuracy == path.accuracy
    first = str(profile).splitlines()[2].split()
    assert first[:2] == ["layer1", "5"]


def test_errors_name_the_segment():
    with pytest.raises(ValueError, match=r"the features of stem cannot be probed: .*not finite"):
        probe_profile({"stem": np.full((9, 2), np.nan)}, np.arange(9) % 2)
    with pytest.raises(ValueError, match="kind is 'ridge' or 'logistic', not 'svm'"):
        probe_profile({}, [], kind="svm")
