"""Starts a program in N processes on this machine, connected over loopback.

    python experiments/launch/local.py 2 -- flaxtransfer train --data folder:scans/ --run runs/scans

Use it to try a run over several processes before a cluster is paid for. Every process gets the
same command, and FT_COORDINATOR, FT_PROCESSES and FT_PROCESS; ``--devices 4`` gives each process
four devices of the CPU. It was run on CPUs alone: with one GPU for each process, jax has to be told
which (JAX_LOCAL_DEVICE_IDS).

On Linux the processes with ``--devices`` get the scheduling policy SCHED_BATCH: they have the same
share of the cores, but a thread that wakes does not interrupt another. Otherwise the thread that
receives sums (Gloo) interrupts the one that holds its lock, and waits for it in a busy loop.

Lines of output begin with the number of the process. SIGINT and SIGTERM go to all processes. When
one ends with an error the others have a minute to end by themselves; then they are killed. The exit
code is the first that is not 0, a signal's as 128 and its number.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

MOST_S = 60.0
"""Time that the others have after one has ended with an error."""


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(count: int, number: int, port: int, devices: int | None) -> dict[str, str]:
    """The environment of one process."""
    found = {
        **os.environ,
        "FT_COORDINATOR": f"127.0.0.1:{port}",
        "FT_PROCESSES": str(count),
        "FT_PROCESS": str(number),
    }
    if devices is not None:
        flags = found.get("XLA_FLAGS", "")
        found["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
        found["JAX_PLATFORMS"] = "cpu"
    return found


def start(
    command: Sequence[str],
    count: int,
    *,
    devices: int | None = None,
    **more: str,
) -> list[subprocess.Popen[str]]:
    """Starts all processes; their output is a pipe each.

    Args:
        command: a program and its arguments.
        count: processes.
        devices: of the CPU in each process; None leaves the devices that are there.
        more: variables of the environment of all.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [*command],
            env=environment(count, number, port, devices) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        for number in range(count)
    ]
    if devices is not None and hasattr(os, "SCHED_BATCH"):
        for process in processes:
            # Threads that it starts later inherit it.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
    return processes


def wait(processes: Sequence[subprocess.Popen[str]], most: float = MOST_S) -> list[int]:
    """Waits for all; after the first error for ``most`` seconds longer. Returns the exit codes."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > most:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]


def _print_lines(number: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="number of processes")
    parser.add_argument("--devices", type=int, help="devices of the CPU in each process")
    parser.add_argument("command", nargs="+", help="program and arguments, after --")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"count must be >= 1, got {options.count}")
    processes = start(options.command, options.count, devices=options.devices)

    def forward(number: int, frame: object) -> None:
        del frame
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    readers = [threading.Thread(target=_print_lines, args=pair) for pair in enumerate(processes)]
    for reader in readers:
        reader.start()
    found = wait(processes)
    for reader in readers:
        reader.join()
    for number, code in enumerate(found):
        if code:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            print(f"process {number} of {len(found)} has ended {how}", file=sys.stderr)
    codes = [128 - code if code < 0 else code for code in found]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
