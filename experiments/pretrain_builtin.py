"""Pre-trains the checkpoint that ships inside the package, on drawings alone.

    python experiments/pretrain_builtin.py                      # the shipped checkpoint
    python experiments/pretrain_builtin.py --steps 20 --glyphs 40 --fractals 6 --run /tmp/smoke

Expected: see the model card beside the checkpoint (``flaxtransfer/weights/builtin``) for the
accuracy over held-out drawings and the time on 2 CPU cores. The run resumes where it was stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

import flaxtransfer as ft
from drawing.fractals import fractal_templates
from drawing.glyphs import glyph_templates
from drawing.render import Bank, draw_batch, make_bank

TRAIN_STREAM, VALIDATION_STREAM, TEST_STREAM = range(3)
"""Which random keys a drawing comes from; the streams never share one."""


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a small ResNet-18 on drawn glyphs and fractals.

    Args:
      run: run folder; an unfinished run in it is continued.
      output: folder for the checkpoint and its model card.
      name: of the checkpoint.
      steps: optimizer steps.
      batch_size: drawings a step.
      learning_rate: of AdamW at its peak, after which it follows a cosine to 0.
      weight_decay: decoupled, on kernels.
      label_smoothing: probability mass spread over all classes.
      glyphs: classes that are characters.
      fractals: classes that are fractals.
      width: channels of the stem.
      image_size: side of the drawings in px.
      test_batches: batches of drawings, kept apart, that the accuracy is measured on.
      seed: of everything.
    """

    run: Path = Path("runs/pretrain_builtin")
    output: Path = Path("runs/pretrain_builtin/export")
    name: str = "resnet18w32_drawn"
    steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    glyphs: int = 480
    fractals: int = 120
    width: int = 32
    image_size: int = 48
    test_batches: int = 40
    seed: int = 0


def drawings(bank: Bank, config: Pretrain, stream: int, start: int) -> Iterator[ft.data.Batch]:
    """Batches ``start``, ``start + 1``, ... of a stream; each depends on its number alone."""
    stream_key = jax.random.fold_in(jax.random.key(config.seed), stream)
    for number in itertools.count(start):
        key = jax.random.fold_in(stream_key, number)
        images, labels = draw_batch(key, bank, config.batch_size)
        yield {"image": images, "label": labels}


def make_plan(params: ft.models.Params, config: Pretrain) -> ft.Plan:
    """One phase in which everything moves."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 12), config.steps
    )
    phase = ft.Phase(
        labels=ft.label(params, {"all": ft.everything()}),
        groups={"all": ft.Group(optax.adamw, schedule, weight_decay=config.weight_decay)},
        steps=config.steps,
        name="pretrain",
        loss=ft.training.CrossEntropy(config.label_smoothing),
    )
    return ft.Plan([phase])


def export(
    config: Pretrain, fitted: ft.training.FitResult, accuracy: float, seconds: float
) -> Path:
    """Writes the float16 checkpoint and its model card; returns the card's path."""
    checkpoint = ft.load(config.run / "model.safetensors")
    weights = config.output / f"{config.name}.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    ft.save(weights, checkpoint, dtype=np.float16)
    card = {
        "name": config.name,
        "architecture": checkpoint.config.name,
        "data": f"{config.glyphs} characters of many scripts in matplotlib's DejaVu faces (no "
        f"character of the Unicode number categories) and {config.fractals} colored fractal "
        "classes (after Kataoka et al., 2020), drawn procedurally by experiments/drawing",
        "command": "python experiments/pretrain_builtin.py"
        + "".join(f" {argument}" for argument in sys.argv[1:]),
        "drawings_seen": fitted.steps * config.batch_size,
        "accuracy": round(accuracy, 4),
        "accuracy_over": f"{config.test_batches * config.batch_size} drawings that were not "
        f"trained on, {config.glyphs + config.fractals} classes",
        "seed": config.seed,
        "minutes": round(seconds / 60, 1),
        "versions": {name: str(v) for name, v in ft.training.environment()["packages"].items()},
        "license": "Apache-2.0; the DejaVu faces are free to use and redistribute",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    path = weights.with_suffix(".json")
    path.write_text(json.dumps(card, indent=2) + "\n")
    return path


def main(config: Pretrain) -> None:
    """Draws, trains, tests and exports."""
    started = time.monotonic()
    families = [glyph_templates(config.glyphs), fractal_templates(config.fractals, config.seed)]
    bank = make_bank(families, config.image_size)
    class_names = tuple(name for family in families for name in family.names)
    architecture = ft.models.ResNetConfig(width=config.width, classes=len(class_names))
    model = ft.resnet(architecture)
    variables = model.init(jax.random.key(config.seed), (config.image_size, config.image_size, 3))
    feed = ft.data.DataLoaders(
        train=lambda start: drawings(bank, config, TRAIN_STREAM, start),
        steps_per_epoch=500,
        validation=lambda: itertools.islice(drawings(bank, config, VALIDATION_STREAM, 0), 8),
        preprocessing=ft.Preprocessing(
            (0.5,) * 3, (0.25,) * 3, config.image_size, config.image_size
        ),
        class_names=class_names,
    )
    identity = {"glyphs": config.glyphs, "fractals": config.fractals, "batch": config.batch_size}
    fitted = ft.fit(
        ft.Classifier(model, variables, feed.preprocessing),
        make_plan(variables["params"], config),
        feed,
        config.run,
        seed=config.seed,
        config=identity,
        resume=True,
    )
    test = itertools.islice(drawings(bank, config, TEST_STREAM, 0), config.test_batches)
    result = ft.evaluate(ft.Classifier(model, fitted.variables, feed.preprocessing), test)
    card = export(config, fitted, result.accuracy, time.monotonic() - started)
    print(f"test accuracy {100 * result.accuracy:.1f} % over {result.examples} drawings; {card}")


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
