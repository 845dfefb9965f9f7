"""Published claims, held against records: held, not held, or undecided."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.records import Record
from experiments.statistics import by_seed, spread


@dataclass(frozen=True)
class Verdict:
    """What came out: `held`, `not held` or `undecided`, and the numbers."""

    claim: str
    source: str
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Difference:
    """`of` minus `against` is at least this much, at each of the fractions of weights `left`.

    Values are paired by seed. A claim is held when the 95 % interval of the mean (Student's t) lies at or
    above the bound less the tolerance, not held when it lies below, otherwise undecided; over several
    fractions the worst of them counts.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        metric: of the records.
        of: kind of run.
        against: kind of run; None: nothing, the claim is about the value of `of` itself.
        left: fractions of weights left at which `of` is read.
        at_least: the bound.
        against_left: where `against` is read, if not at the same fractions.
        tolerance: how far below the bound is as good as at the bound, 0 or more.
    """

    name: str
    source: str
    metric: str
    of: str
    against: str | None
    left: Sequence[float]
    at_least: float
    against_left: float | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.left or self.tolerance < 0:
            raise ValueError(
                f"left={self.left}, tolerance={self.tolerance}: a claim needs one fraction or more, and a "
                "tolerance of 0 or more."
            )

    def _compare(self, of: float, against: float) -> float:
        return of - against

    def _values(self, records: list[Record], left: float) -> list[float]:
        of = by_seed(records, self.metric, self.of, left)
        if self.against is None:
            return list(of.values())
        against = by_seed(records, self.metric, self.against, self.against_left or left)
        return [self._compare(of[seed], against[seed]) for seed in sorted(of.keys() & against.keys())]

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        records, bound = list(records), self.at_least - self.tolerance
        worst: tuple[float, str, str] | None = None
        for left in self.left:
            values = self._values(records, left)
            if not values:
                return Verdict(self.name, self.source, "undecided", f"no records at {left:.1%} left")
            found = spread(values)
            low, high = found.interval
            verdict = "held" if low >= bound else "not held" if high < bound else "undecided"
            numbers = f"{found.mean:.4g} [{low:.4g}, {high:.4g}], {found.n} seeds"
            numbers += f" from {found.lowest:.4g} to {found.highest:.4g}; claimed >= {self.at_least:g}"
            numbers += f" within {self.tolerance:g}" if self.tolerance else ""
            numbers += f" (at {left:.1%} left, the worst of {len(self.left)})" if len(self.left) > 1 else ""
            if worst is None or found.mean < worst[0]:
                worst = (found.mean, verdict, numbers)
        assert worst is not None
        return Verdict(self.name, self.source, worst[1], worst[2])


@dataclass(frozen=True)
class Ratio(Difference):
    """`of` divided by `against` is at least this much; otherwise as `Difference`."""

    def _compare(self, of: float, against: float) -> float:
        return of / against


@dataclass(frozen=True)
class Ladder:
    """The fraction of weights left in rounds 0, 1, 2, ... is the published one, in every run.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        left: the published fractions.
        within: allowed deviation.
    """

    name: str
    source: str
    left: Sequence[float]
    within: float = 0.0005

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        off = [
            abs(r["alive"] / r["total"] - self.left[r["round"]])
            for r in records
            if r["round"] < len(self.left)
        ]
        if not off:
            return Verdict(self.name, self.source, "undecided", "no records")
        verdict = "held" if max(off) <= self.within else "not held"
        return Verdict(
            self.name, self.source, verdict, f"largest deviation {max(off):.5f} over {len(off)} rounds"
        )
