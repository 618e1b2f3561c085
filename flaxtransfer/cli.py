"""The command line: parses options, runs a subcommand, prints errors.

Help, ``--version`` and wrong options are answered before jax is imported: what a subcommand needs
is imported when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import operator
import os
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import tyro

from flaxtransfer import __version__
from flaxtransfer.commands.options import check, flags, outputs, recorded
from flaxtransfer.commands.subcommands import (
    FILES,
    SEVERAL_PROCESSES,
    SUBCOMMANDS,
    Predict,
    Train,
)
from flaxtransfer.files import bucket_address
from flaxtransfer.paths import nearest, shortened, suggest, visible

USER_ERROR = 2

_STYLE = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code.

    Errors print one line, and the code is 2; the traceback of one that nobody foresaw goes to a
    file. An interruption with a checkpoint prints one line, and the code is the customary one of
    the signal.
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
    options = None
    try:
        options = parse(words)
        check(options)
        return _execute(options)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _was_ended(error):
            raise
        known = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        known = known and not _is_broken(error)
        line = _one_line(error if known else _unforeseen(error), options)
        print(line, file=sys.stderr)
        _end_others(line)
        return USER_ERROR


def _is_broken(error: Exception) -> bool:
    """Whether jax says, by whatever class of error, that another process may be gone."""
    distributed = sys.modules.get("flaxtransfer.distributed")
    return distributed is not None and bool(distributed.is_broken(error))


def _end_others(line: str) -> None:
    """Ends the other processes of the run, where there are any, and this one; returns otherwise."""
    # Before jax is imported there is no run.
    distributed = sys.modules.get("flaxtransfer.distributed")
    if distributed is not None and distributed.several():
        distributed.leave(line.removeprefix("flaxtransfer: "))


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
        ValueError: an unknown subcommand, or wrong options.
        SystemExit: help was printed (code 0).
    """
    name = words[0]
    if name in SUBCOMMANDS:
        return _parsed(SUBCOMMANDS[name], words[1:], f"flaxtransfer {name}")
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
    return _parsed(functools.reduce(operator.or_, kinds), words, "flaxtransfer")


def _parsed(kind: Any, words: Sequence[str], program: str) -> Any:
    """What tyro makes of the words; its boxes of several lines become one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(kind, args=words, prog=program, config=_STYLE)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_parse_error(said.getvalue(), kind, words, program)) from None
    sys.stderr.write(said.getvalue())
    return found


_METAVARS = {"INT": "a whole number", "FLOAT": "a number", "[FLOAT [FLOAT ...]]": "numbers"}


def _parse_error(text: str, kind: Any, words: Sequence[str], program: str) -> str:
    """One line for what tyro says in a box: what is wrong, a rule, and the help of the option."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip("│╭╮╰╯").rstrip() for line in text.splitlines()]
    # A title; under it a rule, where the output has no boxes; what is wrong, until the next rule.
    rules = [at for at, line in enumerate(lines) if not line.strip(" ─-")]
    start = 2 if 1 in rules else 1
    box = lines[start : next((at for at in rules if at > start), None)]
    box = textwrap.dedent("\n".join(box)).splitlines()
    wrong = " ".join(" ".join(box).split())
    listed = f'"{program} --help" lists the options'
    # "--name=value" is one word or two.
    words = [part for word in words for part in word.split("=", 1 if word[:2] == "--" else 0)]
    if wrong.startswith("Unrecognized options"):
        known = list(flags(kind)) if isinstance(kind, type) else ["--help", "--version"]
        unknown = [
            word for word in words if word[:2] == "--" and word.replace("_", "-") not in known
        ]
        if unknown:
            named = (f"{word}{_near(word, known)}" for word in dict.fromkeys(unknown))
            line = f"unrecognized option {', '.join(named)}"
            return f"{line}{' ' if line.endswith('?') else '; '}{listed}"
        return f"unrecognized words: {wrong.partition(': ')[2]}; {listed}"
    if wrong.startswith("Missing from"):
        missing = [line.strip() for line in box if re.match(" {4}[^ ]", line)]
        return f"{program} must be given {', '.join(missing)}; {listed}"
    if found := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of (.*)", wrong):
        choices = re.findall(r"'(.*?)'", found[3])
        near = suggest(found[1].strip("'\""), choices)
        return f"{found[2]} must be one of {', '.join(choices)}, got {found[1]}{near}"
    if found := re.match(r"Missing value for argument '(.*)'", wrong):
        return f"{found[1]} must be followed by a value, got none"
    if found := re.match(r"Error parsing (\S+): ", wrong):
        option = found[1]
        helped = (line.strip() for line in lines if line.strip().startswith(option))
        takes = next(helped, "").removeprefix(option).strip()
        value = next((word for before, word in pairwise(words) if before == option), None)
        if takes in _METAVARS and value is not None:
            return f"{option} must be {_METAVARS[takes]}, got {value!r}"
    return f"{wrong}; {listed}"


def _near(option: str, known: Sequence[str]) -> str:
    names = nearest(option.strip("-"), [each.strip("-") for each in known], n=1)
    return f"; did you mean --{names[0]}?" if names else ""


def _execute(options: Any) -> int:
    from flaxtransfer import distributed
    from flaxtransfer.checkpoint.mirror import Bucket
    from flaxtransfer.overview import terminal
    from flaxtransfer.sharding import guard_cpu_thread_pool, keep_compiled
    from flaxtransfer.training.console import Interrupted
    from flaxtransfer.weights.locations import cache_folder

    guard_cpu_thread_pool()
    chosen = options.run.compilation_cache if isinstance(options, Train) else None
    if chosen is not None and bucket_address(chosen) is not None:
        Bucket.at(chosen)  # jax would say of a bucket that cannot be used only that it is not.
    keep_compiled(cache_folder() / "compiled", chosen)
    distributed.start(stop_together=isinstance(options, Train))
    # For Python's process that frees the shared memory of decode workers: where they, or the run,
    # were ended from outside, it would add two lines of its own to the one that says so.
    if "ignore:resource_tracker" not in sys.warnoptions:
        sys.warnoptions.append("ignore:resource_tracker")
    name = next(name for name, kind in SUBCOMMANDS.items() if kind is type(options))
    if distributed.several():
        distributed.check_alike({"subcommand": name, **recorded(options, unrecorded=True)})
        if name not in SEVERAL_PROCESSES:
            raise ValueError(
                f"the subcommand must be one of {', '.join(SEVERAL_PROCESSES)} in a run over "
                f"several processes, got {name}; start it in one"
            )
    name = name.replace("-", "_")
    file = importlib.import_module(f"flaxtransfer.commands.{FILES.get(name, name)}")
    command = getattr(file, name)
    errors = terminal(stderr=True, soft_wrap=True, highlight=False)
    try:
        # Predictions are the standard output of `predict`; its notes must not mix with them.
        command(options, errors if isinstance(options, Predict) else terminal())
    except Interrupted as interruption:
        # In every process: each ends for itself.
        print(str(interruption), file=sys.stderr)
        distributed.finish()
        return 128 + interruption.signal_number
    distributed.finish()
    return 0


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").split("\n")[0]


MOST_CHARACTERS = 600
"""Of a message on the terminal: about what a person reads there."""


def _one_line(error: BaseException, options: Any = None) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # Python's own text begins with "[Errno 28]", and often names no file.
        where = error.filename or " or ".join(map(str, outputs(options))) or "the disk"
        text = f"{where}: {error.strerror}; make room there, or name another place"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = visible(f"flaxtransfer: {' '.join(lines) or type(error).__name__}")
    if len(line) <= MOST_CHARACTERS:
        return line
    path = _in_a_file(text)
    end = f" ... (all of it in {path})" if path else " ..."
    return line[: MOST_CHARACTERS - len(end)] + end


def _was_ended(error: BaseException) -> bool:
    """Whether a signal is behind an error: libraries wrap what is raised within them."""
    # Where another start writes to the bucket of the run, the mirror has sent the signal itself.
    mirror = sys.modules.get("flaxtransfer.checkpoint.mirror")
    if mirror is not None and isinstance(error, mirror.TakenOver):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, (Exception, SystemExit)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _unforeseen(error: Exception) -> Exception:
    """What to say of an error that is not about the input."""
    text = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return MemoryError(
            f"out of memory ({text}); smaller batches (--batch-size) or smaller images need less"
        )
    distributed = sys.modules.get("flaxtransfer.distributed")
    if distributed is not None and (lost := distributed.lost(error)):
        return ConnectionError(lost)
    path = _in_a_file("".join(traceback.format_exception(error)))
    return RuntimeError(
        f"{text}; this is a fault of flaxtransfer, not of what was asked"
        + (f"; the traceback is in {path}" if path else "")
    )


def _in_a_file(text: str) -> str:
    """The path of a new file with the text; "" where there is no room for one."""
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="flaxtransfer-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")
        return path
    return ""
