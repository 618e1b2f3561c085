"""``advise``, ``understand``, ``probe``, ``find-rate``, ``diagnose``: nothing is trained."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flaxtransfer.adapt.scores import ModelOutputs, model_outputs
from flaxtransfer.advice.advise import advise as give_advice
from flaxtransfer.advice.understanding import understand as understood
from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.classifier import Classifier, transfer
from flaxtransfer.commands.job import (
    Job,
    Start,
    begin,
    check_same_images,
    kept_validation,
    leveled,
    levels_note,
    load_weights,
    local_run,
    measured,
    prepare,
    print_notes,
    run_bands,
    run_data,
    split,
    trained_network,
)
from flaxtransfer.commands.predict import cell_text
from flaxtransfer.commands.subcommands import Advise, Diagnose, FindRate, Probe, Understand
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source, open_unlabeled
from flaxtransfer.data.source import Source, UnlabeledImages, task_of_source
from flaxtransfer.data.splits import groups_of, subsample
from flaxtransfer.distributed import from_first
from flaxtransfer.features.inputs import segment_features
from flaxtransfer.files import atomic_write, check_regular, refuse_link, write_file, write_json
from flaxtransfer.groups import Group, WarmupCosine
from flaxtransfer.overview import plain
from flaxtransfer.paths import listing, suggest
from flaxtransfer.report.pages import print_report
from flaxtransfer.shift.diagnosis import diagnose as diagnose_arrays
from flaxtransfer.shift.report import ShiftReport
from flaxtransfer.task import OUTPUTS, for_classes
from flaxtransfer.training.loop import fit
from flaxtransfer.training.lr_finder import (
    RateSweep,
    check_sweep,
    find_learning_rate,
    find_learning_rates,
)
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.plan_yaml import save_plan

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

MOST_CSV_BYTES = 1 << 26
"""Of a file of labels: a million images have half of it, and few labels are enough."""


def advise(options: Advise, console: Console) -> None:
    """Runs ``flaxtransfer advise``."""
    start = _begun(options, console)
    found = give_advice(
        start.network,
        start.source,
        start.splits.train,
        seed=options.split.seed,
        gains=options.gains,
    )
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


def _begun(options: Advise | Understand, console: Console) -> Start:
    """Images and network, said in a line."""
    start = begin(options.data, options.weights, options.input, options.split)
    print_notes(start.source, console)
    _say_levels(start.levels, console)
    outputs = f"{len(start.source.class_names)} {OUTPUTS[task_of_source(start.source).name]}"
    console.print(
        f"{options.data.name}: {len(start.splits.train)} training images, {outputs}; "
        f"{start.checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    return start


def understand(options: Understand, console: Console) -> None:
    """Runs ``flaxtransfer understand``."""
    start = _begun(options, console)
    found = understood(
        start.network,
        start.source,
        start.splits.train,
        seed=options.split.seed,
        attributes=options.attributes,
    )
    console.print(found)
    if options.json is not None:
        write_json(options.json, found.to_json())
    if options.html is not None:
        from flaxtransfer.report.pages import render_understanding

        page = render_understanding(found, data=options.data.name, weights=repr(start.checkpoint))
        with atomic_write(options.html) as made:
            write_file(made, page.encode())
    if options.suspects is not None and found.suspects is None:
        console.print(f"{options.suspects} is not written: its labels are no classes")
    elif options.suspects is not None:
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(("image", "label", "instead", "margin"))
        for name, label, instead, margin in found.suspected():
            rows.writerow((*map(cell_text, (name, label, instead)), f"{margin:.4f}"))
        with atomic_write(options.suspects) as made:
            write_file(made, text.getvalue().encode("utf-8", "surrogateescape"))
    suspects = None if found.suspects is None else options.suspects
    for path in filter(None, (options.json, options.html, suspects)):
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
    check_same_images(source)
    print_notes(source, console)
    task = task_of_source(source)
    training = split(source, data.name, options.split).train
    positions = subsample(training, options.most_images, source.labels())
    classes = len(source.class_names)
    source, levels = leveled(source, training, checkpoint)
    own = checkpoint.preprocessing
    preprocessing = own if levels is None else levels.into(own)
    network = transfer(checkpoint, classes=classes, preprocessing=preprocessing, task=task)
    _say_levels("" if levels is None else levels.note, console)
    if weights.statistics == "measure":
        network = measured(network, source, positions)
    batches = eval_batches(source, positions, network.preprocessing)
    features, labels = segment_features(network, batches)
    groups = groups_of(source)
    belonging = None if groups is None else [groups[i] for i in positions.tolist()]
    profile = probe_profile(
        features, labels, kind=options.kind, classes=classes, task=task, groups=belonging
    )
    outputs = f"{classes} {OUTPUTS[task.name]}"
    console.print(
        f"{data.name}: {len(positions)} training images, {outputs}; {checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(profile), highlight=False)
    if options.out is not None:
        from flaxtransfer.report.figures import plot_profile

        out = options.out
        from_first(lambda: plot_profile(profile, out))
        console.print(f"drawn in {out}", highlight=False, soft_wrap=True)


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


def diagnose(options: Diagnose, console: Console) -> None:
    """Runs ``flaxtransfer diagnose``."""
    options = replace(options, run=local_run(options.run))
    network = trained_network(options.run)
    for_classes(network.task, "a diagnosis of label shift")
    names = network.class_names or tuple(map(str, range(network.model.config.classes)))
    target = open_unlabeled(
        options.target,
        skip_corrupt=options.reading.skip_corrupt,
        bands=run_bands(options.run, network),
        image_column=options.image_column,
    )
    print_notes(target, console)
    labeled = _few_labels(options.target_labels, target, names)
    chosen = _chosen(len(target.source), labeled[0], options)
    if note := levels_note(target.source, chosen, network):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    source, found = _samples(network, (target.source, chosen), options, console)
    place = {position: row for row, position in enumerate(chosen.tolist())}
    report = diagnose_arrays(
        source.logits,
        source.labels,
        source.features,
        found.logits,
        found.features,
        labeled=([place[i] for i in labeled[0].tolist()], labeled[1]),
        class_names=names,
        level=options.level,
        permutations=options.permutations,
        seed=options.seed,
    )
    out = options.out or options.run / "diagnosis" / _file_name(options.target)
    if options.out is None:
        refuse_link(out.parent)
    write_report(out, report, source, found, run=options.run, target=options.target)
    print_report(report, console)
    console.print(f"\nwritten to {out}/", highlight=False, soft_wrap=True)


def write_report(
    out: Path,
    report: ShiftReport,
    source: ModelOutputs,
    found: ModelOutputs,
    *,
    run: Path,
    target: str,
) -> None:
    """Writes the report as a folder, atomically: JSON, an HTML page and its pictures."""
    from flaxtransfer.report.pages import render_html
    from flaxtransfer.report.shift_figures import render_figures

    pictures = render_figures(report, source.features, source.labels, found.features)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, (_, png) in pictures.items():
            write_file(folder / f"{name}.png", png)
        write_file(folder / REPORT_FILE, (json.dumps(report.to_json(), indent=2) + "\n").encode())
        page = render_html(report, dict(pictures.values()), source=str(run), target=target)
        write_file(folder / PAGE_FILE, page.encode())


def _samples(
    network: Classifier,
    target: tuple[Source, np.ndarray],
    options: Diagnose,
    console: Console,
) -> tuple[ModelOutputs, ModelOutputs]:
    """Network outputs for the validation and test images of the run, and for the target."""
    found = _evidence(network, *target, options)
    try:
        source, parts = run_data(options.run, skip_corrupt=options.reading.skip_corrupt)
        if tuple(source.class_names) != network.class_names:
            raise ValueError("their classes are not those of the run")
    except (FileNotFoundError, ValueError) as error:
        kept = kept_validation(options.run)
        rows = subsample(np.arange(len(kept.labels)), options.most_images, kept.labels)
        console.print(
            f"the images of the run cannot be read ({error}): its saved validation examples are "
            "used instead\n",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        # In the precision of the run's features, so that rounding is not a difference.
        rounded = found.features.astype(kept.features.dtype).astype(np.float32)
        own = ModelOutputs(
            kept.logits[rows], kept.features[rows].astype(np.float32), kept.labels[rows]
        )
        return own, ModelOutputs(found.logits, rounded, found.labels)
    positions = np.sort(np.concatenate([parts.val, parts.test]))
    if not len(positions):
        raise ValueError(
            f"the run in {options.run} has no validation or test images; train it with "
            "--val-fraction or --test-fraction"
        )
    chosen = subsample(positions, options.most_images, source.labels())
    return _evidence(network, source, chosen, options), found


def _evidence(
    network: Classifier, source: Source, chosen: np.ndarray, options: Diagnose
) -> ModelOutputs:
    batches = eval_batches(
        source, chosen, network.preprocessing, batch_size=options.reading.batch_size
    )
    return model_outputs(network, batches)


def _chosen(count: int, labeled: np.ndarray, options: Diagnose) -> np.ndarray:
    """Positions of the target images to use, labeled ones included."""
    if count <= options.most_images:
        return np.arange(count)
    others = np.setdiff1d(np.arange(count), labeled)
    rest = subsample(others, max(0, options.most_images - len(labeled)))
    return np.sort(np.concatenate([labeled, rest]))


def _few_labels(
    path: Path | None, target: UnlabeledImages, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and classes of the images in a CSV file."""
    if path is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    check_regular(path)
    size = path.stat().st_size
    if size > MOST_CSV_BYTES:
        raise ValueError(f"{path} must have at most {MOST_CSV_BYTES:,} bytes, got {size:,}")
    # Names of files may be bytes that are not UTF-8, here as there.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            rows = csv.DictReader(file)
            headings = [heading.strip() for heading in rows.fieldnames or ()]
            if missing := [name for name in ("image", "label") if name not in headings]:
                raise ValueError(
                    f"{path} has no column {' and no column '.join(missing)}; its columns are "
                    f"{listing(headings) or 'none'}"
                )
            rows.fieldnames = headings
            given = [((row["image"] or "").strip(), (row["label"] or "").strip()) for row in rows]
        except csv.Error as error:
            raise ValueError(f"{path} is not a readable CSV file ({error})") from error
    if not given:
        raise ValueError(f"{path} has no rows below its headings")
    place = {name: number for number, name in enumerate(names)}
    unknown = sorted({label for _, label in given if label not in place})
    if unknown:
        listed = ", ".join(f"{each!r}{suggest(each, names)}" for each in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"{path}: no class {listed}{more}; the run has {listing(names)}")
    try:
        positions = target.positions([image for image, _ in given])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return positions, np.array([place[label] for _, label in given], np.int64)


def _file_name(target: str) -> str:
    last = target.rstrip("/").split("/")[-1].split(":")[-1]
    return "".join(c if c.isalnum() or c in "-." else "_" for c in last) or "target"
