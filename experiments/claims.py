"""Published claims, held against records: held, not held, or undecided."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

from experiments.records import Record


@dataclass(frozen=True)
class Point:
    """Where a value is read: the kind of run, and the round with this fraction of the weights left."""

    kind: str
    left: float


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
    above the bound, not held when it lies below, otherwise undecided; over several fractions the worst of
    them counts.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        metric: of the records.
        of: kind of run.
        against: kind of run.
        left: fractions of weights left at which `of` is read.
        at_least: the bound.
        against_left: where `against` is read, if not at the same fractions.
    """

    name: str
    source: str
    metric: str
    of: str
    against: str
    left: Sequence[float]
    at_least: float
    against_left: float | None = None

    def _compare(self, of: float, against: float) -> float:
        return of - against

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        records = list(records)
        worst: tuple[float, str, str] | None = None
        for left in self.left:
            of = _by_seed(records, self.metric, Point(self.of, left))
            against = _by_seed(records, self.metric, Point(self.against, self.against_left or left))
            values = [self._compare(of[seed], against[seed]) for seed in sorted(of.keys() & against.keys())]
            if not values:
                return Verdict(self.name, self.source, "undecided", "no records")
            low, mean, high = interval(values)
            verdict = "held" if low >= self.at_least else "not held" if high < self.at_least else "undecided"
            numbers = f"{mean:.4g} [{low:.4g}, {high:.4g}], {len(values)} seeds; claimed >= {self.at_least:g}"
            numbers += f" (at {left:.1%} left, the worst of {len(self.left)})" if len(self.left) > 1 else ""
            if worst is None or mean - self.at_least < worst[0]:
                worst = (mean - self.at_least, verdict, numbers)
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


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Lower end, mean and upper end of the confidence interval of a mean, by Student's t.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [-0.484, 2.0, 4.484]
    >>> interval([1.0])
    (-inf, 1.0, inf)
    """
    mean = fmean(values)
    if len(values) < 2:
        return -float("inf"), mean, float("inf")
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean - half, mean, mean + half


def _by_seed(records: Iterable[Record], metric: str, point: Point) -> dict[int, float]:
    """The metric of each seed's run of this kind, in the round nearest to this fraction of weights left."""
    found: dict[int, tuple[float, float]] = {}
    for r in records:
        if r["kind"] != point.kind or metric not in r["metrics"]:
            continue
        off = abs(r["alive"] / r["total"] - point.left)
        if off <= 0.2 * point.left and off < found.get(r["seed"], (float("inf"), 0.0))[0]:
            found[r["seed"]] = (off, float(r["metrics"][metric]))
    return {seed: value for seed, (_, value) in found.items()}
