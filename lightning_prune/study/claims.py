"""Published claims, held against records: held, not held, or undecided."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from typing_extensions import override

from lightning_prune.study.records import Record
from lightning_prune.study.statistics import nearest, spread


@dataclass(frozen=True)
class Verdict:
    """What came out: `held`, `not held` or `undecided`, and the numbers."""

    claim: str
    source: str
    verdict: str
    numbers: str


# What the interval of a mean over seeds says, and what it does not.
COVERED = (
    "Intervals are those of a mean over n seeds (95 %, Student's t). A seed sets the initialization and the "
    "order of the data together; all seeds share the data and their split, so an interval says nothing of "
    "other data."
)
STEP = "early_stop_step"  # the one metric that a censored minimum leaves unknown


def cited(source: str, margin_from: str | None, has_margin: bool) -> str:
    """The source of a claim, and whose its margin is.

    >>> cited("Someone 2020, Figure 1", None, True)
    'Someone 2020, Figure 1; the margin is our own'
    """
    if not has_margin:
        return source
    return f"{source}; the margin is {'our own' if margin_from is None else f'from {margin_from}'}"


@dataclass(frozen=True)
class Comparison(ABC):
    """`of` compared with `against` is at least, or at most, this, at each of the fractions of weights `left`.

    Values are paired by seed. A claim is held when the 95 % interval of the mean (Student's t) lies on the
    right side of the bound, up to the tolerance, not held when it lies on the other, otherwise undecided;
    over several fractions it is held when it is at all of them, not held when it is not at one, and the
    numbers are those of the worst.

    It is undecided, too, where a value of some seed is not a finite number; where the step of a minimum is
    the last one that was evaluated (censored), so that nobody knows when the minimum comes; and where there
    is one value, or all are equal, so that there is no interval.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        metric: of the records.
        of: kind of run.
        left: fractions of weights left at which `of` is read.
        at_least: the bound, if it is a lower one.
        against: kind of run; None: nothing, the claim is about the value of `of` itself.
        against_left: where `against` is read, if not at the same fractions.
        at_most: the bound, if it is an upper one.
        tolerance: how far beyond the bound is as good as at the bound, 0 or more.
        margin_from: where bound and tolerance are published. None: they are our own, and the verdict says so.
    """

    name: str
    source: str
    metric: str
    of: str
    left: Sequence[float]
    at_least: float | None = None
    against: str | None = None
    against_left: float | None = None
    at_most: float | None = None
    tolerance: float = 0.0
    margin_from: str | None = None

    def __post_init__(self) -> None:
        if not self.left or self.tolerance < 0:
            raise ValueError(
                f"left={self.left}, tolerance={self.tolerance}: a claim needs one fraction or more, and a "
                "tolerance of 0 or more."
            )
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(
                f"at_least={self.at_least}, at_most={self.at_most}: a claim needs one of them, and not both."
            )

    @abstractmethod
    def _compare(self, of: float, against: float) -> float:
        """One number for two."""

    @abstractmethod
    def _equal(self) -> float:
        """What `_compare` gives for equal values: a bound there is no margin."""

    def _values(self, records: list[Record], left: float) -> tuple[list[float], int]:
        """A value for each seed, NaN where it is unknown; and of how many seeds a minimum is censored."""
        of = nearest(records, self.of, left)
        against = of if self.against is None else nearest(records, self.against, self.against_left or left)
        seeds = sorted(of.keys() & against.keys())
        read = [
            [float(r["metrics"].get(self.metric, nan)) for r in (of[seed], against[seed])] for seed in seeds
        ]
        values = [a if self.against is None else self._compare(a, b) for a, b in read]
        late = sum(any(r["metrics"].get("censored") for r in (of[seed], against[seed])) for seed in seeds)
        return values, late

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        records = list(records)
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None
        source = cited(self.source, self.margin_from, bound != self._equal() or self.tolerance > 0)
        verdicts = ("not held", "undecided", "held")
        found_at: list[tuple[int, float, str]] = []
        for left in self.left:
            values, late = self._values(records, left)
            known = [v for v in values if isfinite(v)]
            if not known:
                why = f"no finite {self.metric}" if values else "no records"
                return Verdict(self.name, source, "undecided", f"{why} at {left:.1%} left")
            verdict, off, numbers = self._judged(known, bound)
            if len(known) < len(values):
                verdict, numbers = 1, f"{numbers}; {len(values) - len(known)} more without a finite value"
            if late and self.metric == STEP:
                verdict = 1
            if late and (self.metric == STEP or self.metric.endswith("_at_early_stop")):
                numbers += f"; the minimum of {late} is at the last evaluation (censored)"
            numbers += f" (at {left:.1%} left, the worst of {len(self.left)})" if len(self.left) > 1 else ""
            found_at.append((verdict, off, numbers))
        verdict, _, numbers = min(found_at)
        return Verdict(self.name, source, verdicts[verdict], numbers)

    def _judged(self, values: list[float], bound: float) -> tuple[int, float, str]:
        """0 for not held, 1 undecided, 2 held; how far the mean is on the right side; and the numbers."""
        sign = 1 if self.at_most is None else -1
        found = spread(values)
        low, high = found.interval
        least, most = sorted(sign * (end - bound) + self.tolerance for end in (low, high))
        verdict = 2 if least >= 0 else 0 if most < 0 else 1
        between = f"[{low:.4g}, {high:.4g}]" if isfinite(low) else "without an interval"
        of = "1 seed" if found.n == 1 else f"{found.n} seeds"
        of += f" from {found.lowest:.4g} to {found.highest:.4g}" if isfinite(low) else ""
        of += ", all equal" if found.n > 1 and not isfinite(low) else ""
        claimed = f"claimed {'>=' if sign > 0 else '<='} {bound:g}"
        claimed += f" within {self.tolerance:g}" if self.tolerance else ""
        return verdict, sign * (found.mean - bound), f"{found.mean:.4g} {between}, {of}; {claimed}"


@dataclass(frozen=True)
class Difference(Comparison):
    """`of` minus `against`; otherwise as `Comparison`."""

    @override
    def _compare(self, of: float, against: float) -> float:
        return of - against

    @override
    def _equal(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Ratio(Comparison):
    """`of` divided by `against`; otherwise as `Comparison`."""

    @override
    def _compare(self, of: float, against: float) -> float:
        return of / against if against else nan

    @override
    def _equal(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Ladder:
    """The fraction of weights left in rounds 0, 1, 2, ... is the published one, in every run of a kind.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        left: the published fractions.
        within: allowed deviation.
        of: kind of run. None: every kind.
        margin_from: where that deviation is published. None: it is our own, and the verdict says so.
    """

    name: str
    source: str
    left: Sequence[float]
    within: float = 0.0005
    of: str | None = None
    margin_from: str | None = None

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        off = [
            abs(r["alive"] / r["total"] - self.left[r["round"]])
            for r in records
            if r["round"] < len(self.left) and self.of in (None, r["kind"])
        ]
        source = cited(self.source, self.margin_from, True)
        if not off:
            return Verdict(self.name, source, "undecided", "no records")
        verdict = "held" if max(off) <= self.within else "not held"
        numbers = f"largest deviation {max(off):.5f} over {len(off)} rounds; claimed <= {self.within:g}"
        return Verdict(self.name, source, verdict, numbers)
