"""A tree to store, and what is to be compared when it comes back."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.checkpoint import CheckpointManager


def tree_of(value: float) -> dict:
    return {"a": {"kernel": np.full((50, 70), float(value))}, "b": np.arange(900.0) + value}


def same(a, b) -> bool:
    """Equal structures, and leaves that are equal in type, dtype and every bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (type(x), getattr(x, "dtype", 0), bits(x)) == (type(y), getattr(y, "dtype", 0), bits(y))
        for x, y in pairs
    )


def bits(leaf) -> bytes:
    key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restore_newest(folder: Path):
    with CheckpointManager.open(folder, read_only=True) as store:
        return store.restore(tree_of(0))
