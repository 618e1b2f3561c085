"""Claims about files that somebody else made: what is refused, how soon and in which words."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from flaxtransfer.files import (
    atomic_write,
    check_regular,
    folder_lock,
    parse_json,
    read_json,
    refuse_link,
    replace_file,
)

DEEP = b"[" * 5000

HOSTILE_JSON = {
    "empty": (b"", "it is empty"),
    "half": (b'{"a": [1, 2', "it is not JSON"),
    "zeros": (bytes(50), "it is not JSON"),
    "garbage": (b"\xa7" * 9, "not UTF-8"),
    "deep, closed": (DEEP + b"]" * 5000, "nested at most 64 deep"),
    "deep objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested at most 64 deep"),
    "65 deep": (b"[" * 65 + b"]" * 65, "nested at most 64 deep"),
    "long number": (b'{"a": ' + b"7" * 5000 + b"}", "a number of 5,000 digits"),
    "many brackets": (b"[" + b"[]," * 4_000_001 + b"1]", "brackets"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_ends_soon_in_one_short_line_that_names_the_file(tmp_path, name):
    data, said = HOSTILE_JSON[name]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        read_json(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged: ")
    assert len(text) <= 600
    assert "\n" not in text
    assert "sys." not in text
    assert time.process_time() - start < 2


def test_a_file_of_the_disk_size_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="at most 134,217,728 bytes, got 1,099,511,627,776"):
        read_json(path)


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, None, True, "ü\udcff"]}, [], 3, "x", json.loads("[" * 64 + "]" * 64)]
)
def test_sound_json_is_read(tmp_path, value):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    assert parse_json(json.dumps(value).encode(), "a line") == value


def pipe(path):
    os.mkfifo(path)


def server(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


KINDS = {"named pipe": pipe, "socket": server, "folder": os.mkdir}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_unopened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # The path of a socket must be short.
    KINDS[kind]("x.json")
    for read in (check_regular, read_json):
        with pytest.raises(ValueError, match=f"x.json must be a regular file, got a {kind}"):
            read("x.json")


def test_a_device_is_refused_and_a_link_to_a_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="/dev/zero must be a regular file, got a device"):
        check_regular("/dev/zero")
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_link_where_we_write_is_refused_with_its_target(tmp_path):
    (tmp_path / "checkpoints").symlink_to("/elsewhere")
    with pytest.raises(ValueError, match="must not be a symbolic link, got one to /elsewhere"):
        refuse_link(tmp_path / "checkpoints")
    refuse_link(tmp_path)
    refuse_link(tmp_path / "none")


def test_a_planted_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for target in (victim, tmp_path / "none"):
        run = tmp_path / f"run-{target.name}"
        run.mkdir()
        (run / ".lock").symlink_to(target)
        with pytest.raises(ValueError, match=r"\.lock must not be a symbolic link"):
            folder_lock(run).__enter__()
    assert victim.read_text() == "mine"
    assert not (tmp_path / "none").exists()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    with folder_lock(tmp_path / "link"):
        assert (tmp_path / "real" / ".lock").exists()


def test_a_pipe_in_the_place_of_the_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match="must be a regular file, got a named pipe"):
        folder_lock(tmp_path).__enter__()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_at_the_target_of_a_write_is_replaced_and_not_followed(tmp_path, kind):
    victim, target = tmp_path / "victim", tmp_path / "target"
    if kind == "file":
        victim.write_text("mine")
    else:
        victim.mkdir()
        (victim / "file").write_text("mine")
    target.symlink_to(victim)
    with atomic_write(target) as made:
        if kind == "file":
            made.write_text("ours")
        else:
            made.mkdir()
    assert not target.is_symlink()
    assert (victim if kind == "file" else victim / "file").read_text() == "mine"


def test_a_write_into_no_folder_names_file_and_folder(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"a\.txt cannot be written .*missing'"),
        atomic_write(tmp_path / "missing" / "a.txt"),
    ):
        pass


@pytest.mark.parametrize("name", [".config.json.tmp", "config.json"])
def test_a_planted_link_is_replaced_and_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / name).symlink_to(victim)
    replace_file(tmp_path / "config.json", b"{}")
    assert victim.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "config.json"}
    assert read_json(tmp_path / "config.json") == {}
    assert not (tmp_path / "config.json").is_symlink()
