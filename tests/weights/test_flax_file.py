"""msgpack as `flax.serialization` writes it, and transformers' former Flax names."""

import msgpack
import numpy as np
import pytest
from flax import serialization

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import load
from flaxtransfer.weights.naming import huggingface
from flaxtransfer.weights.naming.key_map import to_keys
from flaxtransfer.weights.readers.flax_file import read_flax


def packed(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb([shape, dtype, content]))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("spelling", ["layer/{k}", "layer/layer_{k}"])
def test_a_file_that_flax_wrote(tmp_path, block, spelling):
    config = ResNetConfig(block, (1, 2, 1, 1), width=4, classes=3)
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.uniform(0.5, 1, shape).astype(np.float32)
        for path, shape in leaf_shapes(config).items()
    }
    keys = to_keys(huggingface.FLAX, leaves)
    assert "batch_stats/resnet/encoder/stages/1/layers/0/shortcut/normalization/var" in keys
    if "layer_" in spelling:
        keys = {key.replace("/layer/", "/layer/layer_"): array for key, array in keys.items()}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.msgpack_serialize(unflatten(keys)))
    for source in (path, tmp_path):
        checkpoint = load(source)
        assert (checkpoint.format, checkpoint.config) == ("huggingface-flax", config)
        found = flatten(checkpoint.variables)
        assert all(np.array_equal(found[leaf], leaves[leaf]) for leaf in leaves)


def test_half_precision():
    import jax.numpy as jnp

    arrays = {"a": jnp.array([1.5, -2.0], jnp.bfloat16), "b": np.float16([0.5])}
    found, _, _ = read_flax(serialization.msgpack_serialize(arrays))
    assert found["a"].astype(np.float32).tolist() == [1.5, -2.0]
    assert found["b"].dtype == np.float16


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": packed([1 << 40], "float32", b"")}, "bytes of an array must fit float32.*, got 0"),
        (
            {"a": packed([-1], "float32", b"")},
            r"shape of an array must be integers >= 0, got \[-1\]",
        ),
        ({"a": packed([1], "object", bytes(8))}, "dtype of an array must be numeric, got 'object'"),
        ({"a": msgpack.ExtType(2, b"")}, "extensions must have type 1 .*, got 2"),
        ({"a": 3}, "a must be an array, got a int"),
        ({"a/b": packed([0], "float32", b"")}, "keys must be names without '/', got 'a/b'"),
        ([1], "must hold arrays by name, got a list"),
    ],
)
def test_what_is_no_dictionary_of_arrays(content, text):
    with pytest.raises(ValueError, match=text):
        read_flax(msgpack.packb(content))


def test_truncated(tmp_path):
    data = serialization.msgpack_serialize({"params": {"a": np.ones(100)}})
    for share in (0.1, 0.5, 0.99):
        with pytest.raises(ValueError, match="incomplete or damaged msgpack file"):
            read_flax(data[: int(share * len(data))])
