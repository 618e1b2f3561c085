"""The command line: parses, calls, prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from flaxtransfer.commands.convert import Convert, convert
from flaxtransfer.commands.diagnose import Diagnose, diagnose
from flaxtransfer.commands.evaluate import Evaluate, evaluate
from flaxtransfer.commands.find_rate import FindRate, find_rate
from flaxtransfer.commands.models import Models, models
from flaxtransfer.commands.options import Train
from flaxtransfer.commands.params import Params, params
from flaxtransfer.commands.plan import Plan, plan
from flaxtransfer.commands.predict import Predict, predict
from flaxtransfer.commands.probe import Probe, probe
from flaxtransfer.commands.stem import Stem, stem
from flaxtransfer.commands.train import train
from flaxtransfer.sharding import guard_cpu_thread_pool
from flaxtransfer.training.console import Interrupted

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[FindRate, tyro.conf.subcommand("find-rate")]
    | Annotated[Stem, tyro.conf.subcommand("stem")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Params, tyro.conf.subcommand("params")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)

_RUN: dict[type, Callable[[Any, Console], None]] = {
    Train: train,
    Plan: plan,
    Probe: probe,
    Stem: stem,
    FindRate: find_rate,
    Models: models,
    Params: params,
    Evaluate: evaluate,
    Predict: predict,
    Diagnose: diagnose,
    Convert: convert,
}

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``flaxtransfer``.

    What a user can get wrong ends with one line and exit code 2; an interruption with a checkpoint
    ends with one line and the signal's customary code.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    guard_cpu_thread_pool()
    # Predictions are the standard output of `predict`; its notes must not mix with them.
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        options: Any = tyro.cli(  # type: ignore[call-overload]
            Command, args=arguments, prog="flaxtransfer", description=__doc_of_program__
        )
        console = errors if isinstance(options, Predict) else Console()
        _RUN[type(options)](options, console)
    except Interrupted as interruption:
        errors.print(str(interruption), markup=False)
        return 128 + interruption.signal_number
    except BrokenPipeError:
        # Whoever read the output, `head` say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        errors.print(f"flaxtransfer: {_one_line(error)}", markup=False)
        return USER_ERROR
    return 0


__doc_of_program__ = "Adapt pre-trained ResNets to your own images, in JAX."


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__
