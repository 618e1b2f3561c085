"""The parameter table: what moves, how fast, and how it decays, from shapes alone.

Also the console and the cells that all tables have in common, in which names of files, classes and
labels are text and never markup.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from flaxtransfer.batchnorm import Norm, check, mode, modules, policy
from flaxtransfer.distributed import is_first
from flaxtransfer.groups import FROZEN, Group, WarmupCosine, check_groups
from flaxtransfer.mask_algebra import select
from flaxtransfer.models.layout import layout_of
from flaxtransfer.paths import PyTree, flatten, listing, map_with_path, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["ParameterTable", "Row", "Total", "parameter_table", "plain", "terminal"]


_WIDTH = 120
"""Characters a line of ``str(table)``, where there is no terminal to ask."""


def plain(text: Any) -> Text:
    """Text from outside as a cell or line of rich: its markup and control characters are shown.

    A class may be called ``[red]`` or ``x[/b]``.
    """
    from rich.text import Text

    return Text(visible(text, keep="\n"))


def terminal(**options: Any) -> Console:
    """A console of rich that shows every string as it is, as ``plain`` does.

    Of several processes, process 0 alone prints.

    Args:
        options: as for ``rich.console.Console``.
    """
    if "file" not in options and not is_first():
        options["quiet"] = True
    return _kind_of_console()(markup=False, emoji=False, **options)


@functools.cache
def _kind_of_console() -> type[Console]:
    # Here, so that the core needs no rich until something is printed.
    from rich.console import Console

    class Terminal(Console):
        """Every string that is printed, in cells and titles too, comes through ``render_str``."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text, keep="\n\t"), **options)

    return Terminal


@dataclass(frozen=True)
class Row:
    """One parameter.

    Args:
        path: Its path.
        shape: Its shape.
        bytes: Its size in memory.
        label: Its label.
        trainable: Whether it moves.
        learning_rate: At step 0, or the peak of a ``WarmupCosine``; None where it is frozen or
            hidden in an optax transformation.
        scheduled: Whether the learning rate changes with the step.
        weight_decay: The coefficient that really applies to it; None where it is hidden.
        norm: Which statistics its BatchNorm uses; None where it is not a BatchNorm's.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    label: str
    trainable: bool
    learning_rate: float | None
    scheduled: bool
    weight_decay: float | None
    norm: Literal["running", "batch"] | None


@dataclass(frozen=True)
class Total:
    """Sums over the leaves of a label, or over all.

    Args:
        label: The label; "total" for all.
        leaves: How many.
        parameters: Numbers in them.
        trainable: Numbers in those that move.
        bytes: Size in memory.
    """

    label: str
    leaves: int
    parameters: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class ParameterTable:
    """What ``parameter_table`` returns: rows and totals as values; printed, a table.

    Args:
        rows: One for each parameter, from the input to the output where the family is known.
        totals: One for each label, then one over all.
    """

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]

    def __str__(self) -> str:
        text = io.StringIO()
        terminal(file=text, width=_WIDTH, color_system=None).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        # Here, so that the core needs no rich until something is printed.
        from rich.console import Group as Stack
        from rich.table import Table as RichTable

        leaves = RichTable("path", "shape", "label", "learning rate", "decay", "trainable", "BN")
        for row in self.rows:
            leaves.add_row(
                plain(row.path),
                " × ".join(map(str, row.shape)) or "scalar",
                plain(row.label),
                _rate(row),
                "–" if not row.weight_decay else f"{row.weight_decay:g}",
                "yes" if row.trainable else "no",
                row.norm or "",
            )
        # A path cut short names no leaf; the other columns fold where the terminal is narrow.
        leaves.columns[0].no_wrap = True
        leaves.columns[0].min_width = max((len(row.path) for row in self.rows), default=4)
        return Stack(leaves, self.summary())

    def summary(self) -> Any:
        """The totals alone, as a table of rich: for logs, where the leaves would be too many."""
        from rich.table import Table as RichTable

        sums = RichTable("label", "leaves", "parameters", "trainable", "MB")
        for total in self.totals:
            numbers = (total.leaves, total.parameters, total.trainable)
            megabytes = f"{total.bytes / 1e6:,.2f}"
            sums.add_row(plain(total.label), *(f"{n:,}" for n in numbers), megabytes)
        for column in sums.columns[1:]:
            column.justify = "right"
        return sums


def parameter_table(
    variables: Mapping[str, Any],
    labels: PyTree,
    groups: Mapping[str, Any],
    norm: Norm | None = None,
) -> ParameterTable:
    """What moves, how fast, and how it decays, leaf by leaf, for a person to read before step 0.

    It needs shapes only: on ``jax.ShapeDtypeStruct`` nothing is allocated.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}`` of arrays or ``jax.ShapeDtypeStruct``.
        labels: Tree of label names with the structure of the parameters.
        groups: For each label a ``Group``, an optax transformation (whose learning rate and decay
            cannot be seen, and are shown as "–") or ``FROZEN``.
        norm: BatchNorm policy; by default the one that follows from the labels.

    Returns:
        A ``ParameterTable``; ``print`` shows it.

    Raises:
        ValueError: Labels of another tree, labels and groups that do not fit, a decay mask that
            selects nothing, a policy for BatchNorms that do not exist.

    >>> import jax, optax
    >>> shapes = {"kernel": (512, 10), "bias": (10,)}
    >>> params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    >>> groups = {"new": Group(optax.adamw, learning_rate=1e-3, weight_decay=1e-4)}
    >>> table = parameter_table({"params": params}, {"kernel": "new", "bias": "new"}, groups)
    >>> [(row.path, row.learning_rate, row.weight_decay) for row in table.rows]
    [('bias', 0.001, 0.0), ('kernel', 0.001, 0.0001)]
    >>> table.totals[-1].parameters
    5130
    """
    if "params" not in variables:
        raise ValueError(
            f'variables must be {{"params": ...}}, got {listing(map(repr, variables))}'
        )
    params = variables["params"]
    flat = flatten(params)
    named = check_groups(labels, groups)
    if differing := sorted(set(flat) ^ set(named)):
        raise ValueError(
            "labels and parameters are of different trees; they differ in " + listing(differing)
        )
    # Statistics tell a BatchNorm from what is only named like one.
    where = variables.get("batch_stats")
    where = where if where is not None and flatten(where) else params
    if norm is None:
        moving = map_with_path(lambda path, name: groups[name] is not FROZEN, labels)
        norm = policy(where, moving)
    else:
        norm = check(norm, where)
    norms = modules(where)
    decaying = _decaying(flat, groups)
    rows = []
    for path in _in_order(flat):
        leaf = flat[path]
        group = groups[named[path]]
        module = path.rpartition("/")[0]
        rate, scheduled = _learning_rate(group)
        known = group is FROZEN or isinstance(group, Group)
        rows.append(
            Row(
                path=path,
                shape=tuple(leaf.shape),
                bytes=math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize,
                label=named[path],
                trainable=group is not FROZEN,
                learning_rate=rate,
                scheduled=scheduled,
                weight_decay=(
                    (group.weight_decay if path in decaying[named[path]] else 0.0)
                    if known
                    else None
                ),
                norm=mode(norm, module) if module in norms else None,
            )
        )
    totals = [_total(name, [row for row in rows if row.label == name]) for name in groups]
    return ParameterTable(tuple(rows), (*totals, _total("total", rows)))


def _in_order(flat: Mapping[str, Any]) -> list[str]:
    """Paths from the input of the network to its output, whichever order jit left the dicts in."""
    layout = layout_of(flat)

    def position(path: str) -> tuple[Any, ...]:
        segment = layout.segment(path) if layout is not None else ""
        parts = path.split("/")
        numbers = [(0, int(one), "") if one.isdecimal() else (1, 0, one) for one in parts]
        return (layout.position(segment) if layout and segment else (math.inf, 0)), numbers

    return sorted(flat, key=position)


def _decaying(flat: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """For each group, the leaves that its decay mask selects; all groups' problems at once."""
    decaying: dict[str, frozenset[str]] = {}
    problems = []
    for name, group in groups.items():
        decaying[name] = frozenset()
        if isinstance(group, Group) and group.weight_decay:
            try:
                decaying[name] = select(group.decay_mask, flat)
            except ValueError as error:
                problems.append(f"decay_mask of group {name!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return decaying


def _learning_rate(group: Any) -> tuple[float | None, bool]:
    if not isinstance(group, Group):
        return None, False
    if isinstance(group.learning_rate, WarmupCosine):
        return group.learning_rate.peak, True
    if callable(group.learning_rate):
        return float(group.learning_rate(0)), True
    return float(group.learning_rate), False


def _rate(row: Row) -> str:
    if row.learning_rate is None:
        return "–"
    return f"{row.learning_rate:g}" + (" schedule" if row.scheduled else "")


def _total(name: str, rows: list[Row]) -> Total:
    sizes = {row.path: math.prod(row.shape) for row in rows}
    moving = sum(sizes[row.path] for row in rows if row.trainable)
    return Total(name, len(rows), sum(sizes.values()), moving, sum(row.bytes for row in rows))
