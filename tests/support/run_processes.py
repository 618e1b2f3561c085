"""Trains and evaluates a small network in this process, which may be one of several.

    run_processes.py <folder> <job as JSON>

A job has the fields of ``JOB``. What came out goes to ``<folder>/out-<process>.npz`` and the exit
is that of the command line: 2 for an error, 143 after SIGTERM.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

JOB: dict[str, Any] = {
    "plan": "two_phases",
    "steps": 4,
    "seed": 0,
    "ema": None,
    "settings": {},
    "images": 17,
    "held_out": 17,
    "mesh": "plain",
    "above": None,
    "cache": "off",
    "every": None,
    "compute": None,
    "x64": False,
    "bad": None,
    "signal": None,
    "struck": 1,
    "full": None,
    "versions": None,
}
"""What a run is, and what befalls it: ``settings`` are those of both phases, ``bad`` is an image
that process 1 cannot read, ``signal`` a signal and the step at which process ``struck`` gets it
(-1: both), ``full`` the first step whose checkpoint finds no room on the disk, ``versions`` those
of its packages."""


def main(folder: Path, job: dict[str, Any]) -> int:
    from flaxtransfer import distributed
    from flaxtransfer.sharding import guard_cpu_thread_pool

    guard_cpu_thread_pool()
    if job["versions"]:
        distributed._versions = lambda: job["versions"]
    import jax

    jax.config.update("jax_enable_x64", job["x64"])
    distributed.start()

    import flaxtransfer as ft
    from flaxtransfer.sharding import make_mesh
    from flaxtransfer.training import loop
    from flaxtransfer.training.console import Interrupted
    from tests.support.small import PREPROCESSING, SIZE, network

    number, count = distributed.share()
    # The folder of the run is there for process 0 alone: no disk is shared.
    run = folder / ("run" if number == 0 else "nowhere/run")

    class Images(ft.ArraySource):
        def __getitem__(self, index: Any) -> Any:
            if number == 1 and int(index) == job["bad"]:
                raise ValueError(f"image {int(index)} cannot be read")
            return super().__getitem__(index)

    random = np.random.default_rng(0)
    total = job["images"] + job["held_out"]
    labels = np.arange(total) % 3
    noise = random.integers(0, 40, (total, SIZE, SIZE, 3))
    images = (noise + 90 * labels[:, None, None, None]).astype(np.uint8)
    source = Images(images, labels, ("dark", "gray", "bright"))
    # Not in the order of the source, which is not that of the rows either.
    order = np.random.default_rng(1).permutation(total)
    splits = ft.data.Splits.of(order[: job["images"]], order[job["images"] :])
    data = ft.loaders(source, splits, PREPROCESSING, batch_size=16, seed=job["seed"])
    model, variables = network()
    if job["x64"]:
        variables = jax.tree.map(lambda leaf: leaf.astype("float64"), variables)
    if job["compute"]:
        model = ft.resnet(model.config, dtype=job["compute"])
    classifier = ft.Classifier(model, variables, PREPROCESSING)
    plan = plan_of(job, variables["params"])
    mesh = make_mesh()
    if job["mesh"] == "alternating":
        devices = sorted(jax.devices(), key=lambda d: (d.id % 4, d.process_index))
        mesh = make_mesh(devices)
        assert [d.process_index for d in devices[:4]] == [0, 1, 0, 1]
    if job["full"] is not None:
        from flaxtransfer.checkpoint import step_files

        started = step_files.start

        def filled(writer: Any, folder: Path, step: int, *more: Any) -> None:
            if step >= job["full"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            started(writer, folder, step, *more)

        step_files.start = filled
    if job["signal"] and job["struck"] in (number, -1):
        logged = loop._log

        def struck(run: Any, phase: Any, pending: Any) -> str:
            if pending[-1][0] == job["signal"][1]:
                os.kill(os.getpid(), signal.Signals[job["signal"][0]])
            return logged(run, phase, pending)

        loop._log = struck
    compiled = Compiled()
    cache = ft.Cache(job["cache"]) if job["cache"] != "off" else None
    options = ft.FitOptions(log_every=1, evaluate_every=job["every"])
    try:
        with compiled, jax.log_compiles():
            fitted = ft.fit(
                classifier,
                plan,
                data,
                run,
                seed=job["seed"],
                options=options,
                cache=cache,
                mesh=mesh,
                resume=True,
                shard_above=job["above"],
            )
    except Interrupted as interruption:
        print(f"flaxtransfer: {interruption}", flush=True)
        distributed.finish()
        return 128 + interruption.signal_number
    test = ft.predict(
        fitted.network, ft.eval_batches(source, splits.val, PREPROCESSING), mesh, features=True
    )
    if count > 1:
        # Batches of somebody's own would count twice.
        transform = ft.data.evaluation_transform(PREPROCESSING)
        whole = list(
            ft.data.batches_in_order(source, splits.val, batch_size=16, transform=transform)
        )
        for batches in (whole, [{k: v for k, v in b.items() if k != "index"} for b in whole]):
            try:
                ft.evaluate(fitted.network, batches, mesh)
            except ValueError as error:
                print(f"refused: {error}")
    from flaxtransfer.paths import flatten

    np.savez(
        folder / f"out-{number}.npz",
        logits=test.logits,
        labels=test.labels,
        features=test.features,
        examples=test.evaluation().examples,
        notes=np.array(json.dumps(fitted.notes)),
        **{path: np.asarray(leaf) for path, leaf in flatten(fitted.variables).items()},
    )
    assert (number == 0) == run.exists()
    # The state leaves a step as it came, or there would be a second program for a phase.
    assert len(compiled.steps) <= len(plan.phases), compiled.steps
    distributed.finish()
    return 0


class Compiled(logging.Handler):
    """Counts the programs of training steps that are compiled within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        self._logger = logging.getLogger("jax")

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps what is about a step."""
        text = record.getMessage()
        if text.startswith("Compiling jit(step)"):
            self.steps.append(text[:300])

    def __enter__(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)


def plan_of(job: dict[str, Any], params: Any) -> Any:
    import flaxtransfer as ft
    from tests.support.small import two_phases

    if job["plan"] == "two_phases":
        return two_phases(params, steps=job["steps"], ema=job["ema"], **job["settings"])
    if job["plan"] == "measured":
        # Statistics are measured and the head is solved before the first step.
        first = two_phases(params, steps=job["steps"]).phases[0]
        from dataclasses import replace

        return ft.Plan([replace(first, recalibrate=ft.everything(), probe="logistic")])
    raise ValueError(f"plan must be two_phases or measured, got {job['plan']!r}")


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]), {**JOB, **json.loads(sys.argv[2])})
    except (ValueError, OSError) as error:
        from flaxtransfer import distributed

        line = distributed.lost(error) or str(error)
        print(f"flaxtransfer: {line}", flush=True)
        distributed.leave(line)
    sys.exit(code)
