"""Reports at the terminal and as HTML pages that need nothing beside themselves: advice, shift."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from flaxtransfer.advice.advise import Advice
from flaxtransfer.advice.evidence import Evidence
from flaxtransfer.advice.understanding import AttributeProfile, Understanding
from flaxtransfer.analysis.profile import LearningCurve
from flaxtransfer.analysis.spectrum import Bottleneck
from flaxtransfer.overview import plain
from flaxtransfer.paths import visible
from flaxtransfer.report.figures import plot_advice, plot_frequency
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.report import ShiftReport
from flaxtransfer.shift.statistics import HypothesisTest

__all__ = [
    "HEADLINES",
    "bullets",
    "escape",
    "html_table",
    "page",
    "picture",
    "print_report",
    "render_advice",
    "render_html",
    "render_understanding",
    "section",
]


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.about { color: color-mix(in srgb, currentColor 65%, transparent); margin-top: 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
span.status { border-radius: .7rem; padding: .05rem .6rem; background: var(--soft); white-space: nowrap; }
span.supported { background: #d5780033; } span.rejected { background: #2a7fbf33; }
img { max-width: 100%; height: auto; background: white; border-radius: .3rem; }
small { color: color-mix(in srgb, currentColor 65%, transparent); display: block; }
"""  # noqa: E501 - one rule per line is more readable than wrapped ones


def page(title: str, parts: Iterable[str]) -> str:
    """The text of one HTML file, of parts that are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def escape(text: str) -> str:
    """Text from outside as HTML; control characters are shown, see ``visible``."""
    return html.escape(visible(text))


def section(title: str, body: str) -> str:
    """A part of a page under its heading."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def bullets(items: Iterable[str]) -> str:
    """Texts as a list; nothing for none."""
    lines = [f"<li>{escape(item)}</li>" for item in items]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def picture(caption: str, png: bytes) -> str:
    """A picture within the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """An HTML table of cells that are HTML; the columns in ``numbers`` are right-aligned."""
    head = "".join(
        f'<th class="number">{escape(heading)}</th>'
        if column in numbers
        else f"<th>{escape(heading)}</th>"
        for column, heading in enumerate(headings)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="number">{cell}</td>' if column in numbers else f"<td>{cell}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def render_advice(advice: Advice, *, data: str, weights: str) -> str:
    """The text of one HTML file: what to do, why, and every number behind it.

    Args:
        advice: from ``ft.advise``.
        data: what was looked at.
        weights: through which network.
    """
    evidence, drawn = advice.evidence, io.BytesIO()
    plot_advice(advice, drawn)
    about = _about(evidence, data, weights)
    parts = [
        f"<h1>{escape(advice.summary)}</h1>",
        f'<p class="about">{escape(about)}</p>',
        section("Strategies", _strategies(advice)),
        section("Why", bullets(advice.reasons)),
        section("What cannot be known from these images", bullets(advice.unknown)),
        section("What heads know at each depth", picture("Heads by depth", drawn.getvalue())),
        section("Heads", _heads(advice)),
        section("Labels", _labels(evidence.curve)),
        section("Plan", f"<pre>{escape(str(advice.plan))}</pre>") if advice.plan else "",
    ]
    return page(f"Advice: {data}", parts)


def render_understanding(found: Understanding, *, data: str, weights: str) -> str:
    """The text of one HTML file: what was found, and the tables and pictures it follows from.

    Args:
        found: from ``flaxtransfer.advice.understand``.
        data: what was looked at.
        weights: through which network.
    """
    evidence, drawn = found.evidence, io.BytesIO()
    plot_frequency(drawn, found.response)
    about = _about(evidence, data, weights)
    heads = [
        (
            escape(head.name),
            evidence.measure.text(head.skill, head.standard_error),
            str(head.features),
            f"{head.degrees_of_freedom:.1f}",
            f"{found.distance[head.name]:.2f}" if head.name in found.distance else "",
        )
        for head in evidence.depths
    ]
    suspected = [
        (escape(name), escape(label), escape(instead), f"{100 * margin:.0f} %")
        for name, label, instead, margin in found.suspected()
    ]
    columns = ("segment", "head, held out", "features", "used", "distance from training, sd")
    doubts = ("image", "label", "looks like", "more probable by")
    shares = [] if found.suspects is None else found.suspects.agreement.tolist()
    agreed = [
        (escape(name), "" if math.isnan(share) else f"{100 * share:.0f} %")
        for name, share in zip(found.class_names, shares, strict=False)
    ]
    parts = [
        f"<h1>{escape(data)}, as the network sees it</h1>",
        f'<p class="about">{escape(about)}</p>',
        section("What was found", bullets(found.findings())),
        section("By depth", html_table(columns, heads, {1, 2, 3, 4})),
        section("By frequency", picture("Response by frequency", drawn.getvalue())),
        _attributes(found.attributes),
        section("Pixels and depths", _pixels(evidence.bottleneck)),
        section("Labels", _labels(evidence.curve)),
        section("Suspected labels", html_table(doubts, suspected, {3})) if suspected else "",
        section(
            "Labels that a held-out head confirms", html_table(("class", "confirmed"), agreed, {1})
        )
        if agreed
        else "",
    ]
    return page(f"Understanding: {data}", parts)


def _attributes(found: AttributeProfile | None) -> str:
    """What each depth knows of generated images; nothing where it was not asked for."""
    if found is None:
        return ""
    rows = [
        (escape(name), *(f"{100 * value:.0f} %" for value in (*values, found.guess[name])))
        for name, values in found.accuracy.items()
    ]
    columns = ("", *found.segments, "guess")
    table = html_table(columns, rows, set(range(1, len(columns))))
    about = f"<p>Accuracy of solved heads on generated images of {found.size} px, held out.</p>"
    return section("What each depth knows", about + table + bullets(found.findings()))


def _about(evidence: Evidence, data: str, weights: str) -> str:
    """What was looked at, in a line."""
    count = f"{evidence.examples} of {evidence.available} images, {evidence.outputs_text}"
    return f"{data}: {count}, the rarest with {evidence.smallest}; {weights}"


def _strategies(advice: Advice) -> str:
    rows = [
        (
            f"<b>{escape(str(one))}</b>" if one is advice.best else escape(str(one)),
            one.skill_text(advice.evidence.measure),
            f"{one.moves:,}",
            "0" if one.cost == 0 else f"{one.cost:.1f}x",
            escape(one.why),
        )
        for one in advice.candidates
    ]
    measured = f"{advice.evidence.measure.name}, held out"
    headings = ("strategy", measured, "parameters that move", "costs", "why")
    return html_table(headings, rows, {1, 2, 3}) + "<p>Costs are in runs of full length.</p>"


def _heads(advice: Advice) -> str:
    evidence = advice.evidence
    named = [(head.name, head) for head in evidence.depths]
    named.append(("the pixels' power spectrum", evidence.reference))
    rows = [
        (
            escape(name),
            evidence.measure.text(head.skill, head.standard_error),
            str(head.features),
            f"{head.degrees_of_freedom:.1f}",
            f"{head.alignment:.1f}",
        )
        for name, head in named
    ]
    rows += [
        (f"spectrum, {escape(name)} cycles per pixel", evidence.measure.text(skill), "", "", "")
        for name, skill in evidence.bottleneck.octaves
    ]
    measured = f"{evidence.measure.name}, held out"
    headings = ("head on", measured, "features", "used", "from shuffled labels, sd")
    return html_table(headings, rows, {1, 2, 3, 4})


def _pixels(found: Bottleneck) -> str:
    text = found.measure.text
    rows = [("the pixels' power spectrum", text(found.reference), "")]
    rows += [
        (f"spectrum, {escape(name)} cycles per pixel", text(skill), "")
        for name, skill in found.octaves
    ]
    rows += [
        (
            escape(row.segment),
            text(row.skill),
            f"{100 * row.difference:+.1f} ± {100 * row.standard_error:.1f}",
        )
        for row in found.rows
    ]
    headings = ("head on", f"{found.measure.name}, held out", "spectrum - segment, points")
    return html_table(headings, rows, {1, 2}) + f"<p>{escape(found.summary())}</p>"


def _labels(curve: LearningCurve | None) -> str:
    if curve is None:
        return (
            "<p>No learning curve: it is of classes, with 6 images of each or more, and without "
            "groups, which its parts would tear.</p>"
        )
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


HEADLINES = {
    "none detected": "No shift was detected",
    "label": "The data support a label shift: the prevalence of the classes has changed",
    "covariate": "The data support a covariate shift: the images of the classes have changed",
    "label and covariate": "Prevalence and images seem to have changed both",
    "concept": "Target labels contradict the model: the same images seem to have other labels",
    "undetermined": "These data do not determine the kind of shift",
}
"""One sentence per conclusion; all of them are hypotheses."""


def print_report(report: ShiftReport, console: Console) -> None:
    """Print a shift report: conclusion, verdicts, tests, prevalence, accuracy, actions, limits."""
    held_out_count, count, labels = report.counts
    console.print(HEADLINES[report.conclusion], highlight=False, style="bold")
    console.print(
        f"{held_out_count} held-out examples of the source, {count} target images, {labels} of "
        f"them with labels; tests at level {report.level:g}\n",
        highlight=False,
    )
    console.print(_verdict_table(report))
    console.print(_test_table(report.tests))
    if report.prevalences:
        console.print(_prevalence_table(report.prevalences, report.class_names))
    console.print(plain(report.accuracy))
    console.print("\nWhat to do", style="bold")
    for number, action in enumerate(report.actions, 1):
        text = " ".join(filter(None, (action.what, action.expected)))
        console.print(plain(f"{number}. {text}"))
        console.print(plain(f"   Guard: {action.guard}"), style="dim")
    console.print("\nWhat cannot be known from these data", style="bold")
    for text in report.not_identifiable:
        console.print(plain(f"- {text}"))
    for note in report.notes:
        console.print(plain(f"note: {note}"), style="dim")


def render_html(
    report: ShiftReport, pictures: Mapping[str, bytes], *, source: str, target: str
) -> str:
    """A shift report with its figures, as the text of one HTML file.

    Args:
        report: From ``diagnose``.
        pictures: PNG by caption, in the order of display.
        source: Where the model comes from, such as the folder of its run.
        target: What was diagnosed.
    """
    held_out, unlabeled, labeled = report.counts
    about = f"{source} ({held_out} held-out examples) against {target} ({unlabeled} examples"
    about += f", {labeled} of them with labels)" if labeled else ", none with labels)"
    parts = [
        f"<h1>{escape(HEADLINES[report.conclusion])}</h1>",
        f'<p class="about">{escape(about)}; tests at level {report.level:g}</p>',
        section("Kind of shift", _verdicts(report)),
        section("What to do", _actions(report)),
        section("What cannot be known from these data", bullets(report.not_identifiable)),
        section("Tests", _tests(report.tests)),
        section("Prevalence, assuming label shift only", _prevalences(report)),
        section("Accuracy on the target, without labels", _accuracy(report)),
        section("Calibration at the source", _calibration(report)),
        *(section(caption, picture(caption, png)) for caption, png in pictures.items()),
        section("Notes", bullets(report.notes)) if report.notes else "",
    ]
    return page(f"Shift: {target}", parts)


def _verdict_table(report: ShiftReport) -> Table:
    table = Table("shift", "status", "evidence", title="Kind of shift", title_justify="left")
    for verdict in report.verdicts:
        table.add_row(verdict.kind, verdict.status, plain(verdict.evidence))
    return table


def _test_table(tests: Sequence[HypothesisTest]) -> Table:
    table = Table("test", title="Tests", title_justify="left")
    for heading in ("p", "adjusted", "effect", "detectable"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in")
    for test in tests:
        if test.p is None:
            reason = plain(f"not testable: {test.not_testable}")
            table.add_row(plain(test.name), "", "", "", "", reason)
            continue
        numbers = (test.p, test.adjusted_p, test.effect, test.minimum_detectable)
        table.add_row(plain(test.name), *map(_table_number, numbers), test.effect_name)
    return table


def _prevalence_table(found: Sequence[Prevalence], names: Sequence[str]) -> Table:
    table = Table("class", title="Prevalence, assuming label shift only", title_justify="left")
    table.add_column("source", justify="right")
    for each in found:
        table.add_column(each.method, justify="right")
    for k, name in enumerate(names):
        proportions = [f"{each.estimate[k]:.3f} {_ends(each, k)}" for each in found]
        table.add_row(plain(name), f"{found[0].source[k]:.3f}", *proportions)
    return table


def _ends(found: Prevalence, k: int) -> str:
    return "" if np.isnan(found.low[k]) else f"({found.low[k]:.3f} to {found.high[k]:.3f})"


def _table_number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3g}"


def _verdicts(report: ShiftReport) -> str:
    rows = [
        (
            f"{escape(verdict.kind)} shift",
            f'<span class="status {verdict.status.split()[0]}">{verdict.status}</span>',
            escape(verdict.evidence),
        )
        for verdict in report.verdicts
    ]
    return html_table(("kind", "status", "evidence"), rows, set())


def _actions(report: ShiftReport) -> str:
    rows = [
        (escape(action.what), escape(action.expected), escape(action.guard))
        for action in report.actions
    ]
    return html_table(("action", "expected", "guard"), rows, set())


def _tests(tests: Sequence[HypothesisTest]) -> str:
    rows = []
    for test in tests:
        details = test.not_testable or "; ".join((*test.notes, *test.assumptions))
        rows.append(
            (
                f"{escape(test.name)}<small>{escape(details)}</small>",
                escape(test.hypothesis),
                _number(test.p),
                _number(test.adjusted_p),
                f"{_number(test.effect)}<small>{escape(test.effect_name)}</small>",
                _number(test.minimum_detectable),
            )
        )
    headings = ("test", "null hypothesis", "p", "adjusted", "effect", "smallest detectable")
    return html_table(headings, rows, {2, 3, 4, 5})


def _prevalences(report: ShiftReport) -> str:
    if not report.prevalences:
        return "<p>Not estimated.</p>"
    headings = ("class", "source", *(found.method for found in report.prevalences))
    rows = [
        (
            escape(name),
            f"{report.prevalences[0].source[k]:.3f}",
            *(_proportion(found, k) for found in report.prevalences),
        )
        for k, name in enumerate(report.class_names)
    ]
    details = [
        f"{found.method}: {text}"
        for found in report.prevalences
        for text in (found.reason, *found.notes)
        if text
    ]
    return html_table(headings, rows, set(range(1, len(headings)))) + bullets(details)


def _proportion(found: Prevalence, k: int) -> str:
    if np.isnan(found.low[k]):
        return f"{found.estimate[k]:.3f}"
    return f"{found.estimate[k]:.3f} <small>{found.low[k]:.3f} to {found.high[k]:.3f}</small>"


def _accuracy(report: ShiftReport) -> str:
    found = report.accuracy
    at_source = (
        "held-out examples of the source",
        f"{found.source_accuracy:.3f}",
        _interval(found.source_low, found.source_high),
        "",
    )
    rows = [
        (
            f"{escape(each.name)}<small>{escape(each.not_available)}</small>",
            _number(each.value),
            _interval(each.low, each.high),
            escape(each.assumes),
        )
        for each in found.estimates
    ]
    table = html_table(
        ("estimate", "accuracy", f"{found.level:.0%} interval", "assumes"),
        [at_source, *rows],
        {1, 2},
    )
    return table + bullets(found.notes)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _calibration(report: ShiftReport) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in str(report.calibration).splitlines())


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3g}"
