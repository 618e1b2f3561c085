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
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import optax
import yaml

from flaxtransfer.files import atomic_write, check_regular, write_file
from flaxtransfer.groups import FROZEN, Group, WarmupCosine
from flaxtransfer.labels import Rest, rest
from flaxtransfer.losses import LOSSES, settings_of
from flaxtransfer.masks import Mask, as_mask, to_text
from flaxtransfer.paths import listing, shortened, suggest
from flaxtransfer.training.plan import Phase, Plan, is_default

__all__ = ["load_plan", "plan_from_yaml", "plan_to_yaml", "save_plan"]


_GROUP = tuple(f.name for f in fields(Group))
_PLAN = tuple(f.name for f in fields(Plan) if f.name != "phases")

MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1 << 18, 20_000, 20
"""Limits of a plan file: its size, its values, and values within values.

A plan of ten phases with fifty groups each has 100 kB and 5,000 values, seven deep. PyYAML reads
about 100 kB per second and two levels of Python's stack for each level of the document."""

MOST_DIGITS = 60
"""Digits of a whole number: Python refuses 4,300, and a number that long fills an error text."""

MOST_TEXT = 440
"""Characters of all that is wrong with a plan: the terminal shows 600 with the file's path."""


def save_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Writes a plan as YAML; a file that is there is replaced as a whole.

    Raises:
        TypeError: something in it cannot be written; see ``plan_to_yaml``.
        OSError: the file cannot be written.
    """
    text = plan_to_yaml(plan)
    with atomic_write(Path(path)) as made:
        write_file(made, text.encode())


def load_plan(path: str | os.PathLike[str], phase: type[Phase] = Phase) -> Plan:
    """Reads a plan that was written by ``save_plan``, or by hand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a plan; the text lists everything that is wrong, by place.
    """
    path = Path(path)
    if not path.exists():
        beside = sorted({*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")})
        raise FileNotFoundError(
            f"there is no plan {path}"
            + (f"; beside it: {listing(map(str, beside))}" if beside else "")
        )
    check_regular(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: a plan must have at most {MOST_BYTES:,} bytes, got {size:,}")
    try:
        return plan_from_yaml(path.read_bytes().decode(), phase)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a plan must be text in UTF-8, got the byte "
            f"{error.object[error.start]:#04x} at {error.start:,}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def plan_to_yaml(plan: Plan) -> str:
    """The plan as YAML; ``plan_from_yaml`` reads it back as an equal plan.

    Raises:
        TypeError: schedules, losses, optimizers or labels that have no name; all in one text.
        ValueError: a mask that holds a function of the program (``ft.where``); it is named.

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
        f.name: getattr(plan, f.name)
        for f in fields(plan)
        if f.name != "phases" and not is_default(plan, f)
    }
    phases = [_phase_out(phase, problems) for phase in plan.phases]
    if problems:
        raise TypeError("this plan cannot be written to a file: " + "; ".join(problems))
    text: str = yaml.safe_dump({**document, "phases": phases}, sort_keys=False)
    return text


def plan_from_yaml(text: str, phase: type[Phase] = Phase) -> Plan:
    """The plan in a YAML document.

    Args:
        text: the document.
        phase: the class of its phases, whose fields are what a phase may say.

    Raises:
        ValueError: it is not one; the text lists everything that is wrong, by place.
    """
    document = _document(text)
    problems: list[str] = []
    document = _mapping(document, "the plan", ("phases", *_PLAN), problems)
    entries: Any = document.get("phases")
    if not problems and not (isinstance(entries, list) and entries):
        problems.append("phases must be a list with at least one phase")
    if not problems:
        phases = [
            _phase_in(phase, each, number, problems) for number, each in enumerate(entries, 1)
        ]
    if not problems:
        try:
            return Plan(phases, **{name: document[name] for name in _PLAN if name in document})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError("this is not a plan: " + shortened("; ".join(problems), MOST_TEXT))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    """YAML without aliases, and with bounded depth and number of values.

    A plan needs no aliases, and 400 bytes with nine levels of them stand for 10^8 values.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        place = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"a plan must be without anchors (&) and aliases (*), got {place}")
        if self._depth == MOST_DEPTH or self._values == MOST_VALUES:
            most = (
                f"{MOST_DEPTH} levels" if self._depth == MOST_DEPTH else f"{MOST_VALUES:,} values"
            )
            raise yaml.YAMLError(f"a plan must have at most {most}, got more ({place})")
        self._depth, self._values = self._depth + 1, self._values + 1
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int":
            digits = node.value.replace("_", "").lstrip("+-")
            if len(digits) > MOST_DIGITS:
                raise yaml.YAMLError(f"a whole number of {len(digits):,} digits ({place})")
        return node


def _document(text: str) -> Any:
    if len(text) > MOST_BYTES:
        raise ValueError(f"a plan must have at most {MOST_BYTES:,} bytes, got {len(text):,}")
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        reason = shortened(" ".join(str(error).split()), MOST_TEXT)
        raise ValueError(f"this is not YAML: {reason}") from error
    # A value that does not fit its tag, as in `!!int x`, raises many types of error.
    except Exception as error:
        reason = shortened(" ".join(str(error).split()), MOST_TEXT)
        raise ValueError(
            f"this is not YAML: a value does not fit its type ({type(error).__name__}: {reason})"
        ) from error


def _phase_out(phase: Phase, problems: list[str]) -> dict[str, Any]:
    where = f"phase {phase.name!r}"
    out: dict[str, Any] = {"name": phase.name}
    for of in fields(phase):
        value = getattr(phase, of.name)
        if of.name in _CODECS:
            codec = _CODECS[of.name]
            found = codec.out(value, where, problems)
            if found is not None:
                out[codec.key or of.name] = found
        elif not is_default(phase, of) and of.name not in out:
            if not _is_plain(value):
                problems.append(
                    f"{where}: {of.name} must be a number, text or truth, got {value!r}"
                )
            out[of.name] = value
    return out


def _labels_out(labels: Any, where: str, problems: list[str]) -> Any:
    rules = {name: rule for name, rule in labels.items() if isinstance(rule, Mask | Rest)}
    if rules != labels:
        problems.append(f"{where} has labels of one network; give it masks, {{'new': ft.head()}}")
    return {
        name: _mask_out(rule, f"{where}, label {name!r}", problems)
        if isinstance(rule, Mask)
        else repr(rule)
        for name, rule in rules.items()
    }


def _mask_out(mask: Any, where: str, problems: list[str]) -> Any:
    return None if mask is None else _tried(to_text, as_mask(mask), where, problems)


def _groups_out(groups: Any, where: str, problems: list[str]) -> Any:
    return {
        name: _group_out(group, f"{where}, group {name!r}", problems)
        for name, group in groups.items()
    }


def _norm_out(norm: Any, where: str, problems: list[str]) -> Any:
    if isinstance(norm, Mapping):
        return {_mask_out(mask, f"{where}, norm", problems): mode for mask, mode in norm.items()}
    return norm if norm is None or isinstance(norm, str) else sorted(norm)


def _loss_out(loss: Any, where: str, problems: list[str]) -> Any:
    if loss is None:
        return None
    names = [name for name, kind in LOSSES.items() if type(loss) is kind]
    if not names:
        problems.append(
            f"{where} has a loss of its own, {loss!r}; a loss of losses.LOSSES has a name"
        )
        return None
    settings = settings_of(loss)
    return {names[0]: settings} if settings else names[0]


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
    for of in fields(group):
        if of.name not in out and not is_default(group, of):
            value = getattr(group, of.name)
            out[of.name] = _mask_out(value, where, problems) if isinstance(value, Mask) else value
    return out


def _phase_in(phase: type[Phase], entry: Any, number: int, problems: list[str]) -> Any:
    # None where a problem was noted; what has one is never put together.
    where = f"phase {number}"
    before = len(problems)
    keys = {_key(of): of for of in fields(phase)}
    entry = _mapping(entry, where, tuple(keys), problems)
    where = f"phase {entry.get('name', number)!r}"
    for name in ("labels", "groups"):
        if not isinstance(entry.get(name), Mapping) or not entry[name]:
            problems.append(f"{where} needs {name}, by label")
    if len(problems) > before:
        return None
    settings = {
        keys[key].name: _CODECS[keys[key].name].into(value, where, problems)
        if keys[key].name in _CODECS
        else value
        for key, value in entry.items()
    }
    if len(problems) > before:
        return None
    if "name" in settings:
        settings["name"] = str(settings["name"])
    return _tried(lambda given: phase(**given), settings, where, problems)


def _key(of: Field[Any]) -> str:
    return (_CODECS[of.name].key if of.name in _CODECS else "") or of.name


def _labels_in(entry: Any, where: str, problems: list[str]) -> Any:
    return {
        str(name): _tried(_rule, rule, f"{where}, label {name!r}", problems)
        for name, rule in entry.items()
    }


def _groups_in(entry: Any, where: str, problems: list[str]) -> Any:
    return {
        str(name): _group_in(group, f"{where}, group {name!r}", problems)
        for name, group in entry.items()
    }


def _norm_in(entry: Any, where: str, problems: list[str]) -> Any:
    if isinstance(entry, Mapping):
        return {_tried(as_mask, m, f"{where}, norm", problems): mode for m, mode in entry.items()}
    return frozenset(entry) if isinstance(entry, list) else entry


def _loss_in(entry: Any, where: str, problems: list[str]) -> Any:
    if entry is None:
        return None
    place = f"{where}, loss"
    written = {entry: {}} if isinstance(entry, str) else entry
    written = _mapping(written, place, tuple(LOSSES), problems, or_else="the name of one")
    if len(written) != 1:
        problems.append(f"{place} must be one loss, got {len(written)}")
        return None
    name, settings = next(iter(written.items()))
    if name not in LOSSES:
        return None  # It is noted already.
    known = tuple(f.name for f in fields(LOSSES[name]) if not f.metadata.get("bound"))
    before = len(problems)
    settings = _mapping(settings, f"{place} {name}", known, problems)
    if len(problems) > before:
        return None
    return _tried(lambda given: LOSSES[name](**given), settings, f"{place} {name}", problems)


@dataclass(frozen=True)
class _Codec:
    """How a field that is not a plain value is written and read.

    Args:
        out: ``(value, where, problems) -> plain value``, None where nothing is written.
        into: ``(plain value, where, problems) -> value``.
        key: in the file, where it is not the field's name.
    """

    out: Callable[[Any, str, list[str]], Any]
    into: Callable[[Any, str, list[str]], Any]
    key: str = ""


_CODECS = {
    "labels": _Codec(_labels_out, _labels_in),
    "groups": _Codec(_groups_out, _groups_in),
    "norm": _Codec(_norm_out, _norm_in),
    "recalibrate": _Codec(
        lambda mask, where, problems: _mask_out(mask, f"{where}, recalibrate", problems),
        lambda entry, where, problems: entry,
    ),
    "loss": _Codec(_loss_out, _loss_in),
}
"""The fields of a phase that need more than a plain value; all others are written as they are."""


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


@functools.cache
def _optimizers() -> list[str]:
    # Also what optax re-exports would be called, if it took a learning rate; nothing else is.
    return [
        name
        for name, function in vars(optax).items()
        if inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
    ]


def _optimizer_in(entry: Any) -> Callable[..., Any]:
    settings = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = settings.pop("name", None)
    optimizers = _optimizers()
    if name not in optimizers:
        raise ValueError(
            f"optax has no optimizer {shortened(repr(name))}{suggest(str(name), optimizers)}"
        )
    function = getattr(optax, name)
    known = list(inspect.signature(function).parameters)
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(
            f"{name} takes no {listing(map(str, unknown))}{suggest(str(unknown[0]), known)}; "
            f"it takes {', '.join(known)}"
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
    unknown = [key for key in value if key not in known]
    # The first few: each costs a comparison with all that are known.
    problems += [
        f"{where} has no setting {shortened(repr(key))}{suggest(str(key), known)}; there are "
        f"{', '.join(known)}"
        for key in unknown[:5]
    ]
    problems += [f"{where} has {len(unknown) - 5} more"] if len(unknown) > 5 else []
    return value


def _tried(make: Callable[[Any], Any], value: Any, where: str, problems: list[str]) -> Any:
    try:
        return make(value)
    except (ValueError, TypeError) as error:
        text = str(error)
        problems.append(text if text.startswith(where) else f"{where}: {text}")
        return None
