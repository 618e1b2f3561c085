"""Training jobs: images, network, batches and plan, made from options; ``flaxtransfer plan``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from flaxtransfer.advice.auto import beginning, choose
from flaxtransfer.checkpoint.mirror import fetch_run
from flaxtransfer.classifier import Classifier, Head, ending_at, transfer
from flaxtransfer.commands.options import (
    AUTO,
    DEFAULT,
    TASK_NAMES,
    Augmentation,
    DataOptions,
    InputOptions,
    JobOptions,
    RegularizationOptions,
    SplitOptions,
    WeightsOptions,
    flag,
    fractions,
    is_file,
)
from flaxtransfer.commands.subcommands import Convert, Plan
from flaxtransfer.data.loader import (
    DataLoaders,
    band_patches,
    band_preprocessing,
    eval_batches,
    loaders,
)
from flaxtransfer.data.open import open_source
from flaxtransfer.data.scans import Levels
from flaxtransfer.data.source import Source, measure_levels, task_of_source, with_levels
from flaxtransfer.data.splits import (
    Split,
    Splits,
    groups_of,
    stratified_folds,
    stratified_split,
    subsample,
)
from flaxtransfer.data.transforms import flip_keeps_labels, training_transform
from flaxtransfer.distributed import check_alike, from_first
from flaxtransfer.features.class_means import Baseline, baseline, leaves_nothing
from flaxtransfer.features.inputs import pooled_features
from flaxtransfer.files import read_json
from flaxtransfer.losses import BinaryCrossEntropy, CrossEntropy
from flaxtransfer.models.adapters import change_input
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import Params, flatten, visible
from flaxtransfer.recipes import RECIPES
from flaxtransfer.recipes.parts import (
    MEASURED,
    MOST_IMAGES,
    Measurement,
    measure,
    most_images,
)
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.training.evaluation import Evaluation, evaluate, recalibrate
from flaxtransfer.training.plan import Phase, plan_table
from flaxtransfer.training.plan import Plan as TrainingPlan
from flaxtransfer.training.plan_yaml import load_plan, save_plan
from flaxtransfer.training.prefix_cache import Cache
from flaxtransfer.training.run_folder import (
    CONFIG_FILE,
    SPLIT_FILE,
    compute_of,
    split_of,
    validation_of,
    weights_of,
)
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.locations import cache_folder
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained

_Geometry = Literal["affine", "crop", "none"]
_Policy = Literal["none", "trivial", "randaugment"]

AUGMENTATIONS: dict[Augmentation, tuple[_Geometry, _Policy]] = {
    "affine": ("affine", "none"),
    "crop": ("crop", "none"),
    "none": ("none", "none"),
    "trivial": ("none", "trivial"),
    "randaugment": ("none", "randaugment"),
    "crop-trivial": ("crop", "trivial"),
    "crop-randaugment": ("crop", "randaugment"),
}
"""Geometry and policy of ``training_transform``, by what ``--augment`` calls them."""

MOST_IMAGES_FOR_HEADS = 2000
"""Images that heads on the frozen network are judged on; more hardly change their accuracy."""


class Choosing(NamedTuple):
    """How ``--strategy auto`` chooses: the folder of its race, its cache, and where it speaks."""

    folder: Path
    cache: Cache
    say: Callable[[str], None]


class FrozenHeads(NamedTuple):
    """Heads on the frozen network, judged by folds, and the features and labels they read.

    There is neither where no head can be judged, and the text says why.
    """

    text: str
    baseline: Baseline | None = None
    pooled: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def leave_nothing(self) -> bool:
        """Whether training could gain less than a point."""
        found = self.baseline
        return found is not None and leaves_nothing(found.ridge, found.examples, found.majority)


@dataclass(frozen=True)
class Job:
    """A training job: its data, its network, its plan, and what was measured before.

    ``levels`` is a note on gray levels, ``ranking`` says why validation ranks as it does; or "".
    """

    source: Source
    splits: Splits
    checkpoint: Pretrained
    network: Classifier
    data: DataLoaders
    plan: TrainingPlan
    evidence: Measurement
    levels: str = ""
    ranking: str = ""
    frozen: FrozenHeads | None = None

    def test(self, network: Classifier) -> Evaluation | None:
        """The metrics on the test images; None where there are none."""
        if not len(self.splits.test):
            return None
        batches = eval_batches(self.source, self.splits.test, network.preprocessing)
        return evaluate(network, batches)


def prepare(
    options: JobOptions,
    settings: Mapping[str, Any] | None = None,
    resumed: Path | None = None,
    choosing: Choosing | None = None,
) -> Job:
    """Opens data and weights, and makes the network, the batches and the plan.

    Args:
        options: of the job.
        settings: arguments of the recipe by name; None is the recipe's own default.
        resumed: the folder of a run that is resumed, whose split is kept.
        choosing: how a strategy is chosen; None for subcommands that take a named one.

    Raises:
        ValueError: options that do not fit the data, the weights or the strategy.
        FileNotFoundError: data, weights or a plan that do not exist.
    """
    settings = dict(settings or {})
    strategy = options.strategy.strategy or DEFAULT
    check_settings(strategy, settings)
    # Whoever says how long to train, with which loss, or brings a head, wants to train.
    open_to_heads = (
        options.strategy.strategy is None
        and options.regularization == RegularizationOptions()
        and options.strategy.head == "new"
        and options.strategy.balance == "no"
        and all(value is None for value in settings.values())
    )
    if strategy == AUTO and choosing is None:
        raise ValueError(f"--strategy {AUTO} is for flaxtransfer train; name a strategy here")
    seed, batch = options.split.seed, options.batch
    source, splits, checkpoint, network, levels = begin(
        options.data,
        options.weights,
        options.input,
        options.split,
        head=options.strategy.head,
        dtype=jnp.bfloat16 if batch.compute == "bfloat16" else None,
        resumed=resumed,
    )
    task, ranking = _ranked(network.task, options.strategy.metric, source, splits)
    network = replace(network, task=task)
    preprocessing = network.preprocessing
    flip = batch.flip == "yes" or (batch.flip == "auto" and flip_keeps_labels(source.class_names))

    geometry, policy = AUGMENTATIONS[batch.augment]

    def feed(parts: Splits) -> DataLoaders:
        transform = training_transform(
            preprocessing,
            geometry=geometry,
            flip=flip,
            policy=policy,
            erasing=batch.random_erasing,
            channels=len(preprocessing.mean),
            # Bands that an adapter reads are no colors, though there be three of them.
            rgb=network.model.config.adapter is None,
        )
        return loaders(
            source,
            parts,
            preprocessing,
            batch_size=batch.batch_size,
            transform=transform,
            seed=seed,
            workers=batch.workers,
            balanced=options.strategy.balance == "sampling" and task.name == SINGLE_LABEL.name,
        )

    data, evidence, frozen = feed(splits), Measurement(), None
    if choosing is not None and open_to_heads and task == SINGLE_LABEL:
        if (solved := _solved_before(resumed)) is None:
            frozen = frozen_heads(network, source, splits.train)
            solved = frozen.leave_nothing
        if solved:
            strategy = "solved_head"
            evidence = _nothing_to_train_for(frozen)
    if choosing is not None and strategy == AUTO:
        if options.regularization != RegularizationOptions():
            choosing.say("strategies are compared without regularization; the chosen one gets it")
        choice = choose(
            network,
            source,
            splits,
            choosing.folder,
            budget=options.strategy.budget,
            batch_size=batch.batch_size,
            seed=seed,
            feed=feed,
            lengths=lambda name: _with_lengths(name, {}, data),
            cache=choosing.cache,
            gains=options.strategy.gains,
            say=choosing.say,
        )
        strategy, settings = choice.candidate.strategy, dict(choice.candidate.settings)
        evidence = Measurement(pooled=choice.pooled)
    network = beginning(strategy, network, seed)
    if strategy in MEASURED and not {"segment", "segments"} & set(settings):
        positions = subsample(splits.train, most_images(strategy), source.labels())
        batches = eval_batches(source, positions, preprocessing, batch_size=batch.batch_size)
        groups = groups_of(source)
        own = None if groups is None else [groups[i] for i in positions.tolist()]
        evidence = measure(strategy, network, batches, len(splits.train), own)
    settings = {**_with_lengths(strategy, settings, data), **evidence.settings}
    plan = strategy_plan(strategy, network.params, settings)
    plan = regularized(balanced(plan, options.strategy.balance, task), options, task)
    network = ending_at(network, plan.ends_at)
    return Job(source, splits, checkpoint, network, data, plan, evidence, levels, ranking, frozen)


def frozen_heads(network: Classifier, source: Source, positions: np.ndarray) -> FrozenHeads:
    """Heads on the frozen network.

    Args:
        network: whose features they read.
        source: images and labels.
        positions: of the training images, of which at most MOST_IMAGES_FOR_HEADS are looked at.

    Raises:
        ValueError: an image that cannot be read.
    """
    looked = subsample(positions, MOST_IMAGES_FOR_HEADS, source.labels())
    pooled = pooled_features(network, eval_batches(source, looked, network.preprocessing))
    try:
        groups = groups_of(source)
        own = None if groups is None else [groups[i] for i in looked.tolist()]
        found = baseline(*pooled, classes=len(source.class_names), groups=own)
    except ValueError as error:
        return FrozenHeads(f"no baseline on frozen features: {error}")
    return FrozenHeads(str(found), found, pooled)


def _solved_before(folder: Path | None) -> bool | None:
    """Whether the run that is resumed solves its head; None for a new or a damaged one."""
    if folder is None:
        return None

    def solved() -> bool | None:
        try:
            phases = read_json(folder / CONFIG_FILE)["phases"].values()
            return all(phase["steps"] == 0 for phase in phases)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # `fit` says so.

    return from_first(solved)


def _nothing_to_train_for(frozen: FrozenHeads | None) -> Measurement:
    if frozen is None or frozen.baseline is None:
        return Measurement()
    left = 100 * frozen.baseline.left
    text = (
        f"{frozen.text}\nA solved head leaves {left:.1f} points to gain (threshold: 1), so that "
        f"nothing is trained; --strategy {DEFAULT} trains all the same"
    )
    return Measurement(text=text, pooled=frozen.pooled)


_UNEQUAL = 3.0
"""Times as many images of one class as of another, from which accuracy hides the rare one: to name
the frequent class alone is right for three of four."""


def _ranked(task: Task, metric: str | None, source: Source, splits: Splits) -> tuple[Task, str]:
    """The task with the metric that validation ranks by, and why, for a person.

    Raises:
        ValueError: the task has no such metric.
    """
    if metric is not None:
        return task.ranked_by(metric), ""
    if task.name != SINGLE_LABEL.name:
        return task, f"validation ranks by {task.ranking} (--metric)"
    names = source.class_names
    counts = np.bincount(source.labels()[splits.train], minlength=len(names))
    few, many = int(counts.argmin()), int(counts.argmax())
    if counts[many] < _UNEQUAL * counts[few]:
        return task, ""
    return task.ranked_by("balanced_accuracy"), (
        f"validation ranks by balanced_accuracy, for {names[many]!r} has {counts[many]} training "
        f"images and {names[few]!r} {counts[few]}; --metric accuracy ranks by accuracy, and "
        "--balance weights lets rare classes count as much"
    )


def balanced(plan: TrainingPlan, balance: str, task: Task) -> TrainingPlan:
    """The plan with the loss of ``--balance`` in every phase.

    Raises:
        ValueError: a plan that has losses of its own, or a task without such a loss.
    """
    if balance == "no":
        return plan
    losses: dict[tuple[str, str], Any] = {
        ("weights", "single_label"): CrossEntropy(class_weights="balanced"),
        ("logits", "single_label"): CrossEntropy(logit_adjustment=1.0),
        ("sampling", "single_label"): None,
        ("weights", "multi_label"): BinaryCrossEntropy(positive_weights="balanced"),
    }
    if (balance, task.name) not in losses:
        raise ValueError(f"--balance must be no for the task {task.name}, got {balance}")
    sampled = balance == "sampling"  # The batches are balanced, with any loss.
    own = [phase.name for phase in plan.phases if phase.loss is not None and not sampled]
    solved = [phase.name for phase in plan.phases if phase.only_solves]
    if own or solved:
        why = "whose losses the plan sets" if own else "which are solved, not trained"
        raise ValueError(f"--balance must be no for phases {why}: {', '.join(own or solved)}")
    if sampled:
        return plan
    loss = losses[balance, task.name]
    return replace(plan, phases=[replace(phase, loss=loss) for phase in plan.phases])


def regularized(plan: TrainingPlan, options: JobOptions, task: Task) -> TrainingPlan:
    """The plan with the options of regularization, accumulation and recomputation in its phases.

    Raises:
        ValueError: no phase takes steps, or label smoothing of another loss than cross-entropy.
    """
    given = asdict(options.regularization) | {
        "accumulate": options.batch.accumulate,
        "remat": options.batch.remat or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    smoothing = given.pop("label_smoothing", None)
    if not given and smoothing is None:
        return plan
    phases = [phase if phase.only_solves else replace(phase, **given) for phase in plan.phases]
    if all(phase.only_solves for phase in phases):
        names = ", ".join(flag(n) for n in (*given, *["label_smoothing"] * (smoothing is not None)))
        raise ValueError(f"{names} must be left out where the head is solved, not trained")
    if smoothing is not None:
        phases = [p if p.only_solves else _smoothed(p, smoothing, task) for p in phases]
    return replace(plan, phases=phases)


def _smoothed(phase: Phase, smoothing: float, task: Task) -> Phase:
    """The phase with a smoothed loss."""
    losses = {"single_label": CrossEntropy(), "multi_label": BinaryCrossEntropy()}
    loss: Any = losses.get(task.name) if phase.loss is None else phase.loss
    if not isinstance(loss, CrossEntropy | BinaryCrossEntropy):
        raise ValueError(
            f"--label-smoothing must be left out for the task {task.name} with the loss "
            f"{loss or task.loss!r}: it smooths cross-entropy"
        )
    return replace(phase, loss=replace(loss, label_smoothing=smoothing))


class Start(NamedTuple):
    """Images, their parts, a network that is made for them, and a note on gray levels or ""."""

    source: Source
    splits: Splits
    checkpoint: Pretrained
    network: Classifier
    levels: str


def begin(
    data: DataOptions,
    weights: WeightsOptions,
    channels: InputOptions,
    parts: SplitOptions,
    *,
    head: Head = "new",
    dtype: Any = None,
    resumed: Path | None = None,
) -> Start:
    """Opens images and weights, and makes a network of them for the classes of the images.

    Args:
        data: which images.
        weights: which weights.
        channels: how the images reach the network.
        parts: of the split.
        head: see ``transfer``.
        dtype: likewise.
        resumed: the folder of a run that is resumed, whose split is kept.
    """
    checkpoint = load_weights(weights.weights, weights, measure=weights.statistics == "measure")
    if channels.image_size is not None:
        resized = checkpoint.preprocessing.at_size(channels.image_size)
        checkpoint = replace(checkpoint, preprocessing=resized)
    source = open_source(
        data.name,
        download=data.download,
        skip_corrupt=data.skip_corrupt,
        bands=checkpoint.config.bands if channels.bands is None else channels.bands,
        **data.columns.arguments(),
    )
    check_same_images(source)
    task = task_of_source(source)
    if data.task is not None and TASK_NAMES[data.task] != task.name:
        raise ValueError(f"--task must be that of {data.name}, {task.name}, got {data.task}")
    splits = _kept(source, resumed) or split(source, data.name, parts)
    source, levels = leveled(
        source, splits.train, checkpoint, bands=channels.bands, window=channels.window
    )
    preprocessing, start = _bands(channels, checkpoint, source, splits)
    if levels is not None:
        preprocessing = levels.into(preprocessing)
    network = transfer(
        checkpoint,
        classes=len(source.class_names),
        class_names=source.class_names,
        preprocessing=preprocessing,
        head=head,
        seed=parts.seed,
        dtype=dtype,
        task=task,
        **start,
    )
    if weights.statistics == "measure":
        network = measured(network, source, subsample(splits.train, MOST_IMAGES, source.labels()))
    return Start(source, splits, checkpoint, network, "" if levels is None else levels.note)


def check_same_images(source: Source) -> None:
    """Refuses processes that have other images.

    Before the first batch: with other numbers of them the processes would wait for ever.
    """
    check_alike(
        {
            "images": len(source),
            "classes": list(source.class_names),
            "labels": hashlib.sha256(np.asarray(source.labels()).tobytes()).hexdigest(),
        }
    )


def leveled(
    source: Source,
    positions: np.ndarray,
    checkpoint: Pretrained,
    *,
    bands: int | None = None,
    window: tuple[float, float] | None = None,
) -> tuple[Source, Levels | None]:
    """The source with black and white for images of more than 8 bits, and what they are.

    Those of the weights hold where they take the bands of the images; others are measured.

    Args:
        source: of the images.
        positions: of the training images.
        checkpoint: the weights.
        bands: channels of the images; None for what the weights take.
        window: center and width, instead of all that.

    Raises:
        ValueError: as ``measure_levels``.
    """
    fits = bands in (None, checkpoint.config.bands) and window is None
    own = Levels.of(checkpoint.preprocessing) if fits else None
    levels = measure_levels(source, positions, window=window, own=own)
    return with_levels(source, levels), levels


_FEW = 8
"""Images that are looked at for a note."""


def levels_note(source: Source, positions: np.ndarray, network: Classifier) -> str:
    """How new images of more than 8 bits are read; "" for others, or where they cannot be read.

    Args:
        source: of the images.
        positions: of those that are used; a few of them are looked at.
        network: a trained one.
    """
    own = Levels.of(network.preprocessing)
    few = np.unique(np.linspace(0, len(positions) - 1, _FEW).astype(int))
    try:
        found = measure_levels(source, np.asarray(positions)[few], own=own)
    except (ValueError, OSError):
        return ""  # Whoever reads all of them says so.
    if found is not None and found.black and own is None:
        return (
            "gray levels: the network has no black and white for images of more than 8 bits; "
            "16-bit PNG and TIFF are read on the scale to 65535"
        )
    return "" if found is None else found.note


def _kept(source: Source, folder: Path | None) -> Splits | None:
    """The split of a run that is resumed; None for a new one, or where its record is damaged."""
    if folder is None:
        return None

    def kept() -> Any:
        try:
            return Split.from_json(read_json(folder / SPLIT_FILE)).to_json()
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # `fit` says so, and compares the data with those of the run.

    record = from_first(kept)
    return None if record is None else Split.from_json(record).positions(source)


def print_notes(source: Any, console: Console) -> None:
    """Prints what was assumed about the data."""
    for note in getattr(source, "notes", ()):
        text = visible(f"data: {note}")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if groups_of(source) is not None:
        console.print(
            "data: groups stay whole in the split and in the folds of baseline, advice and race; "
            "what a solved head or a probe says of itself is by folds that tear them apart, and "
            "may be too good",
            highlight=False,
            soft_wrap=True,
        )


def load_weights(
    source: str, options: WeightsOptions | Convert, *, measure: bool = False
) -> Pretrained:
    """The checkpoint of a source, as the options say; errors as in ``load``."""
    found = load(
        source,
        model=options.model,
        format=options.format,
        sensor=options.sensor,
        key=options.weights_key,
        statistics="measure" if measure else None,
    )
    return normalizing(found, mean=options.mean, std=options.std)


def measured(network: Classifier, source: Source, positions: np.ndarray) -> Classifier:
    """The network with the running statistics that these images of a source give."""
    batches = eval_batches(source, positions, network.preprocessing)
    return network.with_variables(
        {**network.variables, "batch_stats": recalibrate(network, batches)}
    )


def normalizing(checkpoint: Pretrained, **given: Sequence[str]) -> Pretrained:
    """The checkpoint with the mean and std of ``--mean`` and ``--std``; empty ones stay.

    Raises:
        ValueError: another number of channels than the network has.
    """
    bands = checkpoint.config.bands
    numbers = {name: fractions(texts) for name, texts in given.items() if texts}
    for name, values in numbers.items():
        if len(values) not in (1, bands):
            raise ValueError(
                f"--{name} must have 1 or {bands} numbers, one per channel, got {len(values)}"
            )
    if not numbers:
        return checkpoint
    whole: dict[str, Any] = {
        name: values * (bands // len(values)) for name, values in numbers.items()
    }
    return replace(
        checkpoint,
        preprocessing=replace(checkpoint.preprocessing, **whole),
        notes=(*checkpoint.notes, f"preprocessing: {' and '.join(whole)} as requested"),
    )


class Kept(NamedTuple):
    """Logits, labels and features of the validation examples that a run keeps."""

    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray


def kept_validation(run: Path) -> Kept:
    """The outputs of a finished run's network on its validation examples.

    Raises:
        FileNotFoundError: the run keeps none, or has not finished.
        ValueError: the file is damaged.
    """
    found = validation_of(run)
    if found.features is None:
        raise ValueError(f"the run in {run} keeps no features of its validation examples")
    return Kept(found.logits, found.labels, found.features)


def local_run(run: Path) -> Path:
    """The folder of a finished run; that of an address gs:// is fetched first.

    Raises:
        FileNotFoundError: the run in the bucket has not finished, or there is none.
        OSError: the storage refuses.
    """
    return fetch_run(run, cache_folder())


def trained_network(run: Path) -> Classifier:
    """The network of a finished run, which computes in the number type of the run.

    Raises:
        FileNotFoundError: it is not a run folder, or the run has not finished.
        ValueError: weights or configuration are damaged.
    """
    weights = load(weights_of(run))
    return Classifier.of(weights, dtype=compute_of(run))


def run_bands(run: Path, network: Classifier) -> int:
    """Channels that a finished run reads from image files."""
    try:
        bands = split_of(run).bands
    except FileNotFoundError:
        bands = None
    return network.model.config.bands if bands is None else bands


def run_data(run: Path, *, skip_corrupt: bool = False) -> tuple[Source, Splits]:
    """The data of a run, opened again, and the parts that it kept.

    Raises:
        FileNotFoundError: the run keeps no split, or the data are not there.
        ValueError: a program made the data, or examples of the run are missing from them.
    """
    kept = split_of(run)
    if not kept.address:
        raise ValueError(
            f"the run in {run} was trained on data that a program made; say with --data what to "
            "use instead"
        )
    source = open_source(kept.address, skip_corrupt=skip_corrupt, bands=kept.bands, **kept.opened)
    return source, kept.positions(source)


def split(source: Source, name: str, options: SplitOptions) -> Splits:
    """The images for training, validation and test: as the data say, or drawn.

    Raises:
        ValueError: options that do not fit the data.
    """
    given: Splits | None = getattr(source, "splits", None)
    groups = groups_of(source)
    if options.folds is not None:
        return _fold(source, given, groups, options)
    if given is not None:
        return _completed(source, given, groups, options)
    labels_per_class = options.labels_per_class
    if labels_per_class is None:
        labels_per_class = 5 if name == "digits" else 0
    return stratified_split(
        source.labels(),
        labels_per_class=labels_per_class or None,
        val_per_class=options.val_per_class or None,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        groups=groups,
        seed=options.seed,
        class_names=source.class_names,
    )


def _fold(
    source: Source, given: Splits | None, groups: Sequence[str] | None, options: SplitOptions
) -> Splits:
    """One fold; a test part that the data come with stays out of all of them."""
    if options.fold is None or options.folds is None:
        raise ValueError("--folds is for flaxtransfer train; elsewhere, give --fold as well")
    pool = np.arange(len(source))
    if given is not None:
        pool = np.sort(np.concatenate([given.train, given.val]))
    found = stratified_folds(
        source.labels()[pool],
        options.folds,
        groups=None if groups is None else [groups[i] for i in pool.tolist()],
        val_fraction=0.1 if options.val_fraction is None else options.val_fraction,
        seed=options.seed,
        class_names=source.class_names,
    )[options.fold - 1]
    rest = np.setdiff1d(np.arange(len(source)), pool)
    return Splits(pool[found.train], pool[found.val], pool[found.test], rest)


def _completed(
    source: Source, given: Splits, groups: Sequence[str] | None, options: SplitOptions
) -> Splits:
    """The split that the data come with; parts that it lacks are drawn from those to train on."""
    problems = []
    if options.labels_per_class:
        problems.append("--labels-per-class")
    if len(given.val) and (options.val_fraction is not None or options.val_per_class):
        problems.append("--val-fraction and --val-per-class")
    if len(given.test) and options.test_fraction is not None:
        problems.append("--test-fraction")
    if problems:
        raise ValueError(
            f"the data come with a split, and {' and '.join(problems)} would make another one; "
            "leave them out, or leave out the split (--split-column none, or folder:<path>/train)"
        )
    val = 0.0 if len(given.val) else options.val_fraction
    test = 0.0 if len(given.test) else options.test_fraction or 0.0
    if val == test == 0.0:
        return given
    inner = stratified_split(
        source.labels()[given.train],
        val_per_class=options.val_per_class or None,
        val_fraction=val,
        test_fraction=test,
        groups=None if groups is None else [groups[i] for i in given.train.tolist()],
        seed=options.seed,
        class_names=source.class_names,
    )
    return Splits(
        given.train[inner.train],
        given.val if len(given.val) else given.train[inner.val],
        given.test if len(given.test) else given.train[inner.test],
        given.rest,
    )


def _bands(
    options: InputOptions, checkpoint: Pretrained, source: Source, splits: Splits
) -> tuple[Preprocessing, dict[str, Any]]:
    """The preprocessing for the bands of the images, and arguments of ``transfer`` about them."""
    own, bands = checkpoint.preprocessing, options.bands
    start: dict[str, Any] = {"bands": bands, "adapter": options.adapter}
    start["wavelengths"] = options.wavelengths or None
    if bands is None or options.adapter == "replicate":
        return own, start
    # Before the images are read, so that a typing error costs no time.
    change_input(
        checkpoint.config,
        flatten(checkpoint.variables["params"])[checkpoint.config.first_kernel],
        bands=bands,
        method=options.adapter,
        wavelengths=start["wavelengths"],
        stem_wavelengths=own.wavelengths,
    )
    if bands == checkpoint.config.bands and not options.adapter and not options.wavelengths:
        return own, start
    preprocessing = band_preprocessing(own, source, splits.train, bands)
    if bands > 1 and options.adapter in (None, "linear", "curves") and not options.wavelengths:
        start["patches"] = band_patches(preprocessing, source, splits.train)
    return preprocessing, start


_LENGTHS = {
    "head_then_fine_tune": {"head_steps": (100, 3), "fine_tune_steps": (200, 10)},
    "progressive_unfreezing": {"steps": (100, 5)},
    "solved_head": {},
    "depth_head": {},
    "depths_head": {},
}
"""Default lengths of the recipes with several phases: least steps, and epochs."""


def _with_lengths(strategy: str, settings: Mapping[str, Any], data: DataLoaders) -> dict[str, Any]:
    """The settings with default lengths that follow the size of the training set."""
    found = dict(settings)
    if strategy in RECIPES:
        for name, (least, epochs) in _LENGTHS.get(strategy, {"steps": (300, 10)}).items():
            if found.get(name) is None:
                found[name] = max(least, epochs * data.steps_per_epoch)
    return found


def plan(options: Plan, console: Console) -> None:
    """Runs ``flaxtransfer plan``."""
    model = resnet(options.model, classes=options.classes)
    params = model.abstract()["params"]
    made = strategy_plan(options.strategy, params, {})
    console.print(plan_table(made, params))
    if options.out is not None:
        save_plan(options.out, made)
        console.print(f"written to {options.out}", highlight=False, soft_wrap=True)


def check_settings(strategy: str, settings: Mapping[str, Any]) -> None:
    """Checks that a strategy takes the settings, before data and weights are read.

    Args:
        strategy: name of a recipe, or path of a YAML file.
        settings: arguments of the recipe by name; None is the recipe's own default. A file is
            complete and takes none.

    Raises:
        ValueError: a setting that the strategy does not take, with those that it takes.
    """
    given = [name for name, value in settings.items() if value is not None]
    if strategy == AUTO:
        if given:
            raise ValueError(
                f"--strategy {AUTO} chooses {', '.join(map(flag, given))} itself; name a strategy "
                "to set them"
            )
        return
    if is_file(strategy):
        if given:
            raise ValueError(
                f"{strategy} sets what {', '.join(map(flag, given))} would set; edit the file "
                "instead"
            )
        return
    takes = inspect.signature(RECIPES[strategy]).parameters
    if unknown := [name for name in given if name not in takes]:
        raise ValueError(
            f"the strategy {strategy} does not take {', '.join(map(flag, unknown))}; of these "
            f"options it takes {', '.join(flag(name) for name in settings if name in takes)}"
        )


def strategy_plan(strategy: str, params: Params, settings: Mapping[str, Any]) -> TrainingPlan:
    """The plan of a recipe or a file.

    Args:
        strategy: name of a recipe, or path of a YAML file.
        params: parameters of the network, or their shapes.
        settings: arguments of the recipe by name; None is the recipe's own default. A file is
            complete and takes none.

    Raises:
        ValueError: a setting that the strategy does not take, with those that it takes; a recipe
            whose measurements are not among the settings.
        FileNotFoundError: no such file.
    """
    check_settings(strategy, settings)
    if is_file(strategy):
        return load_plan(strategy)
    recipe = RECIPES[strategy]
    given = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(recipe).parameters.values()
    measured = [p.name for p in parameters if p.default is p.empty and p.name != "params"]
    if missing := [name for name in measured if name not in given]:
        raise ValueError(
            f"the strategy {strategy} measures {' and '.join(missing)} on the images first; "
            f"flaxtransfer train --strategy {strategy} does so, and prints its plan before step 0"
        )
    return recipe(params, **given)
