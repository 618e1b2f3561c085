"""The entry point, which answers signals before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


class _Ended(BaseException):
    """SIGTERM or SIGINT; not an Exception, so that nothing on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Entry point of ``flaxtransfer``.

    Input errors print one line and exit with code 2. SIGINT and SIGTERM print one line and exit
    with 130 and 143, at any moment: training ends with a checkpoint, everything else at once.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        from flaxtransfer.cli import run

        code = run()
    except BaseException as error:
        # Libraries wrap what is raised while they are imported.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, _Ended):
                _leave(cause.number)
            cause = cause.__cause__ or cause.__context__
        raise
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise _Ended(number)


def _leave(number: int) -> None:
    print(f"flaxtransfer: ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    distributed = sys.modules.get("flaxtransfer.distributed")
    if distributed is not None:
        distributed.tell(f"ended by {signal.Signals(number).name}", 128 + number)
    # Threads that decode or compile would be waited for.
    os._exit(128 + number)


if __name__ == "__main__":
    main()
