"""The options of a training run, as they are given and as a run folder keeps them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from flaxtransfer.commands.plan import is_file
from flaxtransfer.models.input_channels import Method
from flaxtransfer.training.prefix_cache import Cache
from flaxtransfer.training.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class Train:
    """Adapt a pre-trained network to your images, by default the head first and then everything.

    Without any option this is the main job: the built-in checkpoint learns handwritten digits from
    5 labels a class and is tested on all the others, beside the same network from scratch.

    Args:
      data: "digits", "folder:<path>" (one sub-folder a class) or "tfds:<name>[/config][:split]".
      weights: "builtin", a file of a ResNet (.safetensors, .pth, .npz, .h5, .keras), a folder with
        one, hf://organization/name[@revision], or https://.
      format: naming of the weights, where it is not to be read off: torchvision, timm, timm-v2,
        huggingface, huggingface-flax, bit, keras or keras-hub.
      model: architecture that the weights must be of, such as resnet50; by default whatever they
        are.
      sensor: whose bands the weights take, where their name does not say it: sentinel2_all,
        sentinel1_all, landsat_tm_toa, ...; images are 8 bits between its black and white.
      run: run folder; by default runs/<data>-seed<seed>.
      resume: continue the run in the folder, if there is one.
      labels_per_class: use so many labels of each class and test on all others. By default 5 for
        the digits and all for other data; 0 means all.
      val_per_class: so many of those labels validate instead of train.
      val_fraction: share of the labeled images that validates, where all labels are used.
      test_fraction: share of the images that tests, where all labels are used.
      bands: channels of the images; by default what the weights take, to which gray is
        replicated. With it, each band is normalized by its own statistics over the training
        images. Files: gray, RGB, gray with alpha (2), RGBA (4), or one gray page a band.
      adapter: how other bands reach the stem: "linear" (the default) or "curves", which learn, or
        "replicate", "sum", "average", "repeat", which do not.
      wavelengths: center of each band in nm, for an adapter to start from; by default it starts
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
    format: str | None = None
    model: str | None = None
    sensor: str | None = None
    run: Path | None = None
    resume: bool = False
    labels_per_class: int | None = None
    val_per_class: int = 0
    val_fraction: float | None = None
    test_fraction: float | None = None
    bands: int | None = None
    adapter: Method | None = None
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
        if self.sensor is None:
            del found["sensor"]
        # What a file says, not what it is called, is what was run.
        if is_file(self.strategy):
            found["plan"] = hashlib.sha256(Path(self.strategy).read_bytes()).hexdigest()[:12]
        return found


def training_options(run: Path) -> Train:
    """The options of a run, from its folder; the usual ones where a program made it."""
    path = run / CONFIG_FILE
    saved = json.loads(path.read_text()).get("options", {}) if path.is_file() else {}
    known = {field.name for field in fields(Train)}
    return Train(**{name: value for name, value in saved.items() if name in known})
