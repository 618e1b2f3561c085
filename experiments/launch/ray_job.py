"""Starts a program in N workers of a Ray cluster, connected to one another.

    python experiments/launch/ray_job.py 2 -- flaxtransfer train --data folder:scans/ --run /all/run
    python experiments/launch/ray_job.py 4 --tpu TPU-V5E 4x4 -- flaxtransfer train ...

Without a cluster Ray starts one on this machine. Each worker runs the command with FT_COORDINATOR,
FT_PROCESSES and FT_PROCESS; worker 0 is the coordinator and alone writes the run folder. An error
in one worker ends all, and its last lines are the error of the job. With ``--retries`` Ray starts
all again after that, and ``--resume`` goes on from the last checkpoint. It was run on one machine
with CPUs; on TPUs it was not.

Extra ``ray``. Ray's trainer for JAX (``JaxTrainer``) is a public alpha of Ray 2.60.
"""

from __future__ import annotations

import argparse
import collections
import os
import socket
import subprocess
import sys
from typing import Any

KEPT_LINES = 20
"""Of the output of a worker that fails, in the error."""


def work(config: dict[str, Any]) -> None:
    """Runs the command in this worker; raises if it fails."""
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    context = train.get_context()
    with socket.socket() as probe:
        probe.bind(("", 0))
        mine = f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        **config["environment"],
        "FT_COORDINATOR": broadcast_from_rank_zero(mine),
        "FT_PROCESSES": str(context.get_world_size()),
        "FT_PROCESS": str(context.get_world_rank()),
    }
    process = subprocess.Popen(
        config["command"],
        cwd=config["folder"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    last: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            print(line, end="", flush=True)
        code = process.wait()
    finally:
        # Ray ends a worker whose neighbor has failed.
        if process.poll() is None:
            process.kill()
    if code:
        number = context.get_world_rank()
        raise RuntimeError(f"worker {number} has ended with code {code}:\n{''.join(last)}")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="number of workers")
    parser.add_argument("--tpu", nargs=2, metavar=("KIND", "SHAPE"), help="such as TPU-V5E 4x4")
    parser.add_argument("--devices", type=int, help="devices of the CPU in each worker")
    parser.add_argument("--retries", type=int, default=0, help="how often all are started again")
    parser.add_argument("command", nargs="+", help="program and arguments, after --")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"count must be >= 1, got {options.count}")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    environment = {}
    if options.devices is not None:
        count = f"--xla_force_host_platform_device_count={options.devices}"
        environment = {"XLA_FLAGS": count, "JAX_PLATFORMS": "cpu"}
    if options.tpu is None:
        scaling = ScalingConfig(num_workers=options.count, resources_per_worker={"CPU": 1})
    else:
        kind, shape = options.tpu
        scaling = ScalingConfig(
            num_workers=options.count, use_tpu=True, accelerator_type=kind, topology=shape
        )
    trainer = JaxTrainer(
        work,
        train_loop_config={
            "command": options.command,
            "environment": environment,
            "folder": os.getcwd(),
        },
        # The processes that the workers start hold the devices and find one another.
        jax_config=JaxConfig(use_tpu=False),
        scaling_config=scaling,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.retries)),
    )
    try:
        trainer.fit()
    except Exception as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
