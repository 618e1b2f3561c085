"""Runs a small training run in a process of its own, to be killed: ``run_small.py <folder>``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
from small import batch, feed, network, two_phases

import flaxtransfer as ft


def slowly(number: int) -> ft.Batch:
    # Long enough for a kill to hit any part of a step as well as a save.
    time.sleep(0.01)
    return batch(number)


def main(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model, variables = network()
    plan = two_phases(variables["params"], steps=60, ema=0.9)
    options = ft.Options(evaluate_every=3)
    print("ready", flush=True)
    ft.fit(model, variables, plan, feed(make=slowly), folder, resume=True, options=options)
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
