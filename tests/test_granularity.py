"""Granularity: units live and die together, budgets count units, N:M holds in every group."""

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.allocation import AtLeast, class_distributed, erk, global_rank, lamp, uniform
from lightning_prune.granularity import NM, Block, Filter, Kernel, single
from lightning_prune.pruning import next_masks
from lightning_prune.selection import DEAD
from tests import reference_methods as oracle

SHAPES = [(6, 8), (5, 10), (4, 6, 3, 3), (3, 9, 5), (2, 3)]


def model():
    return nn.ModuleList([nn.Linear(10, 7), nn.Conv2d(8, 6, 3), nn.Conv1d(5, 4, 3), nn.Linear(3, 2)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 8)])
def test_nm_keeps_n_of_every_m_and_the_remainder(n, m, shape):
    scores = torch.randint(0, 5, shape).float()  # many ties
    units, expand = NM(n, m)(scores)
    full = shape[1] // m * m
    assert units.numel() == scores.numel() // shape[1] * full
    assert torch.equal(expand(units > DEAD), oracle.nm(scores, n, m))


@pytest.mark.parametrize(
    "allocate", [global_rank, uniform, erk, lamp, class_distributed, AtLeast(3)], ids=str
)
@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_nm_is_exact_under_every_allocation(allocate, sparsity):
    net = model()
    expected = {n: oracle.nm(p.detach().abs(), 2, 4) for n, p in net.named_parameters() if p.dim() > 1}
    masks = lp.prune(net, sparsity, allocate=allocate, granularity=NM(2, 4))
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert bool(masks["3.weight"].all())  # three inputs are a remainder


def test_more_sparsity_than_the_pattern_prunes_on_within_it():
    net = nn.Linear(16, 8)
    pattern = oracle.nm(net.weight.detach().abs(), 2, 4)
    mask = lp.prune(net, 0.75, granularity=NM(2, 4))["weight"]
    assert int(mask.sum()) == 32
    assert not bool((mask & ~pattern).any())


def test_nm_goes_on_from_masks():
    w = {"w": torch.tensor([[4.0, 3.0, 2.0, 1.0, 9.0, 9.0]])}
    masks = {"w": torch.tensor([[False, True, True, True, False, True]])}
    new = next_masks(w, masks, [(["w"], 0.5)], granularity=NM(2, 4))["w"]
    assert new.tolist() == [[False, True, True, False, False, True]]


@pytest.mark.parametrize("n", [1, 2, 3.5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 1), (7, 99)])
def test_block_scores(rows, columns, n):
    scores = torch.rand(5, 8)
    units, expand = Block(rows, columns, n)(scores)
    assert torch.allclose(units, oracle.block_scores(scores, rows, columns, n))
    mask = torch.rand(units.shape) < 0.5
    expanded = expand(mask)
    for i in range(5):
        for j in range(8):
            assert expanded[i, j] == mask[i // rows, j // columns]


def test_blocks_of_a_convolution_lie_in_its_matrix():
    scores = torch.rand(4, 2, 3, 3)
    units, expand = Block(2, 9)(scores)
    assert torch.allclose(units, torch.stack([scores[r : r + 2].sum((0, 2, 3)) for r in (0, 2)]))
    assert expand(torch.tensor([[True, False], [False, True]]))[0, :, 0, 0].tolist() == [True, False]


@pytest.mark.parametrize("n", [1, 2, float("inf")])
def test_kernel_and_filter_scores_are_norms(n):
    w = torch.randn(4, 3, 5, 5)
    kernels = torch.linalg.vector_norm(w, n, (2, 3))
    assert torch.allclose(Kernel(n)(w.abs())[0], kernels)
    assert torch.allclose(Filter(0, n)(w.abs())[0], torch.linalg.vector_norm(w, n, (1, 2, 3)))
    assert torch.allclose(Filter(-3, n)(w.abs())[0], torch.linalg.vector_norm(w, n, (0, 2, 3)))
    mask = torch.tensor([True, False, True])
    assert torch.equal(Filter(1, n)(w)[1](mask)[:, :, 0, 0], mask.expand(4, 3))
    assert Kernel(n)(w[:, :, 0, 0])[0].shape == (4, 3)


def test_the_dead_count_nothing_and_units_without_life_are_dead():
    scores = torch.tensor([[1.0, DEAD, 2.0], [DEAD, DEAD, DEAD], [-3.0, DEAD, 1.0]])
    assert Filter(0, 1)(scores)[0].tolist() == [3, DEAD, -2]
    assert Filter(0, float("inf"))(scores)[0].tolist() == [2, DEAD, 1]
    assert Filter(1, 1)(scores)[0].tolist() == [-2, DEAD, 3]
    assert Block(3, 2)(scores)[0].tolist() == [[-2, 3]]


@pytest.mark.parametrize("granularity", [single, Block(2, 2), Kernel(), Filter(0), Filter(1, 2)], ids=str)
@pytest.mark.parametrize("allocate", [global_rank, uniform, lamp], ids=["global", "uniform", "lamp"])
def test_the_budget_of_units_is_met_exactly(granularity, allocate):
    net = model()
    params = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()}
    total = sum(granularity(p.detach())[0].numel() for p in params.values())
    for sparsity in (0.3, 0.5, 0.8):
        new = next_masks(
            params, masks, [(list(params), sparsity)], allocate=allocate, granularity=granularity
        )
        assert not any(bool((new[n] & ~masks[n]).any()) for n in new)  # masks only shrink
        alive = [granularity(torch.where(m, 1.0, DEAD))[0] > DEAD for m in new.values()]
        assert sum(int(a.sum()) for a in alive) == round((1 - sparsity) * total)
        for (name, mask), a in zip(new.items(), alive, strict=True):  # and units are whole
            assert torch.equal(mask, granularity(params[name].detach())[1](a))
        masks = new


def test_half_precision_does_not_overflow():
    scores = torch.full((2, 100), 6e4, dtype=torch.float16)
    assert Filter(0, 2)(scores)[0].tolist() == pytest.approx([6e5, 6e5], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(4, 4), "n=4, m=4: allowed are whole numbers with 1 <= n < m"),
        (lambda: NM(0, 4), "n=0, m=4: allowed"),
        (lambda: Block(0, 2), "rows=0: allowed are whole numbers from 1 on"),
        (lambda: Block(1, 2.5), "columns=2.5: allowed are whole numbers from 1 on"),
        (lambda: Filter(n=0), "n=0: allowed are numbers above 0"),
        (lambda: Filter(dim="0"), "dim='0': allowed are whole numbers"),
        (lambda: Filter(2)(torch.rand(2, 3)), "dim=2: allowed are -2 to 1"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
