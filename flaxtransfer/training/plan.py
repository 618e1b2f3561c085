"""Phases and plans: what moves, how fast, for how long, and the table that shows it.

The fields of ``Phase`` and ``Plan`` are listed once, in their dataclasses. The plan file, the
table, the identity of a run and that of a compiled step derive from ``dataclasses.fields``, so that
a new field is part of all of them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from rich.console import Group as RichGroup
from rich.table import Table

from flaxtransfer.batchnorm import Norm
from flaxtransfer.groups import FROZEN, Group, WarmupCosine
from flaxtransfer.groups import Group as OptimizerGroup
from flaxtransfer.labels import ParamGroups, Rest, label
from flaxtransfer.losses import Loss, bound
from flaxtransfer.masks import Mask, as_mask, selected
from flaxtransfer.overview import plain, terminal
from flaxtransfer.paths import Params, flatten, listing, shortened

# What a field of a phase decides beside what is learned; see `Phase`.
_OUTSIDE_STEP = {"in_step": False}
_LENGTH = {"in_step": False, "treatment": False}


@dataclass(frozen=True)
class Phase:
    """One stretch of training with the same leaves moving.

    Use it to say what a stage of an adaptation does; it holds decisions, not state, and can be
    printed or changed with ``dataclasses.replace`` before anything is allocated.

    Args:
        labels: rules, ``{label: mask or ft.rest()}``; or what ``ft.label`` makes of them for one
            network, a nested dict of label names.
        groups: what each label means: a ``Group``, any optax transformation, or ``FROZEN``.
        steps: optimizer steps; give this or ``epochs``. 0 is for a phase that does no more than
            solve the head (``probe``), which then counts as one step.
        epochs: passes over the training examples, rounded up to whole steps.
        name: what tables and logs call the phase.
        norm: BatchNorm policy. By default a BatchNorm whose affine leaves are all frozen uses its
            running statistics and never updates them, and the others use batch statistics.
            Exceptions to that are given as ``{mask: "running" or "batch"}``, the later ones
            winning.
        recalibrate: mask of the BatchNorms whose running statistics are measured anew on the
            training images before the first step of the phase, with the weights as they are then.
        probe: replace the head first by a linear probe on the pooled features of the training
            images, with the weights as they are then: "logistic" regression to its optimum, or
            "ridge", in closed form. The penalty is chosen by cross-validation.
        clip: largest global norm of the gradient over the trainable leaves of all groups.
        ema: decay of an exponential moving average of the trainable leaves, which evaluation then
            uses; None for no average.
        patience: evaluations without a better validation metric after which the phase ends; needs a
            validation set.
        loss: one of ``losses.LOSSES`` or a function, see ``Loss``; None is the task's own.
            Validation reports it too.
        mixup: alpha of MixUp, 0 for none: each image is blended with another one of its batch,
            with a share drawn once per step from Beta(alpha, alpha). The losses of their labels are
            blended alike, and a label that one of them lacks counts by the other alone. Targets of
            a regression are blended themselves, and missing in both where one lacks them: not for
            angles, nor for other targets whose mean is not that of a blend.
        cutmix: alpha of CutMix, 0 for none: each image gets a rectangle of another one, and its
            label by the share of the area. With both, one of them is drawn in each step.
        dropout: share of the features before the head that are dropped in a step.
        stochastic_depth: with which probability an example passes the last block by its shortcut
            alone; earlier blocks in proportion to their depth, and those that are frozen never.
        accumulate: parts in which a batch is computed, one after the other, for batches that do
            not fit into memory. Nothing else changes, for a step is a whole batch, except in a
            BatchNorm that uses batch statistics: it takes those of each part.
        remat: compute what is in a block once more in the backward pass instead of keeping it
            (gradient checkpointing): less memory on accelerators, 1.3 times the arithmetic, the
            same gradient to rounding. XLA's CPU compiler saves nothing by it.
        image_size: side to which training images are made smaller on the device, in px, so that
            early phases cost less (progressive resizing); None for what the batches have.
            Validation sees whole images, so the last phase had better train on them.

    A field of a subclass is part of everything that derives from the fields. Its metadata may say
    ``in_step=False`` where no compiled step depends on it, and ``treatment=False`` where two phases
    that differ in it alone treat the leaves alike.

    Raises:
        ValueError: both or neither of steps and epochs, or numbers out of range; the text names
            them all.

    References:
        H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018. S. Yun et al., "CutMix:
        Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019. G.
        Huang et al., "Deep Networks with Stochastic Depth", 2016. T. Chen et al., "Training Deep
        Nets with Sublinear Memory Cost", 2016 (gradient checkpointing).
    """

    labels: Mapping[str, Any]
    groups: Mapping[str, Any]
    steps: int | None = field(default=None, metadata=_LENGTH)
    epochs: float | None = field(default=None, metadata=_LENGTH)
    name: str = field(default="fine-tune", metadata=_LENGTH)
    norm: Norm | Mapping[Mask | str, Literal["running", "batch"]] | None = None
    recalibrate: Mask | str | None = field(default=None, metadata=_OUTSIDE_STEP)
    probe: Literal["logistic", "ridge"] | None = field(default=None, metadata=_LENGTH)
    clip: float | None = None
    ema: float | None = None
    patience: int | None = field(default=None, metadata=_LENGTH)
    loss: Loss | None = field(default=None, repr=False)
    mixup: float = 0.0
    cutmix: float = 0.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    accumulate: int = 1
    remat: bool = field(default=False, metadata={"treatment": False})
    image_size: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append(
                f"give steps or epochs, one of them; got {self.steps} and {self.epochs}"
            )
        for name in ("steps", "epochs", "clip", "patience", "image_size"):
            value = getattr(self, name)
            solved = name == "steps" and value == 0 and self.probe is not None
            if value is not None and not value > 0 and not solved:
                problems.append(f"{name} must be positive, got {value}")
            elif value == math.inf:
                problems.append(f"{name} must be finite, got {value}")
        for name in ("steps", "patience"):
            if isinstance(getattr(self, name), bool | float):
                problems.append(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            problems.append(f"ema must be in [0, 1), got {self.ema}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} must be >= 0 and < 1, got {getattr(self, name)}")
        idle = [
            name
            for name in ("mixup", "cutmix", "dropout", "stochastic_depth")
            if self.steps == 0 and getattr(self, name)
        ]
        if idle:
            problems.append(f"{', '.join(idle)} must be 0 in a phase that only solves the head")
        if isinstance(self.image_size, bool | float):
            problems.append(f"image_size must be a whole number of px, got {self.image_size!r}")
        if isinstance(self.accumulate, bool | float) or not self.accumulate >= 1:
            problems.append(f"accumulate must be a whole number >= 1, got {self.accumulate!r}")
        if self.probe not in (None, "logistic", "ridge"):
            problems.append(f"probe must be 'logistic' or 'ridge', got {self.probe!r}")
        if problems:
            raise ValueError(f"phase {self.name!r}: " + "; ".join(problems))
        if self.recalibrate is not None:
            object.__setattr__(self, "recalibrate", as_mask(self.recalibrate))

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the phase in steps."""
        if self.steps is not None:
            return self.steps or 1
        return max(1, -int(-(self.epochs or 0) * steps_per_epoch // 1))

    def resolve(self, params: Params, steps_per_epoch: int = 1) -> Phase:
        """The phase for one network and one set of data: every leaf labeled, every number said.

        Args:
            params: nested dict of arrays or ``jax.ShapeDtypeStruct``.
            steps_per_epoch: optimizer steps in one pass over the training examples.

        Raises:
            ValueError: rules that leave gaps or overlap, resolved labels of another network,
                exceptions to the BatchNorm policy that touch none; labels and groups that do not
                fit.
            The text names the phase.
        """
        try:
            labels = self.labels
            if self._has_rules():
                labels = label(params, self.labels)
            else:
                _check_fit(labels, params)
            norm = self.norm
            bound = ParamGroups(labels, self.groups)
            if norm is None or isinstance(norm, Mapping):
                norm = bound.batch_norm(overrides=norm)
            if self.recalibrate is not None:
                selected(self.recalibrate, params)
        except ValueError as error:
            raise ValueError(f"phase {self.name!r}: {error}") from error
        steps = self.total_steps(steps_per_epoch)
        groups = {
            name: group.over(steps) if isinstance(group, Group) else group
            for name, group in self.groups.items()
        }
        steps = 0 if self.only_solves else steps
        return replace(self, labels=labels, groups=groups, norm=norm, steps=steps, epochs=None)

    @cached_property
    def param_groups(self) -> ParamGroups:
        """Labels and groups of a resolved phase, bound to each other.

        Raises:
            ValueError: the phase is not resolved.
        """
        if self._has_rules():
            raise ValueError(f"phase {self.name!r} is not resolved yet; call resolve(params)")
        return ParamGroups(self.labels, self.groups)

    def batch_norm_policy(self) -> Norm:
        """The policy of a resolved phase: the one given, or the one that follows from the labels.

        Raises:
            ValueError: the phase is not resolved.
        """
        if self._has_rules() or isinstance(self.norm, Mapping):
            raise ValueError(f"phase {self.name!r} is not resolved yet; call resolve(params)")
        if self.norm is None:
            return self.param_groups.batch_norm()
        return self.norm

    def in_step(self) -> dict[str, Any]:
        """The fields of a resolved phase that its compiled step depends on, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if _is(f, "in_step")}
        return found | {
            "labels": tuple(self.param_groups.named.items()),
            "groups": tuple(sorted(self.groups.items())),
            "norm": self.batch_norm_policy(),
        }

    def identity(self) -> dict[str, Any]:
        """Every field of a resolved phase as plain JSON: what makes it this phase and no other.

        Learning-rate schedules are recorded by their values at a few steps: functions have no name
        that could be compared.
        """
        found = {f.name: describe(getattr(self, f.name)) for f in fields(self)}
        labels = self.param_groups.named
        names = sorted(set(labels.values()))
        text = "\n".join(f"{path} {name}" for path, name in sorted(labels.items()))
        return found | {
            "labels": {name: list(labels.values()).count(name) for name in names},
            "labels_sha256": hashlib.sha256(text.encode()).hexdigest()[:12],
            "norm": describe(self.batch_norm_policy()),
        }

    @property
    def only_solves(self) -> bool:
        """Whether the phase solves the head and takes no optimizer step."""
        return self.steps == 0

    def moves_anything(self) -> bool:
        """Whether any label is trainable, and for a resolved phase any leaf."""
        if self._has_rules():
            return any(self.groups.get(name, FROZEN) is not FROZEN for name in self.labels)
        return bool(self.param_groups.trainable_paths)

    def _has_rules(self) -> bool:
        return bool(self.labels) and all(
            isinstance(rule, Mask | Rest) for rule in self.labels.values()
        )


@dataclass(frozen=True)
class Plan:
    """Phases in order, and what has to be shown for the next one to begin.

    Between two phases the best validated state of the run is restored (a phase that made
    validation worse is undone), and the optimizer moments of leaves that stay trainable are
    carried over.

    Args:
        phases: in order.
        patience: phases in a row without a better validation score after which the plan ends. None
            goes through all phases; a number needs a validation set.
        min_gain: what every further phase has to earn over what was kept before it, in the metric
            that ranks (accuracy: a share).
        ends_at: the segment whose output the head reads; what follows it is dropped from the
            network. Several: the head reads the outputs of all, and the network ends at the last.
            None for the whole network.
        min_z: how many standard errors the gain has to exceed on top, so that luck does not pass
            for a gain. The two states are compared on the same images: with w that only the new one
            gets right and l that only the old one does, the standard error is sqrt(w + l) images
            (McNemar's test). 2 asks for 5 of 5, 9 of 11 or 22 of 32 such images. Where a metric
            ranks that is no mean of hits, it is that of the difference over bootstrap samples of
            the images. The validations of a phase are ranked, and its patience is measured, by the
            gain less both.

    Raises:
        ValueError: no phase, two phases of one name, a phase in which nothing is trainable, or
            numbers out of range.

    References:
        Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or
        Percentages", 1947.
    """

    phases: Sequence[Phase]
    patience: int | None = None
    min_gain: float = 0.0
    min_z: float = 0.0
    ends_at: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        names = [phase.name for phase in self.phases]
        if not names:
            raise ValueError("phases must hold at least one phase, got none")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"names of phases must be unique, repeated: {', '.join(repeated)}")
        for phase in self.phases:
            if not phase.moves_anything():
                frozen = ", ".join(n for n, group in phase.groups.items() if group is FROZEN)
                raise ValueError(f"phase {phase.name!r} trains nothing: frozen are {frozen}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be 1 phase or more, got {self.patience}")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain must be in [0, 1), got {self.min_gain}")
        if not 0 <= self.min_z < math.inf:
            raise ValueError(f"min_z must be 0 standard errors or more, got {self.min_z}")
        if isinstance(self.ends_at, list):  # of a file
            object.__setattr__(self, "ends_at", tuple(self.ends_at))
        ends = self.ends_at if isinstance(self.ends_at, tuple) else (self.ends_at or "",)
        if self.ends_at == () or not all(isinstance(name, str) for name in ends):
            got = shortened(repr(self.ends_at))
            raise ValueError(f"ends_at must be the name of a segment, or several, got {got}")

    def __str__(self) -> str:
        return plan_text(self)

    def identity(self) -> dict[str, Any]:
        """Every field of a resolved plan as plain JSON."""
        found = {f.name: describe(getattr(self, f.name)) for f in fields(self)}
        return found | {"phases": {phase.name: phase.identity() for phase in self.phases}}

    def bind(self, task: str, names: Sequence[str], labels: np.ndarray | None) -> Plan:
        """The plan whose losses have what they need of the training set; see ``losses.bound``.

        Raises:
            ValueError: a loss that does not fit the task or the names, or CutMix for a regression;
                the text names the phase.
        """
        phases = []
        for phase in self.phases:
            if phase.cutmix and task == "regression":
                raise ValueError(
                    f"phase {phase.name!r}: cutmix must be 0 for the task regression, got "
                    f"{phase.cutmix}: a part of an image has no share of its numbers; mixup blends "
                    "them"
                )
            try:
                phases.append(replace(phase, loss=bound(phase.loss, task, names, labels)))
            except ValueError as error:
                raise ValueError(f"phase {phase.name!r}: {error}") from error
        return replace(self, phases=phases)

    def resolve(self, params: Params, steps_per_epoch: int = 1) -> Plan:
        """The plan for one network and one set of data.

        Raises:
            ValueError: see ``Phase.resolve``; or validation is to decide about a phase that differs
                from the one before it in nothing but its length.
        """
        phases = [phase.resolve(params, steps_per_epoch) for phase in self.phases]
        if self.patience is not None:
            for number in range(1, len(phases)):
                before, here = self.phases[number - 1 : number + 1]
                # Schedules are compared as they were given; resolved, they are closures.
                if _treatment(before, phases[number - 1]) == _treatment(here, phases[number]):
                    raise ValueError(
                        f"phase {here.name!r} unfreezes nothing new: it treats every leaf as "
                        f"{before.name!r} does, so that validation would decide about more of the "
                        f"same; give {before.name!r} more steps, or take the plan's patience away"
                    )
        return replace(self, phases=phases)


def _is(of: Field[Any], property_name: str) -> bool:
    return bool(of.metadata.get(property_name, True))


def is_default(phase: Any, of: Field[Any]) -> bool:
    """Whether a field of a phase or plan has its default value."""
    return of.default is not MISSING and getattr(phase, of.name) == of.default


def describe(value: Any) -> Any:
    """Any value of a phase as plain JSON, such that equal descriptions mean equal treatment."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Group):
        return {f.name: describe(getattr(value, f.name)) for f in fields(value)} | {
            "optimizer": _optimizer_text(value.optimizer),
            "learning_rate": _rate_values(value.learning_rate),
        }
    if isinstance(value, Mapping):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return [describe(each) for each in value]
    if value is FROZEN or isinstance(value, Mask):
        return repr(value)
    if hasattr(value, "_fields"):  # An optax transformation shows none of its numbers.
        return type(value).__name__
    return getattr(value, "__name__", repr(value))


def _optimizer_text(optimizer: Any) -> str:
    if isinstance(optimizer, functools.partial):
        settings = ", ".join(f"{name}={value!r}" for name, value in optimizer.keywords.items())
        return f"{_optimizer_text(optimizer.func)}({settings})"
    return getattr(optimizer, "__name__", str(optimizer))


def _rate_values(rate: Any) -> Any:
    return [float(rate(step)) for step in (0, 1, 10, 100, 1000)] if callable(rate) else rate


def _treatment(given: Phase, resolved: Phase) -> dict[str, Any]:
    """All that a phase does to the leaves, apart from how long."""
    found = {f.name: getattr(given, f.name) for f in fields(given) if _is(f, "treatment")}
    groups = {path: given.groups[name] for path, name in flatten(resolved.labels).items()}
    return found | {"labels": None, "groups": groups, "norm": resolved.norm}


def _check_fit(labels: Mapping[str, Any], params: Params) -> None:
    """Refuses labels that were resolved on other leaves."""
    labeled, leaves = set(flatten(labels)), set(flatten(params))
    problems = []
    if gap := sorted(leaves - labeled):
        problems.append(f"no label takes {len(gap)} leaves: {listing(gap)}")
    if foreign := sorted(labeled - leaves):
        problems.append(f"the network has no such leaves as are labeled: {listing(foreign)}")
    if problems:
        raise ValueError("; ".join(problems))


_WIDTH = 120
"""Characters a line of ``plan_text``, where there is no terminal to ask."""


def plan_table(plan: Plan, params: Params | None = None) -> Any:
    """What moves in each phase, how fast and for how long, as a renderable of rich.

    Args:
        plan: whose phases hold rules or resolved labels.
        params: of the network that it is meant for, or their shapes: adds the numbers of
            parameters, and of the BatchNorms that use batch statistics ("BN").

    Raises:
        ValueError: the plan does not fit the parameters.
    """
    table = Table("phase", "label", "leaves", "peak rate", "decay")
    resolved = plan.resolve(params) if params is not None else plan
    if params is not None:
        table.add_column("parameters", justify="right")
        table.add_column("BN", justify="right")
    for phase, fitted in zip(plan.phases, resolved.phases, strict=True):
        sizes = {} if params is None else _sizes(fitted, params)
        for number, (name, group) in enumerate(phase.groups.items()):
            cells = [f"{phase.name}\n{_length(phase)}" if number == 0 else ""]
            rule = phase.labels.get(name)
            cells += [name, "" if isinstance(rule, Mapping) or rule is None else str(rule)]
            cells += _SOLVED if phase.only_solves and group is not FROZEN else _pace(group)
            if params is not None:
                by_batch = len(fitted.batch_norm_policy()) if number == 0 else ""
                cells += [f"{sizes.get(name, 0):,}", str(by_batch)]
            table.add_row(*map(plain, cells), end_section=number == len(phase.groups) - 1)
    for column in table.columns[3:]:
        column.no_wrap = True
    notes = _notes(plan) + ([] if params is None else _together(resolved))
    return RichGroup(table, *map(plain, notes))


def plan_text(plan: Plan, params: Params | None = None) -> str:
    """``plan_table`` as plain text."""
    file = io.StringIO()
    terminal(file=file, width=_WIDTH, color_system=None).print(plan_table(plan, params))
    return file.getvalue().rstrip()


def _length(phase: Phase) -> str:
    unit, number = ("epochs", phase.epochs) if phase.steps is None else ("steps", phase.steps)
    lines = ["head solved" if phase.only_solves else f"{number:g} {unit}"]
    if phase.patience is not None:
        lines[0] += f", patience {phase.patience}"
    if phase.probe and phase.only_solves:
        lines.append(f"by {phase.probe} regression")
    elif phase.probe:
        lines.append(f"from a {phase.probe} probe")
    shown = ("labels", "groups", "steps", "epochs", "name", "norm", "patience", "probe")
    lines += [
        f"{f.name} {describe(getattr(phase, f.name))}"
        for f in fields(phase)
        if f.name not in shown and not is_default(phase, f)
    ]
    return "\n".join(lines)


_SOLVED = ["solved", ""]
"""In the columns of rate and decay, where there are no steps."""


def _pace(group: Any) -> list[str]:
    if group is FROZEN:
        return ["frozen", ""]
    if not isinstance(group, OptimizerGroup):
        return ["–", "–"]
    rate: Any = group.learning_rate
    if isinstance(rate, WarmupCosine):
        text = f"{rate.peak:.2g}"
    else:
        text = "schedule" if callable(rate) else f"{rate:.2g}"
    decay = f"{group.weight_decay:g}" if group.weight_decay else "–"
    return [text, f"{decay} → start" if group.decay_toward == "start" else decay]


def _sizes(phase: Phase, params: Params) -> dict[str, int]:
    leaves = flatten(params)
    sizes: dict[str, int] = {}
    for path, name in flatten(phase.labels).items():
        sizes[name] = sizes.get(name, 0) + leaves[path].size
    return sizes


def _notes(plan: Plan) -> list[str]:
    ends = []
    if isinstance(plan.ends_at, str):
        ends = [f"The network ends at {plan.ends_at}: what follows is dropped."]
    elif plan.ends_at:
        ends = [
            f"The head reads {', '.join(plan.ends_at)}: what follows all of them is dropped from "
            "the network."
        ]
    if plan.patience is None:
        return ends
    phases = "a phase" if plan.patience == 1 else f"{plan.patience} phases in a row"
    least = [f"{100 * plan.min_gain:g} %"] if plan.min_gain else []
    least += [f"{plan.min_z:g} standard errors"] if plan.min_z else []
    gain = f" by more than {' and '.join(least)} a phase" if least else ""
    rule = [f"Ends after {phases} without better validation{gain}; what did not help is undone."]
    return ends + rule


def _together(plan: Plan) -> list[str]:
    """What two settings of a resolved plan mean together, where one might not think of it.

    A phase that moves the leaves of the one before is meant for another pace, or a mistake.
    """
    moving = [p.param_groups.trainable_paths for p in plan.phases]
    parts = [
        f"Phase {p.name!r} computes a batch in {p.accumulate} parts, and BatchNorm takes the "
        "statistics of each part."
        for p in plan.phases
        if p.accumulate > 1 and p.batch_norm_policy() not in ("running", frozenset())
    ]
    idle = [
        f"Phase {p.name!r} drops no block by stochastic_depth: all are frozen."
        for p, paths in zip(plan.phases, moving, strict=True)
        if p.stochastic_depth and not any(path.startswith("layer") for path in paths)
    ]
    return [*parts, *idle] + [
        f"Phase {plan.phases[n].name!r} moves the same leaves as {plan.phases[n - 1].name!r}."
        for n in range(1, len(moving))
        if moving[n] == moving[n - 1]
    ]
