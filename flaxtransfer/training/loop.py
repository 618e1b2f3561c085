"""The training loop: phases in order, each step in a stated order, resumable at any moment."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.batchnorm import modules
from flaxtransfer.checkpoint.manager import CheckpointManager
from flaxtransfer.checkpoint.manifest import DamagedCheckpointError
from flaxtransfer.checkpoint.mirror import mirrored
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import DataLoaders, reading, sample
from flaxtransfer.data.splits import Split
from flaxtransfer.distributed import check_alike, from_first, held_by_first, is_first, share
from flaxtransfer.features.inputs import pooled_features
from flaxtransfer.files import bucket_address, folder_lock
from flaxtransfer.metrics import shown
from flaxtransfer.paths import Variables, listing
from flaxtransfer.sharding import gather, make_mesh, peak_flops, place_batch, place_replicated
from flaxtransfer.training import identity, run_folder
from flaxtransfer.training.cached_loader import cached_feed
from flaxtransfer.training.console import (
    LONG_S,
    Clock,
    Extent,
    Interrupted,
    MetricsWriter,
    Request,
    Times,
    Tracer,
    log,
    progress_bar,
    read_times,
    seconds_text,
    watch_signals,
)
from flaxtransfer.training.evaluation import (
    Evaluation,
    Predictions,
    head_from_features,
    measure_moments,
    predict,
    recalibrate,
    with_statistics,
)
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.prefix_cache import (
    OFF,
    Cache,
    choose,
    join_state,
    split_phase,
    split_state,
)
from flaxtransfer.training.selection import (
    SAMPLES,
    Progress,
    check_feed,
    decide,
    prepared,
    score,
)
from flaxtransfer.training.step import Metrics, State, advance, start, train_step, with_variables


class NonFiniteLoss(ValueError):
    """The loss or the gradient became NaN or infinite; checkpoints before it are intact."""


@dataclass(frozen=True)
class FitOptions:
    """How a run is logged, validated and saved.

    Args:
        log_every: steps between two lines of training metrics.
        evaluate_every: steps between two validations; each ends with a checkpoint. By default one
            epoch, but at most ten times in a phase. It decides among which steps the best is
            chosen, so that a resumed run must have the same.
        keep_best: how many of the best validated checkpoints are kept besides the latest.
        tensorboard: also write TensorBoard events (extra ``tb``).
        profile: first and last of the steps that are traced into the run folder, from 1.

    Raises:
        ValueError: numbers below 1, steps in the wrong order; all in one text.
    """

    log_every: int = 10
    evaluate_every: int | None = None
    keep_best: int = 1
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        numbers = {"log_every": self.log_every, "evaluate_every": self.evaluate_every}
        numbers["keep_best"] = self.keep_best
        small = [
            f"{k} must be >= 1, got {v}" for k, v in numbers.items() if v is not None and v < 1
        ]
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            small.append(f"profile must be first and last step, from 1, got {self.profile}")
        if small:
            raise ValueError("; ".join(small))


@dataclass(frozen=True)
class FitResult:
    """What a run ended with.

    Args:
        network: with the variables of the best validated state, or of the last step where nothing
            was validated.
        steps: optimizer steps of all phases.
        validation: of ``network``, or None without a validation set.
        audits: one per phase.
        notes: what happened that a person should know: what was found damaged, and what was done
            about it; decisions between phases; examples that are new since the run was started.
        times: where the time went, that of interrupted processes among it; zeros in all processes
            but the first.
    """

    network: Classifier
    steps: int
    validation: Evaluation | None
    audits: tuple[run_folder.Audit, ...]
    notes: tuple[str, ...] = ()
    times: Times = field(default_factory=Times)

    @property
    def variables(self) -> Variables:
        """The parameters and statistics of ``network``."""
        return self.network.variables


@dataclass
class _Run:
    """What every part of the loop needs; fixed for the length of one ``fit``."""

    network: Classifier
    plan: Plan
    feed: DataLoaders
    folder: Path
    options: FitOptions
    cache: Cache
    mesh: Mesh
    store: CheckpointManager
    metrics: MetricsWriter
    request: Request
    clock: Clock
    tracer: Tracer
    shard_above: float | None
    pooled: tuple[np.ndarray, np.ndarray] | None
    sealed: dict[str, str]
    audits: list[run_folder.Audit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    caches: dict[str, bool] = field(default_factory=dict)

    def with_state(self, state: State) -> Classifier:
        """The network as evaluation sees it: whole, with the average where there is one."""
        return self.network.with_variables(self.joined(state.variables()))

    def place(self, tree: Any) -> Any:
        """A state on the devices, where it shares nothing with what was given."""
        return place_replicated(tree, self.mesh, self.shard_above)

    def joined(self, tree: Any) -> Any:
        """The tree as it is whole on every device."""
        return tree if self.shard_above is None else gather(tree, self.mesh)


def fit(
    network: Classifier,
    plan: Plan,
    data: DataLoaders,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    options: FitOptions | None = None,
    cache: Cache | None = None,
    mesh: Mesh | None = None,
    shard_above: float | None = None,
    pooled: tuple[np.ndarray, np.ndarray] | None = None,
) -> FitResult:
    """Trains a network through the phases of ``plan`` and leaves a complete run folder.

    In a run over several processes (``flaxtransfer.distributed.start``) every process calls it with
    the same arguments; process 0 alone reads and writes the folder.

    Args:
        network: from ``ft.transfer``, or made of a model and its weights; not changed.
        plan: what moves, how fast and when.
        data: batches as functions of the step, from ``ft.loaders``.
        folder: the run folder; new, or with ``resume`` one of the very same run. With an address
            such as ``gs://bucket/runs/scans`` (extra ``gcs``) the run works in
            ``runs/bucket/runs/scans``, which is mirrored there while it trains; with ``resume``
            what is there is fetched first.
        seed: of the run's random key.
        config: further JSON values that identify the run; a resumed run must have the same.
        resume: continue from the last sound checkpoint, exactly; start where there is none.
        options: logging, validation, saving.
        cache: whether the frozen part of the network is run once per phase instead of in every
            step; by default never, ``Cache()`` where it pays.
        mesh: devices; by default all of them.
        shard_above: bytes from which a parameter is split over the devices, and with it its moments
            and its average (``sharding.leaf_shardings``); it is joined in every step, and for
            evaluation. By default every device holds all. Other programs use 4 MB. Checkpoints are
            the same, and a run may be resumed with another value.
        pooled: what ``ft.features.pooled_features`` gives for the network, ended where the plan
            ends it, and ``data.calibration()``, where it is known already: a head that is solved
            before the first step then costs no pass over the images.

    Returns:
        The network with the best validated variables, or the last ones without a validation set.

    Raises:
        ValueError: labels that leave gaps, patience without a validation set; data that was
            prepared or labeled for another network; ``pooled`` of other examples or of another
            width; the folder holds another run, or an unfinished
            one and ``resume`` is not set, or somebody else is writing it; the loss is not finite
            (``NonFiniteLoss``); ``shard_above`` below 0; processes with other arguments than
            process 0, batches that are not divided among the processes, a mesh without some of
            them.
        OSError: the folder cannot be written; a bucket does not allow it, or at the end of the run
            had not taken all: the text says what is safe where.
        Interrupted: SIGINT or SIGTERM; the run can be resumed.
    """
    if (address := bucket_address(folder)) is not None:
        with mirrored(address, resume=resume, say=log) as local:
            return fit(
                network,
                plan,
                data,
                local,
                seed=seed,
                config=config,
                resume=resume,
                options=options,
                cache=cache,
                mesh=mesh,
                shard_above=shard_above,
                pooled=pooled,
            )
    started = time.perf_counter()
    folder, options, cache = Path(folder), options or FitOptions(), cache or OFF
    _check_data(network, data)
    network, plan = prepared(network, plan, data)
    check_feed(plan, data)
    _check_pooled(network, data, pooled)
    if shard_above is not None and not shard_above >= 0:
        raise ValueError(f"shard_above must be bytes >= 0, or None, got {shard_above}")
    total = sum(phase.total_steps(data.steps_per_epoch) for phase in plan.phases)
    if options.profile is not None and options.profile[1] > total:
        raise ValueError(
            f"profile must be steps of the run, which has {total:,}, got "
            f"{options.profile[0]}:{options.profile[1]}"
        )
    settings = {"options": asdict(options), "cache": asdict(cache), "resume": resume}
    settings["shard_above"] = shard_above
    _check_processes(data, mesh, settings)
    from_first(lambda: identity.check_place(folder))
    with held_by_first(lambda: folder_lock(folder)), _checkpoints(folder, options) as store:
        from_first(lambda: run_folder.remove_leftovers(folder))
        wanted, record = _identity(network, plan, data, seed, config, options, cache)
        before = store.meta() or {}
        found = _check_run(folder, wanted, record, before.get("sealed"), resume=resume)
        with watch_signals() as request:
            mesh = mesh or make_mesh()
            first = start(network.variables, plan.phases[0], seed)
            state, meta, skipped = _restore(store, plan, first)
            if not meta:
                from_first(lambda: identity.prepare(folder, wanted, record))
            seals = meta.get("sealed") or from_first(
                lambda: identity.seals_at_start(folder, wanted)
            )
            position = Progress(**meta.get("position", {}))
            if options.profile is not None and position.step >= options.profile[1]:
                begin, end = options.profile
                log(f"steps {begin} to {end} were made before: nothing is traced")
            with (
                MetricsWriter(
                    folder,
                    written=Extent(*meta["metrics"]) if meta else None,
                    step=position.step,
                    tensorboard=options.tensorboard,
                ) as metrics,
                Clock(folder, started) as clock,
                Tracer(folder, options.profile) as tracer,
            ):
                run = _Run(
                    replace(network, class_names=data.class_names),
                    plan,
                    data,
                    folder,
                    options,
                    cache,
                    mesh,
                    store,
                    metrics,
                    request,
                    clock,
                    tracer,
                    shard_above,
                    pooled,
                    sealed=dict(seals),
                    audits=[run_folder.Audit.from_json(row) for row in meta.get("audits", [])],
                    notes=list(dict.fromkeys([*meta.get("notes", []), *found.notes])),
                    damage=list(meta.get("damage", [])),
                    caches=dict(meta.get("caches", {})),
                )
                for text in (*found.damage, *_healed(run)):
                    log(text)
                    run.notes.append(text)
                for text in filter(None, (*skipped, metrics.damage)):
                    _say_loss(run, position, text)
                return _train(run, run.place(state), position)


def check_same_run(
    network: Classifier,
    plan: Plan,
    data: DataLoaders,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    options: FitOptions | None = None,
    cache: Cache | None = None,
) -> tuple[str, ...]:
    """Compares a run folder with what would be trained, without training; see ``fit``.

    Returns:
        What a person should know, such as examples that are new.

    Raises:
        ValueError: it is another run; every difference is listed.
    """
    folder, options, cache = Path(folder), options or FitOptions(), cache or OFF
    network, plan = prepared(network, plan, data)
    with held_by_first(lambda: folder_lock(folder)), _checkpoints(folder, options) as store:
        meta = store.meta()
        if meta is None:
            return ()
        wanted, record = _identity(network, plan, data, seed, config, options, cache)
        found = _check_run(folder, wanted, record, meta["sealed"], resume=True)
        return (*found.damage, *found.notes)


def _identity(
    network: Classifier,
    plan: Plan,
    data: DataLoaders,
    seed: int,
    config: Mapping[str, Any] | None,
    options: FitOptions,
    cache: Cache,
) -> tuple[dict[str, Any], Split | None]:
    """What makes this run this run, and the record of its examples, each of which is read."""
    record = identity.record_of(data)
    settings = {"evaluate_every": options.evaluate_every, **cache.identity(), **(config or {})}
    wanted = identity.identity_of(network, plan, seed, data, record, settings)
    identity.check_processes(wanted)
    return wanted, record


def _check_run(
    folder: Path,
    wanted: Mapping[str, Any],
    record: Split | None,
    seals: Mapping[str, str] | None,
    *,
    resume: bool,
) -> identity.Found:
    """What process 0 finds in the folder; see ``identity.check``."""
    found = from_first(lambda: identity.check(folder, wanted, record, seals, resume=resume))
    return identity.Found(*map(tuple, found))


def _check_processes(data: DataLoaders, mesh: Mesh | None, settings: Mapping[str, Any]) -> None:
    """Refuses what would count examples twice, or train without some of the processes.

    Settings that are no part of the identity decide, too, what the processes do in which order.
    """
    _, count = share()
    if count == 1:
        return
    devices = None if mesh is None else [device.id for device in mesh.devices.flat]
    check_alike({**settings, "mesh": devices})
    if data.examples is None:
        raise ValueError(
            "data must be made by ft.loaders in a run over several processes, which gives each "
            "process its share of a batch; got a feed without examples"
        )
    if mesh is not None and len({d.process_index for d in mesh.devices.flat}) < count:
        raise ValueError(f"mesh must have devices of all {count} processes, got {mesh}")
    if data.examples.batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the {count} processes, got "
            f"{data.examples.batch_size}"
        )


def _checkpoints(folder: Path, options: FitOptions) -> AbstractContextManager[CheckpointManager]:
    return CheckpointManager.open(folder / run_folder.CHECKPOINTS, keep_best=options.keep_best)


def _healed(run: _Run) -> Iterator[str]:
    """Writes again what can be made from the checkpoint; what was damaged, for a person."""
    if run.store.latest() is not None:
        yield from from_first(lambda: list(identity.heal(run.folder, run.sealed, run.audits)))


def _say_loss(run: _Run, position: Progress, text: str) -> None:
    """What was lost for good goes into the result, the metrics and the log."""
    log(text)
    run.damage.append(text)
    run.metrics.write("damage", position.step, {"text": text})


def _check_data(network: Classifier, data: DataLoaders) -> None:
    """Refuses batches that another network was meant to see."""
    if data.preprocessing != network.preprocessing:
        raise ValueError(
            f"data must be prepared for this network, whose preprocessing is "
            f"{network.preprocessing}, got {data.preprocessing}; make it with "
            "ft.loaders(source, splits, network.preprocessing, ...)"
        )
    if network.class_names and network.class_names != tuple(data.class_names):
        raise ValueError(
            "data must have the classes of the network, in its order, "
            f"{listing(network.class_names)}; got {listing(data.class_names)}; match them by name "
            "with ft.transfer(..., class_names=source.class_names)"
        )
    if data.examples is not None:
        classes = network.model.config.classes
        network.task.check(data.examples.labels, classes)
        network.task.check(data.examples.validation_labels, classes)
        network.task.check_rankable(data.examples.validation_labels, classes)


def _check_pooled(
    network: Classifier, data: DataLoaders, pooled: tuple[np.ndarray, np.ndarray] | None
) -> None:
    """Refuses features of other examples, or that this head cannot read."""
    if pooled is None or data.examples is None:
        return
    features, labels = map(np.asarray, pooled)
    wanted = (len(data.examples.labels), network.model.config.features)
    if features.shape != wanted or not np.array_equal(
        labels, data.examples.labels, equal_nan=labels.dtype.kind == "f"
    ):
        raise ValueError(
            f"pooled must be features of shape {list(wanted)} and the labels of the training "
            f"examples in their order, got shape {list(features.shape)}"
            + ("" if features.shape != wanted else " and other labels")
        )


def _train(run: _Run, state: State, position: Progress) -> FitResult:
    kept = "with a checkpoint; --resume continues"
    while True:
        phase = run.plan.phases[position.phase]
        where = f"at step {position.step}, {kept}" if position.step else "before the first step"
        with run.request.at_once(where), run.clock.during("prepare"):
            if position.phase_step == 0 and phase.recalibrate is not None:
                state = _recalibrate(run, phase, state)
            if position.phase_step == 0 and phase.probe:
                state = _probe(run, phase, state, position)
            before = _digests_at_start(run, state, position)
            feed = _feed_of(run, phase, state, position)
        state, position = _run_phase(run, phase, feed, state, position)
        with run.request.at_once(f"at step {position.step}, {kept}"):
            after = _frozen_digests(run, state, phase)
            run.audits.append(run_folder.compare(phase, before, after))
            from_first(lambda: run_folder.write_audits(run.folder, run.audits))
            state, kept_best = _best(run, state, position)
            if not _decide(run, position):
                break
            position = kept_best.next_phase()
            state = run.place(advance(state, run.plan.phases[position.phase]))
    with run.request.at_once(f"at step {position.step}, {kept}"):
        trained = run.with_state(state)
        predicted = _predict(run, run.feed, state, features=True)
        validation = None if predicted is None else predicted.evaluation(phase.loss)
    from_first(lambda: _finish(run, trained, position.step, predicted, validation))
    run.clock.write(phase.name, position.step)
    times = read_times(run.folder) if is_first() else Times()
    if is_first():
        log(str(times))
    if run.request.signal_number is not None:
        raise Interrupted(run.request.signal_number, "after the last step; the run is complete")
    notes = (*run.damage, *run.notes)
    return FitResult(trained, position.step, validation, tuple(run.audits), notes, times)


def _finish(
    run: _Run,
    network: Classifier,
    steps: int,
    predicted: Predictions | None,
    validation: Evaluation | None,
) -> None:
    run_folder.finish(run.folder, network, steps, predicted, validation, run.damage)
    shutil.rmtree(run.folder / run_folder.FEATURES, ignore_errors=True)


def _decide(run: _Run, position: Progress) -> bool:
    """Whether another phase begins; what that was decided on goes into the metrics and notes."""
    decision = decide(run.plan, position)
    if decision.evidence:
        run.metrics.write("decision", position.step, decision.evidence)
    if decision.text:
        run.notes.append(decision.text)
    return decision.goes_on


def _recalibrate(run: _Run, phase: Phase, state: State) -> State:
    """The state with measured statistics in the BatchNorms that the phase names."""
    assert run.feed.calibration is not None  # `check_feed` has asked for it.
    measured = recalibrate(
        run.with_state(state), run.feed.calibration(), phase.recalibrate, run.mesh
    )
    variables = {"params": state.params, "batch_stats": measured}
    placed: State = run.place(with_variables(state, variables, phase))
    return placed


def _with_statistics_of_average(run: _Run, phase: Phase, state: State) -> State:
    """The state with statistics of the averaged weights, measured on training images.

    Those that training keeps are of the weights that were stepped, which the average trails.
    Averaged alike they fit worse than measured ones (experiments/results/average_statistics.md).
    Where no statistics move, nothing is done.
    """
    policy = phase.batch_norm_policy()
    moving = frozenset(modules(state.params)) if policy == "batch" else policy
    if phase.ema is None or moving == "running" or not moving:
        return state
    with sample(run.feed) as batches:
        found = measure_moments(run.with_state(state), batches, moving, mesh=run.mesh)
    measured = with_statistics(run.joined(state.batch_stats), found)
    return state._replace(ema_stats=run.place(measured))


def _probe(run: _Run, phase: Phase, state: State, position: Progress) -> State:
    """The state with the head that is optimal on the features as they are."""
    assert run.feed.calibration is not None  # `check_feed` has asked for it.
    assert phase.probe is not None
    untouched = position.step == 0 and phase.recalibrate is None
    network = run.with_state(state)
    pooled = run.pooled if untouched else None
    if pooled is None:
        pooled = pooled_features(network, run.feed.calibration(), run.mesh)
    params, text = head_from_features(network, *pooled, kind=phase.probe, groups=run.feed.groups)
    begins = "is" if phase.only_solves else "begins with"
    run.notes.append(f"phase {phase.name!r} {begins} {text}")
    if not phase.only_solves:
        log(run.notes[-1])
    variables = {"params": params, "batch_stats": state.batch_stats}
    placed: State = run.place(with_variables(state, variables, phase))
    return placed


def _run_phase(
    run: _Run, phase: Phase, feed: DataLoaders, state: State, position: Progress
) -> tuple[State, Progress]:
    """The order of a step, and why.

    1. Read the batch of this step: its number is the data position, so nothing else is saved.
    2. Step. Metrics stay on the device: fetching them each time would stall the next step.
    3. Log, now and then: fetch what is pending and stop at the first loss that is not finite,
       before anything of it can reach a checkpoint.
    4. Validate and save: always together, so that a checkpoint has the metric it is ranked by.
    5. Ask whether to end: patience, then a signal, with the state of this very step saved.
    """
    if phase.only_solves:
        return _solved(run, state, position)
    total = phase.total_steps(run.feed.steps_per_epoch)
    every = run.options.evaluate_every or max(run.feed.steps_per_epoch, math.ceil(total / 10))
    model, task = run.network.model, run.network.task
    ranking = task.ranking
    segments = model.segments
    part = split_phase(phase, segments, feed.start)
    step_function = train_step(model, part, feed, task, run.mesh, run.shard_above)
    working, below = split_state(state, segments, feed.start)
    pending: list[tuple[int, Metrics]] = []
    text, told, flops = "", False, 0.0
    metrics: Metrics = {}
    run.clock.begin_phase()
    with (
        reading(feed, position.step) as batches,
        progress_bar(phase.name, total, start=position.phase_step) as show,
    ):
        while position.phase_step < total and not position.out_of_patience(phase):
            asked = time.perf_counter()
            batch = next(batches)
            placed = place_batch({k: batch[k] for k in ("image", "label")}, run.mesh)
            began, first, images = time.perf_counter(), not metrics, len(placed["label"])
            if first:
                flops = _flops(run, step_function, working, placed) / images
            with run.tracer.step(position.step + 1, metrics):
                working, metrics = step_function(working, placed)
            run.clock.step(asked, began, images, metrics, first=first)
            position = replace(position, phase_step=position.phase_step + 1)
            left = None if told else run.clock.forecast(total - position.phase_step)
            if left is not None:
                told = True
                _say_length(run, phase, left, total, every, position.phase_step)
            pending.append((position.step, metrics))
            done = position.phase_step == total
            interrupted = run.request.asked()
            validate = done or position.phase_step % every == 0
            if validate or interrupted or position.phase_step % run.options.log_every == 0:
                text = _log(run, phase, pending) + _pace(run, flops)
                pending.clear()
            if validate or interrupted:
                state = join_state(working, below)
            if validate:
                with run.clock.during("evaluate"):
                    state = _with_statistics_of_average(run, phase, state)
                    working, below = split_state(state, segments, feed.start)
                    position, found, metric = _validate(run, feed, state, position)
                text = text if found is None else f"{text} validation {shown(ranking, found)}"
                _save(run, state, position, metric)
            elif interrupted:
                _save(run, state, position, None)
            show(position.phase_step, text)
            if run.request.signal_number is not None and (validate or interrupted):
                where = f"at step {position.step}, with a checkpoint; --resume continues"
                raise Interrupted(run.request.signal_number, where)
    return state, position


def _say_length(run: _Run, phase: Phase, left: float, total: int, every: int, done: int) -> None:
    """Says how long a phase takes, where that is long."""
    if left < LONG_S or not is_first():
        return
    steps, validations = total - done, math.ceil(total / every) - done // every
    beside = f", and {validations} validations beside" if run.feed.validation is not None else ""
    log(
        f"phase {phase.name!r}: {steps:,} more steps take about {seconds_text(left)} "
        f"({left / steps:.3g} s each){beside}"
    )


def _flops(run: _Run, step_function: Any, state: State, batch: Any) -> float:
    """Floating-point operations of a step on all devices; 0 where their peak is not known."""
    compute = jnp.dtype(run.network.model.dtype or jnp.float32).name
    if peak_flops(run.mesh, compute) is None:
        return 0.0
    counted = step_function.lower(state, batch).cost_analysis() or {}
    return float(counted.get("flops", 0.0))


def _pace(run: _Run, flops: float) -> str:
    """Images per second since the last line, and the share of the peak that this is."""
    speed = run.clock.speed()
    if speed is None:
        return ""
    compute = jnp.dtype(run.network.model.dtype or jnp.float32).name
    peak = peak_flops(run.mesh, compute)
    share = f" ({speed * flops / peak:.0%} of peak FLOP/s)" if peak and flops else ""
    return f" {speed:,.0f} images/s{share}"


def _solved(run: _Run, state: State, position: Progress) -> tuple[State, Progress]:
    """A phase whose one step was to solve the head: it is validated and saved."""
    if position.phase_step == 0:
        with run.clock.during("evaluate"):
            position, _, metric = _validate(run, run.feed, state, replace(position, phase_step=1))
        _save(run, state, position, metric)
        run.request.asked()
    if run.request.signal_number is not None:
        where = f"at step {position.step}, with a checkpoint; --resume continues"
        raise Interrupted(run.request.signal_number, where)
    return state, position


def _feed_of(run: _Run, phase: Phase, state: State, position: Progress) -> DataLoaders:
    """What the phase reads: images, or what the part that does not move has made of them."""
    done = position.phase_step == phase.total_steps(run.feed.steps_per_epoch)
    if done or phase.only_solves or position.out_of_patience(phase):
        return run.feed  # No step is left that would read it.
    choice = choose(run.cache, run.network.model, state.params, phase, run.feed)
    if run.cache != OFF:
        log(choice.text)
    if choice.cut is None:
        return run.feed
    # Cached and uncached training differ in the last digits, and with random augmentation in more.
    number = str(position.phase)
    before = run.caches.get(number)
    if before is False:
        log(f"phase {phase.name!r}: nothing is cached, as before the interruption")
        return run.feed
    variables = run.joined({"params": state.params, "batch_stats": state.batch_stats})
    folder = run.cache.folder or run.folder / run_folder.FEATURES
    cached = cached_feed(choice, run.network.model, variables, run.feed, run.mesh, folder, log)
    if cached is None and before:
        raise ValueError(
            f"phase {phase.name!r} was trained on cached activations, which cannot be made again "
            f"in {folder}; make room there and resume, or give a new run folder"
        )
    run.caches[number] = cached is not None
    if cached is None:
        return run.feed
    log(cached.text)
    run.metrics.write("cache", position.step, {"phase": phase.name, **cached.facts})
    return cached.feed


def _log(run: _Run, phase: Phase, pending: Sequence[tuple[int, Metrics]]) -> str:
    """Writes the means since the last line; returns the text for the bar."""
    values = [
        (step, {name: float(value) for name, value in metrics.items()})
        for step, metrics in jax.device_get(list(pending))
    ]
    for step, metrics in values:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            listed = ", ".join(f"{name} is {value}" for name, value in bad.items())
            latest = run.store.latest()
            kept = "no checkpoint yet" if latest is None else f"the checkpoint of step {latest}"
            raise NonFiniteLoss(
                f"{listed} at step {step} ({phase.name}); stopped, {kept} is kept in "
                f"{run.folder}; try a lower learning rate or clip the gradient"
            )
    means = {
        name: float(np.mean([metrics[name] for _, metrics in values])) for name in values[0][1]
    }
    run.metrics.write("train", values[-1][0], {"phase": phase.name, **means})
    name = run.network.task.score_name
    return f"loss {means['loss']:.3f} {name} {shown(name, means[name])}"


def _predict(
    run: _Run, feed: DataLoaders, state: State, *, features: bool = False
) -> Predictions | None:
    if feed.validation is None:
        return None
    return predict(
        run.with_state(state), feed.validation(), run.mesh, start=feed.start, features=features
    )


def _validate(
    run: _Run, feed: DataLoaders, state: State, position: Progress
) -> tuple[Progress, float | None, float | None]:
    """The position after a validation, the ranking metric, and the score it is ranked by."""
    predicted = _predict(run, feed, state)
    if predicted is None:
        return position, None, None
    phase = run.plan.phases[position.phase]
    result = predicted.evaluation(phase.loss)
    task, several = run.network.task, len(run.plan.phases) > 1
    asked = several and (run.plan.min_z > 0 or run.plan.patience is not None)
    evidence = task.evidence(predicted.logits, predicted.labels, SAMPLES if asked else 0)
    ranked = score(run.plan, position, evidence)
    run.metrics.write("validation", position.step, {"phase": phase.name, **result.to_json()})
    return position.validated(ranked, evidence), result.metrics[task.ranking], ranked


def _save(run: _Run, state: State, position: Progress, metric: float | None) -> None:
    with run.clock.during("save"):
        _save_step(run, state, position, metric)
    run.clock.write(run.plan.phases[position.phase].name, position.step)


def _save_step(run: _Run, state: State, position: Progress, metric: float | None) -> None:
    meta = {
        "position": asdict(position),
        "sealed": run.sealed,
        "metrics": run.metrics.written,
        "audits": [asdict(audit) for audit in run.audits],
        "notes": run.notes,
        "damage": run.damage,
        "caches": run.caches,
    }
    run.store.save(position.step, state, meta, metric=metric)


def _restore(
    store: CheckpointManager, plan: Plan, first: State
) -> tuple[State, dict[str, Any], list[str]]:
    """State and meta of the newest sound checkpoint, or the start where there is none."""
    if not store.steps():
        return first, {}, []
    restored = store.restore(_abstract_of(plan, first))
    damage = [
        f"checkpoint of step {step} is damaged and was passed over: {reason}"
        for step, reason in restored.skipped
    ]
    return restored.tree, restored.meta, damage


def _abstract_of(plan: Plan, like: State) -> Callable[[Mapping[str, Any]], State]:
    """The state's shape depends on the phase that a checkpoint was written in."""

    def abstract(meta: Mapping[str, Any]) -> State:
        variables = {"params": like.params, "batch_stats": like.batch_stats}
        shapes: State = jax.eval_shape(
            lambda: start(variables, plan.phases[meta["position"]["phase"]], 0)
        )
        return shapes

    return abstract


def _best(run: _Run, state: State, position: Progress) -> tuple[State, Progress]:
    """The best validated state of the run so far; the given one where nothing was validated.

    Its step becomes the current one: data and checkpoints go on, they do not go back. Where the
    best was lost, the best of what is intact takes its place, and its score is what later phases
    have to better.
    """
    if position.best is None:
        return state, position
    try:
        restored = run.store.restore(_abstract_of(run.plan, state), step="best")
    except (DamagedCheckpointError, FileNotFoundError) as error:
        _say_loss(run, position, f"{error}; the state of step {position.step} is used")
        return state, replace(
            position,
            best=None,
            best_step=None,
            best_before=None,
            hits=None,
            hits_before=None,
            draws=(),
            draws_before=(),
        )
    if restored.step != position.step:
        whole = restored.tree._replace(step=np.int32(position.step))
        state = run.place(whole)
    if restored.step == position.best_step and restored.metric == position.best:
        return state, position
    reasons = "".join(f"; step {step}: {reason}" for step, reason in restored.skipped)
    score = "not validated" if restored.metric is None else f"score {restored.metric:.4f}"
    _say_loss(
        run,
        position,
        f"the best checkpoint of the run, that of step {position.best_step} (score "
        f"{position.best:.4f}), is lost{reasons}; that of step {restored.step} takes its place "
        f"({score})",
    )
    kept = Progress(**restored.meta["position"])
    return state, replace(
        position,
        best=restored.metric,
        best_step=restored.step,
        best_before=None,
        hits=kept.hits,
        draws=kept.draws,
    )


def _frozen_digests(run: _Run, state: State, phase: Phase) -> dict[str, str]:
    params, batch_stats = run.joined((state.params, state.batch_stats))
    return run_folder.frozen_digests(params, batch_stats, phase)


def _digests_at_start(run: _Run, state: State, position: Progress) -> Mapping[str, str]:
    """Digests of the leaves that this phase may not move, kept in a file across interruptions."""
    name = run_folder.frozen_file(position.phase)
    if position.phase_step > 0:
        sealed = run.sealed.get(name)
        kept = from_first(lambda: run_folder.read_frozen(run.folder, name, sealed))
        if kept is not None:
            return kept
    digests = _frozen_digests(run, state, run.plan.phases[position.phase])
    sha256 = from_first(lambda: run_folder.write_frozen(run.folder, name, digests))
    if position.phase_step > 0:
        wrong = f"{run.folder / name} is damaged or missing"
        # Where nothing has moved, the digests of today are those of the start.
        if sha256 == run.sealed.get(name):
            run.notes.append(f"{wrong} and is written again")
        else:
            since = f"the audit of this phase begins at step {position.step}"
            _say_loss(run, position, f"{wrong}: {since}")
    run.sealed[name] = sha256
    return digests
