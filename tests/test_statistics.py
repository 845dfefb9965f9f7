"""Statistics over seeds, and the overlap of masks, against slow and obvious ways to compute them."""

import math
import random
import statistics

import pytest
import torch

from lightning_prune.masks import jaccard
from lightning_prune.study.report import differences, table
from lightning_prune.study.statistics import (
    by_seed,
    interval,
    overlap_of_rounds,
    overlap_of_seeds,
    paired,
    paired_by_round,
    spread,
)


def record(kind, seed, round, left, **metrics):
    given = {"kind": kind, "seed": seed, "round": round, "metrics": metrics}
    return {**given, "alive": int(1000 * left), "total": 1000}


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    generator = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, _, high = interval([generator.gauss(3.0, 2.0) for _ in range(5)], level=0.9)
        hits += low <= 3.0 <= high
    assert 0.88 < hits / 2000 < 0.92


def test_a_spread_is_what_the_standard_library_says():
    values = [0.91, 0.97, 0.93, 0.95]
    found = spread(values)
    assert (found.n, found.lowest, found.highest) == (4, 0.91, 0.97)
    assert found.mean == statistics.fmean(values)
    half = 3.182446 * statistics.stdev(values) / 2  # t of 3 degrees of freedom at 97.5 %
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))
    with pytest.raises(ValueError, match="there are none"):
        spread([])


def test_equal_values_have_no_interval_and_not_an_empty_one():
    for values in ([0.5], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3], [0.0, 0.0]):
        low, mean, high = interval(values)
        assert (low, high) == (-math.inf, math.inf)
        assert mean == pytest.approx(values[0])
    rows = [record(kind, s, 1, 0.8, acc=a) for s in (1, 2) for kind, a in (("ticket", 0.9), ("reinit", 0.8))]
    assert differences(rows, "acc")[1] == ["1", "-0.100"]


def test_what_is_not_finite_is_no_value():
    rows = [record("ticket", s, 1, 0.8, acc=acc) for s, acc in enumerate((math.nan, 0.9, math.inf, 0.8))]
    rows += [record("reinit", s, 1, 0.8, acc=0.5) for s in range(4)]
    assert by_seed(rows, "acc", "ticket", 0.8) == {1: 0.9, 3: 0.8}
    assert paired_by_round(rows, "acc", "ticket", "reinit")[1][1].n == 2
    assert table(rows, "acc")[1][2] == "0.850 (0.800 to 0.900) and 2 NaN"
    assert table(rows[:1], "acc")[1][2] == "1 NaN"


def test_differences_are_paired_by_seed_and_not_by_place():
    rows = [record("ticket", s, 1, 0.8, acc=0.9 + s) for s in (3, 1, 2)]
    rows += [record("reinit", s, 1, 0.8, acc=0.5 + s) for s in (1, 2)] + [record("reinit", 2, 0, 1.0, acc=0)]
    assert paired({3: 1.0, 1: 2.0}, {1: 0.5, 2: 9.0}) == [1.5]
    table = paired_by_round(rows, "acc", "ticket", "reinit")
    assert list(table) == [1]
    left, found = table[1]
    assert left == 0.8
    assert (found.n, found.mean) == (2, pytest.approx(0.4))
    assert found.highest - found.lowest < 1e-9  # unpaired it would be 1


def test_the_report_tabulates_paired_differences_to_the_ticket():
    rows = [record("ticket", s, r, 0.8**r, test_acc=0.9 + 0.01 * s) for s in (1, 2) for r in (0, 1)]
    rows += [record("reinit", s, 1, 0.8, test_acc=0.84 + 0.03 * s) for s in (1, 2, 3)]
    rows += [record("random", 1, r, 0.8**r, test_acc=0.81) for r in (0, 1)]
    assert differences(rows, "test_acc") == [
        ["round", "re-initialised", "random mask"],
        ["0", "", "-10.00%"],
        ["1", "-3.00% [-15.71%, 9.71%]", "-10.00%"],
    ]
    assert len(differences(rows[:4], "test_acc")) == 1


def test_the_nearest_round_within_a_fifth_is_read():
    rows = [record("ticket", 1, 1, 0.8, acc=1), record("ticket", 1, 2, 0.64, acc=2)]
    assert by_seed(rows, "acc", "ticket", 0.7) == {1: 2.0}
    assert by_seed(rows, "acc", "ticket", 0.5) == {}
    assert by_seed(rows, "loss", "ticket", 0.7) == {}


def drawn(seed, densities=(0.3, 0.6)):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(40, 50, generator=generator) < d for name, d in zip("ab", densities, strict=True)
    }


def test_jaccard_counts_weights_as_sets_do():
    a, b = drawn(0), drawn(1)
    first, second = (
        {(n, i) for n, m in masks.items() for i, alive in enumerate(m.flatten().tolist()) if alive}
        for masks in (a, b)
    )
    assert jaccard(a, b) == len(first & second) / len(first | second)
    assert jaccard(a, a) == 1.0
    assert jaccard(a, {n: ~m for n, m in a.items()}) == 0.0
    assert jaccard({"w": torch.zeros(3, dtype=torch.bool)}, {"w": torch.zeros(3, dtype=torch.bool)}) == 1.0
    with pytest.raises(ValueError, match="two masks of the same weights"):
        jaccard(a, {"a": a["a"]})


def test_independent_masks_overlap_as_chance_says_and_nested_ones_by_their_sizes():
    dense = {n: torch.ones_like(m) for n, m in drawn(0).items()}
    table = overlap_of_seeds([{0: dense, 1: drawn(seed)} for seed in range(4)], [0, 1])
    assert table[0][0].mean == table[0][1] == 1.0  # dense
    found, chance = table[1]
    assert found.n == 6
    assert found.mean == pytest.approx(chance, abs=0.02)
    assert chance == pytest.approx((0.3**2 + 0.6**2) / (2 * 0.9 - 0.3**2 - 0.6**2), abs=0.02)

    nested = {r: {"w": torch.tensor([0, 1, 2, 2]) >= r} for r in range(3)}
    assert overlap_of_rounds(nested, [0, 1, 2]) == [[1, 0.75, 0.5], [0.75, 1, 2 / 3], [0.5, 2 / 3, 1]]
