"""Advice as one self-contained HTML page."""

from __future__ import annotations

import io

from flaxtransfer.advice.advise import Advice
from flaxtransfer.report.figures import plot_advice
from flaxtransfer.report.page import bullets, escape, html_table, page, picture, section

__all__ = ["render_advice"]


def render_advice(advice: Advice, *, data: str, weights: str) -> str:
    """The text of one HTML file: what to do, why, and every number behind it.

    Args:
        advice: from ``ft.advise``.
        data: what was looked at.
        weights: through which network.
    """
    evidence, drawn = advice.evidence, io.BytesIO()
    plot_advice(advice, drawn)
    about = f"{data}: {evidence.examples} of {evidence.available} images, {evidence.classes} "
    about += f"classes, the rarest with {evidence.smallest}; {weights}"
    parts = [
        f"<h1>{escape(advice.summary)}</h1>",
        f'<p class="about">{escape(about)}</p>',
        section("Strategies", _strategies(advice)),
        section("Why", bullets(advice.reasons)),
        section("What cannot be known from these images", bullets(advice.unknown)),
        section("What heads know at each depth", picture("Accuracy by depth", drawn.getvalue())),
        section("Heads", _heads(advice)),
        section("Labels", _labels(advice)),
        section("Plan", f"<pre>{escape(str(advice.plan))}</pre>") if advice.plan else "",
    ]
    return page(f"Advice: {data}", parts)


def _strategies(advice: Advice) -> str:
    rows = [
        (
            f"<b>{escape(str(one))}</b>" if one is advice.best else escape(str(one)),
            one.accuracy_text,
            f"{one.moves:,}",
            "0" if one.cost == 0 else f"{one.cost:.1f}x",
            escape(one.why),
        )
        for one in advice.candidates
    ]
    headings = ("strategy", "accuracy, held out", "parameters that move", "costs", "why")
    return html_table(headings, rows, {1, 2, 3}) + "<p>Costs are in runs of full length.</p>"


def _heads(advice: Advice) -> str:
    evidence = advice.evidence
    named = [(head.name, head) for head in evidence.depths]
    named.append(("the pixels' power spectrum", evidence.reference))
    rows = [
        (
            escape(name),
            f"{100 * head.accuracy:.1f} ± {100 * head.standard_error:.1f} %",
            str(head.features),
            f"{head.degrees_of_freedom:.1f}",
            f"{head.alignment:.1f}",
        )
        for name, head in named
    ]
    rows += [
        (f"spectrum, {escape(name)} cycles per pixel", f"{100 * accuracy:.1f} %", "", "", "")
        for name, accuracy in evidence.bottleneck.octaves
    ]
    headings = ("head on", "accuracy, held out", "features", "used", "from shuffled labels, sd")
    return html_table(headings, rows, {1, 2, 3, 4})


def _labels(advice: Advice) -> str:
    curve = advice.evidence.curve
    if curve is None:
        return "<p>Too few images of a class for a learning curve.</p>"
    rows = [
        (str(size), f"{100 * error:.1f} %", f"{100 * deviation:.1f}" if deviation else "")
        for size, error, deviation in zip(curve.sizes, curve.errors, curve.deviations, strict=True)
    ]
    if curve.fits:
        for times in (2, 4):
            error, low, high = curve.error_at(times * curve.labels)
            text = f"{100 * error:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            rows.append((f"{times * curve.labels}, expected", text, ""))
    return html_table(("labels", "error of the best head", "sd of parts"), rows, {0, 1, 2})
