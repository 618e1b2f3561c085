"""``flaxtransfer train``: adapt a pre-trained network to a set of images, and test it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from flaxtransfer.adaptation import Way, change_input
from flaxtransfer.commands.evidence import MEASURED, MOST_IMAGES, Evidence, measure
from flaxtransfer.commands.plan import is_file, strategy_plan
from flaxtransfer.data import Source, Splits, open_source, stratified_split
from flaxtransfer.data.splits import some
from flaxtransfer.data.transforms import flip_keeps_labels, training_transform
from flaxtransfer.features.baseline import instant_baseline
from flaxtransfer.features.extraction import pooled_features
from flaxtransfer.models import Model, resnet
from flaxtransfer.pretrained import TransferReport, transfer
from flaxtransfer.strategies import RECIPES, from_scratch
from flaxtransfer.training.band_statistics import band_patches, band_preprocessing
from flaxtransfer.training.caching import Cache
from flaxtransfer.training.evaluation import Evaluation, evaluate
from flaxtransfer.training.feed import Feed, held_out, source_feed
from flaxtransfer.training.loop import Fitted, Options, fit
from flaxtransfer.training.phases import Plan
from flaxtransfer.training.plan_table import plan_table
from flaxtransfer.training.run_folder import CONFIG_FILE, write_json
from flaxtransfer.types import Variables
from flaxtransfer.weights import Checkpoint, Preprocessing, load

SUMMARY_FILE = "summary.json"

MOST_IMAGES_FOR_COMPARISON = 1000
"""Training sets up to this size are also trained from scratch, where nobody says otherwise."""


MOST_IMAGES_FOR_BASELINE = 2000
"""More images than that do not change what a head on frozen features is roughly worth."""


@dataclass(frozen=True)
class Train:
    """Adapt a pre-trained network to your images, by default the head first and then everything.

    Without any option this is the main job: the built-in checkpoint learns handwritten digits from
    5 labels a class and is tested on all the others, beside the same network from scratch.

    Args:
      data: "digits", "folder:<path>" (one sub-folder a class) or "tfds:<name>[/config][:split]".
      weights: "builtin", or a .safetensors or .pth file of a ResNet.
      model: architecture that the weights must be of, such as resnet50; by default whatever they
        are.
      run: run folder; by default runs/<data>-seed<seed>.
      resume: continue the run in the folder, if there is one.
      labels_per_class: use so many labels of each class and test on all others. By default 5 for
        the digits and all for other data; 0 means all.
      val_per_class: so many of those labels validate instead of train.
      val_fraction: share of the labelled images that validates, where all labels are used.
      test_fraction: share of the images that tests, where all labels are used.
      bands: channels of the images; by default what the weights take, to which gray is
        replicated. With it, each band is normalised by its own statistics over the training
        images. Files: gray, RGB, gray with alpha (2), RGBA (4), or one gray page a band.
      adapter: how other bands reach the stem: "linear" (the default) or "curves", which learn, or
        "replicate", "sum", "average", "repeat", which do not.
      wavelengths: centre of each band in nm, for an adapter to start from; by default it starts
        from the training images, by least squares, and for one band as replication.
      head: "new" starts the head at zero, "keep" takes the checkpoint's, "resize" its first rows.
      strategy: how to adapt: a recipe (head_then_fine_tune, linear_probe_then_fine_tune,
        feature_extraction, batch_norm_only, progressive_unfreezing, discriminative,
        curvature_scaled, gradient_scaled, surgical (the part whose gradient is largest beside its
        weights), l2_sp, full_fine_tuning, from_scratch) or the path of a plan, such as plan.yaml;
        "flaxtransfer plan" prints and writes them.
      batch_size: images a step.
      steps: steps of a strategy of one phase, by default 300 or 10 epochs if that is more; of
        each phase of progressive_unfreezing.
      head_steps: steps of the head alone; by default 100, or 3 epochs if that is more.
      fine_tune_steps: steps of everything; by default 200, or 10 epochs if that is more.
      head_learning_rate: peak rate of the head, where it has its own; by default the strategy's.
      learning_rate: peak rate of all else that moves; by default the strategy's.
      weight_decay: decoupled, on kernels; by default the strategy's.
      patience: evaluations without a better validation accuracy that end a phase.
      flip: mirror images in training; "auto" decides by the names of the classes.
      compare: also train from scratch; "auto" does with at most 1000 training images.
      scratch_learning_rate: peak rate of that comparison.
      compute: "bfloat16" for accelerators; parameters and statistics stay float32.
      seed: of the split, the head, the order and the augmentation.
      workers: processes that decode images; 0 uses threads.
      skip_corrupt: leave out unreadable images instead of stopping.
      download: allow a tfds: data set to be fetched.
      tensorboard: also write TensorBoard events (extra tb).
      evaluate_every: steps between validations, each with a checkpoint; by default an epoch, at
        most ten times a phase.
      cache: "auto" runs the frozen part of the network once a phase where that pays and fits, and
        trains the rest on its output; "memory" or "disk" insist on the place, "off" on running it
        in every step.
      cache_views: versions of each augmented image that a cache holds; training goes through them
        from pass to pass.
      cache_dtype: of what is cached; "auto" is float32, or float16 where only that fits.
      cache_memory_gb: most that a cache may take in memory.
      cache_disk_gb: most that caches may take on disk.
      cache_dir: folder of caches that other runs may use as well; by default in the run folder,
        until the run has finished.
    """

    data: str = "digits"
    weights: str = "builtin"
    model: str | None = None
    run: Path | None = None
    resume: bool = False
    labels_per_class: int | None = None
    val_per_class: int = 0
    val_fraction: float | None = None
    test_fraction: float | None = None
    bands: int | None = None
    adapter: Way | None = None
    wavelengths: tuple[float, ...] = ()
    head: Literal["new", "keep", "resize"] = "new"
    strategy: str = "head_then_fine_tune"
    batch_size: int = 64
    steps: int | None = None
    head_steps: int | None = None
    fine_tune_steps: int | None = None
    head_learning_rate: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    patience: int | None = None
    flip: Literal["auto", "yes", "no"] = "auto"
    compare: Literal["auto", "yes", "no"] = "auto"
    scratch_learning_rate: float = 3e-3
    compute: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    workers: int = 0
    skip_corrupt: bool = False
    download: bool = False
    tensorboard: bool = False
    evaluate_every: int | None = None
    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    cache_views: int = 8
    cache_dtype: Literal["auto", "float32", "float16"] = "auto"
    cache_memory_gb: float = 2.0
    cache_disk_gb: float = 20.0
    cache_dir: Path | None = None

    def caching(self) -> Cache:
        """The options of the cache as one value."""
        memory, disk = int(1e9 * self.cache_memory_gb), int(1e9 * self.cache_disk_gb)
        return Cache(self.cache, self.cache_dtype, self.cache_views, memory, disk, self.cache_dir)

    def check(self) -> None:
        """Raises a ValueError that lists every number out of range."""
        problems = [
            f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}"
            for name in (
                "batch_size",
                "steps",
                "head_learning_rate",
                "learning_rate",
                "evaluate_every",
            )
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        problems += [
            f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}"
            for name in ("labels_per_class", "head_steps", "fine_tune_steps", "seed", "workers")
            if getattr(self, name) is not None and getattr(self, name) < 0
        ]
        if self.bands is None and (self.adapter or self.wavelengths):
            problems.append("--adapter and --wavelengths belong to --bands; give it as well")
        if self.bands is not None and self.bands < 1:
            problems.append(f"--bands is a number of channels, 1 or more, not {self.bands}")
        if problems:
            raise ValueError("; ".join(problems))
        self.caching()

    def identity(self) -> dict[str, Any]:
        """The options that decide what is learned, for the run's configuration."""
        silent = ("run", "resume", "tensorboard", "workers", "download", "compare", "cache_dir")
        found = {k: v for k, v in asdict(self).items() if k not in silent}
        if self.bands is None:
            # A run on the bands of its weights is the run that it was before there were others.
            found = {k: v for k, v in found.items() if k not in ("bands", "adapter", "wavelengths")}
        # What a file says, not what it is called, is what was run.
        if is_file(self.strategy):
            found["plan"] = hashlib.sha256(Path(self.strategy).read_bytes()).hexdigest()[:12]
        return found


@dataclass(frozen=True)
class Job:
    """The parts of a training job, made from the options before anything is trained."""

    source: Source
    splits: Splits
    checkpoint: Checkpoint
    report: TransferReport
    model: Model
    variables: Variables
    feed: Feed
    plan: Plan
    evidence: Evidence

    def test(self, model: Model, variables: Variables) -> Evaluation:
        """Accuracy and loss on the images that were kept apart."""
        preprocessing = self.feed.preprocessing
        batches = held_out(self.source, self.splits.test, preprocessing)
        return evaluate(model, variables, batches, preprocessing)


def train(options: Train, console: Console) -> None:
    """Runs ``flaxtransfer train`` and prints what it found; the run folder keeps everything."""
    options.check()
    folder = options.run or Path("runs") / f"{_file_name(options.data)}-seed{options.seed}"
    if options.resume and (folder / SUMMARY_FILE).exists():
        check_finished(folder, options)
        print_summary(json.loads((folder / SUMMARY_FILE).read_text()), folder, console)
        return
    started = time.monotonic()
    job = prepare(options)
    _print_job(job, options, console)
    baseline = _baseline(job, console)
    fitted = _fit(options, job.model, job.variables, job.plan, job.feed, folder)
    rows = [_row("pre-trained", job.test(job.model, fitted.variables), fitted, started)]
    for line in (*fitted.notes, *map(str, fitted.audits)):
        console.print(line, highlight=False)
    few = len(job.splits.train) <= MOST_IMAGES_FOR_COMPARISON
    few = few and options.strategy != "from_scratch"
    if options.compare == "yes" or (options.compare == "auto" and few):
        started = time.monotonic()
        rows.append(_train_from_scratch(options, job, fitted.steps, folder, started))
    summary = {
        "data": options.data,
        "train_images": len(job.splits.train),
        "validation_images": len(job.splits.val),
        "test_images": len(job.splits.test),
        "options": json.loads(json.dumps(options.identity())),
        "baseline": baseline,
        "results": rows,
    }
    write_json(folder / SUMMARY_FILE, summary)
    print_summary(summary, folder, console)


def prepare(options: Train) -> Job:
    """Opens the data and the weights and puts network, labels and batches together."""
    checkpoint = load(options.weights, model=options.model)
    source = open_source(
        options.data,
        download=options.download,
        skip_corrupt=options.skip_corrupt,
        bands=image_bands(options, checkpoint),
    )
    splits = split(source, options)
    classes = len(source.class_names)
    dtype = jnp.bfloat16 if options.compute == "bfloat16" else None
    preprocessing, start = _bands(options, checkpoint, source, splits)
    model, variables, report = transfer(
        checkpoint, classes=classes, head=options.head, seed=options.seed, dtype=dtype, **start
    )
    flip = options.flip == "yes" or (
        options.flip == "auto" and flip_keeps_labels(source.class_names)
    )
    feed = source_feed(
        source,
        splits.train,
        splits.val,
        preprocessing,
        batch_size=options.batch_size,
        transform=training_transform(preprocessing, flip=flip, channels=len(preprocessing.mean)),
        seed=options.seed,
        workers=options.workers,
    )
    if options.strategy == "from_scratch":
        variables = model.init(jax.random.key(options.seed))
    evidence = Evidence()
    if options.strategy in MEASURED:
        positions = some(splits.train, MOST_IMAGES, source.labels())
        batches = list(held_out(source, positions, preprocessing, batch_size=options.batch_size))
        evidence = measure(
            options.strategy, model, variables, batches, preprocessing, len(splits.train)
        )
    settings = {**_settings(options, feed), **evidence.settings}
    plan = strategy_plan(options.strategy, variables["params"], settings)
    return Job(source, splits, checkpoint, report, model, variables, feed, plan, evidence)


def image_bands(options: Train, checkpoint: Checkpoint) -> int:
    """Channels to read from image files, for training and for whatever comes after it."""
    return checkpoint.config.bands if options.bands is None else options.bands


def _bands(
    options: Train, checkpoint: Checkpoint, source: Source, splits: Splits
) -> tuple[Preprocessing, dict[str, Any]]:
    """The preprocessing for the bands at hand, and what `transfer` has to know of them."""
    own, bands = checkpoint.preprocessing, options.bands
    start: dict[str, Any] = {"bands": bands, "adapter": options.adapter}
    start["wavelengths"] = options.wavelengths or None
    if bands is None or options.adapter == "replicate":
        return own, start
    # Before the images are read, so that a typing error costs no time.
    change_input(
        checkpoint.config, checkpoint.variables["params"]["conv1"]["kernel"],
        bands=bands, way=options.adapter, wavelengths=start["wavelengths"],
    )  # fmt: skip
    if bands == checkpoint.config.bands and not options.adapter and not options.wavelengths:
        return own, start
    preprocessing = band_preprocessing(own, source, splits.train, bands)
    if bands > 1 and options.adapter in (None, "linear", "curves") and not options.wavelengths:
        start["patches"] = band_patches(preprocessing, source, splits.train)
    return preprocessing, start


def _settings(options: Train, feed: Feed) -> dict[str, Any]:
    """What of the options is for the strategy; lengths follow the size of the training set."""
    names = ("steps", "head_steps", "fine_tune_steps", "head_learning_rate", "learning_rate",
             "weight_decay", "patience")  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    lengths = {
        "head_then_fine_tune": {"head_steps": (100, 3), "fine_tune_steps": (200, 10)},
        "progressive_unfreezing": {"steps": (100, 5)},
    }
    if options.strategy in RECIPES:
        for name, (least, epochs) in lengths.get(options.strategy, {"steps": (300, 10)}).items():
            settings[name] = _steps(settings[name], least, epochs, feed)
    return settings


def training_options(run: Path) -> Train:
    """The options of a run, from its folder; the usual ones where a program made it."""
    path = run / CONFIG_FILE
    saved = json.loads(path.read_text()).get("options", {}) if path.is_file() else {}
    known = {field.name for field in fields(Train)}
    return Train(**{name: value for name, value in saved.items() if name in known})


def split(source: Source, options: Train) -> Splits:
    """The parts of the data that a run trains, validates and tests on."""
    labels_per_class = options.labels_per_class
    if labels_per_class is None:
        labels_per_class = 5 if options.data == "digits" else 0
    return stratified_split(
        source.labels(),
        labels_per_class=labels_per_class or None,
        val_per_class=options.val_per_class or None,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        class_names=source.class_names,
    )


def check_finished(folder: Path, options: Train) -> None:
    """Refuses to pass off the results of other options as those of these."""
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    wanted = json.loads(json.dumps(options.identity()))
    differences = [
        f"{name} is {summary['options'].get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if summary["options"].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(differences)}; give a new folder"
        )


def print_summary(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """The short table at the end, and the test accuracy as the very last line."""
    results = Table(title=f"{summary['train_images']} training images of {summary['data']}")
    for column in ("start", "steps", "seconds", "test loss", "test accuracy"):
        results.add_column(column, justify="left" if column == "start" else "right")
    for row in summary["results"]:
        results.add_row(
            row["start"],
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['loss']:.3f}",
            f"{100 * row['accuracy']:.1f} %",
        )
    console.print(results)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    console.print(
        f"test accuracy: {100 * summary['results'][0]['accuracy']:.2f} % of "
        f"{summary['test_images']} images that were not trained on",
        highlight=False,
    )


def _train_from_scratch(
    options: Train, job: Job, steps: int, folder: Path, started: float
) -> dict[str, Any]:
    """The same network, images, augmentation and number of steps, from random weights."""
    model = resnet(job.model.config, dtype=job.model.dtype)
    size = job.feed.preprocessing.size
    image_shape = (size, size, job.model.config.bands)
    variables = model.init(jax.random.key(options.seed), image_shape)
    plan = from_scratch(
        variables["params"],
        steps=steps,
        learning_rate=options.scratch_learning_rate,
        weight_decay=1e-2 if options.weight_decay is None else options.weight_decay,
        patience=options.patience,
    )
    inner = replace(options, resume=options.resume or (folder / "from_scratch").exists())
    fitted = _fit(inner, model, variables, plan, job.feed, folder / "from_scratch")
    return _row("from scratch", job.test(model, fitted.variables), fitted, started)


def _fit(
    options: Train, model: Model, variables: Variables, plan: Plan, feed: Feed, folder: Path
) -> Fitted:
    return fit(
        model,
        variables,
        plan,
        feed,
        folder,
        seed=options.seed,
        config={"options": options.identity()},
        resume=options.resume,
        options=Options(evaluate_every=options.evaluate_every, tensorboard=options.tensorboard),
        cache=options.caching(),
    )


def _row(start: str, result: Evaluation, fitted: Fitted, started: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    return {"start": start, "steps": fitted.steps, "seconds": seconds, **result.to_json()}


def _print_job(job: Job, options: Train, console: Console) -> None:
    counts = ", ".join(
        f"{len(part)} {name}" for name, part in zip(Splits._fields, job.splits, strict=True)
    )
    skipped = getattr(job.source, "skipped", ())
    if skipped:
        console.print(f"{len(skipped)} unreadable images were left out", highlight=False)
    console.print(f"{options.data}: {len(job.source.class_names)} classes; {counts}")
    console.print(f"{job.checkpoint!r}", highlight=False)
    if job.report.input:
        console.print(job.report.input, highlight=False, soft_wrap=True)
    if job.evidence.text:
        console.print(job.evidence.text, highlight=False, soft_wrap=True)
    console.print(plan_table(job.plan, job.variables["params"]))


def _baseline(job: Job, console: Console) -> dict[str, Any] | None:
    """Prints what heads on frozen features reach; nothing that is wrong there stops a run."""
    preprocessing = job.feed.preprocessing
    positions = some(job.splits.train, MOST_IMAGES_FOR_BASELINE, job.source.labels())
    batches = held_out(job.source, positions, preprocessing)
    try:
        pooled = pooled_features(job.model, job.variables, batches, preprocessing)
        found = instant_baseline(*pooled, classes=len(job.source.class_names))
    except ValueError as error:
        console.print(f"no baseline on frozen features: {error}", highlight=False)
        return None
    console.print(str(found), highlight=False, soft_wrap=True)
    return asdict(found)


def _steps(given: int | None, least: int, epochs: int, feed: Feed) -> int:
    return max(least, epochs * feed.steps_per_epoch) if given is None else given


def _file_name(data: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in data.rstrip("/").split("/")[-1])
