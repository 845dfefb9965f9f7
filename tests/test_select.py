"""`select` is the one place where masks are born: for prunings, for growth, for units and over ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_prune import allocation
from lightning_prune.layers import Layout
from lightning_prune.selection import DEAD, keep_top_of_rows, select, threshold
from lightning_prune.shards import Part
from tests.naming import in_words
from tests.networks import same
from tests.reference import global_selection, uniform_selection

ORACLES = {allocation.global_rank: global_selection, allocation.uniform: uniform_selection}


def drawn(generator, names=("a", "b", "c")):
    """Scores with many ties, of several dtypes and shapes, an empty one among them, and candidates."""
    shapes = {"a": (4, 6), "b": (12,), "c": (3, 2, 4), "d": (0, 2)}
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    scores, candidates = {}, {}
    for name in (*names, "d"):
        dtype = kinds[int(torch.randint(3, (), generator=generator))]
        scores[name] = torch.randint(-3, 4, shapes[name], generator=generator).to(dtype)
        candidates[name] = torch.rand(shapes[name], generator=generator) < 0.7
    return scores, candidates


@pytest.mark.parametrize("allocate", ORACLES)
@pytest.mark.parametrize("seed", range(10))
def test_select_equals_sorting_the_candidates(allocate, seed):
    scores, candidates = drawn(torch.Generator().manual_seed(seed))
    there = sum(int(c.sum()) for c in candidates.values())
    only = {name: s.masked_fill(~candidates[name], DEAD) for name, s in scores.items()}
    for budget in range(there + 1):
        assert same(select(scores, candidates, budget, allocate), ORACLES[allocate](only, budget)), budget


def test_scores_of_what_is_no_candidate_do_not_matter():
    scores = {"a": torch.tensor([torch.nan, 1.0, torch.inf, 2.0])}
    chosen = select(scores, {"a": torch.tensor([False, True, False, True])}, 1, allocation.global_rank)
    assert chosen["a"].tolist() == [False, False, False, True]
    assert scores["a"][0].isnan()


@pytest.mark.parametrize("counts", [{"a": 1, "b": 0}, {"a": 2, "b": 0}, {"a": 0, "b": 2}])
def test_counts_that_cannot_be_met_are_refused(counts):
    scores = {"a": torch.ones(1), "b": torch.ones(2)}
    candidates = {"a": torch.tensor([True]), "b": torch.tensor([True, False])}
    with pytest.raises(ValueError, match=r"allocate: .* gave .* survivors; allowed are"):
        select(scores, candidates, 2, lambda scores, total: counts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layout", [Layout(), Layout(1, 0), Layout(2, 1, experts=True)], ids=in_words)
def test_counts_per_output_equal_sorting_each_output(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        shape = (3, 4, 6)
        scores = {"a": torch.randint(-3, 4, shape, generator=generator).to(dtype)}
        candidates = {"a": torch.rand(shape, generator=generator) < 0.7}
        rows = layout.rows(scores["a"].masked_fill(~candidates["a"], DEAD))
        there = (rows > DEAD).sum(1)
        counts = (there * torch.rand(len(there), generator=generator)).round().long()
        masks = [global_selection({0: row}, n)[0] for row, n in zip(rows, counts.tolist(), strict=True)]
        found = select(
            scores,
            candidates,
            int(counts.sum()),
            lambda scores, total, counts=counts: {"a": counts},
            layouts={"a": layout},
        )["a"]
        assert torch.equal(layout.rows(found), torch.stack(masks))
        assert found.shape == shape
        assert found.is_contiguous()


def test_rows_are_selected_in_pieces_as_whole(monkeypatch):
    scores, keep = torch.randint(0, 5, (50, 7)).float(), torch.randint(0, 8, (50,))
    whole = keep_top_of_rows(scores, keep)
    monkeypatch.setattr("lightning_prune.selection._PIECE", 20)
    assert torch.equal(keep_top_of_rows(scores, keep), whole)
    assert torch.equal(whole.sum(1), keep)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([2]), r"counts of the shape \(1,\) .* one for each of its 2 outputs"),
        (torch.tensor([1.0, 1.0]), "whole numbers, one for each of its 2 outputs"),
        (torch.tensor([2, 0]), "gave output 0 of a 2 survivors; allowed are 0 to 1, what it has alive"),
        (torch.tensor([-1, 3]), "gave output 0 of a -1 survivors"),
        (torch.tensor([1, 2]), "gave 3 survivors; allowed are the 2 that were asked for"),
    ],
)
def test_counts_per_output_that_cannot_be_met_are_refused(counts, message):
    scores = {"a": torch.ones(2, 3)}
    candidates = {"a": torch.tensor([[True, False, False], [True, True, True]])}
    with pytest.raises(ValueError, match=message):
        select(scores, candidates, 2, lambda scores, total: {"a": counts})


class Ranks:
    """Threads that stand for ranks, each with its part of the tensors."""

    def __init__(self, parts):
        self.parts = parts  # of each rank: {name: flat indices in the whole tensor}
        self.sizes = {n: 1 + max([-1, *(int(p[n].max()) for p in parts if len(p[n]))]) for n in parts[0]}
        self.sums, self.barrier = [None] * len(parts), threading.Barrier(len(parts), timeout=20)
        self.sent = 0

    def of(self, rank):
        outer = self

        class Together:
            def told(self, numbers):
                outer.sums[rank] = numbers
                outer.barrier.wait()
                of_all = torch.stack([c.clone() for c in outer.sums])
                outer.barrier.wait()
                outer.sent += numbers.nbytes
                return of_all

            def add(self, counts):
                return self.told(counts).sum(0)

            def span(self, low, high):
                of_all = self.told(torch.tensor([low, high]))
                return int(of_all[:, 0].min()), int(of_all[:, 1].max())

            def counts(self, name):
                mine = outer.parts[rank][name]
                return not any(torch.equal(mine, outer.parts[other][name]) for other in range(rank))

            def part(self, name):
                mine = outer.parts[rank][name]
                return Part((mine,), (outer.sizes[name],), frozenset([0]))

        return Together()


def cut(shape, how, ranks):
    """The flat indices of each rank's part: rows, columns, uneven, with empty parts, or replicas."""
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    if how == "replicas":
        return [places.flatten()] * ranks
    dim = min(places.dim() - 1, 1) if how == "columns" else 0
    if how == "strided" and places.shape[0] % ranks == 0:
        return [places[rank::ranks].flatten() for rank in range(ranks)]
    chunks = [c.flatten() for c in places.chunk(ranks, dim=dim)]
    return chunks + [torch.empty(0, dtype=torch.int64)] * (ranks - len(chunks))


def selected_by_ranks(scores, candidates, budget, allocate, parts):
    ranks = Ranks(parts)

    def work(rank):
        here = [
            {name: whole[name].flatten()[at] for name, at in parts[rank].items()}
            for whole in (scores, candidates)
        ]
        return select(*here, budget, allocate, ranks.of(rank))

    with ThreadPoolExecutor(len(parts)) as pool:
        of_ranks = list(pool.map(work, range(len(parts))))
    masks = {name: torch.zeros(s.numel(), dtype=torch.bool) for name, s in scores.items()}
    for rank, found in enumerate(of_ranks):
        for name, mask in found.items():
            masks[name][parts[rank][name]] = mask
    for rank, found in enumerate(of_ranks):  # replicas agree
        assert all(torch.equal(mask, masks[n][parts[rank][n]]) for n, mask in found.items())
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}, ranks.sent


@pytest.mark.parametrize(
    "allocate", [*ORACLES, allocation.AtLeast(2, of=allocation.global_rank)], ids=in_words
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_hold_parts_select_what_one_process_does(allocate, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, candidates = drawn(generator)
    ways = ("rows", "columns", "strided", "replicas")
    how = {name: ways[int(torch.randint(4, (), generator=generator))] for name in scores}
    cuts = {name: cut(s.shape, how[name], ranks) for name, s in scores.items()}
    parts = [{name: cuts[name][rank] for name in scores} for rank in range(ranks)]
    there = sum(int(c.sum()) for c in candidates.values())
    for budget in (0, 1, 8, there // 2, there - 1, there) if allocate in ORACLES else (8, there // 2):
        found, _ = selected_by_ranks(scores, candidates, budget, allocate, parts)
        assert same(found, select(scores, candidates, budget, allocate)), (budget, how)


def test_what_ranks_send_does_not_grow_with_the_weights():
    sent = []
    for size in (1000, 100_000, 1_000_000):
        scores = {"a": torch.randn(size, generator=torch.Generator().manual_seed(0))}
        candidates = {"a": torch.ones(size, dtype=torch.bool)}
        parts = [{"a": at} for at in cut((size,), "rows", 2)]
        budget = size // 3
        found, bytes_sent = selected_by_ranks(scores, candidates, budget, allocation.global_rank, parts)
        assert same(found, select(scores, candidates, budget, allocation.global_rank))
        sent.append(bytes_sent)
    histogram = 8 * (1 << 12)
    assert max(sent) <= 2 * 5 * histogram  # of two ranks


def test_an_allocation_that_counts_one_part_alone_is_refused_over_ranks():
    scores, candidates = {"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.bool)}
    together = Ranks([{"a": torch.arange(4)}]).of(0)
    alone = lambda scores, total: {"a": total}  # noqa: E731
    for allocate in (alone, allocation.AtLeast(1, of=alone), allocation.EvenOutputs(of=alone)):
        with pytest.raises(ValueError, match=r"allocate: .* does not ask for `together`"):
            select(scores, candidates, 2, allocate, together)


def test_a_threshold_over_no_score_is_refused():
    with pytest.raises(ValueError, match="keep=1: allowed is 1 to 0"):
        threshold([], 1, Ranks([{}]).of(0))
