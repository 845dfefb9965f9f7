"""Allocations: exact totals, fractions within one weight, never more than is alive."""

import pytest
import torch

from lightning_prune.allocation import AtLeast, apportion, evenly, global_rank, per_output, uniform
from lightning_prune.selection import survivors
from tests.reference import global_selection, largest_remainder


def random_case(generator, layers=5):
    sizes = torch.randint(0, 40, (layers,), generator=generator).tolist()
    scores = {}
    for i, n in enumerate(sizes):
        s = torch.randn(n, generator=generator)
        s[torch.rand(n, generator=generator) < 0.4 * (i % 3)] = -torch.inf
        scores[str(i)] = s
    return scores, {name: int((s > -torch.inf).sum()) for name, s in scores.items()}


def test_uniform_equals_the_largest_remainder_in_exact_arithmetic():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        scores, caps = random_case(generator)
        sizes = {name: s.numel() for name, s in scores.items()}
        for total in range(sum(caps.values()) + 1):
            keep = uniform(scores, total)
            assert keep == largest_remainder(total, sizes, caps), (total, sizes, caps)
            assert sum(keep.values()) == total
            assert all(0 <= keep[name] <= caps[name] for name in scores)


def test_uniform_gives_every_layer_the_same_fraction_within_one_weight():
    scores = {str(n): torch.rand(n) for n in (300 * 784, 100 * 300, 10 * 100, 7, 1)}
    size = sum(s.numel() for s in scores.values())
    for sparsity in (0.2, 0.36, 0.5, 0.9, 0.99):
        total = round((1 - sparsity) * size)
        keep = uniform(scores, total)
        assert sum(keep.values()) == total
        assert all(abs(keep[name] - total * s.numel() / size) < 1 for name, s in scores.items())


def test_equal_remainders_go_to_the_earlier_layer():
    # exact shares 1/2 each: thirds and halves at several magnitudes must compare equal
    assert apportion(3, {"a": 1, "b": 1}, {"a": 9, "b": 9}) == {"a": 2, "b": 1}
    assert apportion(21, {"a": 30, "b": 1, "c": 1, "d": 4}, {"a": 99, "b": 9, "c": 9, "d": 9}) == (
        largest_remainder(21, {"a": 30, "b": 1, "c": 1, "d": 4}, {"a": 99, "b": 9, "c": 9, "d": 9})
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):  # many with equal remainders: small totals over multiples of one another
        shares = {str(i): int(n) * 3 for i, n in enumerate(torch.randint(1, 30, (6,), generator=generator))}
        caps = dict.fromkeys(shares, 1000)
        for total in (1, 5, 7, 10, 50):
            assert apportion(total, shares, caps) == largest_remainder(total, shares, caps), (total, shares)


def test_a_layer_with_fewer_alive_keeps_those_and_the_others_share_the_rest():
    scores = {"a": torch.rand(10), "b": torch.rand(10), "c": torch.rand(10)}
    scores["b"][2:] = -torch.inf
    assert uniform(scores, 18) == {"a": 8, "b": 2, "c": 8}


def test_more_than_are_alive_cannot_be_split():
    with pytest.raises(ValueError, match="total=4: allowed is 0 to 3"):
        apportion(4, {"a": 1, "b": 1}, {"a": 1, "b": 2})


def test_global_rank_counts_what_sorting_keeps():
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        scores, caps = random_case(generator)
        for total in range(0, sum(caps.values()) + 1, 7):
            masks = global_selection(scores, total)
            assert global_rank(scores, total) == {name: int(mask.sum()) for name, mask in masks.items()}


def test_global_rank_gives_ties_to_the_earlier_tensor():
    scores = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.full((2,), 2.0)}
    assert global_rank(scores, 4) == {"a": 2, "b": 0, "c": 2}
    assert global_rank(scores, 0) == {"a": 0, "b": 0, "c": 0}
    assert global_rank(scores, 8) == {"a": 3, "b": 3, "c": 2}


def test_outputs_have_equal_parts_within_one_and_those_with_fewer_alive_keep_them():
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        caps = torch.randint(0, 9, (7,), generator=generator)
        for total in range(int(caps.sum()) + 1):
            expected = largest_remainder(total, dict.fromkeys(range(7), 1), dict(enumerate(caps.tolist())))
            assert dict(enumerate(evenly(total, caps).tolist())) == expected, (total, caps)


def test_a_minimum_holds_for_a_tensor_whose_outputs_are_counted():
    scores = {"large": torch.rand(10, 100), "small": torch.rand(2, 2)}
    assert survivors(per_output(scores, 12)["small"]) == 0
    keep = AtLeast(1, of=per_output)(scores, 12)
    assert {name: survivors(kept) for name, kept in keep.items()} == {"large": 11, "small": 1}
