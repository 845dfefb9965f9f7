"""Each row of `docs/from-sparsifiers.md` on torch.ao.pruning, and on torchao where it is there, compared."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.allocation import uniform
from lightning_prune.granularity import NM, Block, Filter
from tests.networks import same

ao = pytest.importorskip("torch.ao.pruning")
structured = pytest.importorskip("torch.ao.pruning._experimental.pruner")
PAGE = (Path(__file__).parents[1] / "docs" / "from-sparsifiers.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def masks_of(sparsifier, net, config=None, names=("0.weight", "2.weight")):
    """The peer's masks, by the names of the weights, after its `sparsifier.step()`."""
    sparsifier.prepare(net, config or [{"tensor_fqn": name} for name in names])
    sparsifier.step()
    return {n: net.get_submodule(n[:-7]).parametrizations.weight[0].mask.bool() for n in names}


ROWS = {
    "WeightNormSparsifier(s, (1, 1))": (lambda: ao.WeightNormSparsifier(0.5, (1, 1)), {}),
    "WeightNormSparsifier(s, (1, 4))": (
        lambda: ao.WeightNormSparsifier(0.5, (1, 4)),
        {"granularity": Block(1, 4, n=2)},
    ),
    "WeightNormSparsifier(s, (4, 2), norm=1)": (
        lambda: ao.WeightNormSparsifier(0.5, (4, 2), norm=1),
        {"granularity": Block(4, 2, n=1)},
    ),
    "WeightNormSparsifier(1.0, (1, 4), zeros_per_block=2)": (
        lambda: ao.WeightNormSparsifier(1.0, (1, 4), zeros_per_block=2),
        {"granularity": NM(2, 4)},
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_masks_are_those_of_the_weight_norm_sparsifier(row):
    make, axes = ROWS[row]
    assert f"`{row}`" in PAGE
    assert same(lp.prune(network(), 0.5, allocate=uniform, **axes), masks_of(make(), network()))


def test_each_tensor_has_a_sparsity_of_its_own_by_pattern():
    assert '`config=[{"tensor_fqn": ..., "sparsity_level": ...}]`' in PAGE
    config = [
        {"tensor_fqn": "0.weight", "sparsity_level": 0.25},
        {"tensor_fqn": "2.weight", "sparsity_level": 0.75},
    ]
    theirs = masks_of(ao.WeightNormSparsifier(0.5, (1, 1)), network(), config)
    net = network()
    ours = lp.prune(net, 0.25, include=["0.*"]) | lp.prune(net, 0.75, include=["2.*"])
    assert same(ours, theirs)


def test_a_nearly_diagonal_mask_is_one_that_is_given():
    assert "`NearlyDiagonalSparsifier(3)`" in PAGE
    theirs = masks_of(ao.NearlyDiagonalSparsifier(3), network(), names=("0.weight",))
    band = torch.ones(24, 16).triu(-1).tril(1).bool()
    assert same({"0.weight": band}, theirs)
    net = network()
    lp.apply_masks(net, {"0.weight": band})
    assert torch.equal(net[0].weight != 0, band)


@pytest.mark.parametrize("step", range(0, 26, 5))
def test_the_cubic_scheduler_is_the_cubic_schedule_in_rounds(step):
    assert "`CubicSL(sparsifier, init_t=5, delta_t=5, total_t=3)`" in PAGE
    theirs = ao.CubicSL.sparsity_compute_fn(0.0, 0.9, step, 5, 5, 3, initially_zero=True)
    assert lp.schedules.Cubic(0.9, rounds=3, start=1)(step // 5) == pytest.approx(theirs)


def test_the_lambda_scheduler_is_any_function_of_the_round():
    assert "`LambdaSL(sparsifier, sl_lambda)`" in PAGE
    sparsifier = ao.WeightNormSparsifier(0.8, (1, 1))
    sparsifier.prepare(network(), [{"tensor_fqn": "0.weight"}])
    scheduler = ao.LambdaSL(sparsifier, lambda epoch: min(1, epoch / 4))
    levels = []
    for _ in range(6):
        levels.append(scheduler.get_last_sl()[0])
        sparsifier.step()
        scheduler.step()
    pruner = lp.IterativeMagnitudePruning(lambda round: 0.8 * min(1, round / 4), rounds=5)
    assert [pruner.schedule(round) for round in range(6)] == pytest.approx(levels)


def test_the_saliency_pruner_is_a_granularity_of_filters():
    assert '`SaliencyPruner({"sparsity_level": s})`' in PAGE
    pruner, net = structured.SaliencyPruner({"sparsity_level": 0.5}), network()
    pruner.prepare(net, [{"tensor_fqn": "0.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    rows = net[0].parametrizations.weight[0].mask
    masks = lp.prune(network(), 0.5, include=["0.*"], granularity=Filter())
    assert torch.equal(masks["0.weight"], rows[:, None].expand(24, 16))
    pytest.importorskip("torch_pruning")
    units = lp.prune_channels(network(), 0.5, torch.ones(1, 16))
    assert same(list(units.values()), [rows])


def test_the_pruner_by_the_geometric_median_is_a_criterion_of_channels():
    pytest.importorskip("torch_pruning")
    assert "`FPGMPruner(s)`" in PAGE
    pruner, net = structured.FPGMPruner(0.5), convolutions()
    pruner.prepare(net, [{"tensor_fqn": "0.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    rows = net[0].parametrizations.weight[0].mask
    units = lp.prune_channels(
        convolutions(), 0.5, torch.ones(1, 3, 8, 8), criterion=lp.filters.geometric_median
    )
    assert same(list(units.values()), [rows])


def test_the_sparsifier_of_embeddings_is_a_choice_of_layers():
    data = pytest.importorskip("torch.ao.pruning._experimental.data_sparsifier")
    assert "`DataNormSparsifier`" in PAGE
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(12, 8))
    sparsifier = data.DataNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), norm="L2")
    sparsifier.add_data(name="table", data=net[0].weight.detach().clone())
    sparsifier.step()
    masks = lp.prune(net, 0.5, layers=["Embedding"], granularity=Block(1, 4, n=2))
    assert torch.equal(masks["0.weight"], sparsifier.get_mask("table").bool())


def test_after_squashing_the_zeros_are_those_that_our_weights_have_at_all_times():
    assert "`squash_mask()`" in PAGE
    sparsifier, theirs, ours = ao.WeightNormSparsifier(0.5, (1, 1)), network(), network()
    masks_of(sparsifier, theirs)
    sparsifier.squash_mask()
    lp.prune(ours, 0.5, allocate=uniform)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("block", [None, 4])
def test_masks_are_those_of_the_wanda_sparsifier_of_torchao_where_norms_are_squared(block):
    peer = pytest.importorskip("torchao.sparsity")
    net, x = network(), torch.randn(32, 16)
    sparsifier = peer.WandaSparsifier(0.5, semi_structured_block_size=block)
    sparsifier.prepare(net, config=[{"tensor_fqn": "0.weight"}])
    net(x)
    sparsifier.step()
    theirs = net[0].parametrizations.weight[0].mask.bool()
    axes = {} if block is None else {"granularity": NM(2, 4)}

    def squared(params):
        return {name: w.abs() * x.square().sum(0) for name, w in params.items()}

    ours = lp.prune(network(), 0.5, squared, include=["0.*"], **axes)
    assert torch.equal(ours["0.weight"], theirs)
    paper = lp.prune(network(), 0.5, lp.criteria.wanda, data=[x], include=["0.*"], **axes)
    assert not torch.equal(paper["0.weight"], theirs)


def test_every_row_of_the_page_on_torch_ao_pruning_is_in_a_test():
    table = PAGE.split("## torchao")[0]
    rows = [
        row.strip("`") for row in re.findall(r"^\| (`[^|]*?`)(?: of an embedding)? \|", table, re.MULTILINE)
    ]
    source = Path(__file__).read_text().replace('\\"', '"')
    assert len(rows) == 14
    assert [row for row in rows[1:] if row not in source] == []
