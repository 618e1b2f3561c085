"""Archives that strangers made."""

import io
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from flaxtransfer.weights import load
from flaxtransfer.weights.readers.archives import members


def archive_of(files, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_files_by_name():
    assert members(archive_of({"a.npy": b"1", "b/c": b"2"})) == {"a.npy": b"1", "b/c": b"2"}


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "..\\out"])
def test_names_that_lead_out(name):
    with pytest.raises(ValueError, match="leads out of the archive"):
        members(archive_of({name: b""}))


def test_a_file_without_a_name():
    # A name ends at its first zero byte.
    data = archive_of({"unnamed": b""}).replace(b"unnamed", b"\0nnamed")
    with pytest.raises(ValueError, match="must have a name"):
        members(data)


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".keras"])
def test_a_bomb_is_not_unfolded(tmp_path, suffix):
    data = archive_of({"archive/data.pkl": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 20
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"would unpack from .* to 268,435,456 bytes"):
        load(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".keras"])
def test_an_entry_that_lies_about_its_size_unpacks_to_what_it_states(tmp_path, suffix):
    name = {".npz": "a.npy", ".pth": "archive/data.pkl", ".keras": "model.weights.h5"}[suffix]
    data = archive_of({name: bytes(600 << 20)}, zipfile.ZIP_DEFLATED)
    # The size stands in the central directory, 24 bytes behind its mark.
    place = data.rindex(b"PK\x01\x02") + 24
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data[:place] + (1000).to_bytes(4, "little") + data[place + 4 :])
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError, match="Bad CRC-32"):
        load(path)
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_cannot_be_bounded_is_refused(method):
    with pytest.raises(ValueError, match="must be stored or deflated"):
        members(archive_of({"a.npy": bytes(1000)}, method))


def test_half_an_archive():
    data = archive_of({"a": bytes(1000)})
    with pytest.raises(ValueError, match="incomplete or damaged zip archive"):
        members(data[:500])


def test_an_array_that_says_more_than_it_holds(tmp_path):
    from numpy.lib import format as npy

    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    path = tmp_path / "weights.npz"
    path.write_bytes(archive_of({"a.npy": file.getvalue()}))
    with pytest.raises(ValueError, match="its header states 4,398,046,511,104 bytes"):
        load(path)


def test_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.array([object], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="dtype must be numeric, got object"):
        load(path)
