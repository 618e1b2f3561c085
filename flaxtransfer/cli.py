"""The command line: parses options, runs a subcommand, prints errors.

Help, ``--version`` and wrong options are answered before jax is imported: what a subcommand needs
is imported when it runs.
"""

from __future__ import annotations

import functools
import importlib
import io
import operator
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from flaxtransfer import __version__
from flaxtransfer.commands.options import check
from flaxtransfer.commands.subcommands import SUBCOMMANDS, Predict
from flaxtransfer.paths import shortened, suggest, visible

USER_ERROR = 2

MOST_MESSAGE = 600
"""Characters of an error; more is a screen of text, whose beginning nobody sees."""

_STYLE = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code.

    Input errors print one line, and the code is 2. An interruption with a checkpoint prints one
    line, and the code is the customary one of the signal.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be bytes that are no text in any encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    if words == ["--version"]:
        print(f"flaxtransfer {__version__}")
        return 0
    if words in ([], ["-h"], ["--help"]):
        print(help_text(), file=sys.stdout if words else sys.stderr)
        return 0 if words else USER_ERROR
    try:
        options = parse(words)
        check(options)
        return _execute(options)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(shortened(f"flaxtransfer: {_one_line(error)}", MOST_MESSAGE), file=sys.stderr)
        return USER_ERROR


def help_text() -> str:
    """The text of ``flaxtransfer --help``."""
    width = max(map(len, SUBCOMMANDS))
    rows = (f"  {name:<{width}}  {_summary(kind)}" for name, kind in SUBCOMMANDS.items())
    return "\n".join(
        (
            "usage: flaxtransfer <subcommand> [options]",
            "",
            "Transfer learning for pre-trained ResNets, in JAX.",
            "",
            *rows,
            "",
            "flaxtransfer <subcommand> --help  prints the options of a subcommand.",
            "flaxtransfer --version            prints the version.",
        )
    )


def parse(words: Sequence[str]) -> Any:
    """The options of a subcommand, from the words of a command line.

    Raises:
        ValueError: an unknown subcommand.
        SystemExit: help was printed (code 0), or the options are wrong (code 2).
    """
    name = words[0]
    if name in SUBCOMMANDS:
        kind = SUBCOMMANDS[name]
        return tyro.cli(kind, args=words[1:], prog=f"flaxtransfer {name}", config=_STYLE)
    if not name.startswith("-"):
        raise ValueError(
            f"the subcommand must be one of {', '.join(SUBCOMMANDS)}, got {name!r}"
            f"{suggest(name, SUBCOMMANDS)}"
        )
    # Options before a subcommand are tyro's own, such as those that complete words in a shell.
    kinds = (
        Annotated[kind, tyro.conf.subcommand(name, description=_summary(kind))]
        for name, kind in SUBCOMMANDS.items()
    )
    every: Any = functools.reduce(operator.or_, kinds)
    return tyro.cli(every, args=words, prog="flaxtransfer", config=_STYLE)


def _execute(options: Any) -> int:
    from flaxtransfer.overview import terminal
    from flaxtransfer.sharding import guard_cpu_thread_pool
    from flaxtransfer.training.console import Interrupted

    guard_cpu_thread_pool()
    name = next(name for name, kind in SUBCOMMANDS.items() if kind is type(options))
    name = name.replace("-", "_")
    command = getattr(importlib.import_module(f"flaxtransfer.commands.{name}"), name)
    errors = terminal(stderr=True, soft_wrap=True, highlight=False)
    try:
        # Predictions are the standard output of `predict`; its notes must not mix with them.
        command(options, errors if isinstance(options, Predict) else terminal())
    except Interrupted as interruption:
        errors.print(str(interruption))
        return 128 + interruption.signal_number
    return 0


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").split("\n")[0]


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return visible(" ".join(lines)) or type(error).__name__
