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
    """`of` minus `against` is at least, or at most, this much, at each of the fractions of weights `left`.

    Values are paired by seed. A claim is held when the 95 % interval of the mean (Student's t) lies on the
    right side of the bound, up to the tolerance, not held when it lies on the other, otherwise undecided;
    over several fractions it is held when it is at all of them, not held when it is not at one, and the
    numbers are those of the worst.

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
        records = list(records)
        sign, bound = (1, self.at_least) if self.at_least is not None else (-1, self.at_most)
        assert bound is not None
        claimed = f"claimed {'>=' if sign > 0 else '<='} {bound:g}"
        claimed += f" within {self.tolerance:g}" if self.tolerance else ""
        verdicts = ("not held", "undecided", "held")
        found_at: list[tuple[int, float, str]] = []
        for left in self.left:
            values = self._values(records, left)
            if not values:
                return Verdict(self.name, self.source, "undecided", f"no records at {left:.1%} left")
            found = spread(values)
            low, high = found.interval
            least, most = sorted(sign * (end - bound) + self.tolerance for end in (low, high))
            verdict = 2 if least >= 0 else 0 if most < 0 else 1
            numbers = f"{found.mean:.4g} [{low:.4g}, {high:.4g}], {found.n} seeds"
            numbers += f" from {found.lowest:.4g} to {found.highest:.4g}; {claimed}"
            numbers += f" (at {left:.1%} left, the worst of {len(self.left)})" if len(self.left) > 1 else ""
            found_at.append((verdict, sign * (found.mean - bound), numbers))
        verdict, _, numbers = min(found_at)
        return Verdict(self.name, self.source, verdicts[verdict], numbers)


@dataclass(frozen=True)
class Ratio(Difference):
    """`of` divided by `against`; otherwise as `Difference`."""

    def _compare(self, of: float, against: float) -> float:
        return of / against


@dataclass(frozen=True)
class Ladder:
    """The fraction of weights left in rounds 0, 1, 2, ... is the published one, in every run of a kind.

    Args:
        name: the claim in words.
        source: paper, and figure or table.
        left: the published fractions.
        within: allowed deviation.
        of: kind of run. None: every kind.
    """

    name: str
    source: str
    left: Sequence[float]
    within: float = 0.0005
    of: str | None = None

    def check(self, records: Iterable[Record]) -> Verdict:
        """Hold the claim against records."""
        off = [
            abs(r["alive"] / r["total"] - self.left[r["round"]])
            for r in records
            if r["round"] < len(self.left) and self.of in (None, r["kind"])
        ]
        if not off:
            return Verdict(self.name, self.source, "undecided", "no records")
        verdict = "held" if max(off) <= self.within else "not held"
        return Verdict(
            self.name, self.source, verdict, f"largest deviation {max(off):.5f} over {len(off)} rounds"
        )
