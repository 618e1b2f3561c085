"""``flaxtransfer advise``, ``probe`` and ``find-rate``: what is measured before training."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flaxtransfer.advice.advise import advise as give_advice
from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.classifier import Classifier, transfer
from flaxtransfer.commands.job import (
    Job,
    begin,
    leveled,
    load_weights,
    measured,
    prepare,
    print_notes,
    split,
)
from flaxtransfer.commands.subcommands import Advise, FindRate, Probe
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.source import task_of_source
from flaxtransfer.data.splits import subsample
from flaxtransfer.features.inputs import segment_features
from flaxtransfer.files import atomic_write, write_file, write_json
from flaxtransfer.groups import Group, WarmupCosine
from flaxtransfer.overview import plain
from flaxtransfer.paths import suggest
from flaxtransfer.task import for_classes
from flaxtransfer.training.loop import fit
from flaxtransfer.training.lr_finder import (
    RateSweep,
    check_sweep,
    find_learning_rate,
    find_learning_rates,
)
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.plan_yaml import save_plan


def advise(options: Advise, console: Console) -> None:
    """Runs ``flaxtransfer advise``."""
    start = begin(options.data, options.weights, options.input, options.split)
    positions = start.splits.train
    print_notes(start.source, console)
    _say_levels(start.levels, console)
    console.print(
        f"{options.data.name}: {len(positions)} training images, "
        f"{len(start.source.class_names)} classes; {start.checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    found = give_advice(start.network, start.source, positions, seed=options.split.seed)
    console.print(found)
    if options.json is not None:
        write_json(options.json, found.to_json())
    if options.html is not None:
        from flaxtransfer.report.pages import render_advice

        page = render_advice(found, data=options.data.name, weights=repr(start.checkpoint))
        with atomic_write(options.html) as made:
            write_file(made, page.encode())
    if options.plan is not None and found.plan is not None:
        save_plan(options.plan, found.plan)
    elif options.plan is not None:
        console.print(f"{options.plan} is not written: no strategy is recommended", highlight=False)
    written = [options.json, options.html, options.plan if found.plan is not None else None]
    for path in filter(None, written):
        console.print(f"written to {path}", highlight=False, soft_wrap=True)


def _say_levels(note: str, console: Console) -> None:
    if note:
        console.print(note, highlight=False, soft_wrap=True, markup=False)


def probe(options: Probe, console: Console) -> None:
    """Runs ``flaxtransfer probe``."""
    data = options.data
    weights = options.weights
    checkpoint = load_weights(weights.weights, weights, measure=weights.statistics == "measure")
    source = open_source(
        data.name,
        download=data.download,
        skip_corrupt=data.skip_corrupt,
        bands=checkpoint.config.bands,
        **data.columns.arguments(),
    )
    print_notes(source, console)
    for_classes(task_of_source(source), "a profile of probes")
    training = split(source, data.name, options.split).train
    positions = subsample(training, options.most_images, source.labels())
    classes = len(source.class_names)
    source, levels = leveled(source, training, checkpoint)
    own = checkpoint.preprocessing
    preprocessing = own if levels is None else levels.into(own)
    network = transfer(checkpoint, classes=classes, preprocessing=preprocessing)
    _say_levels("" if levels is None else levels.note, console)
    if weights.statistics == "measure":
        network = measured(network, source, positions)
    batches = eval_batches(source, positions, network.preprocessing)
    features, labels = segment_features(network, batches)
    profile = probe_profile(features, labels, kind=options.kind, classes=classes)
    console.print(
        f"{data.name}: {len(positions)} training images, {classes} classes; {checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(profile), highlight=False)
    if options.out is not None:
        from flaxtransfer.report.figures import plot_profile

        plot_profile(profile, options.out)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)


def find_rate(options: FindRate, console: Console) -> None:
    """Runs ``flaxtransfer find-rate``."""
    job, seed = prepare(options.job), options.job.split.seed
    print_notes(job.source, console)
    _say_levels(job.levels, console)
    phase = _phase(job.plan, options.phase)
    # Before the earlier phases are trained, so that a wrong option costs no time.
    check_sweep(phase, options.group, options.lowest, options.highest, options.steps)
    network = _trained(job, job.plan.phases.index(phase), seed)
    if options.each_group:
        sweeps = find_learning_rates(
            network,
            phase,
            job.data,
            lowest=options.lowest,
            highest=options.highest,
            steps=options.steps,
            seed=seed,
        )
    else:
        sweep = find_learning_rate(
            network,
            phase,
            job.data,
            group=options.group,
            lowest=options.lowest,
            highest=options.highest,
            steps=options.steps,
            seed=seed,
        )
        sweeps = {options.group or "all groups": sweep}
        console.print(str(sweep), highlight=False)
    console.print(_table(phase, sweeps))
    if options.out is not None:
        from flaxtransfer.report.figures import plot_rate_sweeps

        plot_rate_sweeps(options.out, sweeps)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)


def _phase(plan: Plan, name: str | None) -> Phase:
    if name is None:
        return plan.phases[0]
    names = [phase.name for phase in plan.phases]
    if name not in names:
        raise ValueError(f"no phase {name!r}{suggest(name, names)}; there are {', '.join(names)}")
    return plan.phases[names.index(name)]


def _trained(job: Job, phases: int, seed: int) -> Classifier:
    """The network after the first ``phases`` phases of the plan, where the sweep starts."""
    if not phases:
        return job.network
    before = [replace(phase, patience=None) for phase in job.plan.phases[:phases]]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        return fit(job.network, Plan(before), job.data, run, seed=seed).network


def _table(phase: Phase, sweeps: dict[str, RateSweep]) -> Table:
    table = Table(title=plain(f"learning rates for phase '{phase.name}'"))
    for column in ("group", "of the strategy", "fastest fall", "middle of the fall", "swept"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for name, sweep in sweeps.items():
        end = "diverged at" if sweep.diverged else "to"
        table.add_row(
            plain(name),
            _planned(phase, sweep.group),
            _rate(sweep.suggestion),
            _rate(sweep.valley),
            f"{sweep.rates[0]:.0e} {end} {sweep.rates[-1]:.0e}",
        )
    return table


def _rate(rate: float | None) -> str:
    return "never fell" if rate is None else f"{rate:.1e}"


def _planned(phase: Phase, name: str | None) -> str:
    """The peak learning rates of the strategy for a group, or for all groups."""
    groups = [phase.groups[name]] if name is not None else phase.groups.values()
    rates = [group.learning_rate for group in groups if isinstance(group, Group)]
    peaks = [rate.peak if isinstance(rate, WarmupCosine) else rate for rate in rates]
    named = {f"{peak:.1e}" if isinstance(peak, float | int) else "schedule" for peak in peaks}
    return ", ".join(sorted(named))
