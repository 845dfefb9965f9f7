"""Statistics over seeds: means with their spread, paired differences, and the overlap of masks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isfinite, nan
from statistics import fmean, stdev

from scipy.stats import t

from lightning_prune.masks import Masks, jaccard
from lightning_prune.study.records import Record


@dataclass(frozen=True)
class Spread:
    """Values over seeds: how many, their mean, lowest and highest, and the mean's confidence interval."""

    n: int
    mean: float
    lowest: float
    highest: float
    interval: tuple[float, float]


def spread(values: Sequence[float], level: float = 0.95) -> Spread:
    """Summarize one value a seed.

    >>> spread([1.0, 2.0, 3.0]).lowest
    1.0

    Raises:
        ValueError: when there is no value.
    """
    if not values:
        raise ValueError("values: there are none; at least one is needed. Give one a seed.")
    low, mean, high = interval(values, level)
    return Spread(len(values), mean, min(values), max(values), (low, high))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Lower end, mean and upper end of the confidence interval of a mean, by Student's t.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [-0.484, 2.0, 4.484]
    >>> interval([1.0])
    (-inf, 1.0, inf)

    One value, or equal ones, do not say how far their mean may be off: the interval is then infinite.
    """
    mean = fmean(values)
    if len(values) < 2 or (deviation := stdev(values)) <= 1e-12 * max(map(abs, values)):  # but for rounding
        return -inf, mean, inf
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean - half, mean, mean + half


def by_seed(records: Iterable[Record], metric: str, kind: str, left: float) -> dict[int, float]:
    """A metric of each seed's run of a kind, in the round that `nearest` finds, where it is finite."""
    found = {seed: r["metrics"].get(metric, nan) for seed, r in nearest(records, kind, left).items()}
    return {seed: float(value) for seed, value in found.items() if isfinite(value)}


def nearest(records: Iterable[Record], kind: str, left: float) -> dict[int, Record]:
    """Of each seed's run of a kind the record of the round whose weights left are nearest to a fraction.

    Fractions that are off by more than a fifth do not count.
    """
    found: dict[int, tuple[float, Record]] = {}
    for r in (r for r in records if r["kind"] == kind):
        off = abs(r["alive"] / r["total"] - left)
        if off <= 0.2 * left and (r["seed"] not in found or off < found[r["seed"]][0]):
            found[r["seed"]] = off, r
    return {seed: r for seed, (_, r) in found.items()}


def paired(of: Mapping[int, float], against: Mapping[int, float]) -> list[float]:
    """Differences `of` - `against` of the seeds that both have, in order of the seeds.

    >>> paired({2: 5.0, 1: 3.0, 9: 0.0}, {1: 1.0, 2: 1.0})
    [2.0, 4.0]
    """
    return [of[seed] - against[seed] for seed in sorted(of.keys() & against.keys())]


def paired_by_round(
    records: Iterable[Record], metric: str, of: str, against: str
) -> dict[int, tuple[float, Spread]]:
    """Paired differences of two kinds in each round that both have: round -> (weights left, their spread).

    Pairs of which one value is not a finite number do not count.
    """
    table: dict[int, dict[str, dict[int, float]]] = {}
    left: dict[int, float] = {}
    for r in records:
        if r["kind"] in (of, against) and isfinite(r["metrics"].get(metric, nan)):
            table.setdefault(r["round"], {}).setdefault(r["kind"], {})[r["seed"]] = float(
                r["metrics"][metric]
            )
            if r["kind"] == of:
                left[r["round"]] = r["alive"] / r["total"]
    pairs = {
        round: paired(kinds[of], kinds[against])
        for round, kinds in sorted(table.items())
        if {of, against} <= kinds.keys()
    }
    return {round: (left[round], spread(values)) for round, values in pairs.items() if values}


def overlap_of_rounds(masks: Mapping[int, Masks], rounds: Sequence[int]) -> list[list[float]]:
    """Jaccard overlap of the masks of one run in each two of these rounds, as a matrix."""
    these = [masks[round] for round in rounds]
    return [[jaccard(a, b) for b in these] for a in these]


def overlap_of_seeds(
    masks: Sequence[Mapping[int, Masks]], rounds: Sequence[int]
) -> dict[int, tuple[Spread, float]]:
    """Jaccard overlap of the masks of different seeds in each round, and what chance would give.

    Chance: the expected alive in both over the expected alive in either, layer by layer, for masks of the
    same densities drawn at random.

    Args:
        masks: of each seed's run by round, two runs or more.
        rounds: which; every run has them.

    Returns:
        {round: (spread over all pairs of seeds, by chance)}
    """
    table: dict[int, tuple[Spread, float]] = {}
    for round in rounds:
        pairs = list(combinations([of_run[round] for of_run in masks], 2))
        chance = [_by_chance(a, b) for a, b in pairs]
        table[round] = spread([jaccard(a, b) for a, b in pairs]), fmean(chance)
    return table


def _by_chance(a: Masks, b: Masks) -> float:
    both = either = 0.0
    for name, mask in a.items():
        n = mask.numel()
        first, second = int(mask.count_nonzero()), int(b[name].count_nonzero())
        both += first * second / n if n else 0.0
        either += first + second - (first * second / n if n else 0.0)
    return both / either if either else 1.0
