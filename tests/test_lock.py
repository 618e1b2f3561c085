"""Claims about the folder lock, with real second processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flaxtransfer.files import folder_lock

ROOT = Path(__file__).resolve().parents[1]
# Says "held" and keeps the lock until its standard input ends, or says why it cannot.
HOLDER = """
import sys
from flaxtransfer.files import folder_lock
try:
    with folder_lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture
def start():
    """Starts a second process that tries to hold a folder; returns it and its first line."""
    running = []

    def run(folder: Path) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process, process.stdout.readline().strip()

    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_second_process_is_refused_by_the_pid_of_the_first(tmp_path, start):
    process, said = start(tmp_path)
    assert said == "held"
    with (
        pytest.raises(ValueError, match=f"written by process {process.pid} on ") as caught,
        folder_lock(tmp_path),
    ):
        pass
    assert str(tmp_path) in str(caught.value)
    assert "give another folder" in str(caught.value)


def test_this_process_is_named_to_the_second(tmp_path, start):
    with folder_lock(tmp_path):
        _, said = start(tmp_path)
    assert f"process {os.getpid()} on " in said


def test_same_process_twice_says_so(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(ValueError, match="this process"), folder_lock(tmp_path):
            pass
        # The refused attempt must not have opened the door for others.
        with pytest.raises(ValueError, match="this process"), folder_lock(tmp_path):
            pass


def test_a_killed_holder_leaves_no_lock(tmp_path, start):
    process, said = start(tmp_path)
    assert said == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with folder_lock(tmp_path) as path:
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_released_at_the_end_and_by_an_exception(tmp_path, start):
    with folder_lock(tmp_path):
        pass
    with pytest.raises(KeyError), folder_lock(tmp_path):
        raise KeyError
    _, said = start(tmp_path)
    assert said == "held"


def test_released_although_a_forked_child_still_has_the_file(tmp_path, start):
    with folder_lock(tmp_path):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[_descriptor(tmp_path / ".lock")],
        )
    try:
        _, said = start(tmp_path)
    finally:
        child.kill()
        child.communicate()
    assert said == "held"


def _descriptor(path: Path) -> int:
    for name in os.listdir("/proc/self/fd"):
        if Path(f"/proc/self/fd/{name}").resolve() == path:
            return int(name)
    raise AssertionError(f"{path} is not open")


def test_text_of_a_longer_lived_name_is_overwritten(tmp_path):
    (tmp_path / ".lock").write_text("process 1234567890 on a.very.long.host.name.example\n" * 9)
    with folder_lock(tmp_path) as path:
        assert path.read_text().count("\n") == 1


def test_two_folders_are_two_locks(tmp_path):
    with folder_lock(tmp_path / "a" / "deep"), folder_lock(tmp_path / "b"):
        assert (tmp_path / "a" / "deep" / ".lock").exists()


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError) as caught, folder_lock(place):
            pass
        assert caught.value.errno == errno.ENOTDIR
        assert "\n" not in str(caught.value)
