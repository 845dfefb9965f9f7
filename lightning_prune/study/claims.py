"""Published claims, held against records: held, not held, or undecided."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

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


FAMILIES = (
    "A claim at several densities is held where it is held at each of them, and not held where it is not at "
    "one; a claim at one of several the other way round. What one of n would be enough for is judged at "
    "1 - 0.05 / n (Bonferroni), so that n tries do not make it likelier. The claims are judged one by one, "
    "without a correction for their number."
)


def covered(seeds: Iterable[tuple[Any, Any]]) -> str:
    """What the interval of a mean over runs says of these, and what it does not.

    >>> covered([(1, 1), (1, 2)])[63:140]
    'The runs share their initialization and differ in the order of the data alone'

    Args:
        seeds: of each run that of its initialization and that of its data order.
    """
    pairs = list(seeds)
    initializations, orders = {a for a, _ in pairs}, {b for _, b in pairs}
    if all(a == b for a, b in pairs):
        varies = "A seed sets the initialization and the order of the data together"
    elif len(initializations) == 1:
        varies = "The runs share their initialization and differ in the order of the data alone"
    elif len(orders) == 1:
        varies = "The runs share the order of the data and differ in their initialization alone"
    else:
        varies = (
            "The runs cross initializations with orders of the data and are counted as if they were "
            "independent, so that the intervals are too narrow"
        )
    return (
        f"Intervals are those of a mean over n runs (95 %, Student's t). {varies}; all share the data and "
        "their split, so an interval says nothing of other data."
    )


VERDICTS = ("not held", "undecided", "held")
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
        at_one: the claim is that there is such a fraction among those `left`, not that all are such.
        floor: kind of run from whose value, at the same fractions, both are counted: their ratio is then the
            share of the way from there to `against`. None: they are counted from 0.
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
    at_one: bool = False
    floor: str | None = None

    def __post_init__(self) -> None:
        if not self.left or self.tolerance < 0:
            raise ValueError(
                f"left={self.left}, tolerance={self.tolerance}: a claim needs one fraction or more, and a "
                "tolerance of 0 or more. Give it both, such as left=[0.2] and tolerance=0."
            )
        if self.floor is not None and self.against is None:
            raise ValueError(
                f"floor={self.floor}, against=None: two values are counted from a floor, and there is one. "
                "Allowed is a floor beside another kind. Give against=, too, or no floor."
            )
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(
                f"at_least={self.at_least}, at_most={self.at_most}: a claim needs one of them, and not both. "
                "Leave the other out."
            )

    @abstractmethod
    def _compare(self, of: float, against: float) -> float:
        """One number for two."""

    @abstractmethod
    def _equal(self) -> float:
        """What `_compare` gives for equal values: a bound there is no margin."""

    def _values(self, records: list[Record], left: float) -> tuple[list[float], int]:
        """A value for each seed, NaN where it is unknown; and of how many seeds a minimum is censored."""
        kinds = [nearest(records, self.of, left)]
        if self.against is not None:
            kinds.append(nearest(records, self.against, self.against_left or left))
        if self.floor is not None:
            kinds.append(nearest(records, self.floor, left))
        seeds = sorted(set.intersection(*map(set, kinds)))
        read = [[float(kind[seed]["metrics"].get(self.metric, nan)) for kind in kinds] for seed in seeds]
        if self.floor is not None:
            read = [[value - floor for value in values] for *values, floor in read]
        values = [self._compare(*each) if self.against is not None else each[0] for each in read]
        late = sum(any(kind[seed]["metrics"].get("censored") for kind in kinds) for seed in seeds)
        return values, late

    def _kinds(self) -> Sequence[str]:
        """The kinds of run that the claim reads."""
        return [kind for kind in (self.of, self.against, self.floor) if kind is not None]

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        records = list(records)
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None
        source = cited(self.source, self.margin_from, bound != self._equal() or self.tolerance > 0)
        ran = {r["kind"] for r in records}
        absent = [kind for kind in self._kinds() if kind not in ran]
        if absent:
            return Verdict(self.name, source, "undecided", f"not run: {', '.join(absent)}")
        found = [(*self._judged(*self._values(records, left), bound), left) for left in self.left]
        verdict, _, numbers, left = max(found) if self.at_one else min(found)
        if len(found) > 1:
            which = "best" if self.at_one else "worst"
            n = {word: sum(v == i for v, *_ in found) for i, word in enumerate(VERDICTS)}
            counted = ", ".join(f"{word} at {n[word]}" for word in reversed(VERDICTS) if n[word])
            numbers += f" (at {left:.1%} left, the {which} of {len(found)}: {counted})"
        elif numbers.startswith("no "):
            numbers += f" at {left:.1%} left"
        return Verdict(self.name, source, VERDICTS[verdict], numbers)

    def _judged(self, values: list[float], late: int, bound: float) -> tuple[int, float, str]:
        """Which of the verdicts; how far the mean is on the right side; and the numbers."""
        known = [v for v in values if isfinite(v)]
        if not known:
            return 1, 0.0, f"no finite {self.metric}" if values else "no records"
        sign = 1 if self.at_most is None else -1
        alone, family = 0.95, 1 - 0.05 / len(self.left)
        to_hold, to_fail = (family, alone) if self.at_one else (alone, family)
        found = spread(known)
        low, high = found.interval

        def sides(level: float) -> list[float]:
            return sorted(sign * (end - bound) + self.tolerance for end in spread(known, level).interval)

        verdict = 2 if sides(to_hold)[0] >= 0 else 0 if sides(to_fail)[1] < 0 else 1
        between = f"[{self._number(low)}, {self._number(high)}]" if isfinite(low) else "without an interval"
        of = "1 run" if found.n == 1 else f"{found.n} runs"
        of += f" from {self._number(found.lowest)} to {self._number(found.highest)}" if isfinite(low) else ""
        of += ", all equal" if found.n > 1 and not isfinite(low) else ""
        claimed = f"claimed {'>=' if sign > 0 else '<='} {self._number(bound)}"
        claimed += f" within {self._number(self.tolerance)}" if self.tolerance else ""
        numbers = f"{self._number(found.mean)}{self._unit()} {between}, {of}; {claimed}"
        if len(known) < len(values):
            verdict, numbers = 1, f"{numbers}; {len(values) - len(known)} more without a finite value"
        if late and self.metric == STEP:
            verdict = 1
        if late and (self.metric == STEP or self.metric.endswith("_at_early_stop")):
            numbers += f"; the minimum of {late} is at the last evaluation (censored)"
        return verdict, sign * (found.mean - bound), numbers

    def _number(self, value: float) -> str:
        """A number in the unit of the claim."""
        if self._unit() == " steps":
            return f"{value:,.0f}"
        return f"{value * (100 if self._unit() in (' points', ' %') else 1):.4g}"

    def _unit(self) -> str:
        """What the numbers of the claim count."""
        if "_acc" in self.metric:
            return " %" if self.against is None else " points"
        return " steps" if self.metric.endswith("_step") else ""


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

    @override
    def _unit(self) -> str:
        return super()._unit() if self.against is None else " times"


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
            numbers = "not run" if self.of is None else f"not run: {self.of}"
            return Verdict(self.name, source, "undecided", numbers)
        verdict = "held" if max(off) <= self.within else "not held"
        numbers = (
            f"largest deviation {max(off):.3%} over {len(off)} rounds (all of them count); claimed <= "
            f"{self.within:.3%}"
        )
        return Verdict(self.name, source, verdict, numbers)
