"""Schedules: how far. A schedule maps the round (0, 1, 2, ...) to the sparsity to have in it, in [0, 1).

Any callable `int -> float` is a schedule; those here are frozen dataclasses, so that YAML can name them.
"""

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"{name}={value}: allowed are fractions between 0 and 1, both excluded, such as 0.2."
        )


@dataclass(frozen=True)
class Geometric:
    """Prune the same fraction of what is left in every round: 1 - (1 - rate)**round.

    >>> [round(Geometric(rate=0.2)(r), 4) for r in range(4)]
    [0.0, 0.2, 0.36, 0.488]

    Args:
        rate: fraction of the remaining weights that each pruning removes, in (0, 1).

    Reference: Frankle & Carbin (2019), arXiv:1803.03635, Section 2.
    """

    rate: float = 0.2

    def __post_init__(self) -> None:
        _check_fraction("rate", self.rate)

    def __call__(self, round: int) -> float:
        return 1 - (1 - self.rate) ** round


@dataclass(frozen=True)
class OneShot:
    """Dense in round 0, all of the pruning at once after it.

    >>> [OneShot(sparsity=0.9)(r) for r in range(3)]
    [0.0, 0.9, 0.9]

    Args:
        sparsity: fraction of the weights removed, in (0, 1).
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)

    def __call__(self, round: int) -> float:
        return self.sparsity if round else 0.0
