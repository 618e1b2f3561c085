"""Runs a small training run in a process of its own, to be killed.

    run_small.py <folder> [two_phases | short | progressive] [<moment>:<which>]

A moment is a function of the loop; the process kills itself, as ``kill -9`` would, when that
function has returned for the time ``which``, counted from 1 in this process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import jax

import flaxtransfer as ft
from flaxtransfer.training import loop
from tests.support.small import batch, feed, network, progressive, two_phases

PLANS = {
    "two_phases": lambda params: two_phases(params, steps=60, ema=0.9),
    "short": lambda params: two_phases(params, steps=18, ema=0.9),
    "progressive": progressive,
}


def slowly(number: int) -> ft.data.Batch:
    # Long enough for a kill to hit any part of a step as well as a save.
    time.sleep(0.01)
    return batch(number)


def die_after(moment: str, which: int) -> None:
    """Makes this process end the moment ``flaxtransfer.training.loop``'s function has returned."""
    function, calls = getattr(loop, moment), 0

    def deadly(*arguments, **settings):
        nonlocal calls
        result = function(*arguments, **settings)
        calls += 1
        if calls == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(loop, moment, deadly)


def main(folder: Path, plan: str = "two_phases", death: str = "") -> None:
    # So that a process that was started again comes as far as a kill can be of interest.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model, variables = network()
    if death:
        moment, which = death.split(":")
        die_after(moment, int(which))
    options = ft.FitOptions(evaluate_every=3)
    made = PLANS[plan](variables["params"])
    print("ready", flush=True)
    ft.fit(
        ft.Classifier(model, variables, feed(make=slowly).preprocessing),
        made,
        feed(make=slowly),
        folder,
        resume=True,
        options=options,
    )
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
