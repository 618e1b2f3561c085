"""Names for the trees that everything passes around."""

from typing import Any

__all__ = ["Params", "PyTree", "Variables"]


PyTree = Any
"""Any tree that JAX can flatten."""

Params = dict[str, Any]
"""Nested dict with string keys; the leaves are arrays or ``jax.ShapeDtypeStruct``."""

Variables = dict[str, Any]
"""``{"params": Params, "batch_stats": Params}``."""
