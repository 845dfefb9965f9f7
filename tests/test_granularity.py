"""Granularity: units live and die together, budgets count units, N:M holds in every group."""

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.allocation import (
    AtLeast,
    EvenOutputs,
    class_distributed,
    erk,
    global_rank,
    lamp,
    per_output,
    uniform,
)
from lightning_prune.granularity import NM, Block, Filter, Kernel, single, units
from lightning_prune.layers import Layout, layouts
from lightning_prune.pruning import next_masks
from lightning_prune.selection import DEAD
from tests import reference_methods as oracle
from tests.naming import in_words

SHAPES = [(6, 8), (5, 10), (4, 6, 3, 3), (3, 9, 5), (2, 3)]


def model():
    return nn.ModuleList([nn.Linear(10, 7), nn.Conv2d(8, 6, 3), nn.Conv1d(5, 4, 3), nn.Linear(3, 2)])


@pytest.mark.parametrize("shape", SHAPES, ids=in_words)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 8)])
def test_nm_keeps_n_of_every_m_and_the_remainder(n, m, shape):
    scores = torch.randint(0, 5, shape).float()  # many ties
    units, expand = NM(n, m)(scores)
    full = shape[1] // m * m
    assert units.numel() == scores.numel() // shape[1] * full
    assert torch.equal(expand(units > DEAD), oracle.nm(scores, n, m))


@pytest.mark.parametrize(
    "allocate", [global_rank, uniform, erk, lamp, class_distributed, AtLeast(3)], ids=in_words
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
    assert torch.allclose(units, torch.stack([scores[r : r + 2].mean((0, 2, 3)) for r in (0, 2)]))
    assert expand(torch.tensor([[True, False], [False, True]]))[0, :, 0, 0].tolist() == [True, False]


@pytest.mark.parametrize("n", [1, 2, float("inf")])
def test_kernel_and_filter_scores_are_norms_per_weight(n):
    w = torch.randn(4, 3, 5, 5)

    def norm(dims, size):
        return torch.linalg.vector_norm(w, n, dims) / (1 if n == float("inf") else size ** (1 / n))

    assert torch.allclose(Kernel(n)(w.abs())[0], norm((2, 3), 25))
    assert torch.allclose(Filter(0, n)(w.abs())[0], norm((1, 2, 3), 75))
    assert torch.allclose(Filter(1, n)(w.abs())[0], norm((0, 2, 3), 100))
    mask = torch.tensor([True, False, True])
    assert torch.equal(Filter(1, n)(w)[1](mask)[:, :, 0, 0], mask.expand(4, 3))
    assert Kernel(n)(w[:, :, 0, 0])[0].shape == (4, 3)


@pytest.mark.parametrize("n", [0.5, 1, 2, 7, float("inf")])
@pytest.mark.parametrize("granularity", [Block, Kernel, Filter])
def test_units_of_equal_weights_score_alike_whatever_their_size(granularity, n):
    """So that a layer of small fan-in, or a block at an edge, does not go first."""
    granularity = granularity(n=n)
    for shape in ((5, 7), (6, 3, 5, 5), (4, 64, 1)):
        scores, _ = granularity(torch.full(shape, 1.5))
        assert torch.allclose(scores, torch.full_like(scores, 1.5))


def test_the_dead_count_nothing_and_units_without_life_are_dead():
    scores = torch.tensor([[1.0, DEAD, 2.0], [DEAD, DEAD, DEAD], [-3.0, DEAD, 0.0]])
    assert Filter(0, 1)(scores)[0].tolist() == [1, DEAD, -1]
    assert Filter(0, float("inf"))(scores)[0].tolist() == [2, DEAD, 0]
    assert Filter(1, 1)(3 * scores)[0].tolist() == [-2, DEAD, 2]
    assert Block(3, 2)(3 * scores)[0].tolist() == [[-1, 2]]


# ----------------------------------------------------------------------------- the layer's outputs and inputs


def conv1d(inputs, outputs):
    """The linear layer of transformers' GPT-2, whose weight is (inputs, outputs)."""
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


PLAIN = {
    "Linear": lambda: nn.Linear(8, 6),
    "Conv1d": lambda: nn.Conv1d(8, 6, 3, padding=1),
    "grouped Conv2d": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "depthwise Conv2d": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 3),
    "grouped ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
    "depthwise ConvTranspose2d": lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
    "transformers' Conv1D": lambda: conv1d(8, 6),
}


@pytest.fixture(params=PLAIN)
def plain(request):
    layer = PLAIN[request.param]()
    pairs = oracle.connections(layer)
    assert bool((pairs >= 0).all())
    return layer.weight.detach(), layouts(layer, ["weight"])["weight"], pairs


@pytest.mark.parametrize("n", [1, 2, float("inf")])
@pytest.mark.parametrize("dim", [0, 1])
def test_filters_are_the_outputs_or_inputs_that_the_layer_computes_with(plain, dim, n):
    weight, layout, pairs = plain
    scores, expand = Filter(dim, n)(weight.abs(), layout=layout)
    assert len(scores) == int(pairs[..., dim].max()) + 1
    for channel, score in enumerate(scores):
        alive = torch.arange(len(scores)) == channel
        assert torch.equal(expand(alive), pairs[..., dim] == channel)
        of_channel = weight[pairs[..., dim] == channel].abs().double()
        assert float(score) == pytest.approx(
            float(of_channel.max() if n == float("inf") else (of_channel**n).mean() ** (1 / n))
        )


def test_kernels_join_one_input_with_one_output(plain):
    weight, layout, pairs = plain
    scores, expand = Kernel()(weight.abs(), layout=layout)
    seen = set()
    for i in range(scores.numel()):
        mask = expand(torch.arange(scores.numel()).view(scores.shape) == i)
        (pair,) = {tuple(p.tolist()) for p in pairs[mask]}
        assert torch.equal(mask, (pairs == torch.tensor(pair)).all(-1))
        seen.add(pair)
    assert len(seen) == scores.numel()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4)])
def test_nm_lies_along_the_inputs_of_each_output(plain, n, m):
    weight, layout, pairs = plain
    scores, expand = NM(n, m)(weight.abs(), layout=layout)
    mask = expand(scores > DEAD)
    for output in range(int(pairs[..., 0].max()) + 1):
        of_output = pairs[..., 0] == output
        for place in {tuple(p) for p in of_output.nonzero()[:, 2:].tolist()}:  # of the kernel
            here = [i for i in of_output.nonzero().tolist() if tuple(i[2:]) == place]
            here.sort(key=lambda i: int(pairs[(*i, 1)]))  # by input
            for start in range(0, len(here) // m * m, m):
                group = here[start : start + m]
                best = sorted(group, key=lambda i: -float(weight[tuple(i)].abs()))[:n]
                assert [bool(mask[tuple(i)]) for i in group] == [i in best for i in group]
            assert all(bool(mask[tuple(i)]) for i in here[len(here) // m * m :])


def test_blocks_keep_to_outputs_and_inputs_that_lie_together(plain):
    weight, layout, pairs = plain
    scores, expand = Block(2, 3)(weight.abs(), layout=layout)
    covered = torch.zeros_like(weight)
    for i in range(scores.numel()):
        mask = expand(torch.arange(scores.numel()).view(scores.shape) == i)
        covered += mask
        assert int(pairs[mask][:, 0].max() - pairs[mask][:, 0].min()) <= 1
        assert int(pairs[mask][:, 1].max() - pairs[mask][:, 1].min()) <= 2
        assert float(scores.flatten()[i]) == pytest.approx(float(weight[mask].abs().mean()), rel=1e-5)
    assert torch.equal(covered, torch.ones_like(weight))  # each weight lies in one block


@pytest.mark.parametrize("layout", [Layout(1, 2, experts=True), Layout(2, 1, experts=True)], ids=["oi", "io"])
@pytest.mark.parametrize("granularity", [NM(2, 4), Block(2, 4), Filter(0), Filter(1)], ids=in_words)
def test_each_expert_is_a_matrix_of_its_own(granularity, layout):
    weight = torch.rand(3, 5, 8)
    given = weight if layout.outputs == 1 else weight.mT
    scores, expand = granularity(given, layout=layout)
    mask = torch.rand(scores.shape) < 0.5
    whole = expand(mask) if layout.outputs == 1 else expand(mask).mT
    for matrix, s, m, expanded in zip(weight, scores.chunk(3), mask.chunk(3), whole, strict=True):
        alone, expand_one = granularity(matrix)
        assert torch.equal(s, alone)
        assert torch.equal(expanded, expand_one(m))
    assert torch.equal(Kernel()(given, layout=layout)[0], weight.flatten(0, 1))


@pytest.mark.filterwarnings("ignore:.*finds no unit")
@pytest.mark.parametrize("granularity", [single, Kernel(), Block(1, 2), NM(2, 4)], ids=in_words)
def test_per_output_keeps_the_same_of_every_output_that_the_layer_computes(plain, granularity):
    weight, layout, pairs = plain
    params, masks = {"w": weight}, {"w": torch.ones_like(weight, dtype=torch.bool)}
    if granularity == NM(2, 4) and int(pairs[..., 1].max()) < 3:
        return  # a depthwise layer has no four inputs
    new = next_masks(
        params, masks, [(["w"], 0.55)], allocate=per_output, granularity=granularity, layouts={"w": layout}
    )["w"]
    alive = torch.bincount(pairs[new][:, 0], minlength=int(pairs[..., 0].max()) + 1)
    kernel = int((pairs == pairs.flatten(0, -2)[0]).all(-1).sum())
    assert int(alive.max() - alive.min()) <= {Kernel(): kernel, Block(1, 2): 3}.get(granularity, 1)


@pytest.mark.parametrize("allocate", [per_output, EvenOutputs(of=erk)], ids=in_words)
def test_even_outputs_of_whole_outputs_are_refused(allocate):
    with pytest.raises(ValueError, match="units of weight are whole outputs or whole inputs"):
        lp.prune(nn.Linear(4, 4), 0.5, allocate=allocate, granularity=Filter())


def test_two_of_four_of_gpt2_lie_along_inputs():
    layer = conv1d(8, 6)
    mask = lp.prune(layer, 0.5, granularity=NM(2, 4))["weight"]
    assert mask.shape == (8, 6)
    assert bool((mask.unflatten(0, (-1, 4)).sum(1) == 2).all())


def test_a_granularity_gets_the_layout_if_its_signature_says_so():
    seen = []

    def asking(scores, *, layout):
        seen.append(layout)
        return single(scores)

    net = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Linear(3, 3), nn.Linear(3, 3))
    lp.prune(net, 0.5, granularity=asking)
    assert seen == [Layout(1, 0, 2), Layout(), Layout(head=True)]
    assert lp.prune(net, 0.5, granularity=lambda scores: single(scores))


def test_without_layouts_outputs_come_first():
    w = {"w": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}
    masks = {"w": torch.ones(2, 2, dtype=torch.bool)}
    rows = next_masks(w, masks, [(["w"], 0.5)], granularity=Filter())["w"]
    assert rows.tolist() == [[True, True], [False, False]]
    given = {"w": Layout(outputs=1, inputs=0)}
    columns = next_masks(w, masks, [(["w"], 0.5)], granularity=Filter(), layouts=given)["w"]
    assert columns.tolist() == [[False, True], [False, True]]


def test_granularities_work_on_shapes_alone():
    """A dry run needs no memory."""
    for granularity in (single, NM(), Block(), Kernel(), Filter(), Filter(1)):
        scores, expand = units(granularity, torch.empty(6, 8, 3, 3, device="meta"))
        assert expand(torch.empty(scores.shape, dtype=torch.bool, device="meta")).shape == (6, 8, 3, 3)


# -------------------------------------------------------------------------------------------------- budgets


def test_filters_of_unequal_fan_in_compare_fairly():
    """Of the shapes of a ResNet-18 with weights of one distribution, no layer is starved at half."""
    shapes = {"conv1": (64, 3, 7, 7), "layer1": (64, 64, 3, 3), "layer2": (128, 64, 3, 3)}
    shapes |= {"shortcut": (128, 64, 1, 1), "layer4": (256, 512, 3, 3), "fc": (1000, 512)}
    generator = torch.Generator().manual_seed(0)
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dense = {name: torch.ones_like(p, dtype=torch.bool) for name, p in w.items()}
    for n in (1, 2):
        masks = next_masks(w, dense, [(list(w), 0.5)], granularity=Filter(0, n))
        left = {name: float(mask.flatten(1).any(1).float().mean()) for name, mask in masks.items()}
        assert all(0.35 < fraction < 0.65 for fraction in left.values()), left


def test_outputs_of_the_last_layer_are_pruned_with_a_warning():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(
        UserWarning, match=r"those of the last layer, of which the weight has the shape \(3, 8\)"
    ):
        lp.prune(net, 0.5, granularity=Filter())
    lp.prune(net, 0.6, granularity=Filter(), exclude=["2.*"])  # each of these would be an error
    lp.prune(net, 0.6, granularity=Filter(), include=["2.*"])
    lp.prune(net, 0.6, granularity=Filter(dim=1))
    lp.prune(net, 0.6, granularity=Block())


@pytest.mark.parametrize(
    "granularity", [single, Block(2, 2), Kernel(), Filter(0), Filter(1, 2)], ids=in_words
)
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
    assert Filter(0, 2)(scores)[0].tolist() == pytest.approx([6e4, 6e4], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(4, 4), "n=4, m=4: allowed are whole numbers with 1 <= n < m"),
        (lambda: NM(0, 4), "n=0, m=4: allowed"),
        (lambda: Block(0, 2), "rows=0: allowed are whole numbers from 1 on"),
        (lambda: Block(1, 2.5), "columns=2.5: allowed are whole numbers from 1 on"),
        (lambda: Filter(n=0), "n=0: allowed are numbers above 0"),
        (lambda: Filter(dim="0"), "dim='0': allowed are 0, outputs of the layer, and 1, inputs"),
        (lambda: Filter(7), "dim=7: allowed are 0, outputs of the layer, and 1, inputs"),
        (lambda: Filter()(torch.rand(3)), r"a weight of the shape \(3,\) has no outputs and inputs"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("filter", r"granularity='filter': allowed are functions, such as those of .*granularity"),
        (NM, r"granularity=NM: a class is given; allowed are its instances. Give NM\(\)"),
        (None, "granularity=None: allowed are functions"),
        (lambda scores: scores, "gave Tensor; a pair"),
        (lambda scores: (scores, lambda mask: mask[:1]), r"expands to torch.bool of the shape \(1, 6\)"),
        (lambda scores: (scores, lambda mask: mask.float()), r"expands to torch.float32"),
    ],
)
def test_what_is_no_granularity_is_refused_and_nothing_is_pruned(granularity, message):
    net = nn.Linear(6, 4)
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        lp.prune(net, 0.5, granularity=granularity)
    assert torch.equal(net.weight, before)


def test_a_network_without_a_unit_is_said_to_stay_dense():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(2, 3))
    with pytest.warns(UserWarning, match=r"NM\(n=2, m=4\) finds no unit in 0\.weight, 1\.weight, which stay"):
        masks = lp.prune(model, 0.5, granularity=NM(2, 4))
    assert all(bool(mask.all()) for mask in masks.values())
