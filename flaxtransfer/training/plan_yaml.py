"""Plans as YAML: written from what a program composed, read back as the same plan.

    phases:
    - name: head
      steps: 100
      labels: {head: head(), backbone: rest()}
      groups:
        head:
          optimizer: adamw
          learning_rate: {peak: 0.003, warmup: 0.1}
          weight_decay: 0.01
        backbone: frozen
      clip: 1.0

What has no name in a file (a schedule or a loss of one's own, a bare optax transformation, labels
resolved on one network) is refused, not written in part.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import optax
import yaml

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import Rest, rest
from flaxtransfer.masks import Mask, as_mask
from flaxtransfer.paths import suggest
from flaxtransfer.schedules import WarmupCosine
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.task import SmoothedCrossEntropy, cross_entropy

__all__ = ["load_plan", "plan_from_yaml", "plan_to_yaml", "save_plan"]


_PLAN = ("patience", "min_gain", "min_z")
_SIMPLE = ("steps", "epochs", "clip", "ema", "patience")
_PHASE = ("name", "labels", "groups", "norm", "recalibrate", "probe", "label_smoothing", *_SIMPLE)
_GROUP = ("optimizer", "learning_rate", "weight_decay", "decay_mask", "decay_toward")


def save_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Writes a plan as YAML; a file that is there is replaced as a whole.

    Raises:
      TypeError: something in it cannot be written; see ``plan_to_yaml``.
      OSError: the file cannot be written.
    """
    path = Path(path)
    text = plan_to_yaml(plan)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan that was written by ``save_plan``, or by hand.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a plan; the text lists everything that is wrong, by place.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted({*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")})
        raise FileNotFoundError(
            f"there is no plan {path}"
            + (f"; beside it: {', '.join(map(str, beside))}" if beside else "")
        )
    try:
        return plan_from_yaml(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def plan_to_yaml(plan: Plan) -> str:
    """The plan as YAML; ``plan_from_yaml`` reads it back as an equal plan.

    Raises:
      TypeError: schedules, losses, optimizers or labels that have no name; all in one text.

    >>> import flaxtransfer as ft
    >>> plan = ft.Plan([ft.Phase({"all": ft.everything()}, {"all": ft.Group(optax.sgd, 0.1)}, 5)])
    >>> print(plan_to_yaml(plan))
    phases:
    - name: fine-tune
      labels:
        all: everything()
      groups:
        all:
          optimizer: sgd
          learning_rate: 0.1
      steps: 5
    <BLANKLINE>
    """
    problems: list[str] = []
    document = {
        name: value for name, value in ((name, getattr(plan, name)) for name in _PLAN) if value
    }
    phases = [_phase_out(phase, problems) for phase in plan.phases]
    if problems:
        raise TypeError("this plan cannot be written to a file: " + "; ".join(problems))
    return yaml.safe_dump({**document, "phases": phases}, sort_keys=False)


def plan_from_yaml(text: str) -> Plan:
    """The plan in a YAML document.

    Raises:
      ValueError: it is not one; the text lists everything that is wrong, by place.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {' '.join(str(error).split())}") from error
    problems: list[str] = []
    document = _mapping(document, "the plan", ("phases", *_PLAN), problems)
    entries: Any = document.get("phases")
    if not problems and not (isinstance(entries, list) and entries):
        problems.append("phases must be a list with at least one phase")
    if not problems:
        phases = [_phase_in(entry, number, problems) for number, entry in enumerate(entries, 1)]
    if not problems:
        try:
            return Plan(phases, **{name: document[name] for name in _PLAN if document.get(name)})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError("this is not a plan: " + "; ".join(problems))


def _phase_out(phase: Phase, problems: list[str]) -> dict[str, Any]:
    where = f"phase {phase.name!r}"
    rules = {n: r for n, r in phase.labels.items() if isinstance(r, Mask | Rest)}
    if rules != phase.labels:
        problems.append(f"{where} has labels of one network; give it masks, {{'new': ft.head()}}")
    out: dict[str, Any] = {
        "name": phase.name,
        "labels": {name: repr(rule) for name, rule in rules.items()},
        "groups": {
            name: _group_out(group, f"{where}, group {name!r}", problems)
            for name, group in phase.groups.items()
        },
    }
    if isinstance(phase.norm, Mapping):
        out["norm"] = {repr(as_mask(mask)): mode for mask, mode in phase.norm.items()}
    elif phase.norm is not None:
        out["norm"] = phase.norm if isinstance(phase.norm, str) else sorted(phase.norm)
    if phase.recalibrate is not None:
        out["recalibrate"] = repr(phase.recalibrate)
    if phase.probe:
        out["probe"] = True
    if isinstance(phase.loss, SmoothedCrossEntropy):
        out["label_smoothing"] = phase.loss.amount
    elif phase.loss is not cross_entropy:
        problems.append(f"{where} has a loss of its own, {phase.loss!r}")
    out |= {name: getattr(phase, name) for name in _SIMPLE if getattr(phase, name) is not None}
    return out


def _group_out(group: Any, where: str, problems: list[str]) -> Any:
    if group is FROZEN:
        return "frozen"
    if not isinstance(group, Group):
        problems.append(f"{where} is a bare optax transformation; give it as an ft.Group")
        return None
    optimizer, settings = _function_and_settings(group.optimizer)
    name = getattr(optimizer, "__name__", "")
    if getattr(optax, name, None) is not optimizer:
        problems.append(f"{where} has an optimizer that is not optax's: {group.optimizer!r}")
    unwritten = [key for key, value in settings.items() if not _is_plain(value)]
    if unwritten:
        problems.append(f"{where}: {', '.join(unwritten)} of {name} is no number, text or truth")
    rate: Any = group.learning_rate
    if isinstance(rate, WarmupCosine):
        rate = {"peak": rate.peak, "warmup": rate.warmup} | ({"end": rate.end} if rate.end else {})
    elif callable(rate):
        problems.append(f"{where} has a schedule without a name; ft.WarmupCosine has one")
    out = {"optimizer": name if not settings else {"name": name, **settings}, "learning_rate": rate}
    defaults = {field.name: field.default for field in fields(Group)}
    for key in ("weight_decay", "decay_mask", "decay_toward"):
        value = getattr(group, key)
        if defaults[key] is MISSING or value != defaults[key]:
            out[key] = repr(value) if isinstance(value, Mask) else value
    return out


def _phase_in(entry: Any, number: int, problems: list[str]) -> Any:
    # None where a problem was noted; what has one is never put together.
    where = f"phase {number}"
    before = len(problems)
    entry = _mapping(entry, where, _PHASE, problems)
    where = f"phase {entry.get('name', number)!r}"
    for name in ("labels", "groups"):
        if not isinstance(entry.get(name), Mapping) or not entry[name]:
            problems.append(f"{where} needs {name}, by label")
    if len(problems) > before:
        return None
    labels = {
        str(name): _tried(_rule, rule, f"{where}, label {name!r}", problems)
        for name, rule in entry["labels"].items()
    }
    groups = {
        str(name): _group_in(group, f"{where}, group {name!r}", problems)
        for name, group in entry["groups"].items()
    }
    norm = entry.get("norm")
    if isinstance(norm, Mapping):
        norm = {_tried(as_mask, m, f"{where}, norm", problems): mode for m, mode in norm.items()}
    elif isinstance(norm, list):
        norm = frozenset(norm)
    smoothing = entry.get("label_smoothing")
    loss: Any = cross_entropy
    if smoothing is not None:
        loss = _tried(SmoothedCrossEntropy, smoothing, f"{where}, label_smoothing", problems)
    if len(problems) > before:
        return None
    simple = {name: entry[name] for name in _SIMPLE if name in entry}
    if "name" in entry:
        simple["name"] = str(entry["name"])
    if "probe" in entry:
        simple["probe"] = entry["probe"]
    return _tried(
        lambda _: Phase(
            labels, groups, norm=norm, recalibrate=entry.get("recalibrate"), loss=loss, **simple
        ),
        None,
        where,
        problems,
    )


def _group_in(entry: Any, where: str, problems: list[str]) -> Any:
    if isinstance(entry, str) and entry.lower() == "frozen":
        return FROZEN
    before = len(problems)
    entry = dict(_mapping(entry, where, _GROUP, problems, or_else="'frozen'"))
    problems += [
        f"{where} needs {name}"
        for name in ("optimizer", "learning_rate")
        if name not in entry and len(problems) == before
    ]
    if len(problems) > before:
        return None
    optimizer = _tried(_optimizer_in, entry.pop("optimizer"), where, problems)
    rate = entry.pop("learning_rate")
    if isinstance(rate, Mapping):
        place = f"{where}, learning_rate"
        rate = _mapping(rate, place, ("peak", "warmup", "end"), problems)
        rate = _tried(lambda settings: WarmupCosine(**settings), rate, place, problems)
    if len(problems) > before:
        return None
    return _tried(lambda rest_of: Group(optimizer, rate, **rest_of), entry, where, problems)


def _rule(text: Any) -> Mask | Rest:
    if isinstance(text, str) and text.strip() == "rest()":
        return rest()
    return as_mask(text)


def _optimizer_in(entry: Any) -> Callable[..., Any]:
    settings = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = settings.pop("name", None)
    # Also what optax re-exports would be called, if it took a learning rate; nothing else is.
    optimizers = [
        n
        for n, function in vars(optax).items()
        if inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
    ]
    if name not in optimizers:
        raise ValueError(f"optax has no optimizer {name!r}{suggest(str(name), optimizers)}")
    function = getattr(optax, name)
    known = list(inspect.signature(function).parameters)
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(
            f"{name} takes no {', '.join(unknown)}{suggest(unknown[0], known)}; it takes "
            f"{', '.join(known)}"
        )
    return functools.partial(function, **settings) if settings else function


def _function_and_settings(optimizer: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(optimizer, functools.partial):
        return optimizer.func, dict(optimizer.keywords)
    return optimizer, {}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _mapping(
    value: Any, where: str, known: tuple[str, ...], problems: list[str], or_else: str = ""
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        alternative = f", or {or_else}" if or_else else ""
        problems.append(f"{where} must be a mapping with {', '.join(known)}{alternative}")
        return {}
    problems += [
        f"{where} has no setting {key!r}{suggest(str(key), known)}; there are {', '.join(known)}"
        for key in value
        if key not in known
    ]
    return value


def _tried(make: Callable[[Any], Any], value: Any, where: str, problems: list[str]) -> Any:
    try:
        return make(value)
    except (ValueError, TypeError) as error:
        text = str(error)
        problems.append(text if text.startswith(where) else f"{where}: {text}")
        return None
