"""Times the test of the maximum mean discrepancy, and the memory that a large one takes.

    python experiments/benchmarks/mmd.py

First 2,000 against 2,000 examples of 512 features with 1,000 permutations, beside NumPy doing the
usual: the kernel matrix once, and for each permutation its three sums by index (a few of them,
scaled up). Then 50,000 against 50,000, where a kernel matrix would take 40 GB in float32, in a
process of its own that says what it took at most. Target: 3 s for the first on 2 CPU cores, the
compilation not counted.
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
import tyro

from flaxtransfer.shift import mmd_test


@dataclass(frozen=True)
class Mmd:
    """Time the test of the maximum mean discrepancy.

    Args:
      examples: of each sample.
      large: examples of each sample in the second part; 0 leaves it out.
      features: of each example.
      permutations: of the test.
      sampled: permutations that NumPy is timed on.
      rounds: turns of each; the best counts.
      alone: print time and memory of one test of ``large``; for the script's own use.
    """

    examples: int = 2000
    large: int = 50_000
    features: int = 512
    permutations: int = 1000
    sampled: int = 10
    rounds: int = 5
    alone: bool = False


def samples(count: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of one distribution, float32."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, count, features)).astype(np.float32))


def by_index(source: np.ndarray, target: np.ndarray, permutations: int) -> tuple[float, float]:
    """Seconds for the kernel matrix, and for one permutation, in float32."""
    start = time.perf_counter()
    pooled = np.concatenate([source, target])
    squares = np.square(pooled).sum(1)
    distances = squares[:, None] + squares - 2 * pooled @ pooled.T
    kernel = np.exp(-distances / (2 * np.median(distances)))
    once = time.perf_counter() - start
    rng, count = np.random.default_rng(0), len(source)
    start = time.perf_counter()
    for _ in range(permutations):
        order = rng.permutation(len(pooled))
        first, second = order[:count], order[count:]
        for rows, columns in ((first, first), (second, second), (first, second)):
            kernel[np.ix_(rows, columns)].mean()
    return once, (time.perf_counter() - start) / permutations


def main(options: Mmd) -> None:
    """Prints seconds and the ratio; the large test runs in a process of its own."""
    if options.alone:
        source, target = samples(options.large, options.features)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        found = mmd_test(source, target, permutations=options.permutations)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{options.large} against {options.large}: {seconds:.1f} s, compilation included; at "
            f"most {(peak - before) / 2**20:.2f} GiB more than before; p = {found.p:.3f}"
        )
        return
    source, target = samples(options.examples, options.features)
    start = time.perf_counter()
    mmd_test(source, target, permutations=options.permutations)
    first = time.perf_counter() - start
    ours, theirs = [], []
    for _ in range(options.rounds):
        start = time.perf_counter()
        mmd_test(source, target, permutations=options.permutations)
        ours.append(time.perf_counter() - start)
        once, each = by_index(source, target, options.sampled)
        theirs.append(once + options.permutations * each)
    print(
        f"{options.examples} against {options.examples}, {options.features} features, "
        f"{options.permutations} permutations: {min(ours):.2f} s (median {np.median(ours):.2f}, "
        f"the first time {first:.2f}); NumPy by index {min(theirs):.1f} s, "
        f"{min(theirs) / min(ours):.0f} times as long (median ratio "
        f"{np.median(np.divide(theirs, ours)):.0f})"
    )
    if options.large:
        command = [
            sys.executable,
            __file__,
            "--alone",
            "--large",
            str(options.large),
            "--features",
            str(options.features),
            "--permutations",
            str(options.permutations),
        ]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    print(f"jax {jax.__version__}, numpy {np.__version__}, python {platform.python_version()}")


if __name__ == "__main__":
    main(tyro.cli(Mmd))
