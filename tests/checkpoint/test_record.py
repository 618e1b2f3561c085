"""Claims about sealed records: any change of the file is found, or changes nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.checkpoint.step_files import jsonable, sign, verify

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_what_was_sealed_comes_back(record):
    text = json.dumps(sign(record))
    assert json.dumps(verify(text)) == json.dumps(record)


@given(
    st.dictionaries(st.text(min_size=1), JSON, min_size=1, max_size=3),
    st.integers(min_value=0),
    st.integers(min_value=0, max_value=6),
)
def test_a_flipped_bit_is_found_or_changes_nothing(record, place, bit):
    data = bytearray(json.dumps(sign(record)).encode())
    data[place % len(data)] ^= 1 << bit
    try:
        kept = verify(data.decode())
    except ValueError:
        return
    assert json.dumps(kept, sort_keys=True) == json.dumps(record, sort_keys=True)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"record": {}}', "{", '"text"'])
def test_other_text_is_no_record(text):
    with pytest.raises(ValueError, match=r"not a signed record|does not match"):
        verify(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": (1, 2.5)}, {"a": [1, 2.5]}),
        ({"a": {"b": None}, "c": [True, "x"]}, {"a": {"b": None}, "c": [True, "x"]}),
    ],
)
def test_jsonable_values(value, expected):
    assert jsonable(value, "meta") == expected


def test_a_number_that_is_none_is_kept():
    assert math.isnan(jsonable({"loss": float("nan")}, "meta")["loss"])


def test_all_that_json_would_change_or_refuse_is_listed():
    with pytest.raises(TypeError) as caught:
        jsonable({"loss": np.float32(1), 3: "x", "deep": [{"at": object()}]}, "meta")
    text = str(caught.value)
    for part in ("meta['loss']: is a numpy.float32", "the key 3", "meta['deep'][0]['at']"):
        assert part in text
