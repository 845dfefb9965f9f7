"""Tables of dataclass rows: as plain text, and as HTML for notebooks."""

import html
import itertools
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

_WIDTH = 160  # of text that goes to no terminal: a file, a notebook
_GAP = "  "
_NARROWEST = 8  # width that a column keeps in any case


def table(title: str, rows: Sequence[Any], without: Sequence[str] = ()) -> str:
    """One line for each row, one column for each field of the rows' dataclass.

    The text is as wide as it has to be, and no wider than the terminal (`COLUMNS` says how wide that is where
    it is set): long cells go on in the next line.

    Args:
        title: the line above.
        rows: instances of one dataclass.
        without: fields that have no column.
    """
    names, cells = _grid(rows, without)
    numeric = [_are_numbers(rows, name) for name in _fields(rows, without)]
    widths = _fit([max(map(len, column)) for column in zip(names, *cells, strict=True)])
    rule = ["-" * width for width in widths]
    lines = [line for row in (names, rule, *cells) for line in _wrap(row, widths)]
    aligned = (
        _GAP.join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
    return "\n".join((*_lines(title, _columns()), *aligned)) + "\n"


def html_table(title: str, rows: Sequence[Any]) -> str:
    """The same for notebooks, which show what `_repr_html_` gives."""
    names, cells = _grid(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
    return (
        f"<table><caption>{html.escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _fields(rows: Sequence[Any], without: Sequence[str] = ()) -> list[str]:
    return [field.name for row in rows[:1] for field in fields(row) if field.name not in without]


def _grid(rows: Sequence[Any], without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    names = _fields(rows, without)
    return [name.replace("_", " ") for name in names], [
        [_cell(getattr(row, name)) for name in names] for row in rows
    ]


def _are_numbers(rows: Sequence[Any], name: str) -> bool:
    values = [getattr(row, name) for row in rows]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _columns() -> int:
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def _fit(widths: list[int]) -> list[int]:
    """Take from the widest columns until the table fits."""
    widths = list(widths)
    most = max(_columns() - len(_GAP) * (len(widths) - 1), _NARROWEST * len(widths))
    while sum(widths) > most:
        widths[widths.index(max(widths))] -= 1
    return widths


def _wrap(row: list[str], widths: list[int]) -> list[list[str]]:
    """The lines of a row."""
    parts = [_lines(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [list(line) for line in itertools.zip_longest(*parts, fillvalue="")]


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
