"""Files of torch.save without torch: what torch wrote, bit for bit, and what is refused.

`tests/golden/make_torch_files.py` made the files; live comparisons are in tests/parity.
"""

import io
import os
import pickle
import struct
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.paths import flatten
from flaxtransfer.weights import load
from flaxtransfer.weights.readers import torch_file, torch_pickle
from flaxtransfer.weights.readers.torch_file import read_torch
from flaxtransfer.weights.readers.torch_pickle import Foreign, Refused

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)


def text(string):
    return b"X" + struct.pack("<i", len(string)) + string.encode()


def number(value):
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else pickle.dumps(value, 2)[2:-1]


def tensor(key="0", count=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage", view=b""):
    """A tensor as torch pickles it: the name, a storage, and where its numbers are."""
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = (
        b"("
        + text("storage")
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(count)
        + view
        + b"tQ"
    )
    axes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, strides)]
    return name + b"(" + storage + number(offset) + axes[0] + axes[1] + b"\x89}tR"


def dictionary(**values):
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def zipped(content, compression=zipfile.ZIP_STORED, **files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, held in files.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", held)
    return data.getvalue()


def legacy(content, system=SYSTEM, **storages):
    keys = pickle.dumps(list(storages), 2)
    numbers = b"".join(struct.pack("<q", len(a)) + a.tobytes() for a in storages.values())
    return MAGIC + pickle.dumps(1001, 2) + system + content + keys + numbers


FOUR = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_what_torch_wrote_bit_for_bit(golden, layout):
    data = (golden / "torch_files" / f"{layout}.pth").read_bytes()
    # The state of an optimizer beside the weights is not wanted, and its storages are not read.
    arrays, metadata, notes = read_torch(
        data, lambda named: [name for name in named if name.startswith("model/")]
    )
    expected = np.load(golden / "torch_files" / "expected.npz")
    arrays = {key.removeprefix("model/"): array for key, array in arrays.items()}
    assert list(arrays) == list(expected)
    assert arrays["bfloat16"].dtype == jnp.bfloat16
    arrays["bfloat16"] = arrays["bfloat16"].view(np.uint16)
    for name, array in arrays.items():
        wanted = expected[name]
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.tobytes() == wanted.tobytes(), name
    assert (metadata, notes) == ({}, [])


def test_nothing_of_torch_is_imported():
    # In the suite's own environment there is no torch; where there is one, it stays where it is.
    assert "torch" not in vars(torch_file)
    assert "torch" not in sys.modules or "torch" not in vars(torch_pickle)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_network_in_either_layout(basic, tmp_path, layout):
    pieces = {key: np.ascontiguousarray(array) for key, array in basic.items()}
    kinds = {"f": "FloatStorage", "i": "LongStorage"}
    content = dictionary(
        **{
            key: tensor(
                str(n),
                a.size,
                0,
                a.shape,
                [s // a.itemsize for s in a.strides],
                kinds[a.dtype.kind],
            )
            for n, (key, a) in enumerate(pieces.items())
        }
    )
    if layout == "zip":
        files = {f"data_{n}": array.tobytes() for n, array in enumerate(pieces.values())}
        data = zipped(content, **files)
    else:
        data = legacy(content, **{str(n): a.ravel() for n, a in enumerate(pieces.values())})
    (tmp_path / "w.pth").write_bytes(data)
    kernel = flatten(load(tmp_path / "w.pth").variables)["params/fc/kernel"]
    np.testing.assert_array_equal(kernel, basic["fc.weight"].T)


def test_big_endians_and_missing_checksums():
    content, swapped = dictionary(a=tensor()), FOUR.astype(">f4").tobytes()
    arrays, _, _ = read_torch(zipped(content, data_0=swapped, byteorder="big"))
    assert arrays["a"].tolist() == [0, 1, 2, 3]
    # Of a complex number each half is turned round by itself.
    pairs = (FOUR + 1j * FOUR[::-1]).astype(">c8").tobytes()
    halves = dictionary(a=tensor(kind="ComplexFloatStorage"))
    arrays, _, _ = read_torch(zipped(halves, data_0=pairs, byteorder="big"))
    assert arrays["a"].tolist() == [3j, 1 + 2j, 2 + 1j, 3]
    # torch writes 0 for every checksum when it is told to compute none.
    data = bytearray(zipped(content, data_0=FOUR.tobytes()))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            checksum = struct.pack("<I", entry.CRC)
            while (at := data.find(checksum)) >= 0:
                data[at : at + 4] = bytes(4)
    arrays, _, notes = read_torch(bytes(data))
    assert arrays["a"].tolist() == [0, 1, 2, 3]
    assert notes == ["the archive has no checksums: damage cannot be detected"]


def test_a_flipped_bit_is_found():
    data = bytearray(zipped(dictionary(a=tensor()), data_0=FOUR.tobytes()))
    data[data.find(FOUR.tobytes())] ^= 1
    with pytest.raises(ValueError, match="Bad CRC-32 for file 'archive/data/0'"):
        read_torch(bytes(data))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_most_of_a_file_is_read_in_place(compression):
    """Where the weights are most of the file, what is stored is not copied."""
    many = np.arange(5000, dtype=np.float32)
    content = dictionary(a=tensor(count=5000, shape=(5000,)))
    data = zipped(content, compression, data_0=many.tobytes())
    arrays, _, _ = read_torch(data)
    assert np.array_equal(arrays["a"], many)
    plain = compression == zipfile.ZIP_STORED
    assert np.shares_memory(arrays["a"], np.frombuffer(data, "u1")) == plain
    if plain:
        broken = data.replace(many.tobytes(), many[::-1].tobytes())
        with pytest.raises(ValueError, match="Bad CRC-32 for file 'archive/data/0'"):
            read_torch(broken)


@pytest.mark.parametrize(
    ("at", "byte"), [(0, b"X"), (6, b"\x01"), (6, b"\x20"), (6, b"\x40"), (30, b"X")]
)
def test_the_header_of_a_file_in_place_is_that_of_the_archive(at, byte):
    """Its mark, its flags (encrypted, patched, strongly encrypted), its name."""
    many = np.arange(5000, dtype=np.float32)
    content = dictionary(a=tensor(count=5000, shape=(5000,)))
    data = bytearray(zipped(content, data_0=many.tobytes()))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        place = archive.getinfo("archive/data/0").header_offset + at
    data[place : place + 1] = byte
    with pytest.raises(ValueError, match="header of the file 'archive/data/0' is not that of"):
        read_torch(bytes(data))


def test_views_of_the_former_layout():
    view = b"(" + text("1") + number(1) + number(2) + b"t"
    content = dictionary(a=tensor(shape=(2,), view=view), b=tensor(offset=1, shape=(3,)))
    arrays, _, _ = read_torch(legacy(content, **{"0": FOUR}))
    assert [arrays[name].tolist() for name in "ab"] == [[1, 2], [1, 2, 3]]
    beyond = dictionary(a=tensor(shape=(3,), view=view))
    with pytest.raises(ValueError, match=r"shape \[3\] exceeds its storage"):
        read_torch(legacy(beyond, **{"0": FOUR}))
    long = b"(" + text("1") + number(1) + number(4) + b"t"
    with pytest.raises(ValueError, match="a view exceeds its storage"):
        read_torch(legacy(dictionary(a=tensor(shape=(2,), view=long)), **{"0": FOUR}))


NAMED = {
    "GLOBAL": b"\x80\x02cposix\nsystem\n.",
    "a call": b"\x80\x02cposix\nsystem\n" + text("touch executed") + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "a list's neighbor": b"\x80\x02cargparse\nArgumentParser\n.",
    "deeper": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93.",
    "a reader of numpy's": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
}


@pytest.fixture(scope="module")
def audit():
    """What the interpreter reports of imports, calls and files while the list is not None."""
    state = {"seen": None}

    def watch(event, arguments):
        wanted = ("os.system", "pickle.find_class", "import", "open", "exec")
        if state["seen"] is not None and event in wanted:
            state["seen"].append((event, arguments))

    sys.addaudithook(watch)  # for good: there is no way to take one off
    return state


@pytest.mark.parametrize("content", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("layout", [zipped, legacy, bytes], ids=["zip", "legacy", "bare"])
def test_a_name_that_is_on_no_list_is_refused_and_not_looked_up(audit, content, layout):
    data, audit["seen"] = layout(content), []
    with pytest.raises(
        ValueError, match=r"refused, and no code in it was run, because it calls \w+\."
    ):
        read_torch(data)
    seen, audit["seen"] = audit["seen"], None
    assert seen == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cposix\x0b\x1b[2J\nsystem\n.",
        pickle.dumps({"a\nb\u2028c": {"d": 1}}, 2),
        pickle.dumps(["a\x85\nb"], 2)[:-1] + b"R.",
    ],
)
@pytest.mark.parametrize("layout", [zipped, legacy])
def test_names_in_a_file_stay_in_one_line(content, layout):
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_torch(layout(content))
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)


class Whole:
    """What a pickled network looks like: a class of some module, with its state."""


def test_a_whole_network_is_refused_with_the_reason():
    whole = pickle.dumps(Whole(), 2).replace(
        f"c{__name__}\nWhole\n".encode(), b"ctorchvision.models.resnet\nResNet\n"
    )
    for layout in (zipped, legacy):
        with pytest.raises(ValueError, match=r"whole network.*torchvision\.models\.resnet\.ResNet"):
            read_torch(layout(whole))
    module = b"\x80\x02(" + text("module") + b"NNNtQ."
    with pytest.raises(ValueError, match="whole network, pickled with its code"):
        read_torch(legacy(module))


HOSTILE = {
    "no pickle": (b"\x80\x02}", "truncated, damaged"),
    "an instruction too many": (b"\x80\x02.", "pops more than it pushed"),
    "text instructions": (b"\x80\x02I5\n.", "the instruction INT"),
    "a call of text": (b"\x80\x02" + text("a") + b")R.", "called value is not a function"),
    "a state of a text": (b"\x80\x02" + text("a") + b"}b.", "a str cannot have a state"),
    "nested keys": (b"\x80\x02})\x85\x85Ns.", "must not be a tuple"),
    "a storage of two dtypes or sizes": (
        dictionary(a=tensor(), b=tensor(kind="LongStorage")),
        "two dtypes or sizes",
    ),
    "no storage": (dictionary(a=tensor(key="1")), "missing|but the file holds"),
    "beyond": (
        dictionary(a=tensor(shape=(2, 3), strides=(3, 1))),
        "exceeds its storage",
    ),
    "far beyond": (dictionary(a=tensor(offset=1 << 60)), "exceeds its storage"),
    "strides far beyond": (
        dictionary(a=tensor(strides=(1 << 61,))),
        "exceeds its storage",
    ),
    "negative offset": (dictionary(a=tensor(offset=-1)), "must be integers >= 0"),
    "negative stride": (dictionary(a=tensor(strides=(-1,))), "must be integers >= 0"),
    "more strides than axes": (dictionary(a=tensor(strides=(1, 1))), "1 axes and 2 strides"),
    "many axes": (dictionary(a=tensor(shape=(1,) * 65, strides=(1,) * 65)), "65 axes"),
    "more numbers than there are": (dictionary(a=tensor(count=5)), "bytes"),
    "a terabyte": (
        dictionary(a=tensor(shape=(1 << 40,), strides=(0,))),
        "would unpack to 4,398,046,511,104 bytes",
    ),
    "a terabyte in all": (
        dictionary(**{f"a{n}": tensor(shape=(1 << 20,), strides=(0,)) for n in range(20)}),
        "would unpack",
    ),
    "empty and huge": (
        dictionary(a=tensor(shape=(0, 1 << 62, 1 << 62), strides=(1, 1, 1))),
        "truncated, damaged",
    ),
    "a loop": (
        b"\x80\x02}q\x00" + text("model") + b"h\x00s.",
        "tensors by name|but the file holds",
    ),
    "no dictionary": (b"\x80\x02]" + tensor() + b"a.", "must hold tensors by name, got a list"),
    "other things only": (dictionary(epoch=b"K\x03"), r"by name, got a dict of epoch|storages"),
    "one list for many": (
        b"\x80\x02(]q\x00NN\x86ah\x000ccollections\nOrderedDict\nq\x01h\x00\x85Rh\x01h\x00\x85Rl.",
        "truncated, damaged",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_what_does_not_fit_is_an_error_of_one_kind(case, layout):
    content, said = HOSTILE[case]
    if layout == "zip":
        data = zipped(content, data_0=FOUR.tobytes())
    else:
        data = legacy(content, **{"0": FOUR})
    with pytest.raises(ValueError, match=said):
        read_torch(data)


def test_there_is_an_end_to_instructions(monkeypatch):
    monkeypatch.setattr(torch_pickle, "MOST_INSTRUCTIONS", 1000)
    assert torch_pickle.read_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 498 + b"N."))[0] is None
    with pytest.raises(ValueError, match="more than 1,000 instructions"):
        torch_pickle.read_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 499 + b"N."))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (legacy(dictionary(a=tensor()), **{"0": FOUR[:3]}), "must have 16 bytes"),
        (legacy(dictionary(a=tensor()), **{"0": FOUR})[:-1], "must have 16 bytes"),
        (legacy(dictionary(a=tensor()), **{"0": FOUR}) + b"1", "1 bytes follow the last storage"),
        (
            legacy(dictionary(a=tensor()), pickle.dumps({}, 2), **{"0": FOUR}),
            "must be little-endian",
        ),
        (pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write"),
        (
            zipped(dictionary(a=tensor()), data_0=FOUR.tobytes(), byteorder="?"),
            "byteorder must be little or big",
        ),
        (
            zipped(dictionary(a=tensor()), data_0=FOUR.tobytes(), **{"constants.pkl": b""}),
            "a TorchScript program",
        ),
        (
            zipped(dictionary(a=tensor()), data_0=b"", **{"b/data.pkl": b""}),
            "must hold one data.pkl, got 2",
        ),
    ],
)
def test_layouts_that_contradict_themselves(data, said):
    with pytest.raises(ValueError, match=said):
        read_torch(data)


def test_values_beside_weights_leave_a_mark():
    from argparse import Namespace
    from collections import Counter, OrderedDict, defaultdict, deque

    beside = [
        Namespace(a=1),
        Counter("ab"),
        defaultdict(list, a=[1]),
        deque([1]),
        {1},
        1j,
        frozenset({2}),
        bytearray(b"1"),
        np.float64(0.5),
        np.dtype("f4"),
    ]
    for protocol in (2, 3, 4):
        found, _ = torch_pickle.read_pickle(io.BytesIO(pickle.dumps(beside, protocol)))
        assert all(isinstance(value, Foreign) for value in found)
    plain = {"a": [1, 2.5, None, True, "ä", b"\xff", (), (1, 2, 3), 1 << 80], "b": {}}
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps({**plain, "c": OrderedDict(plain)}, protocol)
        found, _ = torch_pickle.read_pickle(io.BytesIO(data))
        if protocol == 2:  # which writes bytes as a call
            assert isinstance(found["a"].pop(5), Foreign)
            assert isinstance(found["c"]["a"], list)
        else:
            assert found == {**plain, "c": plain}
    with pytest.raises(Refused, match=r"posix\.DirEntry|nt\.DirEntry"):
        torch_pickle.read_pickle(io.BytesIO(pickle.dumps(os.DirEntry)))


@pytest.mark.parametrize("layout", [zipped, legacy], ids=["zip", "legacy"])
def test_states_and_options_of_other_libraries_are_passed_over(layout):
    """As fastai's ``Learner.save``, mmengine, omegaconf and numpy's random states pickle them."""
    names = [
        *("fastcore.foundation\nL", "mmengine.logging.history_buffer\nHistoryBuffer"),
        *("omegaconf.dictconfig\nDictConfig", "functools\npartial", "datetime\ndatetime"),
        *("numpy\nndarray", "torch.optim.adamw\nAdamW", "torch\nqint8"),
    ]
    state = b"}(" + text("a") + b"K\x01u"
    marks = (b"c" + name.encode() + b"\n)\x81" + state + b"b" for name in names)
    content = dictionary(**{f"n{n}": mark for n, mark in enumerate(marks)})
    with pytest.raises(ValueError, match=r"must hold tensors by name, got a dict of n0, n1, n2,"):
        read_torch(layout(content))
