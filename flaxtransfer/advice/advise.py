"""``advise``: from the evidence to a recommendation, with the reasons and what cannot be known.

The rule, and where its numbers come from, is written down in BUILD_NOTES.md. Each reason is one
number, its threshold, and what follows from it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from flaxtransfer.advice.evidence import Evidence, HeadEvidence, gather
from flaxtransfer.advice.race import (
    FEWEST,
    LEARNED,
    Gains,
    Prior,
    Verdict,
    checked_gains,
    on_target,
    prior_of,
)
from flaxtransfer.analysis.spectrum import OCTAVE_NAMES
from flaxtransfer.classifier import Classifier, transfer
from flaxtransfer.data.source import Source, task_of_source
from flaxtransfer.features.class_means import leaves_nothing
from flaxtransfer.metrics import Draws, Skill, compared
from flaxtransfer.overview import terminal
from flaxtransfer.paths import Params, flatten, listing
from flaxtransfer.recipes.catalog import RECIPES
from flaxtransfer.task import REGRESSION, SINGLE_LABEL
from flaxtransfer.training.plan import Plan
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["SCHEMA", "Advice", "Candidate", "advise", "decide", "expectations", "known_gains"]

CHANCE = 4.0
"""Alignment below which features are taken to say nothing: of 40 draws of labels without relation
to the images, none is beyond it."""

CHANCE_OF_OUTPUTS = 5.0
"""The same for labels that are no classes, of which there may be many with few examples each: of
1,040 draws of six kinds 18 are beyond 4, and none beyond 5."""

LEVEL = 0.01
"""Differences in skill below this are none: one point."""

LITTLE = 0.03
"""What depths that are level may leave to be gained, for the cheapest to be taken."""

WORTH = 0.02
"""Skill that more labels have to gain, and training not to, for them to be collected first."""

_SHOWN = 80
"""Characters a line, where there is no terminal to ask."""


@dataclass(frozen=True)
class Candidate:
    """A strategy that fits the data, or does not.

    Args:
        strategy: the name of a recipe.
        settings: its arguments, beside the defaults.
        skill: held out, of heads that were solved; None for what has to be trained to know.
        error: standard error of the skill.
        moves: parameters that move.
        cost: in full runs of the strategy that trains everything; a solved head costs nothing.
        why: in one sentence.
        tried: whether it is worth a trial.
    """

    strategy: str
    settings: dict[str, Any]
    skill: float | None
    error: float | None
    moves: int
    cost: float
    why: str
    tried: bool = True

    def skill_text(self, measure: Skill) -> str:
        """The skill, or why there is none."""
        if self.skill is None or self.error is None:
            return "to be trained" if self.tried else "not tried"
        return measure.text(self.skill, self.error)

    def plan(self, params: Params, lengths: Mapping[str, int] | None = None) -> Plan:
        """The strategy as a plan for a network; by default with the recipe's own lengths."""
        return RECIPES[self.strategy](params, **self.settings, **(lengths or {}))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.strategy}{f' ({settings})' if settings else ''}"


@dataclass(frozen=True, eq=False)
class Advice:
    """What to do with a network and images, and why; ``print`` shows it at 80 columns.

    Args:
        verdict: in a word.
        summary: in a sentence.
        candidates: strategies, the recommended one first; those that are struck out last.
        reasons: each one number, its threshold and what follows.
        unknown: what no measurement on these images can say.
        evidence: all numbers.
        plan: of the recommended strategy, to be printed, changed and trained; None where nothing is
            learnable.
        collect: how many more labels to collect before anything is trained: they gain 2 points,
            and nothing that is trained is expected to; None where that cannot be said. It does not
            change what is recommended.
    """

    verdict: Verdict
    summary: str
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    unknown: tuple[str, ...]
    evidence: Evidence
    plan: Plan | None
    collect: int | None = None

    @property
    def best(self) -> Candidate | None:
        """The recommended strategy; None where nothing is learnable."""
        return self.candidates[0] if self.plan is not None else None

    @property
    def challengers(self) -> tuple[Candidate, ...]:
        """Strategies that only training can compare with the recommended one; at most four."""
        return tuple(one for one in self.candidates[1:] if one.tried and one.skill is None)

    def to_json(self) -> dict[str, Any]:
        """Plain values that follow ``SCHEMA``."""
        return {
            "version": 2,
            "verdict": self.verdict,
            "summary": self.summary,
            "candidates": [one.to_json() for one in self.candidates],
            "reasons": list(self.reasons),
            "unknown": list(self.unknown),
            "collect": self.collect,
            "evidence": self.evidence.to_json(),
        }

    def __str__(self) -> str:
        file = io.StringIO()
        terminal(file=file, width=_SHOWN, color_system=None).print(self)
        return file.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        measure = self.evidence.measure
        heads = Table("head on", f"{measure.name}, 5 folds", "features", "used")
        for head in (*self.evidence.depths, self.evidence.reference):
            heads.add_row(
                "pixels' spectrum" if head is self.evidence.reference else head.name,
                measure.text(head.skill, head.standard_error),
                str(head.features),
                f"{head.degrees_of_freedom:.0f}",
            )
        for column in heads.columns[1:]:
            column.justify = "right"
        table = Table("strategy", measure.name, "moves", "costs")
        for one in self.candidates:
            cost = "0" if one.cost == 0 else f"{one.cost:.1f}x"
            table.add_row(f"{one}\n  {one.why}", one.skill_text(measure), f"{one.moves:,}", cost)
        for column in table.columns[1:]:
            column.justify = "right"
            column.no_wrap = True
        parts: list[Any] = [self.summary, heads, table]
        parts += [f"- {reason}" for reason in self.reasons]
        parts += [
            "What cannot be known from these images:",
            *(f"- {text}" for text in self.unknown),
        ]
        return Group(*parts)


def advise(
    network: Pretrained | Classifier,
    source: Source,
    positions: Any = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    gains: Gains | None = None,
) -> Advice:
    """Which strategy fits these images, from one pass over them; nothing is trained.

    A head in closed form is judged on each depth of the network, and on the power spectrum of the
    pixels, which needs no network, by the same folds: stratified, and of whole groups where the
    source has them. The depth that knows most is the recommendation that costs nothing; the
    differences say whether training can be better, and of which part.

    Classes are judged by accuracy; several labels and numbers by the metric that ranks the task, as
    a skill whose hundredths are points (``metrics.Skill``).

    Args:
        network: pre-trained weights from ``ft.load``; or a ``Classifier``, whose input and
            preprocessing are made for the images.
        source: images and labels.
        positions: int ``[examples]``, the training images; by default all of the source. Keep test
            images out.
        seed: of the folds.
        batch_size: images per forward pass.
        mesh: devices; by default all of them.
        gains: what each strategy gained on other data with this network, or the JSON file of it, as
            ``experiments/strategy_grid.py --gains`` writes it; see ``checked_gains`` in
            ``advice/race.py``. By default known of the built-in network.

    Raises:
        TypeError: gains of another type.
        ValueError: gains of another network or that are no such numbers; too few images or classes,
            no label or target with two values, images of other bands than the network's, another
            task than the network's, features that are not finite.

    References:
        A. Royer, C. Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer Learning",
        2020 (an intermediate or early layer is often the best).
        U. Evci, V. Dumoulin, H. Larochelle, M. C. Mozer, "Head2Toe: Utilizing Intermediate
        Representations for Better Transfer Learning", 2022.

    >>> import flaxtransfer as ft
    >>> import numpy as np
    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> images = random.integers(0, 30, (60, 32, 32, 3)) + 80 * labels[:, None, None, None]
    >>> source = ft.ArraySource(images.astype(np.uint8), labels, ["dark", "gray", "bright"])
    >>> ft.advise(ft.load("builtin"), source).verdict
    'ceiling'
    """
    task = task_of_source(source)
    if isinstance(network, Pretrained):
        names = tuple(source.class_names)
        network = transfer(network, classes=len(names), class_names=names, task=task)
    elif network.task.name != task.name:
        raise ValueError(
            f"network must have the task of the data, {task.name}, got {network.task.name}; give "
            f"task= to ft.transfer"
        )
    if gains is not None:  # Before anything is computed.
        gains = checked_gains(gains, network.model.config.name)
    evidence = gather(network, source, positions, batch_size=batch_size, seed=seed, mesh=mesh)
    return decide(evidence, network.params, gains)


def decide(evidence: Evidence, params: Params, gains: Gains | None = None) -> Advice:
    """The recommendation that follows from the evidence; see BUILD_NOTES.md for the rule.

    Args:
        evidence: from ``gather``.
        params: of the network, or their shapes.
        gains: see ``advise``.
    """
    best, last, reference = evidence.best, evidence.last, evidence.reference
    strongest = max((*evidence.depths, reference), key=lambda head: head.alignment)
    known = strongest.alignment > _chance(evidence)
    gain, error = compared(best.judged, last.judged)
    deeper = best is not last and gain > max(LEVEL, 2 * error)
    level = all(_is_level(best, head) for head in evidence.depths) and best.left < LITTLE
    verdict: Verdict
    if not known:
        verdict = "nothing"
    elif evidence.bottleneck.whole:
        verdict = "early"
    elif _leaves_nothing(best, evidence):
        verdict = "ceiling"
    elif deeper:
        verdict = "depth"
    elif level:
        verdict = "level"
    else:
        verdict = "train"
    about = partial(prior_of, verdict, network=evidence.network, gains=known_gains(evidence, gains))
    expected = expectations(verdict, evidence, gains)
    candidates = _candidates(verdict, evidence, params, expected)
    recommended = candidates[0] if verdict != "nothing" else None
    collect: int | None = None
    why: list[str] = []
    if verdict in ("depth", "level", "train"):
        priors = [expected(one.strategy) for one in candidates if one.tried and one.skill is None]
        collect, why = _collect(evidence, priors)
    return Advice(
        verdict,
        _summary(verdict, evidence, recommended, collect),
        tuple(candidates),
        (*_reasons(verdict, evidence, strongest, recommended, about), *why),
        (*_unknown(evidence), *_not_measured(gains, candidates, expected)),
        evidence,
        None if recommended is None else recommended.plan(params),
        collect,
    )


def _chance(evidence: Evidence) -> float:
    return CHANCE if evidence.task == SINGLE_LABEL.name else CHANCE_OF_OUTPUTS


def _leaves_nothing(best: HeadEvidence, evidence: Evidence) -> bool:
    if isinstance(best.judged, Draws):
        return best.left < LEVEL
    return leaves_nothing(best.skill, best.examples, evidence.measure.of_guess)


def known_gains(evidence: Evidence, gains: Gains | None) -> Mapping[str, Any] | None:
    """What is known of gains: those that the package holds are of accuracies.

    Raises:
        TypeError, ValueError: see ``checked_gains``.
    """
    if gains is not None:
        return checked_gains(gains, evidence.network)
    return None if evidence.task == SINGLE_LABEL.name else {"network": None, "gains": {}}


def _not_measured(
    gains: Gains | None, candidates: Sequence[Candidate], about: Callable[[str], Prior]
) -> list[str]:
    """Strategies that the user's own gains do not cover."""
    tried = [one.strategy for one in candidates if one.tried and one.skill is None]
    missing = [name for name in tried if not about(name).targets]
    if gains is None or not missing:
        return []
    return [
        f"What {listing(missing)} gained elsewhere: the gains that were given have fewer than "
        f"{FEWEST} kinds of images of it; 0 ± {100 * Prior().deviation:g} points are assumed."
    ]


def expectations(
    verdict: Verdict, evidence: Evidence, gains: Gains | None
) -> Callable[[str], Prior]:
    """What is expected of a strategy by its name, on these images: gains elsewhere, and evidence.

    Args:
        verdict: of the advice.
        evidence: from ``gather``.
        gains: see ``advise``.
    """
    known = known_gains(evidence, gains)

    def expected(strategy: str) -> Prior:
        prior = prior_of(verdict, strategy, evidence.network, known)
        if evidence.task != SINGLE_LABEL.name:
            return prior
        return on_target(prior, evidence.best.left, evidence.wrong, evidence.outputs)

    return expected


def _error(head: HeadEvidence) -> float:
    """Standard error that is not 0 where every example is right: as if half of one were wrong."""
    if isinstance(head.judged, Draws):
        return head.standard_error
    count = head.examples
    share = min(max(head.skill, 0.5 / count), 1 - 0.5 / count)
    return math.sqrt(share * (1 - share) / count)


def _is_level(best: HeadEvidence, head: HeadEvidence) -> bool:
    gain, error = compared(best.judged, head.judged)
    return gain <= max(LEVEL, error)


def _moves(strategy: str, settings: dict[str, Any], params: Params) -> int:
    """Parameters that the longest phase of a strategy moves."""
    plan, leaves = RECIPES[strategy](params, **settings).resolve(params), flatten(params)
    sizes = {path: int(math.prod(leaf.shape)) for path, leaf in leaves.items()}
    moving = [phase.param_groups.trainable_paths for phase in plan.phases]
    return max(sum(sizes[path] for path in paths) for paths in moving)


def _candidates(
    verdict: Verdict, evidence: Evidence, params: Params, about: Callable[[str], Prior]
) -> list[Candidate]:
    best, last = evidence.best, evidence.last
    of_last = evidence.measure.text(last.skill)
    if verdict in ("ceiling", "level"):
        # The last of equal ones: what generalizes most, and a whole network fits every export.
        best = [head for head in evidence.depths if _is_level(evidence.best, head)][-1]
    head = Candidate(
        "depth_head" if best is not last else "solved_head",
        {"segment": best.name} if best is not last else {},
        best.skill,
        _error(best),
        (best.features + 1) * evidence.outputs,
        0.0,
        f"costs no training; {last.name} has {of_last}"
        if best is not last
        else "costs no training; no depth knows more than the last",
    )
    rows: list[tuple[str, str]] = []
    struck: list[tuple[str, str]] = []
    if verdict == "early":
        where = evidence.bottleneck.segment
        rows = [
            ("early_layers", f"{where} has to let through what it stops"),
            ("high_rate_fine_tuning", "the same, if more than the first layers has to change"),
            ("from_scratch", "the pre-training may not help at all here"),
        ]
        stops = f"reads what {where} has stopped"
        struck = [
            ("discriminative", f"early layers hardly move: {stops}"),
            ("batch_norm_only", stops),
        ]
    elif verdict in ("depth", "train", "level"):
        if best is last:
            rows = [
                ("linear_probe_then_fine_tune", "the last depth knows most: a small step from it"),
                ("discriminative", "late layers move most"),
                ("high_rate_fine_tuning", "if the start matters more than its features"),
                ("early_layers", "if the images differ in what the first layers see"),
            ]
        else:
            rows = [
                ("early_layers", f"{best.name} knows more than what follows it"),
                ("high_rate_fine_tuning", "the same, if late layers have to change, too"),
                ("discriminative", "if late layers have only to be turned"),
                ("from_scratch", "the late layers are of little use here"),
            ]
            struck = [("feature_extraction", f"what it reads has {of_last}")]
    made = [_trained(name, why, params) for name, why in rows]
    out = [_trained(name, why, params, tried=False) for name, why in struck]
    if verdict == "early":
        return [made[0], head, *made[1:], *out]
    priors = {one.strategy: about(one.strategy) for one in made}
    made.sort(key=lambda one: -priors[one.strategy].mean)
    if made and min(priors[made[0].strategy].mean, best.left) > LEVEL:
        return [made[0], head, *made[1:], *out]
    return [head, *made, *out]


def _trained(strategy: str, why: str, params: Params, *, tried: bool = True) -> Candidate:
    cost = 1.0
    return Candidate(strategy, {}, None, None, _moves(strategy, {}, params), cost, why, tried)


def _nouns(evidence: Evidence) -> str:
    return "classes" if evidence.task == SINGLE_LABEL.name else "labels"


def _collect(evidence: Evidence, priors: Sequence[Prior]) -> tuple[int | None, list[str]]:
    """How many labels to collect before anything is trained, and why; None and nothing if none.

    Args:
        evidence: of images that leave something to gain.
        priors: of what could be trained.
    """
    curve = evidence.curve
    looked = evidence.examples + evidence.repeated
    if curve is None or not curve.fits or looked < evidence.available:
        return None, []
    more = curve.labels_for(WORTH)
    trained = min(max([0.0, *(prior.mean for prior in priors)]), evidence.best.left)
    if more is None or trained >= WORTH:
        return None, []
    gain, error = curve.gain(curve.labels + more)
    if gain <= error:
        return None, []
    known = any(prior.targets for prior in priors)
    told = "" if known else ", of which nothing is known with this network,"
    unless = "" if known else ", unless a race (`--strategy auto`) shows that training gains more"
    return more, [
        f"{more:,} more labels would gain {100 * gain:.1f} ± {100 * error:.1f} points (threshold: "
        f"1 standard error), and training{told} is expected to gain {100 * trained:.1f} "
        f"(threshold: {100 * WORTH:g}): collect labels first{unless}."
    ]


def _summary(
    verdict: Verdict, evidence: Evidence, chosen: Candidate | None, collect: int | None
) -> str:
    best = evidence.best
    if verdict == "nothing":
        return (
            f"Nothing is learnable from these features with {evidence.examples} images: no head "
            f"does better than labels that are shuffled. No strategy is recommended; look at the "
            "labels first."
        )
    text = {
        "early": f"The network loses what the {_nouns(evidence)} are made of: early layers have to "
        "move.",
        "ceiling": "A head leaves nothing to gain: take it.",
        "depth": f"{best.name} knows more than the layers behind it: a head there is the one to "
        "beat.",
        "level": "All depths are level and leave little to gain: take the cheapest.",
        "train": f"A head on {best.name} is the one to beat; training may be better.",
    }[verdict]
    end = "" if collect is None else f" Collect labels first: about {collect:,} more for 2 points."
    return f"{text} Recommended: {chosen}.{end}"


def _reasons(
    verdict: Verdict,
    evidence: Evidence,
    strongest: HeadEvidence,
    chosen: Candidate | None,
    about: Callable[[str], Prior],
) -> list[str]:
    best, last, text = evidence.best, evidence.last, evidence.measure.text
    found = [
        f"Held-out scores are {strongest.alignment:.1f} standard deviations from those of shuffled "
        f"labels (threshold {_chance(evidence):g}): "
        + (
            "the images say something of the labels."
            if verdict != "nothing"
            else "no more than luck."
        )
    ]
    if verdict == "nothing":
        return found
    if evidence.task != SINGLE_LABEL.name:
        found.append(
            f"Heads are judged by {evidence.measure.name}, by which this task ranks; 1 point is "
            f"{evidence.measure.point}, and a guess has {text(evidence.measure.of_guess)}."
        )
    if evidence.bottleneck.segment is not None:
        found.append(evidence.bottleneck.summary())
    found.append(
        f"The best head has {text(best.skill)} of {best.examples} images: {100 * best.left:.1f} "
        "points are left that training may gain (threshold: 1 point)."
    )
    if chosen is not None and chosen.skill is None and verdict != "early":
        prior = about(chosen.strategy)
        found.append(
            f"On {prior.targets} other kinds of images this network gained "
            f"{100 * prior.mean:.1f} ± {100 * prior.deviation:.1f} points over such a head by "
            f"{chosen.strategy} (threshold: 1 point): train it. Whether it does so here, a race "
            "says."
        )
    if best is not last:
        gain, error = compared(best.judged, last.judged)
        found.append(
            f"{best.name} is {100 * gain:.1f} ± {100 * error:.1f} points above {last.name} on the "
            f"same images (threshold: 2 standard errors and 1 point): "
            + (
                "the head should read there."
                if gain > max(LEVEL, 2 * error)
                else "the two may be level; the earlier is cheaper in use."
            )
        )
    if evidence.wrong:
        found.append(
            f"About {100 * evidence.wrong:.0f} % of the labels look wrong: they contradict a head "
            "that is sure, and name any class (threshold: 20 times as likely as no wrong label). "
            "What is trained learns them, too, and a solved head averages over them: "
            f"{100 * LEARNED * evidence.wrong:.0f} points less are expected of training."
        )
    found += _augmentation(verdict, evidence)
    found.append(
        f"The head uses {best.degrees_of_freedom:.0f} of {best.features} degrees of freedom, "
        f"{best.degrees_of_freedom / best.examples:.2f} per image; the whole network has "
        f"{evidence.parameters / best.examples:,.0f} parameters per image, which by itself "
        "foretells little."
    )
    curve = evidence.curve
    if curve is not None and curve.fits:
        more = curve.labels_for(WORTH)
        end = (
            f"about {more:,} more would gain 2 points."
            if more is not None
            else "2 points more are not in sight within four times as many."
        )
        found.append(
            f"Half the labels would cost {100 * curve.cost_of_half:.1f} points of the head's "
            f"accuracy: {end}"
        )
    return found


def _augmentation(verdict: Verdict, evidence: Evidence) -> list[str]:
    """Augmentations that change what the classes are made of, as far as a spectrum shows it."""
    reference, found, text = evidence.reference, [], evidence.measure.text
    drop = reference.skill - evidence.mirrored
    if reference.alignment > _chance(evidence) and drop > max(
        0.1, 2 * math.sqrt(2) * _error(reference)
    ):
        found.append(
            f"On mirrored images the head on the pixels' spectrum falls from "
            f"{text(reference.skill)} to {text(evidence.mirrored)} (threshold: 10 points and 2 "
            "standard errors): train with --flip no."
        )
    if verdict == "early" and evidence.bottleneck.octave == OCTAVE_NAMES[-1]:
        found.append(
            "What is finer than 4 pixels does not survive being turned or magnified: train with "
            "--augment none."
        )
    return found


def _unknown(evidence: Evidence) -> list[str]:
    found = [
        "Whether images in use are like these: where they shift, fine-tuned networks lose more "
        "than heads do (`flaxtransfer diagnose` compares).",
        "What training gains: heads foretell heads. `--strategy` trains one of the candidates.",
    ]
    if evidence.grouped:
        found.append(
            "What more labels would bring: a learning curve would tear groups (patients, scenes, "
            "sites) apart, which the folds hold out as a whole."
        )
    if evidence.task != SINGLE_LABEL.name:
        found.append(
            "How much strategies gained elsewhere, and how a head's error falls with more labels: "
            "both were measured for classes alone."
        )
    if evidence.constant:
        found.append(
            f"Anything of {listing(map(repr, evidence.constant))}, of which all images have one "
            "value: left out."
        )
    if evidence.smallest < 5:
        rarest = {
            SINGLE_LABEL.name: "class, which has {} images",
            REGRESSION.name: "known target, which has {} images",
        }.get(evidence.task, "label, of whose rarer value there are {} images")
        found.append(
            f"Much of the rarest {rarest.format(evidence.smallest)} to learn and to judge by."
        )
    if evidence.repeated:
        found.append(
            f"Anything from {evidence.repeated} images that are there before, pixel for pixel: "
            "they were left out."
        )
    if evidence.examples + evidence.repeated < evidence.available:
        found.append(f"What {evidence.available - evidence.examples:,} further images say.")
    return found


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Advice",
    "type": "object",
    "required": ["version", "verdict", "summary", "candidates", "reasons", "unknown", "evidence"],
    "properties": {
        "version": {"const": 2},
        "verdict": {"enum": ["nothing", "ceiling", "early", "depth", "level", "train"]},
        "summary": {"type": "string"},
        "candidates": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["strategy", "settings", "skill", "error", "moves", "cost", "why"],
                "properties": {
                    "strategy": {"type": "string"},
                    "settings": {"type": "object"},
                    "skill": {"type": ["number", "null"], "maximum": 1},
                    "error": {"type": ["number", "null"], "minimum": 0},
                    "moves": {"type": "integer", "minimum": 1},
                    "cost": {"type": "number", "minimum": 0},
                    "why": {"type": "string"},
                    "tried": {"type": "boolean"},
                },
            },
        },
        "reasons": {"type": "array", "items": {"type": "string"}},
        "unknown": {"type": "array", "items": {"type": "string"}},
        "collect": {"type": ["integer", "null"], "minimum": 1},
        "evidence": {
            "type": "object",
            "required": [
                "examples",
                "task",
                "metric",
                "guess",
                "depths",
                "reference",
                "bottleneck",
            ],
        },
    },
}
"""What ``Advice.to_json`` gives, as a JSON Schema."""
