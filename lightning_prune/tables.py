"""Tables as text: dataclass rows, drawn by rich where it is installed."""

import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

_WIDTH = 160


def table(title: str, rows: Sequence[Any]) -> str:
    """One line for each row, one column for each field of the rows' dataclass.

    Args:
        title: the line above.
        rows: instances of one dataclass.
    """
    names = [field.name.replace("_", " ") for row in rows[:1] for field in fields(row)]
    cells = [[_cell(getattr(row, field.name)) for field in fields(row)] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines = ("  ".join(map(str.rjust, line, widths)) for line in (names, *cells))
        return "\n".join((title, *lines)) + "\n"
    drawn = Table(*(Column(name, justify="right") for name in names), title=title, title_justify="left")
    for line in cells:
        drawn.add_row(*line)
    Console(width=_WIDTH, markup=False, file=(text := io.StringIO())).print(drawn)
    return text.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
