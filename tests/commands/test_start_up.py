"""What the command line imports, and how long it takes, before it runs anything."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from flaxtransfer.commands.subcommands import SUBCOMMANDS

HEAVY = (
    "jax",
    "flax",
    "optax",
    "sklearn",
    "scipy",
    "grain",
    "orbax",
    "matplotlib",
    "tensorflow_datasets",
    "PIL",
    "pyarrow",
)
MAIN = "from flaxtransfer.__main__ import main; main()"
PROGRAM = f"""
import atexit, sys
names = {HEAVY!r}
atexit.register(lambda: print("heavy:", *(n for n in names if n in sys.modules), file=sys.stderr))
{MAIN}
"""
HELP = [[name, "--help"] for name in SUBCOMMANDS]
ERRORS = [
    ["trian"],
    ["--verbose"],
    ["train", "--dat", "digits"],
    ["train", "--data"],
    ["train", "--data", "digit"],
    ["train", "--data", "digits", "--group-column", "patient"],
    ["train", "--folds", "1"],
    ["train", "--folds", "3", "--fold", "4"],
    ["train", "--fold", "2"],
    ["train", "--profile", "15:10"],
    ["train", "--run", "s3://bucket/run"],
    ["train", "--batch-size", "0"],
    ["train", "--batch-size", "x"],
    ["train", "--head", "old"],
    ["train", "--strategy", "surgicl"],
    ["train", "--strategy", "nowhere.yaml"],
    ["train", "--adapter", "linear"],
    ["plan", "--model", "resnet5"],
    ["find-rate", "--out", "rates.txt"],
    ["find-rate", "--lowest", "2"],
    ["probe", "--out", "x.xyz"],
    ["plan", "--out", "missing/p.yaml"],
    ["diagnose", "--run", "nowhere", "--target", "folder:x", "--out", "/dev/null/report"],
    ["convert", "nowhere.pth", "x.xyz"],
    ["params", "--rates", "hed=1"],
    ["predict", "nowhere", "image.png"],
    ["explain", "nowhere.pth", "--out", "explained"],
    ["explain", "builtin", "--data", "scans", "--out", "explained"],
    ["diagnose", "--run", "nowhere"],
    ["diagnose", "--run", "nowhere", "--target", "scans"],
    ["evaluate", "nowhere", "--data", "scans"],
    ["convert", "nowhere.pth"],
]
CASES = [(words, 0) for words in ([["--version"], ["--help"], *HELP])] + [([], 2)]
CASES += [(words, 2) for words in ERRORS]


@pytest.mark.parametrize(("words", "code"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_help_and_wrong_options_are_answered_before_jax_is_imported(words, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if words:
        assert len(done.stderr.splitlines()) == (2 if code else 1)  # "heavy:" is one of them
    assert done.stderr.splitlines()[-1] == "heavy:"
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "share"), [(["--help"], 0.5), (["--version"], 0.5), (["train", "--help"], 0.75)]
)
def test_help_is_faster_than_importing_jax_flax_and_optax(words, share):
    def seconds(program: str, *words: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program, *words], capture_output=True, check=True)
        return time.perf_counter() - start

    # In turns, so that a busy machine is busy for both.
    pairs = [(seconds(MAIN, *words), seconds("import jax, flax, optax")) for _ in range(5)]
    ours, theirs = map(min, zip(*pairs, strict=True))
    assert ours <= share * theirs
