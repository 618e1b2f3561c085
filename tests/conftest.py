"""Settings for the whole suite."""

from __future__ import annotations

import gc
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine is slow at everything, drawing examples included: that says nothing about the
# code, and neither does the time that one example takes.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# As many processes as cores share the machine: threads of BLAS on top wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The suite's networks run for milliseconds and compile for seconds, of which XLA's optimization of
# machine code is about half. What is claimed here does not depend on it; `make test-slow` runs with
# the level that users have, and XLA_FLAGS=--xla_backend_optimization_level=3 does so for all tests.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in _FLAGS:
    quick = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        # Later releases have but the one way to emit fusions, and end at an unknown flag. A program
        # in pieces is compiled on several threads, and the other cores are busy.
        quick += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([_FLAGS, *quick]).strip()

# Nobody reads where in the source an operation comes from, and tracing makes much short garbage.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(200_000, 50, 1000)

# Checkpoints wait for the disk, which in memory takes no time.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# Most of the suite's time would go to compiling the same small networks again in every file,
# worker and fresh process. The first process of a run makes a cache; the others inherit its name.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None if _CACHE in os.environ else tempfile.mkdtemp(prefix="flaxtransfer-compiled-")
if _made is not None:
    os.environ[_CACHE] = _made
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"


# CI tries these on one interpreter: rooms that reach jax, flax and numpy through the rooms below
# them, whose tests, and the examples in the docstrings of every room, run on both; and what tries
# the same code for one more task, network or case.
_ONCE = re.compile(
    "(adapt|advice|analysis|commands|data|distributed|experiments|faults|features)/"
    "|(recipes|report|shift)/"
    "|weights/(test_|exports/test_exports)"
    "|test_(costs|readme|sharding)|training/test_(?!fit|program|resume)|models/test_variants"
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what CI tries on one interpreter: some rooms, and all cases of a test but its first."""
    tests = Path(__file__).parent
    seen = set()
    for item in items:
        if not item.path.is_relative_to(tests):
            continue
        test = item.nodeid.partition("[")[0]
        if test in seen or _ONCE.match(item.path.relative_to(tests).as_posix()):
            item.add_marker("once")
        seen.add(test)


def pytest_unconfigure() -> None:
    """Removes the cache, in the process that made it."""
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)
