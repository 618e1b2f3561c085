"""Damages each file of a run, resumes or uses the run, and holds the outcome against the law.

    python -m tests.faults.damage                # every file, every kind of damage
    python -m tests.faults.damage --every 9      # a sample

The law: the same result, or it is said what was damaged and the run goes on, or the run is refused
with the name of what is damaged. Another result without a word, or an error that is not ours, is
a violation.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import flaxtransfer as ft
from flaxtransfer.training.run_folder import check_sealed, split_of, validation_of, weights_of
from tests.faults import harness

Damage = Callable[[Path, Path], None]


def _flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _other_run(path: Path, other: Path) -> None:
    if other.exists():
        shutil.copy(other, path)


DAMAGES: dict[str, Damage] = {
    "deleted": lambda path, _: path.unlink(),
    "half": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": _flip,
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path, _: path.write_bytes(b"\x93\xff garbage \x00" * 9),
    "{}": lambda path, _: path.write_bytes(b"{}"),
    "[]": lambda path, _: path.write_bytes(b"[]"),
    "another run's": _other_run,
}


def files(folder: Path) -> list[str]:
    """Files of a run, without the lock, which holds nothing."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in found)


def used(folder: Path) -> None:
    """What the commands read of a finished run."""
    ft.load(weights_of(folder))
    split_of(folder)
    validation_of(folder)
    check_sealed(folder, "metrics.jsonl")


def judged(folder: Path, name: str, whole: dict[str, str], *, finished: bool) -> str:
    """How a damaged run ends: "same", "healed", "refused", or the violation."""
    if finished:
        with suppress(ValueError, OSError):
            used(folder)
            reads = ("model.safetensors", "validation.npz", "metrics.jsonl")
            kept = harness.outcome(folder)
            if any(kept[key] != whole[key] for key in whole if key in (*reads, "metrics")):
                return "VIOLATION: damaged files were used"
    top = name.split("/")[0]
    step = name.split("/")[1] if top == "checkpoints" else ""
    try:
        result = harness.fit(folder)
    except (ValueError, OSError) as error:
        named = top in str(error) or (step and f"step {step}" in str(error))
        return "refused" if named else f"VIOLATION: refused without a name: {error}"
    except BaseException as error:
        return f"VIOLATION: {type(error).__name__}: {error}"
    said = any(top in note or (step and f"step {step}" in note) for note in result.notes)
    found = harness.outcome(folder)
    wrong = [key for key in whole if found[key] != whole[key]]
    if said:
        return "healed"
    return f"VIOLATION: differs in {wrong}, and nothing is said" if wrong else "same"


def runs(place: Path) -> Iterator[tuple[str, Path, Path, bool]]:
    """Name, folder, the same of another seed, and whether it has finished."""
    for seed in (0, 1):
        with suppress(OSError):
            harness.fit(place / f"unfinished-{seed}", at=2 * harness.STEPS + 3, seed=seed)
        assert not (place / f"unfinished-{seed}/result.json").exists()
        shutil.copytree(place / f"unfinished-{seed}", place / f"finished-{seed}")
        harness.fit(place / f"finished-{seed}", seed=seed)
    yield "unfinished", place / "unfinished-0", place / "unfinished-1", False
    yield "finished", place / "finished-0", place / "finished-1", True


def check(
    place: Path, every: int = 1, first: int = 0
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Outcomes counted by run and kind, and the violations."""
    counts: Counter[tuple[str, str]] = Counter()
    violations = []
    cases = list(runs(place))
    whole = harness.outcome(place / "finished-0")
    number = 0
    for label, folder, other, finished in cases:
        for name in files(folder):
            for kind, damage in DAMAGES.items():
                number += 1
                if (number - 1 - first) % every:
                    continue
                trial = place / "trial"
                shutil.rmtree(trial, ignore_errors=True)
                shutil.copytree(folder, trial)
                damage(trial / name, other / name)
                ended = judged(trial, name, whole, finished=finished)
                counts[label, ended.split(":")[0]] += 1
                if ended.startswith("VIOLATION"):
                    violations.append(f"{label}, {name}, {kind}: {ended}")
    return counts, violations


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        counts, violations = check(Path(name), options.every)
    print(*violations, sep="\n")
    for (label, ended), count in sorted(counts.items()):
        print(f"{label}: {ended}: {count}")


if __name__ == "__main__":
    main()
