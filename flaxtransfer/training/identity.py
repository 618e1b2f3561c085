"""Which run a run folder holds: identity, comparison with what is asked for, and repair.

Content is compared, not spelling: examples and weights by digest, settings by value. What the
checkpoints know of the files beside them decides which of these are believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import DataLoaders
from flaxtransfer.data.splits import Split
from flaxtransfer.distributed import check_alike
from flaxtransfer.files import (
    MANIFEST_FILE,
    json_bytes,
    read_json,
    refuse_link,
    seal_again,
    sha256_of,
    write_json,
)
from flaxtransfer.paths import flatten, listing, nested_differences
from flaxtransfer.training.console import METRICS_FILE, progress_bar
from flaxtransfer.training.plan import Plan
from flaxtransfer.training.run_folder import (
    AUDIT_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    FEATURES,
    RACE,
    RESULT_FILE,
    SPLIT_FILE,
    TENSORBOARD,
    VALIDATION_FILE,
    WEIGHTS_FILE,
    Audit,
    digest,
    environment,
    frozen_file,
    has_checkpoint,
    matches,
    run_problems,
    write_audits,
)

_BY_CONTENT = {"options": ("data", "weights")}
"""Settings that are kept for people: what they name is compared by content."""


def record_of(data: DataLoaders) -> Split | None:
    """The record of the examples, each of which is read; None for a feed that has none."""
    if data.record is None:
        return None
    count = 0 if data.examples is None else len(data.examples.labels)
    if count < _MANY:
        return data.record(None)
    with progress_bar("examples read", count) as show:
        return data.record(lambda done: show(done, ""))


_MANY = 20_000
"""Training examples from which reading them all takes so long that a bar is shown."""


def identity_of(
    network: Classifier,
    plan: Plan,
    seed: int,
    data: DataLoaders,
    record: Split | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What makes a run this run and no other, as plain JSON.

    Args:
        network: before training.
        plan: resolved.
        seed: of the run.
        data: its batches.
        record: of the examples; None where the feed cannot tell them apart.
        config: further values.
    """
    raw = {
        "model": network.model.config.to_json(),
        "compute": jnp.dtype(network.model.dtype or jnp.float32).name,
        "task": network.task.name,
        "metric": network.task.ranking,
        "seed": seed,
        "weights_sha256": _digest_of_tree(network.variables),
        "classes": list(data.class_names),
        "preprocessing": asdict(data.preprocessing),
        "steps_per_epoch": data.steps_per_epoch,
        **data.settings,
        "examples_sha256": None if record is None else record.identity(),
        **plan.identity(),
        **config,
    }
    if network.task.units is not None:
        raw["targets"] = asdict(network.task.units)
    plain: dict[str, Any] = json.loads(json.dumps(raw))
    return plain


def sha256_of_config(config: Mapping[str, Any]) -> str:
    """Digest of what is compared of a configuration."""
    text = json.dumps(_compared(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_processes(config: Mapping[str, Any]) -> None:
    """Refuses processes of a run that are not about to train the same; see ``check_alike``."""
    named = {"weights_sha256": "the digest of the weights", "examples_sha256": "that of the data"}
    check_alike({named.get(name, name): value for name, value in _compared(config).items()})


def check_place(folder: Path) -> None:
    """Refuses a folder that holds something else than a run, before anything is written into it.

    Raises:
        ValueError: see above; or one of its folders, such as that of the checkpoints, is a symbolic
            link.
    """
    for name in (CHECKPOINTS, FEATURES, TENSORBOARD):
        refuse_link(folder / name)
    if (folder / CONFIG_FILE).exists() or has_checkpoint(folder):
        return
    ours = {ENVIRONMENT_FILE, SPLIT_FILE, METRICS_FILE, CHECKPOINTS, RACE}
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in others if not name.startswith(".") and name not in ours]
    if others:
        raise ValueError(
            f"{folder} is not a run folder (it has no {CONFIG_FILE}, but {listing(others, most=3)}"
            "); give a new folder"
        )


class Found(NamedTuple):
    """What ``check`` has to say: what a person should know, and what was damaged."""

    notes: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()


def check(
    folder: Path,
    wanted: Mapping[str, Any],
    record: Split | None,
    seals: Mapping[str, str] | None,
    *,
    resume: bool,
) -> Found:
    """Refuses a folder that holds another run, or an unfinished one that is not to be resumed.

    Configuration and split that are missing or damaged are written again from what was asked for,
    if that is the very run of the checkpoints.

    Args:
        folder: of the run, which the caller has locked.
        wanted: the configuration that was asked for.
        record: the examples as they are today.
        seals: digests of the files beside the checkpoints, as the newest of them has them; None
            without one.
        resume: whether an unfinished run is continued.

    Raises:
        ValueError: see above; the text lists every setting and example that differs.
    """
    if seals is None:
        if (folder / RESULT_FILE).exists():
            raise ValueError(
                f"{folder} holds a finished run whose {CHECKPOINTS} are gone: it can be used, but "
                "not continued; give a new folder"
            )
        return Found()  # It never got anywhere: there is nothing to lose and nothing to continue.
    damage: list[str] = []
    existing, problem = _read_config(folder, seals[CONFIG_FILE])
    if existing is None:
        if sha256_of_config(wanted) != seals[CONFIG_FILE]:
            raise ValueError(
                f"{problem}, and this is not the run in {folder}: its checkpoints are of another "
                "configuration; repeat the command that started it, or give a new folder"
            )
        damage.append(f"{problem}; it is written again from what was asked for")
        existing = dict(wanted)
    kept, problem = _read_split(folder, existing["examples_sha256"])
    differences = list(nested_differences(_compared(existing), _compared(wanted)))
    if differences:
        texts = [
            text
            for name, there, here in differences
            for text in (
                _data_differences(kept, record, problem)
                if name == "examples_sha256"
                else [_difference(name, there, here)]
            )
        ]
        own = any(name == "examples_sha256" for name, *_ in differences)
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(texts)}; give a new folder"
            + (", or the split of the run (ft.training.kept_splits)" if own else "")
        )
    if not resume:
        state = "a finished" if (folder / RESULT_FILE).exists() else "an unfinished"
        raise ValueError(
            f"{folder} holds {state} run of this very configuration; add --resume (resume=True) "
            "to continue it, or give a new folder"
        )
    if damage:
        write_json(folder / CONFIG_FILE, wanted)
    if record is None:
        text = (
            "the examples are not compared with those of the interrupted run: its batches were not "
            "made by ft.loaders"
        )
        return Found((text,), tuple(damage))
    notes = []
    if kept is None:
        damage.append(f"{problem}; it is written again from the data")
    elif record.examples > kept.examples:
        count = record.examples - kept.examples
        notes.append(
            f"{count} new {'example belongs' if count == 1 else 'examples belong'} to no part of "
            f"the run and {'is' if count == 1 else 'are'} left out"
        )
    if kept is None or kept.address != record.address:
        examples = record.examples if kept is None else kept.examples
        write_json(folder / SPLIT_FILE, replace(record, examples=examples).to_json())
        if kept is not None:
            with suppress(ValueError):  # A damaged manifest is written anew when the run ends.
                seal_again(folder, SPLIT_FILE)
    return Found(tuple(notes), tuple(damage))


def seals_at_start(folder: Path, wanted: Mapping[str, Any]) -> dict[str, str]:
    """What the checkpoints of a new run know of the files beside them."""
    return {
        CONFIG_FILE: sha256_of_config(wanted),
        ENVIRONMENT_FILE: sha256_of(folder / ENVIRONMENT_FILE),
    }


def heal(folder: Path, seals: dict[str, str], audits: Sequence[Audit]) -> Iterator[str]:
    """Writes audits and environment again where they are not what the checkpoint knows.

    Args:
        folder: of a run that is resumed.
        seals: as ``seals_at_start`` made them; changed where a file is new.
        audits: of the phases that have ended.

    Yields:
        What was damaged, and what was done about it.
    """
    path = folder / ENVIRONMENT_FILE
    if not matches(path, seals[ENVIRONMENT_FILE]):
        write_json(path, environment())
        seals[ENVIRONMENT_FILE] = sha256_of(path)
        yield f"{path} is damaged or missing; it now tells of today's packages and devices"
    for number in range(len(audits)):
        path = folder / frozen_file(number)
        if not matches(path, seals[path.name]):
            path.unlink(missing_ok=True)
            yield f"{path} is damaged or missing and is not kept: its phase was audited before"
    path = folder / AUDIT_FILE
    text = json_bytes([asdict(audit) for audit in audits])
    if audits and not matches(path, hashlib.sha256(text).hexdigest()):
        # A process that was killed after its phase has audited one phase more.
        later = path.is_file() and path.read_bytes().startswith(text.rstrip(b"\n]"))
        write_audits(folder, audits)
        if not later:
            yield f"{path} is damaged or missing and is written again"
    if (folder / MANIFEST_FILE).exists():
        remade = (WEIGHTS_FILE, VALIDATION_FILE, RESULT_FILE)
        yield from (
            f"{problem}; it is made again from the checkpoints"
            for problem in run_problems(folder, remade)
        )


def _read_config(folder: Path, sha256: str) -> tuple[dict[str, Any] | None, str]:
    """The configuration that the checkpoints belong to; or None, and what is wrong with it."""
    path = folder / CONFIG_FILE
    try:
        existing = read_json(path)
        if isinstance(existing, dict) and sha256_of_config(existing) == sha256:
            return existing, ""
        return None, f"{path} was changed since the run was started"
    except FileNotFoundError:
        return None, f"{path} is missing"
    except ValueError as error:
        return None, str(error)


def _read_split(folder: Path, identity: str | None) -> tuple[Split | None, str]:
    """The record of the split with this identity; or None, and what is wrong with it."""
    path = folder / SPLIT_FILE
    try:
        kept = Split.from_json(read_json(path))
        if kept.identity() == identity:
            return kept, ""
        return None, f"{path} was changed since the run was started"
    except FileNotFoundError:
        return None, f"{path} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error)
        return None, text if text.startswith(str(path)) else f"{path} is damaged: {error}"


def _data_differences(kept: Split | None, record: Split | None, problem: str) -> list[str]:
    if record is None:
        return ["its examples were recorded, and these batches cannot tell theirs apart"]
    if kept is None:
        return [f"the data are not those of the run, and {problem}"]
    return kept.differences(record) or ["the data are not those of the run"]


def prepare(folder: Path, wanted: Mapping[str, Any], record: Split | None) -> None:
    """Writes configuration, environment and split of a run before its first checkpoint.

    The configuration comes first: a folder that has one is known as ours, wherever a kill falls.
    """
    write_json(folder / CONFIG_FILE, wanted)
    write_json(folder / ENVIRONMENT_FILE, environment())
    if record is not None:
        write_json(folder / SPLIT_FILE, record.to_json())


def _digest_of_tree(tree: Any) -> str:
    """SHA-256 over the paths and leaves of a nested dict."""
    parts = (f"{path} {digest(leaf)}" for path, leaf in sorted(flatten(dict(tree)).items()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the settings whose content is compared instead."""
    return {
        name: {k: v for k, v in value.items() if k not in _BY_CONTENT[name]}
        if name in _BY_CONTENT and isinstance(value, Mapping)
        else value
        for name, value in config.items()
    }


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "weights_sha256":
        return "the weights that training starts from are others"
    return f"{name} is {there!r} there and {here!r} here"
