"""SIGTERM and Ctrl-C end a command at any moment, in one line and with the customary code."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
def hook(event, arguments):
    if event == {event!r} and str(arguments[0]).endswith({end!r}):
        os.kill(os.getpid(), signal.{name})
sys.addaudithook(hook)
from flaxtransfer.__main__ import main
main()
"""


def ended(event, end, name, *words):
    program = PROGRAM.format(event=event, end=end, name=name)
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("end", "name", "code"),
    [
        ("tyro", "SIGINT", 130),
        ("jax", "SIGTERM", 143),
        ("jax._src.interpreters.mlir", "SIGINT", 130),
    ],
)
def test_while_libraries_are_imported(end, name, code):
    done = ended("import", end, name, "train", "--data", "digits")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"flaxtransfer: ended by {name}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "RUN", "FOLDER/dark/0.png"),
        pytest.param(("probe", "DATA"), marks=pytest.mark.slow),
    ],
)
def test_while_images_are_read(words, finished, folder, weights):
    places = {"RUN": str(finished), "DATA": f"--data=folder:{folder}"}
    given = [places.get(word, word.replace("FOLDER", str(folder))) for word in words]
    done = ended("open", "dark/0.png", "SIGTERM", *given)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == "flaxtransfer: ended by SIGTERM"
    assert "Traceback" not in done.stderr
