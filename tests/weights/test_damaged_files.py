"""Files that are damaged, foreign, missing, or wrapped by a training script."""

import os
import re
from pathlib import Path

import pytest

from flaxtransfer import files
from flaxtransfer.weights import load
from flaxtransfer.weights.readers import array_files, torch_file


def file_of(data, name="weights.safetensors"):
    def make(folder, whole):
        (folder / name).write_bytes(data(whole) if callable(data) else data)
        return folder / name

    return make


def of_type(kind, name):
    def make(folder, whole):
        del whole
        kind(folder / name)
        return folder / name

    return make


def header(text):
    return len(text).to_bytes(8, "little") + text


FILES = {
    "named pipe": (of_type(os.mkfifo, "w.safetensors"), ["regular file, got a named pipe"]),
    "named pipe in a folder": (
        of_type(lambda path: os.mkfifo(path / "model.safetensors"), "."),
        ["regular file, got a named pipe"],
    ),
    "device": (lambda folder, whole: Path("/dev/zero"), ["regular file, got a device"]),
    "deep header": (
        file_of(header(b'{"a":' * 5000 + b"1" + b"}" * 5000)),
        ["incomplete or damaged safetensors file", "its header is damaged"],
    ),
    "long number in the header": (
        file_of(header(b'{"a": ' + b"7" * 5000 + b"}")),
        ["incomplete or damaged safetensors file", "its header is damaged"],
    ),
    "a flood of pickle opcodes": (
        file_of(b"\x80\x02" + b"N0" * 2_000_000 + b".", "w.pth"),
        ["a pickle of more than 300,000 instructions"],
    ),
    "keys of one hash": (
        file_of(
            b"\x80\x02}("
            + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") for n in range(9, 99))
            + b"u.",
            "w.pth",
        ),
        ["a number that is a key must be at most"],
    ),
    "empty": (file_of(b""), ["the file is empty"]),
    "empty torch file": (file_of(b"", "w.pth"), ["the file is empty"]),
    "half": (
        file_of(lambda whole: whole[: len(whole) // 2]),
        ["incomplete or damaged safetensors file", "its header states"],
    ),
    "one byte short": (
        file_of(lambda whole: whole[:-1]),
        ["incomplete or damaged safetensors file"],
    ),
    "one byte long": (
        file_of(lambda whole: whole + b"\0"),
        ["incomplete or damaged safetensors file"],
    ),
    "header cut": (
        file_of(lambda whole: whole[:100]),
        ["incomplete or damaged safetensors file", "its header ends at byte"],
    ),
    "header damaged": (
        file_of(lambda whole: whole[:8] + b"]" + whole[9:]),
        ["incomplete or damaged safetensors file", "its header is damaged"],
    ),
    "a few letters": (file_of(b"weights"), ["incomplete or damaged safetensors file"]),
    "no arrays": (file_of(array_files.write_safetensors({}, {})), ["holds no arrays"]),
    "pointer": (
        file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["Git LFS pointer", "git lfs pull"],
    ),
    "web page": (file_of(b"<!DOCTYPE html><html>"), ["a web page"]),
    "half an archive": (file_of(b"PK\x03\x04 and more"), ["incomplete or damaged zip archive"]),
    "text": (file_of(b"hello, this is text", "w.bin"), ["unknown format"]),
    "another kind": (
        file_of(b"...", "w.onnx"),
        ["unknown format: the first bytes are b'...'", "(.safetensors)"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_or_foreign_file_is_refused(golden, tmp_path, case):
    make, parts = FILES[case]
    path = make(tmp_path, (golden / "torchvision_basic" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_missing_file_names_the_nearest(basic, write):
    folder = write(basic, "resnet18_best.safetensors").parent
    with pytest.raises(FileNotFoundError, match=r"did you mean 'resnet18_best\.safe"):
        load(folder / "resnet18_bets.safetensors")
    with pytest.raises(FileNotFoundError, match=r"checkpoints there: resnet18_best\.safetensors"):
        load(folder / "zzz.pth")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        load(folder / "no" / "zzz.pth")


def test_a_folder_must_hold_one_checkpoint(basic, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds 0 checkpoints: no .safetensors"):
        load(tmp_path)
    write(basic, "first.safetensors")
    assert load(tmp_path).config.width == 4
    write(basic, "second.safetensors")
    with pytest.raises(FileNotFoundError, match=r"first\.safetensors, second\.safetensors"):
        load(tmp_path)
    write(basic, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert load(tmp_path).config.width == 4


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("s3://bucket/resnet18.pth", "unknown kind of address; known: hf://"),
        ("", "source must not be empty"),
    ],
)
def test_a_source_that_is_no_path(source, text):
    with pytest.raises(ValueError, match=text):
        load(source)


def test_a_file_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match="must hold tensors by name, got a list"):
        torch_file.tensors([1, 2])


def test_a_sealed_file_is_what_its_manifest_says(basic, write, tmp_path):
    """A manifest of another program, or one that does not name the file, says nothing."""
    path = write(basic, "model.safetensors")
    files.seal(tmp_path, ["model.safetensors"])
    wanted = load(path).sha256
    write(basic | {"fc.bias": basic["fc.bias"] + 1}, "model.safetensors")
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=r"model\.safetensors: it was changed since the run w"):
            load(source)
    assert load(write(basic, "other.safetensors")).sha256 == wanted
    manifest = tmp_path / files.MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace(wanted, wanted[::-1]))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: its checksum does not match"):
        load(path)
    manifest.write_text('{"name": "another program"}')
    assert load(path).class_names is None
