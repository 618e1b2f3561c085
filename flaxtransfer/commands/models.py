"""``flaxtransfer models``: the named architectures and their costs."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from flaxtransfer.commands.subcommands import Models
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES, costs
from flaxtransfer.paths import match, suggest


def models(options: Models, console: Console) -> None:
    """Runs ``flaxtransfer models``."""
    rows, unfit = [], []
    for name, config in _chosen(options.names).items():
        parameters = costs(config, 32).parameters
        try:
            macs: int | None = costs(config, options.size).multiply_adds
        except ValueError as error:
            macs = None
            unfit.append(str(error))
        rows.append((name, parameters, macs, config.features))
    if options.sort == "name":
        rows.sort(key=lambda row: _natural(row[0]))
    elif options.sort != "family":
        by = 1 if options.sort == "parameters" else 2
        rows.sort(key=lambda row: row[by] or 0)

    table = Table("name", "parameters (M)", "GMAC", "features")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, parameters, macs, features in rows:
        cost = "–" if macs is None else f"{macs / 1e9:,.3f}"
        table.add_row(name, f"{parameters / 1e6:,.2f}", cost, str(features))
    console.print(table)
    console.print(
        f"{len(rows)} of {len(ARCHITECTURES)} names, with heads of 1000 classes. GMAC: 10^9 "
        f"multiply-adds for one image of {options.size} px; FLOPs are twice that. features: inputs "
        "of the head.",
        highlight=False,
    )
    if unfit:
        console.print(f"–  {unfit[0]}", highlight=False)


def _chosen(names: str) -> dict[str, ResNetConfig]:
    pattern = names if set(names) & set("*?[{") else f"*{names}*"
    if found := {name: c for name, c in ARCHITECTURES.items() if match(pattern, name)}:
        return found
    raise ValueError(
        f"no architecture is called {names!r}{suggest(names.strip('*?'), ARCHITECTURES)}; "
        '"flaxtransfer models" lists them all'
    )


def _natural(name: str) -> list[tuple[str, int]]:
    """Numbers by their size: resnet18 before resnet101."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]
