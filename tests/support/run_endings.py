"""Counts together with the other processes of a run, until something befalls one of them.

    run_endings.py <fate> <process>

A fate is the name of a signal, ``hang`` or ``error``. No network is trained, so that it is quick.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

from flaxtransfer import distributed

STEP = 3
"""At which it happens."""


def main(fate: str, struck: int) -> int:
    distributed._SILENT_S = 6.0
    distributed.start()
    number, _ = distributed.share()
    distributed.total(1)
    # Not before: on a busy machine one starts later than the other.
    os.environ[distributed.LONGEST_WAIT] = "4"
    for step in range(1, 10_000):
        if step == STEP and number == struck:
            if fate == "hang":
                time.sleep(600)
            if fate == "error":
                raise OSError(errno.ENOSPC, "No space left on device", "/full/disk")
            os.kill(os.getpid(), signal.Signals[fate])
        distributed.total(1)
        if distributed.stop_requested():
            print(f"stopped at step {step}", flush=True)
            distributed.finish()
            return 143
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
