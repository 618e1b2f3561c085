"""HTML pages that need nothing beside themselves, and the page of an advice."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from flaxtransfer.advice.advise import Advice
from flaxtransfer.paths import visible
from flaxtransfer.report.figures import plot_advice

__all__ = [
    "bullets",
    "escape",
    "html_table",
    "page",
    "picture",
    "render_advice",
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
