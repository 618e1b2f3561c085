"""Claims about taking a pytree apart into named host arrays and putting it together again."""

from __future__ import annotations

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flaxtransfer.checkpoint import manifest as inv

DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "float8_e4m3fn",
    "int4",
]


def equal_bits(a, b):
    """Same types, dtypes, shapes and bits, leaf by leaf; NaN equals the same NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(one) is type(other)
        if isinstance(one, bool | int | float) and not isinstance(one, np.generic):
            assert one == other or (one != one and other != other)
            continue
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert getattr(one, "weak_type", None) == getattr(other, "weak_type", None)
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


class Holder(NamedTuple):
    first: object
    second: object


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["numpy", "jax", "struct", "scalar", "generic", "key"]))
    if kind == "scalar":
        return draw(st.integers() | st.floats() | st.booleans())
    if kind == "key":
        impl = draw(st.sampled_from(["threefry2x32", "rbg"]))
        key = jax.random.key(draw(st.integers(0, 99)), impl=impl)
        return draw(st.sampled_from([key, jax.random.split(key, 3), jax.random.split(key, 0)]))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = int(np.prod(shape))
    numbers = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = numbers.reshape(shape).astype(jnp.dtype(draw(st.sampled_from(DTYPES))))
    if kind == "generic":
        return np.float32(draw(st.floats(width=32)))
    return array if kind == "numpy" else jnp.asarray(array)


TREES = st.recursive(
    leaves() | st.none(),
    lambda inner: (
        st.dictionaries(st.text(st.characters(exclude_characters="/")), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Holder, inner, inner)
    ),
    max_leaves=6,
)


@given(TREES)
def test_any_tree_comes_back_bit_for_bit(tree):
    try:
        arrays, inventory = inv.build_manifest(tree)
    except ValueError as error:
        # The only tree without names: an empty key beside the level above it.
        assert "same path" in str(error)  # noqa: PT017
        return
    inventory = json.loads(json.dumps(inventory))
    assert inv.differences(inventory, tree) == []
    assert inv.corrupted(inventory, arrays) == []
    assert sorted(arrays) == sorted(inv.stored(inventory))
    equal_bits(inv.rebuild(inventory, arrays, tree), tree)


@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(min_value=0), st.integers(0, 7))
def test_every_flipped_bit_changes_the_checksum(dtype, size, place, bit):
    array = np.arange(size).astype(jnp.dtype(dtype))
    data = bytearray(array.tobytes())
    data[place % len(data)] ^= 1 << bit
    flipped = np.frombuffer(bytes(data), array.dtype)
    assert inv.checksum(flipped) != inv.checksum(array)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (np.zeros(4, np.float32), np.zeros(4, np.int32), False),
        (np.zeros(4), np.zeros((2, 2)), False),
        (np.zeros((0, 3)), np.zeros((3, 0)), False),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy(), True),
        (np.arange(6)[::2], np.array([0, 2, 4]), True),
        (np.float32(0.0), np.float32(-0.0), False),
    ],
)
def test_checksum_sees_dtype_shape_and_bytes_but_not_the_layout(a, b, same):
    assert (inv.checksum(np.asarray(a)) == inv.checksum(np.asarray(b))) is same


def test_names_of_an_optimizer_state():
    state = optax.chain(optax.clip(1.0), optax.adam(0.1)).init({"fc": {"bias": jnp.ones(2)}})
    assert set(inv.named_leaves(state)) == {"1/0/count", "1/0/mu/fc/bias", "1/0/nu/fc/bias"}


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"same path.*a/b"):
        inv.build_manifest({"a/b": np.ones(1), "a": {"b": np.ones(1)}})


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        ("text", "is a str"),
        (object(), "is a object"),
        (np.array(["a"]), "is of type <U1"),
        (np.array([None]), "is of type object"),
        (np.array("2020", "datetime64[Y]"), "is of type datetime64"),
        (np.ones(2, jnp.uint4), "is of type uint4"),
        (1j, "is a complex"),
        (jax.ShapeDtypeStruct((2,), np.float32), "is a ShapeDtypeStruct"),
    ],
)
def test_what_is_no_number_is_refused_by_path(leaf, said):
    with pytest.raises(TypeError, match=f"here/0: {said}"):
        inv.build_manifest({"here": [leaf], "fine": np.ones(1)})


def test_donated_memory_is_refused_by_path():
    tree = {"w": jnp.ones(3), "b": jnp.ones(3)}
    tree["w"].delete()
    with pytest.raises(ValueError, match=r"donated.*\['w'\]"):
        inv.build_manifest(tree)


@pytest.mark.parametrize(
    ("saved", "asked", "said"),
    [
        ({"a": np.ones(2)}, {"a": np.ones(2)}, []),
        ({"a": np.ones(2)}, {"a": jax.ShapeDtypeStruct((2,), np.float64)}, []),
        ({"a": (1, 2)}, {"a": [3, 4]}, []),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, ["a: saved as float64[2], asked for as float64[3]"]),
        (
            {"a": np.ones(2, np.float32)},
            {"a": np.ones(2, jnp.bfloat16)},
            ["a: saved as float32[2], asked for as bfloat16[2]"],
        ),
        ({"n": 3}, {"n": np.int32(3)}, ["n: saved as Python int, asked for as int32[]"]),
        ({"n": 1}, {"n": True}, ["n: saved as Python int, asked for as Python bool"]),
        (
            {"fc": {"kernel": np.ones(1)}},
            {"fc": {"kernal": np.ones(1)}},
            [
                "asked for, not saved: fc/kernal (float64[1]); saved there is fc/kernel",
                "saved, not asked for: fc/kernel (float64[1])",
            ],
        ),
        (np.ones(1), {"a": np.ones(1)}, None),
        ({"k": jax.random.key(0)}, {"k": jax.random.key(0, impl="rbg")}, None),
        ({"k": jax.random.key(0)}, {"k": np.zeros(2, np.uint32)}, None),
    ],
)
def test_differences(saved, asked, said):
    found = inv.differences(inv.build_manifest(saved)[1], asked)
    if said is None:
        assert found
    else:
        assert found == said


def test_a_template_places_committed_leaves_and_no_others():
    device = jax.devices()[0]
    template = {"free": jnp.zeros(2), "held": jax.device_put(np.zeros(2, np.float32), device)}
    arrays, inventory = inv.build_manifest({"free": jnp.ones(2), "held": jnp.ones(2)})
    filled = inv.rebuild(inventory, arrays, template)
    assert not filled["free"].committed
    assert filled["held"].committed


def test_a_weakly_typed_scalar_stays_one():
    tree = {"rate": jnp.asarray(0.5), "count": jnp.asarray(3), "strong": jnp.float32(0.5)}
    arrays, inventory = inv.build_manifest(tree)
    filled = inv.rebuild(inventory, arrays, tree)
    equal_bits(filled, tree)
    assert (filled["rate"] * jnp.bfloat16(2)).dtype == jnp.bfloat16


def test_a_filled_array_can_be_donated():
    arrays, inventory = inv.build_manifest({"w": jnp.arange(4096.0)})
    for like in (jnp.zeros(4096), jax.device_put(jnp.zeros(4096), jax.devices()[0])):
        filled = inv.rebuild(inventory, arrays, {"w": like})["w"]
        # Warnings are errors here, and jax warns about donated memory that it could not use.
        jax.jit(lambda x: x + 1, donate_argnums=0)(filled).block_until_ready()
        assert filled.is_deleted()
        assert arrays["w"][7] == 7.0
