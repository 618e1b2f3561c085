"""HTML pages that need nothing beside themselves: style, tables, lists and pictures in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from flaxtransfer.paths import visible

__all__ = ["bullets", "escape", "html_table", "page", "picture", "section"]

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
