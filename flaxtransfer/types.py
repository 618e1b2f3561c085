"""Types of the trees and arrays that everything passes around; annotations only."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chex import Array as Array
    from chex import ArrayTree as ArrayTree
    from chex import PRNGKey as PRNGKey

__all__ = ["Params", "PyTree", "Variables"]


PyTree = Any
"""Any tree that JAX can flatten."""

Params = dict[str, Any]
"""Nested dict with string keys; the leaves are arrays or ``jax.ShapeDtypeStruct``."""

Variables = dict[str, Any]
"""``{"params": Params, "batch_stats": Params}``."""
