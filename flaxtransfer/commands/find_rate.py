"""``flaxtransfer find-rate``: the order of magnitude of the learning rates, before training."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from flaxtransfer.commands.job import Job, prepare
from flaxtransfer.commands.options import Train
from flaxtransfer.groups import Group
from flaxtransfer.paths import suggest
from flaxtransfer.report.figures import check_picture, rate_picture
from flaxtransfer.schedules import WarmupCosine
from flaxtransfer.training.loop import fit
from flaxtransfer.training.lr_finder import (
    RateSweep,
    check_sweep,
    find_learning_rate,
    find_learning_rates,
)
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.types import Variables


@dataclass(frozen=True)
class FindRate:
    """Train a copy at rising learning rates and see where the loss falls fastest.

    Nothing is kept of it but what is printed and drawn. For a later phase of the strategy, those
    before it are trained first, because a network under a head at zero gets no gradient.

    Example: flaxtransfer find-rate --data folder:scans/ --phase fine-tune --each-group --out r.png

    Args:
      data: "digits", "folder:<path>" (one sub-folder a class) or "tfds:<name>[/config][:split]".
      weights: "builtin", or a .safetensors or .pth file of a ResNet.
      model: architecture that the weights must be of; by default whatever they are.
      strategy: a recipe, or the path of a plan; see "flaxtransfer plan".
      phase: which of its phases, by name; by default the first.
      group: sweep this group alone, with all others frozen; by default all at one rate.
      each_group: sweep every group alone, one after the other.
      lowest: rate of the first step.
      highest: rate of the last step.
      steps: how many, unless the loss diverges before.
      out: also draw the sweeps: a .png, .pdf or .svg file.
      labels_per_class: use so many labels of each class. By default 5 for the digits and all for
        other data; 0 means all.
      head: "new" starts the head at zero, "keep" takes the checkpoint's, "resize" its first rows.
      batch_size: images a step.
      flip: mirror images; "auto" decides by the names of the classes.
      compute: "bfloat16" for accelerators.
      seed: of the split, the head, the order and the augmentation.
      workers: processes that decode images; 0 uses threads.
      skip_corrupt: leave out unreadable images instead of stopping.
      download: allow a tfds: data set to be fetched.
    """

    data: str = "digits"
    weights: str = "builtin"
    model: str | None = None
    strategy: str = "head_then_fine_tune"
    phase: str | None = None
    group: str | None = None
    each_group: bool = False
    lowest: float = 1e-6
    highest: float = 1.0
    steps: int = 100
    out: Path | None = None
    labels_per_class: int | None = None
    head: Literal["new", "keep", "resize"] = "new"
    batch_size: int = 64
    flip: Literal["auto", "yes", "no"] = "auto"
    compute: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    workers: int = 0
    skip_corrupt: bool = False
    download: bool = False

    def job(self) -> Train:
        """The options of a training run on the same images, network and strategy."""
        names = (
            "data",
            "weights",
            "model",
            "strategy",
            "labels_per_class",
            "head",
            "batch_size",
            "flip",
            "compute",
            "seed",
            "workers",
            "skip_corrupt",
            "download",
        )
        return Train(**{name: getattr(self, name) for name in names})


def find_rate(options: FindRate, console: Console) -> None:
    """Runs ``flaxtransfer find-rate``."""
    if options.each_group and options.group is not None:
        raise ValueError(f"--each-group sweeps {options.group!r} too; give one of the two options")
    if options.out is not None:
        check_picture(options.out)
    job_options = options.job()
    job_options.check()
    job = prepare(job_options)
    phase = _phase(job.plan, options.phase)
    # What is wrong with these is said before the earlier phases are trained.
    check_sweep(phase, options.group, options.lowest, options.highest, options.steps)
    variables = _trained(job, job.plan.phases.index(phase), options.seed)
    if options.each_group:
        sweeps = find_learning_rates(
            job.model,
            variables,
            phase,
            job.feed,
            lowest=options.lowest,
            highest=options.highest,
            steps=options.steps,
            seed=options.seed,
        )
    else:
        sweep = find_learning_rate(
            job.model,
            variables,
            phase,
            job.feed,
            group=options.group,
            lowest=options.lowest,
            highest=options.highest,
            steps=options.steps,
            seed=options.seed,
        )
        sweeps = {options.group or "all groups": sweep}
        console.print(str(sweep), highlight=False)
    console.print(_table(phase, sweeps))
    if options.out is not None:
        rate_picture(options.out, sweeps)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)


def _phase(plan: Plan, name: str | None) -> Phase:
    if name is None:
        return plan.phases[0]
    names = [phase.name for phase in plan.phases]
    if name not in names:
        raise ValueError(f"no phase {name!r}{suggest(name, names)}; there are {', '.join(names)}")
    return plan.phases[names.index(name)]


def _trained(job: Job, phases: int, seed: int) -> Variables:
    """The variables after so many phases of the plan; what a sweep has to start from."""
    if not phases:
        return job.variables
    before = [replace(phase, patience=None) for phase in job.plan.phases[:phases]]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        return fit(job.model, job.variables, Plan(before), job.feed, run, seed=seed).variables


def _table(phase: Phase, sweeps: dict[str, RateSweep]) -> Table:
    table = Table(title=f"learning rates for phase '{phase.name}'")
    for column in ("group", "of the strategy", "fastest fall", "middle of the fall", "swept"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for name, sweep in sweeps.items():
        end = "diverged at" if sweep.diverged else "to"
        table.add_row(
            name,
            _planned(phase, sweep.group),
            _rate(sweep.suggestion),
            _rate(sweep.valley),
            f"{sweep.rates[0]:.0e} {end} {sweep.rates[-1]:.0e}",
        )
    return table


def _rate(rate: float | None) -> str:
    return "never fell" if rate is None else f"{rate:.1e}"


def _planned(phase: Phase, name: str | None) -> str:
    """The peak rates that the strategy has for a group, or for all of them."""
    groups = [phase.groups[name]] if name is not None else phase.groups.values()
    rates = [group.learning_rate for group in groups if isinstance(group, Group)]
    peaks = [rate.peak if isinstance(rate, WarmupCosine) else rate for rate in rates]
    named = {f"{peak:.1e}" if isinstance(peak, float | int) else "schedule" for peak in peaks}
    return ", ".join(sorted(named))
