"""The few figures of a benchmark that the table of `make bench` shows: said in one form, and read again."""

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_prune.deploy.timing import Ratio

_MARK = "headline"


@dataclass(frozen=True)
class Headline:
    """A row of the table."""

    what: str
    measured: str
    aim: str = ""
    verdict: str = ""


def headline(
    what: str, measured: Ratio | float, at_least: float = 0, at_most: float = 0, unit: str = "x"
) -> None:
    """Print a figure beside its aim, as `headlines` reads it.

    >>> headline("a step over one without masks", Ratio(1.05, 1.02, 1.07), at_most=1.03)
    headline | a step over one without masks | 1.05x | at most 1.03x | missed
    >>> headline("as fast as torch", Ratio(20, 9, 29), at_least=12)
    headline | as fast as torch | 9.00x to 29.00x (too noisy to say) | at least 12x | too noisy to say

    Args:
        what: what is measured, and against what.
        measured: a ratio with its range, or a number.
        at_least: the aim, if it is one of gain; 0 is none.
        at_most: the aim, if it is one of cost; 0 is none.
        unit: what the number is in.
    """
    result = measured if isinstance(measured, Ratio) else Ratio(measured, measured, measured)
    shown = str(result) if unit == "x" else f"{result.value:.3g}{unit}"
    aim = f"at least {at_least:g}{unit}" if at_least else f"at most {at_most:g}{unit}" if at_most else "-"
    row = Headline(what, shown, aim, _verdict(result, at_least, at_most) if at_least or at_most else "-")
    print(" | ".join((_MARK, row.what, row.measured, row.aim, row.verdict)), flush=True)


def headlines(lines: Iterable[str]) -> list[Headline]:
    """The figures among what a benchmark printed.

    >>> headlines(["a table", "headline | a step | 1.05x | at most 1.03x | missed"])
    [Headline(what='a step', measured='1.05x', aim='at most 1.03x', verdict='missed')]
    """
    cells = ([cell.strip() for cell in line.split("|")] for line in lines)
    return [Headline(*rest) for mark, *rest in cells if mark == _MARK]


def _verdict(measured: Ratio, at_least: float, at_most: float) -> str:
    """Whether the aim is met; a wide range that lies on one side of it tells that too."""
    values = (measured.low, measured.high) if measured.noisy else (measured.value,)
    met = {at_least <= value and (not at_most or value <= at_most) for value in values}
    return "too noisy to say" if len(met) == 2 else "met" if met == {True} else "missed"
