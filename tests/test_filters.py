"""Units are scored as the papers say, budgets and targets are met, and arguments are checked."""

import re
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation, criteria, filters, prune_channels
from lightning_prune.structured import discover, speed, targets
from lightning_prune.structured import units as structure
from lightning_prune.structured.surgery import cut
from tests.naming import in_words
from tests.networks import Net, fitter, same
from tests.test_channels import IMAGE, Residual, randomized


def test_scores_are_norms_of_the_filters_that_make_a_channel():
    model = randomized(Residual())
    groups = discover(model, torch.randn(IMAGE))
    params = structure.parameters(groups, model)
    for criterion, power in ((criteria.magnitude, 1), (criteria.Ln(2), 2)):
        scores = filters.unit_scores(groups, criterion, params)
        inner = [float((w.abs() ** power).mean()) for w in model.plain[0][0].weight.detach()]
        torch.testing.assert_close(scores["plain.0.0.weight"], torch.tensor(inner))
        # of the grouped block's second convolution: the i-th filter of every group
        w = (model.grouped[1][0].weight.detach().abs() ** power).view(4, 6, -1)
        torch.testing.assert_close(scores["grouped.1.0.weight"], w.mean((0, 2)))


def test_channel_criteria_equal_their_definitions():
    model = randomized(Residual())
    groups = discover(model, torch.randn(IMAGE), include=["plain.0.*"])
    groups = {"plain.0.0.weight": groups["plain.0.0.weight"]}
    params = structure.parameters(groups, model)
    slim = filters.unit_scores(groups, filters.batch_norm_scale, params)["plain.0.0.weight"]
    assert torch.equal(slim, model.plain[0][1].weight.abs())
    median = filters.unit_scores(groups, filters.geometric_median, params)["plain.0.0.weight"]
    w = model.plain[0][0].weight.detach().flatten(1)
    far = torch.tensor([sum(float((a - b).norm()) for b in w) / len(w) for a in w])
    torch.testing.assert_close(median, far)
    first = filters.unit_scores(groups, filters.RandomChannels(1), params)
    assert same(first, filters.unit_scores(groups, filters.RandomChannels(1), params))


def units(groups, sparsity, allocate=allocation.uniform, **options):
    scores = {n: torch.rand(g.units) for n, g in groups.items()}
    masks = {n: torch.ones(g.units, dtype=torch.bool) for n, g in groups.items()}
    return filters.next_units(groups, scores, masks, [(list(groups), sparsity)], allocate, **options)


@pytest.mark.parametrize("allocate", [allocation.uniform, allocation.global_rank, filters.isomorphic])
def test_the_budget_is_met_exactly(allocate):
    groups = discover(Residual(), torch.randn(IMAGE))
    total = sum(g.units for g in groups.values())
    for sparsity in (0.1, 0.5, 0.8):
        masks = units(groups, sparsity, allocate)
        assert sum(int(m.sum()) for m in masks.values()) == round((1 - sparsity) * total)
        assert all(m.any() for m in masks.values())


def test_channels_of_any_module_are_cut_once():
    model, x = randomized(Residual()), torch.randn(IMAGE)
    twin, weight = deepcopy(model), model.plain[0][0].weight
    alive = prune_channels(model, 0.5, x, allocate=allocation.global_rank)
    cut(twin, structure.cut_of(discover(twin, x), alive))
    assert same(model.state_dict(), twin.state_dict())
    assert model.plain[0][0].weight is weight
    total = sum(mask.numel() for mask in alive.values())
    assert sum(int(mask.sum()) for mask in alive.values()) == total / 2


def examples(n=3):
    return [(torch.randn(IMAGE), torch.tensor([0, 3])) for _ in range(n)]


def test_criteria_that_need_data_get_it_without_a_trainer():
    model, data = randomized(Residual()).train(), examples()
    before, grads = deepcopy(model), torch.random.get_rng_state()
    couplings = discover(model, data[0][0])
    params = structure.parameters(couplings, model)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    want = filters.unit_scores(couplings, criteria.taylor, params, model=before, batches=data, loss=loss)
    alive = prune_channels(
        model, 0.5, list(IMAGE), criteria.taylor, data=iter(data), loss=nn.functional.cross_entropy
    )
    for name, mask in alive.items():
        assert want[name][mask].min() >= want[name][~mask].max()
    assert torch.equal(torch.random.get_rng_state(), grads)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for options, message in (
        ({}, "taylor asks for `batches`"),
        ({"data": data}, "taylor asks for `loss`"),
        ({"data": data, "loss": lambda y, t: y}, "a scalar tensor that depends on the weights is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_channels(before, 0.5, list(IMAGE), criteria.taylor, **options)


@pytest.mark.parametrize("of", ["parameters", "multiply_adds"])
def test_a_target_on_the_size_is_met_without_a_trainer(of):
    model, x = randomized(Residual()), torch.randn(IMAGE)
    size = lambda: structure_size(model, x, of)  # noqa: E731
    full = size()
    prune_channels(model, filters.Removed(0.4, of), x)
    assert 0.4 <= 1 - size() / full < 0.47
    with pytest.raises(ValueError, match=rf"schedule: 0.999 of the {of.replace('_', '-')} is to be removed"):
        prune_channels(model, filters.Removed(0.999, of), x)
    with pytest.raises(ValueError, match="of='bytes': allowed are 'parameters' and 'multiply_adds'"):
        filters.Removed(0.4, "bytes")


def stored(model):
    """What `torch.save` writes of the tensors, without their names and places."""
    return sum(t.nbytes for t in model.state_dict().values())


def test_a_target_on_the_bytes_of_the_weights_is_met_without_a_trainer(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model, x = randomized(Residual()).to(dtype), torch.randn(IMAGE, dtype=dtype)
        full = stored(model)
        prune_channels(model, filters.Smaller(0.6 * full), x)
        assert 0.53 * full < stored(model) <= 0.6 * full
        torch.save(model.state_dict(), tmp_path / "file")
        assert 0 < (tmp_path / "file").stat().st_size - stored(model) < 400 * len(model.state_dict())
        with pytest.raises(
            ValueError, match=r"bytes: 1 are wanted in round 1, and without all .* are \d+; allowed"
        ):
            prune_channels(model, filters.Smaller(1), x)
    before = deepcopy(model)
    with pytest.warns(UserWarning, match="nothing goes of"):
        prune_channels(model, filters.Smaller(full), x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(ValueError, match="bytes=0: allowed are sizes in bytes"):
        filters.Smaller(0)


def structure_size(model, x, of):
    """The slow way: count while the network runs."""
    if of == "parameters":
        return sum(p.numel() for p in model.parameters())
    done = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, a, y: done.append(y.numel() * m.weight[0].numel()))
        elif isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, a, y: done.append(y.numel() * m.in_features))
    model(x)
    for layer in model.modules():
        layer._forward_hooks.clear()
    return sum(done)


def test_a_target_for_each_of_several_patterns_is_met_by_each_alone():
    model, x = randomized(Residual()), torch.randn(IMAGE)
    couplings = discover(model, x)
    scores = filters.unit_scores(couplings, criteria.magnitude, structure.parameters(couplings, model))
    weights = targets.elements(model, x, couplings, "parameters")
    cost = lambda units, multiply_adds: targets.cost(couplings, units, weights)  # noqa: E731
    dense = structure.all_units(couplings)
    first = ["plain.0.0.weight"]
    rest = [name for name in couplings if name not in first]
    goals = {tuple(first): 0.1, tuple(rest): 0.3}
    units = filters.next_units(
        couplings,
        scores,
        dense,
        [(names, partial(filters.Removed(goal), 1)) for names, goal in goals.items()],
        cost=cost,
    )
    assert list(units) == list(couplings)
    for names, goal in goals.items():
        alone = {**dense, **{name: units[name] for name in names}}
        assert goal <= 1 - cost(alone, False) / cost(dense, False) < goal + 0.06


def test_an_optimizer_goes_on_after_the_cut():
    model, x = Residual(), torch.randn(IMAGE)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    prune_channels(model, 0.5, x, optimizer=optimizer)
    assert all(s.shape == p.shape for p, kept in optimizer.state.items() for s in kept.values() if s.dim())
    step()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="LBFGS keeps state"):
        prune_channels(model, 0.5, x, optimizer=torch.optim.LBFGS(model.parameters()))
    assert same(dict(model.state_dict()), dict(before))


def of_wrong_shape(params, channels):
    return {name: torch.ones(1) for name in channels}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0: allowed is 0 \(dense\) to below 1"),
        ({"sparsity": -0.1}, r"sparsity=-0.1: allowed"),
        ({"sparsity": "half"}, r"sparsity='half': allowed"),
        ({"round_to": 0}, r"round_to=0: allowed are whole numbers from 1 on"),
        ({"round_to": 8.0}, r"round_to=8.0: allowed"),
        ({"round_to": 64}, r"round_to=64, at_least=1: no channel could go. The widest layer, grouped"),
        ({"at_least": 0}, r"at_least=0: allowed"),
        ({"at_least": 24}, r"at_least=24: no channel could go"),
        ({"criterion": of_wrong_shape}, r"must give 16 scores of stem.0.weight, one for each unit"),
        ({"criterion": lambda params, channels: {}}, r"must give 16 scores of stem.0.weight"),
        ({"criterion": "magnitude"}, r"criterion='magnitude': allowed are functions"),
        ({"allocate": "uniform"}, r"allocate='uniform': allowed are functions"),
        ({"allocate": lambda scores, total: dict.fromkeys(scores, 1)}, r"were asked for"),
        ({"example_input": None}, r"its channels cannot be traced"),
        ({"calibrate": True}, r"calibrate=True: data=None; batches are needed"),
        ({"calibrate": True, "data": []}, r"calibrate=True: data holds no batch; some are needed"),
    ],
    ids=in_words,
)
def test_bad_arguments_are_refused_by_name_and_change_nothing(options, message):
    model = Residual()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_channels(model, **{"sparsity": 0.5, "example_input": IMAGE, **options})
    assert same(dict(model.state_dict()), dict(before))


def test_weights_that_are_not_finite_are_refused():
    model = Residual()
    model.plain[0][0].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"scores of plain.0.0.weight's units hold NaN or infinity"):
        prune_channels(model, 0.5, IMAGE)


def test_it_is_said_where_nothing_goes():
    with pytest.warns(UserWarning, match=r"sparsity=0.001: nothing goes of 64 units"):
        prune_channels(Residual(), 0.001, IMAGE)
    with pytest.warns(UserWarning, match=r"sparsity=0.1: nothing goes of .* with round_to=16"):
        prune_channels(Residual(), 0.1, IMAGE, round_to=16)
    prune_channels(Residual(), 0, IMAGE)  # that is what was asked for


def test_it_is_said_where_there_are_no_statistics_to_take_anew():
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match=r"calibrate=True: Sequential has no batch normalization"):
        prune_channels(model, 0.5, [3, 2], data=[torch.randn(3, 2)], calibrate=True)


def test_widths_are_rounded_up_and_never_fall_below_the_minimum():
    groups = discover(Residual(), torch.randn(IMAGE))
    left = {n: int(m.sum()) * groups[n].per_unit for n, m in units(groups, 0.5, round_to=8).items()}
    assert left == {
        "stem.0.weight": 8,
        "plain.0.0.weight": 8,
        "grouped.0.0.weight": 16,
        "grouped.1.0.weight": 16,
        "depthwise.0.0.weight": 16,
        "gate.0.weight": 4,  # all it has
    }
    assert min(int(m.sum()) for m in units(groups, 0.9, at_least=3).values()) >= 3


# ----------------------------------------------------------------------------------------------- speed


def attending():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))


def test_products_of_attentions_count_as_summarize_counts_them():
    pytest.importorskip("safetensors")
    model, x = randomized(attending()), torch.randn(2, 40, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_channels(model, filters.Removed(0.0, "multiply_adds"), x)
        full = lp.summarize(model, x).total.multiply_adds
        couplings = discover(model, x)
        weights = targets.elements(model, x, couplings, "multiply_adds")
        dense = structure.all_units(couplings)
        assert targets.cost(couplings, dense, weights) == full
        some = {name: torch.arange(len(mask)) != 1 for name, mask in dense.items()}
        counted = targets.cost(couplings, some, weights)
        cut(model, structure.cut_of(couplings, some))
    assert counted == lp.summarize(model, x).total.multiply_adds < 0.9 * full


def test_as_few_channels_go_as_make_the_network_so_many_times_as_fast():
    """The time is made up here: that of the multiply-adds."""
    asked_for = []

    def faster(sparsity):
        asked_for.append(sparsity)
        return 1 / (1 - 0.8 * sparsity)

    found = filters.Faster(2.0)(1, faster=faster)
    assert 0.625 <= found <= 0.625 + 1 / 128
    assert len(asked_for) == len(set(asked_for)) <= 10
    assert filters.Faster(2.0)(0, faster=faster) == 0.0
    assert filters.Faster(lambda round: 1 + round)(2, faster=faster) > found
    with pytest.raises(ValueError, match=r"times: 6.0 times as fast is wanted in round 1.* it is 5.00 times"):
        filters.Faster(6.0)(1, faster=faster)
    with pytest.raises(ValueError, match=r"times=0\.5"):
        filters.Faster(0.5)


def test_a_network_becomes_as_fast_as_asked_for(monkeypatch, caplog):
    """What a clock says is replaced by what is computed, so that a busy machine does not decide."""

    def computed(works, at_least):
        counts = {
            name: sum(p.numel() for p in work.args[0].args[0].parameters()) for name, work in works.items()
        }
        return {name: [float(count)] * 5 for name, count in counts.items()}

    monkeypatch.setattr(speed, "settled", computed)
    model, x = randomized(Residual()), torch.randn(IMAGE)
    before = sum(p.numel() for p in model.parameters())
    with caplog.at_level("INFO"):
        prune_channels(model, filters.Faster(1.5), x)
    assert 1.5 <= before / sum(p.numel() for p in model.parameters()) < 1.6
    assert re.search(
        r"Faster\(1.5\): without .* % of the channels the network is 1.5\d times as fast", caplog.text
    )
    with pytest.raises(ValueError, match="times: 1000 times as fast is wanted"):
        prune_channels(model, filters.Faster(1000), x)


def test_the_speed_is_that_of_the_full_size_network_over_that_of_a_cut_one():
    model = nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4)
    )
    couplings = discover(model, [256, 64])
    dense = structure.all_units(couplings)
    few = {name: torch.arange(len(mask)) < 64 for name, mask in dense.items()}
    assert speed.speed(model, [256, 64], couplings, dense)(few) > 2
    cut(model, structure.cut_of(couplings, few))
    assert speed.speed(model, [256, 64], couplings, few)(few) > 2
    full = speed.full_size(model, structure.cut_of(couplings, few))
    assert [m.out_features for m in full if isinstance(m, nn.Linear)] == [1024, 1024, 4]


# ----------------------------------------------------------------------------------------- calibration


def test_statistics_are_those_of_the_data_after_a_cut():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(16, 4) for _ in range(3)]
    rng = torch.get_rng_state()
    prune_channels(model, 0.5, [2, 4], data=data, calibrate=True)
    assert torch.equal(torch.get_rng_state(), rng)
    means = torch.stack([model[0](x).mean(0) for x in data]).mean(0)
    variances = torch.stack([model[0](x).var(0) for x in data]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert (model[1].momentum, model[1].training, int(model[1].num_batches_tracked)) == (0.1, True, 0)
    with pytest.raises(ValueError, match="calibrate=True: data=None"):
        prune_channels(model, 0.5, [2, 4], calibrate=True)


BAD = (float("nan"), -0.5, "half", None, True)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("target", "argument"),
    [(filters.Removed, "schedule"), (filters.Smaller, "bytes"), (filters.Faster, "times")],
)
def test_what_a_schedule_of_a_target_says_is_checked(target, argument, bad):
    before = deepcopy(model := randomized(Residual()))
    with pytest.raises(ValueError, match=rf"{argument}\(1\)={bad!r}: allowed are"):
        prune_channels(model, target(lambda round: bad), torch.randn(IMAGE))
    with pytest.raises(ValueError, match=rf"{argument}: its signature is \(\)"):
        prune_channels(model, target(lambda: 0.5), torch.randn(IMAGE))
    assert same(dict(model.state_dict()), dict(before.state_dict()))


def test_a_plain_schedule_is_checked_too():
    with pytest.raises(ValueError, match=r"sparsity=nan: allowed"):
        prune_channels(randomized(Residual()), lambda round: float("nan"), torch.randn(IMAGE))


def test_the_schedule_of_a_target_is_told_the_rounds():
    last = {}

    def removed(sparsity, of):
        return sparsity

    for r in (1, 2):
        last[r] = filters.Removed(lp.schedules.Geometric(to=0.75))(r, removed, rounds=2)
    assert [round(s, 6) for s in last.values()] == [0.5, 0.75]
    pruner = lp.StructuredChannelPruning(filters.Removed(lp.schedules.Geometric(to=0.4)), rounds=2)
    model = Net()
    count = sum(p.numel() for p in model.parameters())
    fitter(pruner, epochs=3).fit(model)
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * count


@pytest.mark.parametrize("criterion", [criteria.large_init_large_final, criteria.SynFlow()], ids=in_words)
def test_channels_are_scored_by_what_asks_for_masks_and_sparsity(criterion):
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(4, 6)]
    initial = None if isinstance(criterion, criteria.SynFlow) else deepcopy(model.state_dict())
    lp.prune_channels(model, 0.5, [1, 6], criterion, data=None if initial else data, initial=initial)
    assert model[0].out_features == 4


def test_an_allocation_that_asks_for_more_than_scores_is_refused():
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(4, 6)]
    with pytest.raises(ValueError, match=r"allocate=OWL\(.*\) asks for batches, .*; allowed are allocations"):
        lp.prune_channels(model, 0.5, [1, 6], criteria.wanda, allocation.OWL(), data=data)
    assert model[0].out_features == 8
