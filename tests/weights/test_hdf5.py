"""HDF5 from strangers, and what Keras' names mean; Keras itself is asked in tests/parity."""

import io
import zipfile

import h5py
import numpy as np
import pytest

from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.weights.naming import keras
from flaxtransfer.weights.naming.formats import FORMATS
from flaxtransfer.weights.naming.key_map import to_keys, to_leaves
from flaxtransfer.weights.readers.array_files import read_hdf5, read_keras_archive


def file_of(fill):
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        fill(file)
    return data.getvalue()


def layer(file, name, **arrays):
    group = file.create_group(f"layers/{name}_7/vars")
    group.attrs["name"] = name
    for key, array in arrays.items():
        group[key.strip("_")] = array


def test_layers_have_their_own_names_in_every_layout():
    def numbered(file):
        layer(file, "conv1_conv", _0=np.ones((7, 7, 3, 4)), _1=np.ones(4))
        file["optimizer/vars/0"] = np.ones(3)

    def named(file):
        file["model_weights/conv1_conv/conv1_conv/kernel:0"] = np.ones((7, 7, 3, 4))
        file["model_weights/conv1_conv/conv1_conv/bias:0"] = np.ones(4)

    arrays, _, notes = read_hdf5(file_of(numbered))
    assert sorted(arrays) == ["conv1_conv/0", "conv1_conv/1"]
    assert notes == ["the optimizer's state was left out"]
    assert sorted(keras.prepared(arrays)[0]) == sorted(read_hdf5(file_of(named))[0])


def hostile_soft(file):
    file["a"] = h5py.SoftLink("/etc/passwd")


def hostile_external(file):
    file["a"] = h5py.ExternalLink("other.h5", "/weights")


def hostile_storage(file):
    file.create_dataset("a", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def hostile_virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (4,))
    file.create_virtual_dataset("a", layout)


def hostile_text(file):
    file["a"] = ["text"]


def hostile_bomb(file):
    file.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 16,), compression="gzip")


@pytest.mark.parametrize(
    ("fill", "text"),
    [
        (hostile_soft, "/a must not link to another place"),
        (hostile_external, "/a must not link to another place"),
        (hostile_storage, "/a must not be stored in another file"),
        (hostile_virtual, "/a must not be stored in another file"),
        (hostile_text, "the dtype of /a must be numeric, got object"),
        (hostile_bomb, "/a would unpack to 4,398,046,511,104 bytes"),
    ],
)
def test_what_leads_elsewhere_is_not_followed(fill, text):
    with pytest.raises(ValueError, match=text):
        read_hdf5(file_of(fill))


def test_a_group_within_itself_is_read_once():
    def loop(file):
        file["a/w"] = np.ones(2)
        file["a/again"] = file["a"]

    assert list(read_hdf5(file_of(loop))[0]) == ["a/w"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(share):
    data = file_of(lambda file: layer(file, "conv1_conv", _0=np.ones((7, 7, 3, 64))))
    with pytest.raises(ValueError, match="incomplete or damaged HDF5 file"):
        read_hdf5(data[: int(share * len(data))])


def test_an_archive_without_weights():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"must hold model.weights.h5, got \['config.json'\]"):
        read_keras_archive(data.getvalue())


@pytest.mark.parametrize("version", [1, 2])
def test_names_go_there_and_back(version):
    # The smallest network of the version; `keras.applications` has the same names.
    from flaxtransfer.models.config import ResNetConfig

    plain = ResNetConfig("bottleneck", (2, 1, 1, 1), width=4, classes=3)
    second = {"preactivation": True, "stem_bias": True} if version == 2 else {}
    config = keras.first_version(ResNetConfig(**{**plain.to_json(), **second}))
    shapes = leaf_shapes(config)
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    table = keras.table(["post_bn/gamma"] if version == 2 else [])
    keys = to_keys(table, leaves)
    assert "conv2_block2_3_conv/kernel" in keys
    assert ("conv5_block1_preact_bn/gamma" in keys) == (version == 2)
    back = to_leaves(table, keys, shapes, what="keras")
    assert all(np.array_equal(back[path], leaves[path]) for path in leaves)


def test_biases_go_into_the_means_behind():
    # conv + b, then (x - mean): the same as conv, then (x - (mean - b)).
    arrays = {
        "conv1_conv/kernel": np.arange(3.0).reshape(1, 1, 3, 1),
        "conv1_conv/bias": np.array([0.5]),
        "conv1_bn/moving_mean": np.array([2.0]),
        "conv2_block1_1_conv/kernel": np.zeros((1, 1, 1, 1)),
    }
    found, notes = keras.prepared(arrays)
    assert found["conv1_bn/moving_mean"] == [1.5]
    assert "conv1_conv/bias" not in found
    assert found["conv1_conv/kernel"].ravel().tolist() == [2, 1, 0]
    assert notes == [
        "the stem's input channels were reordered from BGR to RGB",
        "1 biases of convolutions were folded into running means",
    ]


def test_biases_add_up_along_the_stream_until_a_shortcut_starts_anew():
    means = {"conv2_block1": 0.0, "conv2_block2": 0.0, "conv3_block1": 0.0, "conv3_block2": 0.0}
    biases = {
        "conv2_block1_0": 1,
        "conv2_block1_3": 2,
        "conv2_block2_3": 4,
        "conv3_block1_0": 8,
        "conv3_block1_3": 16,
        "conv3_block2_3": 32,
    }
    arrays = {f"{block}_preact_bn/moving_mean": np.zeros(1) for block in means}
    arrays |= {f"{name}_conv/bias": np.array([float(b)]) for name, b in biases.items()}
    arrays |= {"post_bn/moving_mean": np.zeros(1), "conv1_conv/bias": np.ones(1)}
    found, _ = keras.prepared(arrays)
    shifted = {block: -found[f"{block}_preact_bn/moving_mean"][0] for block in means}
    assert shifted == {"conv2_block1": 0, "conv2_block2": 3, "conv3_block1": 7, "conv3_block2": 24}
    assert found["post_bn/moving_mean"] == [-56]
    assert found["conv1_conv/bias"] == [1]  # behind it there is a pool of zeros: it stays


def test_the_order_of_blocks_is_that_of_numbers():
    # conv4_block10 comes after conv4_block9.
    arrays = {f"conv4_block{b}_preact_bn/moving_mean": np.zeros(1) for b in range(1, 12)}
    arrays |= {f"conv4_block{b}_3_conv/bias": np.ones(1) for b in range(1, 12)}
    arrays |= {"post_bn/moving_mean": np.zeros(1), "conv1_conv/bias": np.ones(1)}
    found, _ = keras.prepared(arrays)
    assert found["conv4_block11_preact_bn/moving_mean"] == [-10]


def test_other_files_are_left_alone(basic):
    assert FORMATS["keras"].prepare(basic) == (dict(basic), [])
