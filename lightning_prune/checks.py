"""Arguments that are numbers: an error says what was given, what is allowed, and an example."""

from collections.abc import Callable
from numbers import Real


def whole(name: str, value: object, lowest: int, such_as: int | None = None) -> None:
    """Make sure that a value is a whole number, not below the lowest.

    >>> whole("rounds", 2.5, 0)
    Traceback (most recent call last):
    ValueError: rounds=2.5: allowed are whole numbers from 0 on, such as 1.

    Raises:
        ValueError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        example = lowest + 1 if such_as is None else such_as
        raise ValueError(f"{name}={value!r}: allowed are whole numbers from {lowest} on, such as {example}.")


def number(name: str, value: object, allowed: str, within: Callable[[float], bool]) -> None:
    """Make sure that a value is a number within bounds.

    >>> number("rate", "some", "are fractions, such as 0.2", lambda rate: 0 < rate < 1)
    Traceback (most recent call last):
    ValueError: rate='some': allowed are fractions, such as 0.2.

    Args:
        name: of the argument.
        value: given.
        allowed: which numbers are, with an example.
        within: whether a number is one of them.

    Raises:
        ValueError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not within(float(value)):
        raise ValueError(f"{name}={value!r}: allowed {allowed}.")
