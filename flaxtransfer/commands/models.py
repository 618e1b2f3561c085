"""``flaxtransfer models``: the architectures that have a name here, and what they cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.costs import costs
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import match, suggest


@dataclass(frozen=True)
class Models:
    """Print the architectures by name, with their parameters and multiply-adds.

    Examples: flaxtransfer models resnet50, flaxtransfer models "se*50*" --sort macs

    Args:
      names: a part of the name, or a pattern of the whole, such as "se*50*"; by default all.
      size: height and width of the images in px.
      sort: "family", the order of the catalog, or by name, parameters or macs.
    """

    names: tyro.conf.Positional[str] = "*"
    size: int = 224
    sort: Literal["family", "name", "parameters", "macs"] = "family"


def models(options: Models, console: Console) -> None:
    """Runs ``flaxtransfer models``."""
    if options.size < 1:
        raise ValueError(f"--size is a positive number of px, not {options.size}")
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
        f"multiplications, each with its addition, for one image of {options.size} px; FLOPs are "
        "twice that. features: what the head sees.",
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
