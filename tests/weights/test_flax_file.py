"""msgpack as `flax.serialization` writes it, and transformers' former Flax names."""

import msgpack
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import train_state

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import load
from flaxtransfer.weights.naming import huggingface
from flaxtransfer.weights.naming.key_map import to_keys
from flaxtransfer.weights.readers.array_files import read_flax


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
        ({"a": msgpack.ExtType(5, b"")}, "extensions must have type 1 .*, got 5"),
        ({"a": [3]}, "a must be an array, got a list"),
        ({"a/b": packed([0], "float32", b"")}, "keys must be names without '/', got 'a/b'"),
        ([1], "must hold arrays by name, got a list"),
    ],
)
def test_what_is_no_dictionary_of_arrays(content, text):
    with pytest.raises(ValueError, match=text):
        read_flax(msgpack.packb(content))


@pytest.mark.parametrize("name", ["float32" * 2000, "float\n\x1b[2J" * 99])
def test_what_a_file_says_is_quoted_in_a_short_line(tmp_path, name):
    path = tmp_path / "w.msgpack"
    path.write_bytes(msgpack.packb({"params": {"a": packed([1], name, bytes(4))}}))
    with pytest.raises(ValueError, match="dtype of an array must be numeric") as caught:
        load(path)
    text = str(caught.value).removeprefix(str(path))
    assert len(text) <= 502
    assert len(text.splitlines()) == 1


def test_truncated(tmp_path):
    data = serialization.msgpack_serialize({"params": {"a": np.ones(100)}})
    for share in (0.1, 0.5, 0.99):
        with pytest.raises(ValueError, match="incomplete or damaged msgpack file"):
            read_flax(data[: int(share * len(data))])


CONFIG = ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3)


def tree(scale=1.0, names=None):
    """Variables of a small network as a nested dict, and its leaves by path."""
    rng = np.random.default_rng(0)
    leaves = {
        path: (rng.uniform(0.5, 1, shape) * scale).astype(np.float32)
        for path, shape in leaf_shapes(CONFIG).items()
    }
    return unflatten(to_keys(names, leaves) if names else leaves), leaves


class State(train_state.TrainState):
    """As in flax's own examples; ``ema_params`` as in many programs."""

    batch_stats: dict
    ema_params: dict | None = None


def state_of(variables, **more):
    return State.create(
        apply_fn=None,
        params=variables["params"],
        tx=optax.adamw(1e-3),
        batch_stats=variables["batch_stats"],
        **more,
    )


def merged(variables):
    """One tree, as ``nnx.to_pure_dict`` gives it."""
    flat = flatten(variables)
    return unflatten({path.partition("/")[2]: leaf for path, leaf in flat.items()})


TREES = {
    "a train state": (lambda v, hf: state_of(v), "left out: opt_state"),
    "a train state of Hugging Face's": (lambda v, hf: state_of(hf), "left out: opt_state"),
    "variables as parameters": (
        lambda v, hf: train_state.TrainState.create(
            apply_fn=None, params=v, tx=optax.sgd(0.1, momentum=0.9)
        ),
        "the network is under 'params/'; left out: opt_state",
    ),
    "an average": (
        lambda v, hf: state_of({**v, "params": tree(0.5)[0]["params"]}, ema_params=v["params"]),
        "38 leaves are averages over steps",
    ),
    "numbers and text beside": (
        lambda v, hf: {
            "net": v,
            "rng": np.zeros(2, np.uint32),
            "step": np.int32(3),
            **{"epoch": 3, "name": "x", "lr": 0.1, "none": None, "flag": True},
        },
        "the network is under 'net/'; left out: rng, step",
    ),
    "NNX": (
        lambda v, hf: {"model": merged(v), "opt_state": {"mu": merged(v)}},
        "the network is under 'model/'; left out: opt_state",
    ),
    "twice the same": (lambda v, hf: {"a": v, "b": v}, "the network is under 'a/'; left out: b"),
}


@pytest.mark.parametrize("case", TREES)
def test_the_network_in_the_state_of_a_program(tmp_path, case):
    (variables, leaves), (hf, _) = tree(), tree(names=huggingface.FLAX)
    make, note = TREES[case]
    path = tmp_path / "checkpoint_500"
    path.write_bytes(serialization.to_bytes(make(variables, hf)))
    for source in (path, tmp_path):
        found = load(source)
        ours = flatten(found.variables)
        assert all(np.array_equal(ours[leaf], leaves[leaf]) for leaf in leaves)
        assert note in found.notes


def test_of_two_networks_in_a_tree_one_is_named(tmp_path):
    path = tmp_path / "two.msgpack"
    path.write_bytes(serialization.to_bytes({"a": tree(2.0)[0], "b": tree()[0]}))
    with pytest.raises(ValueError, match=r"--weights-key\) must name one of 2 .* 'a', 'b'"):
        load(path)
    assert flatten(load(path, key="b").variables).keys() == tree()[1].keys()


def test_parameters_alone_need_statistics(tmp_path):
    path = tmp_path / "params.msgpack"
    for content in (tree()[0]["params"], {"params": tree()[0]["params"]}):
        path.write_bytes(serialization.to_bytes(content))
        with pytest.raises(ValueError, match=r"must have the statistics .*statistics='measure'"):
            load(path)
        assert "12 norms have no running statistics" in str(load(path, statistics="measure").notes)


@pytest.mark.parametrize("name", ["conv_init/kernel", "res_net18/~/initial_conv/w"])
def test_other_programs_networks_are_named(tmp_path, name):
    path = tmp_path / "net.npz"
    np.savez(path, **{name: np.ones((7, 7, 3, 64), np.float32)})
    with pytest.raises(ValueError, match=r"a ResNet of (flax|haiku).*pad otherwise \(SAME\)"):
        load(path)
