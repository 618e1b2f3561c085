"""Contestants that run in processes of their own and take turns.

A process that times itself while another one computes measures the other one. So each contestant
prepares itself, says that it is ready, and then works only when it is asked to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

Facts = dict[str, Any]


def serve(prepare: Callable[[Facts], tuple[Facts, Callable[[], Facts]]]) -> None:
    """The contestant's side: `prepare(job)` gives what is known beforehand, and one turn."""
    # Libraries print what they like to standard output; the conversation gets a stream of its own.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, turn = prepare(json.loads(sys.argv[1]))
    print(json.dumps(facts), file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=replies, flush=True)


class Contestant:
    """The asking side: a context in which the process lives."""

    def __init__(self, name: str, script: str, job: Mapping[str, Any]) -> None:
        self.name = name
        # Several contestants may share one accelerator, so none may take all of its memory.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seconds: list[float] = []
        self.facts: Facts = {}

    def __enter__(self) -> Contestant:
        self.facts = self._reply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()

    def go_first(self) -> None:
        """Takes the process before all others of the machine, with the rights to do so."""
        for task in os.listdir(f"/proc/{self._process.pid}/task"):
            os.sched_setscheduler(int(task), os.SCHED_RR, os.sched_param(1))

    def take_turn(self) -> None:
        """Asks for one turn, and keeps what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        reply = self._reply()
        self.seconds.append(reply.pop("seconds"))
        self.facts |= reply

    @property
    def best(self) -> float:
        """The shortest turn, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median turn, in seconds."""
        return float(np.median(self.seconds))

    def _reply(self) -> Facts:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name} ended with exit code {self._process.wait()}; its message is above"
            )
        return json.loads(line)


def alternate(contestants: Sequence[Contestant], rounds: int) -> None:
    """Lets every contestant take one turn in every round."""
    for _ in range(rounds):
        for contestant in contestants:
            contestant.take_turn()
