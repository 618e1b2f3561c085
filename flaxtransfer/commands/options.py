"""Groups of command-line options, each a frozen dataclass that subcommands share.

A group is a section of ``--help``. An option's limits are in its annotation, beside its default, so
that ``check`` lists every value out of range, and ``recorded`` gives what a run folder keeps. This
module imports no jax: help and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from flaxtransfer.data.open import SCHEMES, open_source
from flaxtransfer.data.source import USUAL_COLUMNS
from flaxtransfer.files import check_regular
from flaxtransfer.metrics import METRICS
from flaxtransfer.models.config import Method
from flaxtransfer.models.registry import named
from flaxtransfer.paths import suggest
from flaxtransfer.recipes import RECIPE_NAMES
from flaxtransfer.weights.naming.formats import FORMATS
from flaxtransfer.weights.naming.published import SENSORS


@dataclass(frozen=True)
class Limit:
    """What a number must be.

    Args:
        text: completes "must be ...".
        holds: whether a value is within the limit.
    """

    text: str
    holds: Callable[[Any], bool]


NOT_NEGATIVE = Limit(">= 0", lambda value: value >= 0)
AT_LEAST_1 = Limit(">= 1", lambda value: value >= 1)
AT_LEAST_2 = Limit(">= 2", lambda value: value >= 2)
AT_LEAST_3 = Limit(">= 3", lambda value: value >= 3)
AT_LEAST_20 = Limit(">= 20", lambda value: value >= 20)
POSITIVE = Limit("> 0", lambda value: value > 0)
SHARE = Limit(">= 0 and < 1", lambda value: 0 <= value < 1)
UP_TO_1 = Limit(">= 0 and <= 1", lambda value: 0 <= value <= 1)
LEVEL = Limit("> 0 and < 1", lambda value: 0 < value < 1)

UNRECORDED = "unrecorded"
"""Marks an option that does not decide what is learned: the run folder does not keep it."""


def default(text: str) -> Any:
    """The default that help shows where the value itself says nothing, such as None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def described(text: str, *, default: str | None = None) -> Any:
    """A help text that is derived from a table; others are in the docstrings."""
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(help=text, help_behavior_hint=hint)


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""An option without a value, off by default."""

Count = Annotated[int, AT_LEAST_1]
Augmentation = Literal[
    "affine", "crop", "none", "trivial", "randaugment", "crop-trivial", "crop-randaugment"
]
Rate = Annotated[float, POSITIVE]

RECIPES_HELP = f"a recipe ({', '.join(RECIPE_NAMES)}), or the path of a plan, such as plan.yaml"
AUTO = "auto"
"""The strategy that chooses another one."""

DEFAULT = "head_then_fine_tune"
"""The recipe where none is named and training has something to gain."""

FORMATS_HELP = ", ".join(FORMATS)
SENSORS_HELP = ", ".join(SENSORS)
FORMS = [scheme.form for scheme in SCHEMES.values() if scheme.labeled]
SCHEMES_HELP = " or ".join((", ".join(FORMS[:-1]), FORMS[-1]))


METRIC_NAMES = tuple(dict.fromkeys(name for table in METRICS.values() for name in table))
METRICS_HELP = ", ".join(METRIC_NAMES)

PLAN_SUFFIXES = (".yaml", ".yml")
WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".stablehlo", ".h5")


TASK_NAMES = {"single": "single_label", "multi": "multi_label", "regression": "regression"}
"""The tasks by what ``--task`` calls them."""

TABLES_HELP = ", ".join(scheme.form for scheme in SCHEMES.values() if scheme.columns)


def _column(kind: str, text: str, none: str = "an error where there is none") -> Any:
    usual = ", ".join(USUAL_COLUMNS[kind][:4])
    return described(text, default=f"the usual names: {usual}, ...; {none}")


@dataclass(frozen=True)
class ColumnOptions:
    """Columns of a table with one row per image (csv:, parquet: and hf:).

    Args:
        label_separator: Mark between several labels of an image in one column.
        ignore_label: Value that means "no label"; such rows are left out, and counted.
    """

    image_column: Annotated[
        str | None,
        UNRECORDED,
        _column(
            "image",
            "Column with the images (hf:) or their paths, relative to the table or absolute; or a "
            "pattern, such as images/{id}.png.",
        ),
    ] = None
    label_column: Annotated[
        tuple[str, ...],
        UNRECORDED,
        _column(
            "label",
            "Column with the label: text and whole numbers are classes, other numbers values; or "
            "several columns of 0, 1 and empty cells.",
        ),
    ] = ()
    split_column: Annotated[
        str | None,
        UNRECORDED,
        _column("split", "Column with train, val or test; none for no such column.", "else none"),
    ] = None
    group_column: Annotated[
        str | None,
        UNRECORDED,
        _column(
            "group",
            "Column of patients, scenes or sites, none of which comes into two parts of the split; "
            "none for no such column.",
            "else none",
        ),
    ] = None
    label_separator: Annotated[str, UNRECORDED] = "|"
    ignore_label: Annotated[str | None, UNRECORDED, default("none")] = None

    def arguments(self) -> dict[str, Any]:
        """What was given, as arguments of ``open_source``.

        >>> ColumnOptions(group_column="site").arguments()
        {'group_column': 'site'}
        """
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        plain = {entry.name: entry.default for entry in dataclasses.fields(self)}
        return {name: value for name, value in given.items() if value != plain[name]}

    def unused(self, data: str | None) -> Iterator[str]:
        """Options that the data source has no use for."""
        scheme = SCHEMES.get((data or "").partition(":")[0])
        if (given := self.arguments()) and not (scheme and scheme.columns):
            yield (
                f"{', '.join(map(flag, given))} must be given with --data {TABLES_HELP} only, got "
                f"{data or 'no --data'}"
            )


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Args:
        task: What an image has: a single class, any of multiple labels, or numbers (regression).
        skip_corrupt: Leave out unreadable images instead of stopping.
        download: Allow a data set of tfds: or hf: to be downloaded.
    """

    name: Annotated[
        str,
        tyro.conf.arg(
            name="data",
            help=f"Data set: {SCHEMES_HELP}. A folder has one sub-folder per class, or folders "
            "train, val and test of such; a table has one row per image.",
        ),
    ] = "digits"
    task: Annotated[
        Literal["single", "multi", "regression"] | None, default("what the data say")
    ] = None
    skip_corrupt: Flag = False
    download: Annotated[Flag, UNRECORDED] = False
    columns: ColumnOptions = field(default_factory=ColumnOptions)

    def problems(self) -> Iterator[str]:
        """An unknown data source, and options that it has no use for."""
        yield from data_problems("--data", self.name)
        yield from self.columns.unused(self.name)


@dataclass(frozen=True)
class SplitOptions:
    """Which images train, validate and test.

    Args:
        labels_per_class: Train on this many labels per class and test on all others; 0 means all.
        val_per_class: Use this many of those labels per class for validation.
        val_fraction: Share of the labeled images for validation.
        test_fraction: Share of the images for the test.
        folds: Cross-validate: train and test this many times, so that each image is tested once.
        fold: Of these folds, only that with this number, from 1.
        seed: Seed of the split, the new head, the order of the images and the augmentation.
    """

    labels_per_class: Annotated[
        int | None, NOT_NEGATIVE, default("5 for digits, all for other data")
    ] = None
    val_per_class: Annotated[int, NOT_NEGATIVE] = 0
    val_fraction: Annotated[
        float | None, SHARE, default("0.1, or 0 where labels are counted per class")
    ] = None
    test_fraction: Annotated[
        float | None, SHARE, default("0.2, or all others where labels are counted per class")
    ] = None
    folds: Annotated[int | None, AT_LEAST_2, default("none")] = None
    fold: Annotated[int | None, AT_LEAST_1, UNRECORDED, default("all, one after the other")] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0

    def problems(self) -> Iterator[str]:
        """Options that exclude each other."""
        if self.folds is None:
            if self.fold is not None:
                yield "--fold belongs to --folds; give it as well"
            return
        if self.fold is not None and self.fold > self.folds:
            yield f"--fold must be 1 .. {self.folds}, got {self.fold}"
        given = {
            "--labels-per-class": self.labels_per_class,
            "--val-per-class": self.val_per_class,
            "--test-fraction": self.test_fraction,
        }
        if others := [name for name, value in given.items() if value]:
            yield f"--folds tests on every image in turn; leave out {', '.join(others)}"


@dataclass(frozen=True)
class WeightsOptions:
    """The pre-trained weights.

    Args:
        weights: Weights of a ResNet: builtin, a file (.safetensors, .pth, .npz, .h5, .keras), a
            folder with one, hf://organization/name[@revision], https:// or gs://bucket/path.
        model: Network that the weights must be, by name, such as resnet50_v1: it also says what no
            weights show, here the stride in the first convolution.
        mean: Mean that the network subtracts from each channel, for pixels from 0 to 1: one number
            for all or one per channel, such as 0.5 or 123/255.
        std: Standard deviation that it then divides by, likewise.
        statistics: Running statistics of the BatchNorms: those of the file, or measured on training
            images, for a file that has none.
    """

    weights: str = "builtin"
    weights_key: Annotated[
        str | None,
        described(
            "Place of the network in a file that holds several, such as student.",
            default="an average before plain weights",
        ),
    ] = None
    format: Annotated[
        str | None,
        described(f"Naming of the weights: {FORMATS_HELP}.", default="read off the file"),
    ] = None
    model: Annotated[str | None, default("that of the weights")] = None
    sensor: Annotated[
        str | None,
        described(
            f"Sensor whose bands the weights take: {SENSORS_HELP}.",
            default="read off the name of the weights",
        ),
    ] = None
    mean: Annotated[tuple[str, ...], default("recorded, or assumed")] = ()
    std: Annotated[tuple[str, ...], default("recorded, or assumed")] = ()
    statistics: Literal["file", "measure"] = "file"

    def problems(self) -> Iterator[str]:
        """An unknown network, and numbers that are none."""
        yield from model_problems(self.model)
        yield from fraction_problems(("--mean", self.mean), ("--std", self.std))


def fractions(texts: Iterable[str]) -> tuple[float, ...]:
    """Numbers that may be written as fractions.

    >>> fractions(("0.5", "123/255"))
    (0.5, 0.4823529411764706)
    """
    pairs = (text.partition("/") for text in texts)
    return tuple(float(above) / float(below or "1") for above, _, below in pairs)


def fraction_problems(*options: tuple[str, tuple[str, ...]]) -> Iterator[str]:
    """What is wrong with options that take fractions."""
    for name, texts in options:
        try:
            fractions(texts)
        except (ValueError, ZeroDivisionError):
            yield f"{name} must be numbers such as 0.485 or 123/255, got {' '.join(texts)!r}"


def model_problems(name: str | None) -> Iterator[str]:
    """What is wrong with ``--model``; None is no name."""
    try:
        if name is not None:
            named(name, "--model")
    except ValueError as error:
        yield str(error)


@dataclass(frozen=True)
class InputOptions:
    """The channels and the size of the images.

    Args:
        bands: Channels of the images, each normalized by its own statistics over the training
            images: gray (1), gray with alpha (2), RGB (3), RGBA (4), or any number in a GeoTIFF.
        adapter: How other bands reach the stem; linear and curves learn, the others do not.
        wavelengths: Center of each band in nm, from which an adapter starts.
        window: Center and width of the measurements between black and white, such as 40 400, for
            images of more than 8 bits.
        image_size: Side of the images that the network gets, in px. Networks take any; larger ones
            show more and cost more, by the square.
    """

    bands: Annotated[
        int | None, AT_LEAST_1, default("what the weights take, gray being replicated")
    ] = None
    adapter: Annotated[Method | None, default("linear, where the bands differ")] = None
    wavelengths: Annotated[
        tuple[float, ...], default("none: an adapter starts from the training images")
    ] = ()
    window: Annotated[
        tuple[float, float] | None,
        default("each DICOM file's own, else measured on the training images"),
    ] = None
    image_size: Annotated[int | None, AT_LEAST_1, default("that of the weights")] = None

    def problems(self) -> Iterator[str]:
        """Options that mean nothing without another, and a window without a width."""
        if self.window is not None and not self.window[1] > 1:
            yield f"--window: its width must be > 1, got {self.window[1]:g}"
        if self.bands is None and (self.adapter or self.wavelengths):
            yield "--adapter and --wavelengths belong to --bands; give it as well"


GainsFile = Annotated[
    Path | None,
    described(
        "File of what each strategy gained elsewhere with this network, in the form of "
        "flaxtransfer/advice/gains.json.",
        default="known of the built-in network",
    ),
]


@dataclass(frozen=True)
class StrategyOptions:
    """How the network is adapted.

    Args:
        head: Start of the head: new starts at zero, keep takes the checkpoint's head, resize takes
            its first rows.
        balance: For rare classes: weights lets them count as much as frequent ones (for multiple
            labels, positives as much as negatives); logits adds the log frequency of each class to
            the logits in training; sampling shows rare classes as often as frequent ones.
    """

    strategy: Annotated[
        str | None,
        described(
            f"Strategy: {AUTO}, which chooses one by advice and a race; {RECIPES_HELP}; "
            '"flaxtransfer plan" prints and writes them.',
            default=f"solved_head where it leaves less than 1 point to gain, else {DEFAULT}",
        ),
    ] = None
    head: Literal["new", "keep", "resize"] = "new"
    metric: Annotated[
        str | None,
        described(
            f"What validation ranks by: {METRICS_HELP}.",
            default="by the task; balanced_accuracy where classes are unequal",
        ),
    ] = None
    balance: Literal["no", "weights", "logits", "sampling"] = "no"
    budget: Annotated[
        str, described(f"Full runs (4x) or minutes (10m) for {AUTO}, the last run included.")
    ] = "4x"
    gains: Annotated[GainsFile, UNRECORDED] = None

    def problems(self) -> Iterator[str]:
        """An unknown recipe or metric, a plan that does not exist, a budget of another form."""
        if self.metric is not None and self.metric not in METRIC_NAMES:
            near = suggest(self.metric, METRIC_NAMES)
            yield f"--metric must be one of {METRICS_HELP}, got {self.metric!r}{near}"
        if self.strategy not in (None, AUTO):
            yield from strategy_problems(self.strategy, AUTO)
        if not re.fullmatch(r"[1-9]\d{0,3}[xm]", self.budget):
            yield (
                "--budget must be a number of full runs or of minutes, such as 4x or 10m, got "
                f"{self.budget!r}"
            )
        if self.gains is not None and self.strategy != AUTO:
            yield f"--gains belongs to --strategy {AUTO}; a named strategy reads none"
        yield from input_problems("--gains", self.gains)


@dataclass(frozen=True)
class BatchOptions:
    """Batches and arithmetic.

    Args:
        batch_size: Images per step.
        flip: Mirror images in training; auto decides by the names of the classes.
        augment: Change of images in training: affine turns, shifts and magnifies a little; crop
            cuts out a part, as for photographs; trivial and randaugment draw from a set of strong
            operations (TrivialAugment turns by up to 135 degrees), with crop- in front after a
            crop. Gray images and bands get those of them that keep their meaning.
        random_erasing: Share of training images that lose a random rectangle.
        accumulate: Parts in which a batch is computed, one after the other, so that it needs less
            memory; a step is still a whole batch. A BatchNorm that uses batch statistics takes
            those of each part.
        remat: Compute each block once more in the backward pass instead of keeping what is in it
            (gradient checkpointing): for large images on accelerators; a CPU saves nothing by it.
        compute: Number type of the convolutions; bfloat16 is for accelerators, and parameters and
            statistics stay float32.
        workers: Processes that decode images; 0 uses threads.
    """

    batch_size: Count = 64
    flip: Literal["auto", "yes", "no"] = "auto"
    augment: Augmentation = "affine"
    random_erasing: Annotated[float, UP_TO_1] = 0.0
    accumulate: Annotated[int | None, AT_LEAST_1, default("1, or the plan's")] = None
    remat: Flag = False
    compute: Literal["float32", "bfloat16"] = "float32"
    workers: Annotated[int, NOT_NEGATIVE, UNRECORDED] = 0


_PLANS = default("0, or the plan's")


@dataclass(frozen=True)
class RegularizationOptions:
    """What keeps training from learning images by heart; in every phase that takes steps.

    Args:
        mixup: Alpha of MixUp, such as 0.2: images are blended in pairs, and what is to be said of
            them. Targets of a regression are blended themselves, which is wrong for angles.
        cutmix: Alpha of CutMix, such as 1.0: images get a rectangle of another one, and its class
            or labels by the share of the area. With both, one is drawn in each step.
        label_smoothing: Share of a class or label that is spread over all of them, such as 0.1.
        dropout: Share of the features before the head that are dropped.
        stochastic_depth: Probability with which the last block is passed by its shortcut alone;
            earlier ones in proportion to their depth, and frozen ones never.
    """

    mixup: Annotated[float | None, NOT_NEGATIVE, _PLANS] = None
    cutmix: Annotated[float | None, NOT_NEGATIVE, _PLANS] = None
    label_smoothing: Annotated[float | None, SHARE, _PLANS] = None
    dropout: Annotated[float | None, SHARE, _PLANS] = None
    stochastic_depth: Annotated[float | None, SHARE, _PLANS] = None


@dataclass(frozen=True)
class JobOptions:
    """All that makes a training job: images, network and strategy."""

    data: DataOptions = field(default_factory=DataOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    weights: WeightsOptions = field(default_factory=WeightsOptions)
    input: InputOptions = field(default_factory=InputOptions)
    strategy: StrategyOptions = field(default_factory=StrategyOptions)
    regularization: RegularizationOptions = field(default_factory=RegularizationOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)


@dataclass(frozen=True)
class TrainingOptions:
    """Length and learning rates of the recipe.

    Args:
        steps: Steps of a strategy of one phase, or of each phase of progressive_unfreezing.
        head_steps: Steps of the head alone.
        fine_tune_steps: Steps of all parameters.
        head_learning_rate: Peak learning rate of the head.
        learning_rate: Peak learning rate of all other parameters that train.
        weight_decay: Decoupled weight decay, on kernels.
        patience: Evaluations without a better validation metric that end a phase.
        evaluate_every: Steps between validations, each with a checkpoint.
    """

    steps: Annotated[int | None, AT_LEAST_1, default("300, or 10 epochs if that is more")] = None
    head_steps: Annotated[int | None, NOT_NEGATIVE, default("100, or 3 epochs if that is more")] = (
        None
    )
    fine_tune_steps: Annotated[
        int | None, NOT_NEGATIVE, default("200, or 10 epochs if that is more")
    ] = None
    head_learning_rate: Annotated[float | None, POSITIVE, default("the strategy's")] = None
    learning_rate: Annotated[float | None, POSITIVE, default("the strategy's")] = None
    weight_decay: Annotated[float | None, default("the strategy's")] = None
    patience: Annotated[int | None, AT_LEAST_1, default("none")] = None
    evaluate_every: Annotated[
        int | None, AT_LEAST_1, default("an epoch, at most 10 times per phase")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The arguments of a recipe; None is the recipe's own default."""
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        del given["evaluate_every"]
        return given


@dataclass(frozen=True)
class CacheOptions:
    """The cache of what the frozen part of the network computes.

    Args:
        where: Place of the cache; auto caches where that pays and fits, memory and disk insist on
            the place, and off runs the frozen part in every step instead of once per phase.
        views: Versions of each augmented image in the cache; training takes them in turn.
        dtype: Number type in the cache; auto is float32, or float16 where only that fits.
        memory_gb: Most memory that the cache may take, in GB.
        disk_gb: Most disk space that caches may take, in GB.
        folder: Folder of caches that other runs share.
    """

    where: Annotated[Literal["auto", "memory", "disk", "off"], tyro.conf.arg(name="cache")] = "auto"
    views: Annotated[int, AT_LEAST_1, tyro.conf.arg(name="cache-views")] = 8
    dtype: Annotated[Literal["auto", "float32", "float16"], tyro.conf.arg(name="cache-dtype")] = (
        "auto"
    )
    memory_gb: Annotated[float, NOT_NEGATIVE, tyro.conf.arg(name="cache-memory-gb")] = 2.0
    disk_gb: Annotated[float, NOT_NEGATIVE, tyro.conf.arg(name="cache-disk-gb")] = 20.0
    folder: Annotated[
        Path | None,
        UNRECORDED,
        tyro.conf.arg(
            name="cache-dir",
            help_behavior_hint="(default: the run folder, until the run has finished)",
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """The run folder, and what is written and compared.

    Args:
        run: Run folder; or gs://bucket/path (extra gcs), to which a local folder is mirrored while
            the run trains, and from which --resume goes on.
        resume: Continue the run in the folder, if there is one.
        compare: Also train from scratch; auto does so with at most 1000 training images, and not
            in folds.
        scratch_learning_rate: Peak learning rate of that comparison.
        tensorboard: Also write TensorBoard events (extra tb).
        profile: Steps to trace into the run folder, such as 10:15, for xprof or TensorBoard.
        shard_above_mb: Split parameters of more than so many megabytes over the devices, with their
            moments and averages; 4 is what other programs take.
        compilation_cache: Folder or gs://bucket/path (extra gcs) that keeps compiled programs for
            later runs, also on other machines of the kind.
    """

    run: Annotated[
        Path | None, UNRECORDED, default("runs/<data>-seed<seed>, of folds with -folds<folds>")
    ] = None
    resume: Annotated[Flag, UNRECORDED] = False
    compare: Annotated[Literal["auto", "yes", "no"], UNRECORDED] = "auto"
    scratch_learning_rate: Rate = 3e-3
    tensorboard: Annotated[Flag, UNRECORDED] = False
    profile: Annotated[str | None, UNRECORDED, default("none")] = None
    shard_above_mb: Annotated[
        float | None, NOT_NEGATIVE, UNRECORDED, default("every device holds all")
    ] = None
    compilation_cache: Annotated[
        str | None, UNRECORDED, default("the cache folder of this machine")
    ] = None

    def problems(self) -> Iterator[str]:
        """Steps to trace that are none."""
        if self.profile is not None and self.steps_to_trace() is None:
            yield f"--profile must be first:last step, from 1, such as 10:15, got {self.profile!r}"

    def steps_to_trace(self) -> tuple[int, int] | None:
        """The first and the last step to trace; None without, or for what is none.

        >>> RunOptions(profile="10:15").steps_to_trace()
        (10, 15)
        """
        found = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})", self.profile or "")
        steps = None if found is None else (int(found[1]), int(found[2]))
        return steps if steps is not None and steps[0] <= steps[1] else None


@dataclass(frozen=True)
class ReadingOptions:
    """How images are read.

    Args:
        batch_size: Images per batch.
        skip_corrupt: Leave out unreadable images, with a note, instead of stopping.
    """

    batch_size: Count = 64
    skip_corrupt: Flag = False


def data_problems(option: str, name: str) -> Iterator[str]:
    """An unknown data source; one of a known scheme is not opened."""
    takes_rest = {name: each.takes_rest for name, each in SCHEMES.items() if each.labeled}
    scheme, colon, _ = name.partition(":")
    if takes_rest.get(scheme) is not bool(colon):
        try:
            open_source(name)
        except ValueError as error:
            yield f"{option}: {error}"


def input_problems(option: str, path: Path | None) -> Iterator[str]:
    """Why a file cannot be read, as far as its name tells; None is no file."""
    if path is not None and not path.is_file():
        what = "be a regular file" if path.exists() else "exist"
        yield f"{option} must name a file; {path} does not {what}"


def is_file(strategy: str) -> bool:
    """Whether a strategy is the path of a plan, rather than the name of a recipe."""
    return strategy.endswith(PLAN_SUFFIXES)


def strategy_problems(strategy: str, *others: str) -> Iterator[str]:
    """What is wrong with the name of a recipe, or one of the others, or the path of a plan."""
    if is_file(strategy):
        if not Path(strategy).exists():
            yield f"--strategy: there is no plan {strategy}"
        elif not Path(strategy).is_file():
            yield f"--strategy: the plan {strategy} must be a regular file"
    elif strategy not in RECIPE_NAMES:
        known = (*others, *RECIPE_NAMES)
        either = "".join(f"{other}, or " for other in others)
        yield (
            f"--strategy must be {either}{RECIPES_HELP}, got {strategy!r}{suggest(strategy, known)}"
        )


_LEAST_ROOM = 2**14
"""Bytes; less than any picture, report or run takes."""


def output_problems(
    option: str,
    path: Path | None,
    *,
    suffixes: Sequence[str] = (),
    folder: bool = False,
    either: bool = False,
    needs: int = _LEAST_ROOM,
) -> Iterator[str]:
    """Why something cannot be written, said before anything is computed for it.

    Args:
        option: that named the path, for the text.
        path: of the file or folder; None where none is asked for.
        suffixes: that the name may end in; () for any.
        folder: whether it is a folder, which is made with its parents.
        either: whether it may be a folder that is made without them.
        needs: bytes that it will take, where that is known.

    >>> list(output_problems("--out", Path("no/plan.yaml"), suffixes=PLAN_SUFFIXES))
    ['--out: the folder no for plan.yaml does not exist; make it, or name another']
    """
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        named = f"{option}: its name" if option.startswith("--") else option
        yield f"{named} must end in {', '.join(suffixes)}, got {path}"
    if folder:
        # Where the first folder that is missing will be made.
        place = next(each for each in (path, *path.parents) if each.exists() or each == each.parent)
        if not place.is_dir():
            yield f"{option} must be a folder, got {path}, and {place} is a file"
            return
    else:
        place = path.parent
        if not place.is_dir():
            yield (
                f"{option}: the folder {place} for {path.name} does not exist; make it, or name "
                "another"
            )
            return
        if path.is_dir() and not either:
            yield f"{option} must be a file, got the folder {path}"
            return
    try:
        # By trying, which knows about every kind of permission, and leaves nothing behind.
        with tempfile.TemporaryFile(dir=place):
            pass
        total, _, free = shutil.disk_usage(place)
    except OSError as error:
        yield f"{option}: nothing can be written in {place} ({error.strerror}); name another place"
        return
    if total and needs > free:
        yield (
            f"{option}: {path} needs {needs:,} bytes, and {free:,} are free in {place}; make "
            "room, or name another place"
        )


def check(options: Any) -> None:
    """Checks options, before anything is imported that could use them.

    Args:
        options: a dataclass of options, with groups in it.

    Raises:
        ValueError: values out of range, and what the ``problems`` of the dataclasses list; all in
            one text.

    >>> check(BatchOptions(batch_size=0, workers=-1))
    Traceback (most recent call last):
    ...
    ValueError: --batch-size must be >= 1, got 0; --workers must be >= 0, got -1
    """
    if problems := list(_problems(options)):
        raise ValueError("; ".join(problems))


def recorded(options: Any, *, unrecorded: bool = False) -> dict[str, Any]:
    """The options that decide what is learned, as JSON, for the run's configuration.

    Args:
        options: a dataclass of options, with groups in it.
        unrecorded: also those that do not decide it.

    >>> recorded(BatchOptions(batch_size=8))["batch_size"]
    8
    """
    found: dict[str, Any] = {}
    for name, value, notes in _entries(options):
        if dataclasses.is_dataclass(value):
            found |= recorded(value, unrecorded=unrecorded)
        elif unrecorded or UNRECORDED not in notes:
            found[_key(name, notes)] = list(value) if isinstance(value, tuple) else value
    if isinstance(options, StrategyOptions) and options.strategy and is_file(options.strategy):
        # The content of the file decides what is learned, not its name.
        check_regular(options.strategy)
        content = Path(options.strategy).read_bytes()
        found["plan"] = hashlib.sha256(content).hexdigest()[:12]
    if isinstance(options, StrategyOptions) and options.gains is not None:
        check_regular(options.gains)
        found["known_gains"] = hashlib.sha256(options.gains.read_bytes()).hexdigest()[:12]
    return found


Options = TypeVar("Options")


def from_record(options: Options, record: Mapping[str, Any]) -> Options:
    """The options that ``recorded`` wrote.

    Args:
        options: a dataclass of options, whose values stay where the record has none.
        record: from ``recorded``.

    >>> from_record(BatchOptions(), {"batch_size": 8}) == BatchOptions(batch_size=8)
    True
    """
    given: dict[str, Any] = {}
    for name, value, notes in _entries(options):
        if dataclasses.is_dataclass(value):
            given[name] = from_record(value, record)
        elif _key(name, notes) in record:
            there = record[_key(name, notes)]
            given[name] = tuple(there) if isinstance(there, list) else there
    return dataclasses.replace(options, **given)  # type: ignore[type-var]


def _key(name: str, notes: tuple[Any, ...]) -> str:
    """The key of an option in a record."""
    return flag(name, notes).removeprefix("--").replace("-", "_")


def flag(name: str, notes: tuple[Any, ...] = ()) -> str:
    """How an option is written on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    names = [note.name for note in notes if getattr(note, "name", None)]
    return f"--{names[0] if names else name.replace('_', '-')}"


def outputs(options: Any) -> Iterator[Path]:
    """The files and folders that a subcommand may write."""
    for name, value, _ in _entries(options) if dataclasses.is_dataclass(options) else ():
        if dataclasses.is_dataclass(value):
            yield from outputs(value)
        elif isinstance(value, Path):
            # Of "diagnose" the run folder is the place where nothing else is named.
            into_run = isinstance(options, RunOptions) or getattr(options, "out", value) is None
            if name in ("out", "target", "folder") or (name == "run" and into_run):
                yield value


def flags(kind: type) -> Iterator[str]:
    """All options of a subcommand, as they are written."""
    hints = get_type_hints(kind, include_extras=True)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        inner = getattr(hint, "__origin__", hint)
        if dataclasses.is_dataclass(inner):
            yield from flags(inner)  # type: ignore[arg-type]
        else:
            yield flag(entry.name, getattr(hint, "__metadata__", ()))


def _problems(options: Any) -> Iterator[str]:
    for name, value, notes in _entries(options):
        if dataclasses.is_dataclass(value):
            yield from _problems(value)
        for limit in notes:
            if isinstance(limit, Limit) and value is not None and not limit.holds(value):
                yield f"{flag(name, notes)} must be {limit.text}, got {value}"
    if hasattr(options, "problems"):
        yield from options.problems()


def _entries(options: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, value and annotations of each field."""
    hints = get_type_hints(type(options), include_extras=True)
    for entry in dataclasses.fields(options):
        notes = getattr(hints[entry.name], "__metadata__", ())
        yield entry.name, getattr(options, entry.name), notes
