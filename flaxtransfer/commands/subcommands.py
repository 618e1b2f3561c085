"""The subcommands: name and options of each.

A subcommand is run by the function of its name, in the file of its name (or of ``FILES``), which is
imported only then. This module imports no jax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flaxtransfer.commands.options import (
    AT_LEAST_1,
    AT_LEAST_3,
    AT_LEAST_20,
    FORMATS_HELP,
    LEVEL,
    NOT_NEGATIVE,
    PLAN_SUFFIXES,
    RECIPES_HELP,
    SCHEMES_HELP,
    SENSORS_HELP,
    WEIGHT_SUFFIXES,
    CacheOptions,
    ColumnOptions,
    Count,
    DataOptions,
    Flag,
    GainsFile,
    InputOptions,
    JobOptions,
    Rate,
    ReadingOptions,
    RunOptions,
    SplitOptions,
    TrainingOptions,
    WeightsOptions,
    data_problems,
    default,
    described,
    fraction_problems,
    input_problems,
    model_problems,
    output_problems,
    strategy_problems,
)
from flaxtransfer.files import bucket_address
from flaxtransfer.paths import listing, suggest
from flaxtransfer.report.figures import FIGURE_SUFFIXES

__all__ = [
    "FILES",
    "SUBCOMMANDS",
    "Advise",
    "Compile",
    "Convert",
    "Diagnose",
    "Evaluate",
    "Explain",
    "FindRate",
    "Models",
    "Params",
    "Plan",
    "Predict",
    "Probe",
    "Stem",
    "Train",
    "Understand",
    "named_values",
    "rate_problems",
]


ImageColumn = Annotated[
    str | None,
    described(
        "Column with the paths (csv: and parquet:) or images (hf:).", default="its usual names"
    ),
]


def is_source(image: Path) -> bool:
    """Whether a word in the place of an image names a data source with files."""
    return str(image).startswith(("folder:", "csv:", "parquet:", "gs:/")) and not image.exists()


@dataclass(frozen=True)
class Train:
    """Adapt a pre-trained network to your images and test it.

    By default a head is solved; where that leaves a point to gain, all is trained.

    Without options, the network learns handwritten digits from 5 labels per class.

    Example: flaxtransfer train --data folder:scans --weights resnet50.pth
    """

    run: RunOptions = field(default_factory=RunOptions)
    job: Annotated[JobOptions, tyro.conf.arg(name="")] = field(default_factory=JobOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)

    def problems(self) -> Iterator[str]:
        """Folders that cannot be written."""
        if re.match(r"(?!gs:)[a-z0-9]{2,}:/", str(self.run.run)):
            yield f"--run must be a folder or an address gs://bucket/path, got {self.run.run}"
        elif bucket_address(self.run.run) is None:  # A bucket is asked before all is computed.
            yield from output_problems("--run", self.run.run or Path("runs"), folder=True)
        yield from output_problems("--cache-dir", self.cache.folder, folder=True)


@dataclass(frozen=True)
class Plan:
    """Print the plan of a strategy, phase by phase.

    Strategies that measure on images first are printed by "flaxtransfer train".

    Example: flaxtransfer plan --strategy discriminative --out plan.yaml

    Args:
        model: Network by name, such as resnet18 or resnet50w32; "flaxtransfer models" lists them.
        classes: Outputs of the head.
        out: Also write the plan to this file, to be edited and given to "train --strategy".
    """

    strategy: Annotated[str, described(f"Strategy: {RECIPES_HELP}.")] = "head_then_fine_tune"
    model: str = "resnet18"
    classes: Count = 10
    out: Annotated[Path | None, default("none")] = None

    def problems(self) -> Iterator[str]:
        """An unknown strategy or architecture, and a file that cannot be written."""
        yield from strategy_problems(self.strategy)
        yield from model_problems(self.model)
        yield from output_problems("--out", self.out, suffixes=PLAN_SUFFIXES)


@dataclass(frozen=True)
class Compile:
    """Say what a training step takes of each device, a TPU's too.

    Memory, arithmetic and exchanges; --topology needs no such device (extra tpu).

    Example: flaxtransfer compile --topology v5e:4x4 --batch-size 1024

    Args:
        model: Network by name, such as resnet18 or resnet50w32; "flaxtransfer models" lists them.
        classes: Outputs of the head.
        bands: Channels of the images.
        topology: Kind and shape of a slice of TPUs, such as v5e:4x4, v6e:2x4 or v5p:2x2x2.
        batch_size: Images per step, of all devices together.
        size: Height and width of the images in pixels.
        compute: Number type of the convolutions.
        shard_above_mb: Split parameters of more than so many megabytes over the devices.
    """

    strategy: Annotated[str, described(f"Strategy: {RECIPES_HELP}.")] = "head_then_fine_tune"
    model: str = "resnet18"
    classes: Count = 10
    bands: Count = 3
    topology: Annotated[str | None, default("the devices of this machine")] = None
    batch_size: Count = 64
    size: Count = 224
    compute: Literal["float32", "bfloat16"] = "float32"
    shard_above_mb: Annotated[float | None, NOT_NEGATIVE, default("every device holds all")] = None

    def problems(self) -> Iterator[str]:
        """An unknown strategy or architecture."""
        yield from strategy_problems(self.strategy)
        yield from model_problems(self.model)


@dataclass(frozen=True)
class Advise:
    """Say which strategy fits your images, and why; nothing is trained.

    One pass over the images; solved heads on every depth, for every task.

    Example: flaxtransfer advise --data folder:scans --weights resnet50.pth

    Args:
        json: Also write all numbers and reasons to this .json file.
        html: Also write a report to this .html file.
        plan: Also write the recommended plan to this file, for "train --strategy".
    """

    json: Annotated[Path | None, default("none")] = None
    html: Annotated[Path | None, default("none")] = None
    plan: Annotated[Path | None, default("none")] = None
    gains: GainsFile = None
    data: DataOptions = field(default_factory=DataOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    weights: WeightsOptions = field(default_factory=WeightsOptions)
    input: InputOptions = field(default_factory=InputOptions)

    def problems(self) -> Iterator[str]:
        """Files that cannot be read or written."""
        yield from input_problems("--gains", self.gains)
        yield from output_problems("--json", self.json, suffixes=(".json",))
        yield from output_problems("--html", self.html, suffixes=(".html",))
        yield from output_problems("--plan", self.plan, suffixes=PLAN_SUFFIXES)


@dataclass(frozen=True)
class Understand:
    """Say what a network makes of your images; name doubtful labels.

    Depths, frequencies, distance from its training, bias and variance.

    Example: flaxtransfer understand --data folder:scans --html scans.html

    Args:
        json: Also write all numbers to this .json file.
        html: Also write a report to this .html file.
        suspects: Also write all suspected labels to this .csv file.
        attributes: Also say what each depth knows of generated images: orientation, hue, texture,
            number, polygon, letter.
    """

    json: Annotated[Path | None, default("none")] = None
    html: Annotated[Path | None, default("none")] = None
    suspects: Annotated[Path | None, default("none")] = None
    attributes: Flag = False
    data: DataOptions = field(default_factory=DataOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    weights: WeightsOptions = field(default_factory=WeightsOptions)
    input: InputOptions = field(default_factory=InputOptions)

    def problems(self) -> Iterator[str]:
        """Files that cannot be written."""
        yield from output_problems("--json", self.json, suffixes=(".json",))
        yield from output_problems("--html", self.html, suffixes=(".html",))
        yield from output_problems("--suspects", self.suspects, suffixes=(".csv",))


@dataclass(frozen=True)
class Probe:
    """Print the held-out skill of a linear probe on each segment.

    Only the training images are used: the test images of "train" stay unseen.

    Example: flaxtransfer probe --data folder:scans --weights resnet50.pth

    Args:
        kind: Kind of probe, on stratified folds: ridge, in closed form, or logistic (classes only).
        most_images: Use at most this many images.
        out: Also draw the skills to this .png, .pdf or .svg file.
    """

    kind: Literal["ridge", "logistic"] = "ridge"
    most_images: Annotated[int, AT_LEAST_3] = 5000
    out: Annotated[Path | None, default("none")] = None
    data: DataOptions = field(default_factory=DataOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    weights: WeightsOptions = field(default_factory=WeightsOptions)

    def problems(self) -> Iterator[str]:
        """A picture that cannot be written."""
        yield from _picture_problems(self.out)


@dataclass(frozen=True)
class FindRate:
    """Find learning rates by training a copy at rising rates.

    For a later phase of the strategy, the phases before it are trained first.

    Example: flaxtransfer find-rate --data folder:scans --phase fine-tune

    Args:
        phase: Phase of the strategy, by name.
        group: Sweep this group alone, with all others frozen.
        each_group: Sweep each group alone, one after the other.
        lowest: Learning rate of the first step.
        highest: Learning rate of the last step.
        steps: Steps of the sweep, unless the loss diverges before.
        out: Also draw the sweeps to this .png, .pdf or .svg file.
    """

    phase: Annotated[str | None, default("the first")] = None
    group: Annotated[str | None, default("all at one rate")] = None
    each_group: Flag = False
    lowest: Rate = 1e-6
    highest: Rate = 1.0
    steps: Annotated[int, AT_LEAST_3] = 100
    out: Annotated[Path | None, default("none")] = None
    job: Annotated[JobOptions, tyro.conf.arg(name="")] = field(default_factory=JobOptions)

    def problems(self) -> Iterator[str]:
        """Options that exclude each other, and a picture that cannot be written."""
        if self.each_group and self.group is not None:
            yield f"--each-group sweeps {self.group!r} too; give one of the two options"
        if not self.lowest < self.highest:
            yield f"--lowest must be < --highest, got {self.lowest} and {self.highest}"
        yield from _picture_problems(self.out)


@dataclass(frozen=True)
class Stem:
    """Print how much of each first-layer filter survives gray images.

    Filters that compare colors are silent on gray images in three equal channels.

    For a run with an input adapter, what survives the adapter is printed too.

    Args:
        source: Weights of a ResNet: builtin, a .safetensors or .pth file, or a run folder.
        model: Network that the source must be, by name, such as resnet50.
        out: Also draw the filters and their shares to this .png, .pdf or .svg file.
    """

    source: tyro.conf.Positional[str] = "builtin"
    model: Annotated[str | None, default("that of the source")] = None
    out: Annotated[Path | None, default("none")] = None

    def problems(self) -> Iterator[str]:
        """An unknown network, and a picture that cannot be written."""
        yield from model_problems(self.model)
        yield from _picture_problems(self.out)


@dataclass(frozen=True)
class Models:
    """List the architectures, or inspect a weights file.

    Of a file: what it holds, which networks are in it, and what is taken.

    Example: flaxtransfer models "se*50*" --sort macs

    Example: flaxtransfer models checkpoint.pth --weights-key model_ema

    Args:
        names: Part of a name, or a pattern of the whole name, such as "se*50*"; or a weights file,
            a folder or an address to inspect.
        size: Height and width of the images in pixels.
        sort: Order of the table: family (the order of the catalog), name, parameters or macs.
        weights_key: Place of the network to inspect in a file that holds several.
        model: Architecture to try on a file, such as resnet50.
    """

    names: Annotated[tyro.conf.Positional[str], default("all")] = "*"
    size: Count = 224
    sort: Annotated[
        Literal["family", "name", "parameters", "macs"], tyro.conf.arg(metavar="ORDER")
    ] = "family"
    weights_key: Annotated[str | None, default("that which is loaded")] = None
    model: Annotated[str | None, default("that of the file")] = None


RULES, RATES = ("head=head()", "frozen=rest()"), ("head=1e-3",)
"""Of ``params``, where none are given."""


@dataclass(frozen=True)
class Params:
    """Print each parameter with its label and learning rate.

    Weight decay and BatchNorm mode are printed too; nothing is allocated.

    Example: flaxtransfer params --rules "new=head()" "old=rest()" --rates new=1e-3

    Args:
        model: Network by name, such as resnet18 or resnet50w32s64_v1; "flaxtransfer models" lists
            those without widths and endings.
        width: Channels of the first stage in its 3x3 convolutions, and of a plain stem.
        classes: Outputs of the head.
        rules: Labels as name=mask; each leaf must fall under exactly one. A mask is an expression
            of stem() stage(3) stages(3, 4) head() adapter() batch_norm() kernels() biases()
            matrices() up_to("pool") glob("**/kernel") everything() with & | ~ -;
            rest() takes what no other rule does.
        rates: Learning rates as name=rate; labels without a rate are frozen.
        weight_decay: Weight decay of all groups that train, on leaves with >= 2 dimensions.
        layerwise_decay: Factor per segment from the head down, in place of rules; the rate of the
            head is that of --rates all=<rate>, or 1e-3.
    """

    model: str = "resnet18"
    width: Annotated[int | None, AT_LEAST_1, default("the architecture's")] = None
    classes: Count = 1000
    rules: tuple[str, ...] = RULES
    rates: tuple[str, ...] = RATES
    weight_decay: float = 0.0
    layerwise_decay: Annotated[float | None, default("none")] = None

    def problems(self) -> Iterator[str]:
        """An unknown architecture, rates of labels without a rule, and wrong forms."""
        yield from model_problems(self.model)
        try:
            rules, rates = named_values(self.rules), named_values(self.rates)
        except ValueError as error:
            yield str(error)
            return
        for name, text in rates.items():
            if not _is_number(text):
                yield f"--rates: the rate of {name!r} must be a number, got {text!r}"
        # With other rules, what they do not take may be why: the command says both.
        if self.layerwise_decay is None and self.rules == RULES:
            yield from rate_problems(rates, rules)


@dataclass(frozen=True)
class Evaluate:
    """Print the metrics of a finished run, as JSON.

    With bootstrap intervals (by group, where the data have groups).

    Classes are matched by name; those of the run without an image are listed.

    Data that come with a split are evaluated on its test part, if there is one.

    Args:
        run: Run folder, or its address gs://bucket/path.
        skip_unknown_classes: Leave out images of classes that the run does not know.
        tta: Average the probabilities over views of each image: flip also mirrors it, dihedral
            takes the eight positions of a square.
    """

    run: tyro.conf.Positional[Path]
    data: Annotated[
        str | None,
        described(f"Data set: {SCHEMES_HELP}.", default="the test images of the run"),
    ] = None
    skip_unknown_classes: Flag = False
    tta: Literal["none", "flip", "dihedral"] = "none"
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def problems(self) -> Iterator[str]:
        """An unknown data source, and options that it has no use for."""
        if self.data is not None:
            yield from data_problems("--data", self.data)
        yield from self.columns.unused(self.data)


@dataclass(frozen=True)
class Predict:
    """Print one prediction per image, with its probability.

    Example: flaxtransfer predict runs/scans-seed0 new/*.png --top 3

    Args:
        run: Run folder, or its address gs://bucket/path.
        images: Image files; or folder:<path>, csv:<path>, parquet:<path> or gs://bucket/path, of
            which labels are not used.
        format: Output: one JSON object per line, or CSV.
        top: Classes to list per image, the most probable first.
        adjust_prior: Estimate the share of each class among these images, and correct the
            predictions for it. It is for images of the same kind in which classes are differently
            common; it is refused where the images have changed or are too few.
        prior: Known share of each class, in place of the estimate: numbers in the order of the
            run's classes (0.2 0.8), or dark=0.2 bright=0.8.
        tta: Average the probabilities over views of each image: flip also mirrors it, dihedral
            takes the eight positions of a square.
    """

    run: tyro.conf.Positional[Path]
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(one or more)")
    ]
    format: Literal["jsonl", "csv"] = "jsonl"
    top: int = 1
    adjust_prior: Flag = False
    prior: Annotated[tuple[str, ...], default("none")] = ()
    image_column: ImageColumn = None
    tta: Literal["none", "flip", "dihedral"] = "none"
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def problems(self) -> Iterator[str]:
        """Images that do not exist, and views that a correction does not know."""
        if self.tta != "none" and (self.adjust_prior or self.prior):
            yield (
                f"--tta must be none with --adjust-prior and --prior, got {self.tta}: they correct "
                "by validation examples of which the run kept one view"
            )
        if not self.images:
            yield "no image was given: flaxtransfer predict <run> <image> [<image> ...]"
        files = [path for path in self.images if not is_source(path)]
        if missing := [str(path) for path in files if not path.exists()]:
            yield f"no such image: {listing(missing)}"


@dataclass(frozen=True)
class Explain:
    """Show which parts of images decide, and whether to trust that.

    Saliency maps for the predicted classes are drawn over the images.

    What they mark is removed, and compared with the removal of random blobs.

    Example: flaxtransfer explain runs/scans-seed0 --data folder:new --out explained

    Args:
        source: Run folder, or its address gs://bucket/path; or weights of a ResNet with a head.
        out: Folder for the pictures and explanation.json.
        most_images: Use at most this many images, drawn at random.
        layer: Segment whose map is used, by name: stem, ...
        method: How the map is made.
        seed: Seed of all random choices.
    """

    source: tyro.conf.Positional[str]
    out: Path
    data: Annotated[
        str | None,
        described(
            "Images: folder:<path> (at any depth), csv:<path>, parquet:<path>, npz:<file> (an "
            'array "image"), tfds:<name>[/config][:split] or hf:<name or folder>[:config][:split]. '
            "Labels in it are not used.",
            default="the test images of the run",
        ),
    ] = None
    most_images: Count = 24
    layer: Annotated[str | None, default("the deepest with a map of at least 7x7")] = None
    method: Annotated[
        Literal["cam", "grad_cam", "hires_cam"] | None,
        default("cam where it is exact, else grad_cam"),
    ] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    image_column: ImageColumn = None
    reading: ReadingOptions = field(default_factory=lambda: ReadingOptions(batch_size=64))

    def _is_run_in_bucket(self) -> bool:
        if bucket_address(self.source) is None:
            return False
        from flaxtransfer.weights.readers.detect import has_weights_name  # It imports jax.

        return not has_weights_name(self.source)

    def problems(self) -> Iterator[str]:
        """An unknown data source, none at all, and a folder that cannot be written."""
        if self.data is None and not (Path(self.source).is_dir() or self._is_run_in_bucket()):
            yield f"--data must name images, unless the source is a run folder, got {self.source}"
        if self.data is not None and not self.data.startswith("npz:"):
            yield from data_problems("--data", self.data)
        yield from output_problems("--out", self.out, folder=True)
        if self.out.is_dir() and not _holds(self.out, "explanation.json"):
            yield (
                f"--out must be a new folder, or that of an earlier explanation, got {self.out}, "
                "which holds other files"
            )


@dataclass(frozen=True)
class Diagnose:
    """Say which kind of shift target images have.

    The target is compared with the validation and test images of the run.

    The report is printed, and written as JSON, HTML and pictures.

    Example: flaxtransfer diagnose --run runs/scans-seed0 --target folder:other

    Args:
        run: Run folder, or its address gs://bucket/path.
        target: Target images: folder:<path> (images at any depth), csv:<path>, parquet:<path>,
            npz:<file> (an array "image"), tfds:<name>[/config][:split] or
            hf:<name or folder>[:config][:split]. Labels in it are not used.
        target_labels: CSV file with the classes of a few target images drawn at random: a column
            "image" (path below the folder, or number) and a column "label".
        out: Folder for the report.
        level: Level of the tests, after correction for their number.
        permutations: Permutations, or simulations, per test.
        most_images: Use at most this many images of either side.
        seed: Seed of all random choices.
    """

    run: Path
    target: str
    target_labels: Annotated[Path | None, default("none")] = None
    out: Annotated[Path | None, default("<run>/diagnosis/<name of the target>")] = None
    level: Annotated[float, LEVEL] = 0.05
    permutations: Count = 499
    most_images: Annotated[int, AT_LEAST_20] = 5000
    seed: Annotated[int, NOT_NEGATIVE] = 0
    image_column: ImageColumn = None
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def problems(self) -> Iterator[str]:
        """An unknown data source, and a folder that cannot be written."""
        if not self.target.startswith("npz:"):
            yield from data_problems("--target", self.target)
        out = self.run / "diagnosis" if self.out is None else self.out
        if self.out is None and bucket_address(self.run) is not None:
            yield f"--out must name a folder for the report of a run in a bucket, got {self.run}"
            return
        yield from output_problems("--out", out, folder=True)
        # The report replaces the folder as a whole.
        if self.out is not None and self.out.is_dir() and not _holds(self.out, "report.json"):
            yield (
                f"--out must be a new folder, or that of an earlier report, got {self.out}, which "
                "holds other files"
            )


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint for this package or another program.

    The written file is read again, and its logits are compared with the original.

    Args:
        source: Weights of a ResNet: builtin, a file, a folder with one, a run folder,
            hf://organization/name, https:// or gs://bucket/path.
        target: File to write (.safetensors, .onnx, .stablehlo, or .h5 for Keras), or folder for
            timm and huggingface.
        model: Network that the source must be, by name, such as resnet50_v1: it also says what no
            weights show.
        mean: Mean that the network subtracts from each channel, for pixels from 0 to 1: one number
            for all or one per channel, such as 0.5 or 123/255.
        std: Standard deviation that it then divides by, likewise.
        to: Format of the target.
        dtype: Number type in a .safetensors or .onnx file; in the latter also of the computation.
        adapter: In a .safetensors file, fold a linear input adapter into the stem, so that other
            programs can load the file, or keep it for this package.
    """

    source: tyro.conf.Positional[str]
    target: tyro.conf.Positional[Path]
    model: Annotated[str | None, default("that of the source")] = None
    mean: Annotated[tuple[str, ...], default("recorded, or assumed")] = ()
    std: Annotated[tuple[str, ...], default("recorded, or assumed")] = ()
    weights_key: Annotated[
        str | None,
        described(
            "Place of the network in a source that holds several, such as student.",
            default="an average before plain weights",
        ),
    ] = None
    format: Annotated[
        str | None, described(f"Naming of the source: {FORMATS_HELP}.", default="read off the file")
    ] = None
    sensor: Annotated[
        str | None,
        described(
            f"Sensor whose bands the stem takes: {SENSORS_HELP}.",
            default="read off the name of the source",
        ),
    ] = None
    to: Annotated[
        Literal["safetensors", "torchvision", "timm", "huggingface", "keras", "onnx", "stablehlo"]
        | None,
        default("read off the suffix of the target"),
    ] = None
    dtype: Literal["float32", "float16"] = "float32"
    adapter: Literal["fold", "keep"] = "fold"

    def problems(self) -> Iterator[str]:
        """An unknown network, and a target that cannot be written or has no room."""
        yield from model_problems(self.model)
        yield from fraction_problems(("--mean", self.mean), ("--std", self.std))
        yield from output_problems(
            "the target",
            self.target,
            suffixes=WEIGHT_SUFFIXES if self.to is None else (),
            either=self.to in ("timm", "huggingface"),
            needs=_bytes_of(self.source) // (2 if self.dtype == "float16" else 1),
        )


SUBCOMMANDS: dict[str, type] = {
    "train": Train,
    "advise": Advise,
    "understand": Understand,
    "plan": Plan,
    "compile": Compile,
    "probe": Probe,
    "find-rate": FindRate,
    "stem": Stem,
    "models": Models,
    "params": Params,
    "evaluate": Evaluate,
    "predict": Predict,
    "explain": Explain,
    "diagnose": Diagnose,
    "convert": Convert,
}
"""The options of each subcommand, in the order of ``flaxtransfer --help``."""

SEVERAL_PROCESSES = ("train", "evaluate", "predict", "probe")
"""What spreads its images over the processes of a run; all else would do the same in each."""

FILES = {
    **dict.fromkeys(("stem", "models", "params", "convert", "compile"), "networks"),
    **dict.fromkeys(("advise", "understand", "probe", "find_rate", "diagnose"), "measure"),
    **dict.fromkeys(("evaluate", "explain"), "predict"),
    "plan": "job",
}
"""The file of a subcommand's function, where it has not its name."""


def named_values(texts: tuple[str, ...]) -> dict[str, str]:
    """The pairs of ``name=value`` texts.

    >>> named_values(("head=1e-3",))
    {'head': '1e-3'}
    """
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(f"{text!r} must be of the form name=value")
        pairs[name.strip()] = value.strip()
    return pairs


def rate_problems(rates: Iterable[str], rules: Iterable[str]) -> Iterator[str]:
    """Labels with a rate and without a rule."""
    known = list(rules)
    if unknown := [f"{name!r}{suggest(name, known)}" for name in rates if name not in known]:
        yield (
            f"--rates has names without a rule: {', '.join(unknown)}; the rules are "
            f"{', '.join(known)}"
        )


def _holds(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, or is empty."""
    return (folder / name).is_file() or not any(folder.iterdir())


def _bytes_of(source: str) -> int:
    """Bytes of weights that are a file; 0 where that is not known."""
    path = Path(source)
    return path.stat().st_size if path.is_file() else 0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _picture_problems(path: Path | None) -> Iterator[str]:
    yield from output_problems("--out", path, suffixes=FIGURE_SUFFIXES)
