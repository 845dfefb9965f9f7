"""Layer by layer: each layer on what the pruned ones before it give, exact budgets, nothing half changed."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation, criteria, granularity, schedules
from lightning_prune.allocation import OWL, AtLeast, apportion
from lightning_prune.criteria import SparseGPT
from lightning_prune.granularity import NM, Filter
from lightning_prune.masks import alive
from lightning_prune.selection import keep_top
from lightning_prune.updates import LeastSquares
from tests import reference_methods as oracle
from tests.naming import in_words
from tests.networks import same
from tests.reference import per_output_selection, uniform_selection
from tests.test_reaching import Residual, Stack

pytestmark = pytest.mark.filterwarnings("ignore:data. .* layers see fewer tokens")


def case(depth=2, dtype=torch.float64):
    torch.manual_seed(0)
    return Stack(depth).eval().to(dtype), [torch.randn(4, 5, 4, dtype=dtype) for _ in range(4)]


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


ORDER = ("embed", *(f"blocks.{i}.{n}" for i in range(2) for n in ("q k v", "o", "up", "down")), "head")


def slowly(model, batches, prune_layer):
    """`prune_layer(weight, inputs)` for layer after layer, on what a run of the whole model gives it."""
    masks = {}
    for group in ORDER:
        path, _, names = group.rpartition(".")
        layers = {".".join(filter(None, (path, n))): None for n in names.split()}
        inputs = []
        for name in layers:
            layers[name] = model.get_submodule(name)
            inputs = []
            handle = layers[name].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))  # noqa: B023
            for batch in batches:
                model(batch)
            handle.remove()
        for name, layer in layers.items():
            weight, mask = prune_layer(layer.weight.detach(), torch.cat(inputs).flatten(0, 1))
            layer.weight.data.copy_(weight)
            masks[f"{name}.weight"] = mask
    return masks


def half(scores):
    return keep_top(scores, scores.numel() // 2)


@pytest.mark.parametrize(
    ("allocate", "select"),
    [(allocation.uniform, uniform_selection), (allocation.per_output, per_output_selection)],
)
def test_wanda_scores_each_layer_on_what_the_pruned_ones_before_it_give(allocate, select):
    model, data = case()
    twin, before = deepcopy(model), {n: p.detach().clone() for n, p in weights(model).items()}

    def prune_layer(weight, x):
        mask = select({0: oracle.wanda_linear(weight, x)}, round(weight.numel() / 2))[0]
        return weight * mask, mask

    masks = lp.prune(model, 0.5, criteria.wanda, allocate, data=data, layer_by_layer=True)
    with torch.no_grad():
        assert same(masks, {name: slowly(twin, data, prune_layer)[name] for name in masks})
    for name, p in weights(model).items():
        assert torch.equal(p, before[name] * masks[name])
        assert bool(masks[name].any())
    at_once = lp.prune(case()[0], 0.5, criteria.wanda, allocate, data=data)
    assert not same(masks, at_once)


def test_sparsegpt_prunes_each_layer_on_what_the_pruned_ones_before_it_give():
    model, data = case()
    twin = deepcopy(model)

    def prune_layer(weight, x):
        h = x.T @ x / len(x)
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        parts = [(start, min(start + 4, len(h))) for start in range(0, len(h), 4)]
        sizes = {a: len(weight) * (b - a) for a, b in parts}
        counts = iter(apportion(weight.numel() // 2, sizes, sizes).values())
        return oracle.sparsegpt(weight, h, lambda scores: keep_top(scores, next(counts)), parts)

    masks = lp.prune(model, 0.5, SparseGPT(block=4), data=data, layer_by_layer=True)
    with torch.no_grad():
        expected = slowly(twin, data, prune_layer)
    assert same(masks, {name: expected[name] for name in masks})
    for name, p in weights(model).items():
        assert torch.allclose(p, twin.get_parameter(name), atol=1e-8)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("criterion", [criteria.wanda, criteria.ria, SparseGPT(block=4)], ids=in_words)
@pytest.mark.parametrize(
    "allocate", [None, allocation.uniform, allocation.erk, allocation.per_output, OWL(2, 0.1)], ids=in_words
)
def test_the_budget_is_met_exactly(criterion, allocate, sparsity):
    if isinstance(criterion, SparseGPT) and allocate is allocation.per_output:
        return
    model, data = case(dtype=torch.float32)
    masks = lp.prune(model, sparsity, criterion, allocate, data=data, layer_by_layer=True)
    size = sum(mask.numel() for mask in masks.values())
    assert alive(masks) == round((1 - sparsity) * size)
    for name, p in weights(model).items():
        assert not bool(p.detach().view(torch.int32)[~masks[name]].any())  # +0.0, every bit
    if allocate in (None, allocation.uniform):
        assert all(abs(int(m.sum()) - (1 - sparsity) * m.numel()) < 1 for m in masks.values())


@pytest.mark.parametrize("criterion", [criteria.wanda, SparseGPT()], ids=in_words)
def test_n_of_m_holds_in_every_group(criterion):
    model, data = case()
    masks = lp.prune(model, 0.5, criterion, granularity=NM(2, 4), data=data, layer_by_layer=True)
    for mask in masks.values():
        full = mask.shape[1] // 4 * 4
        assert bool((mask[:, :full].view(len(mask), -1, 4).sum(-1) == 2).all())
        assert bool(mask[:, full:].all())


@pytest.mark.parametrize("update", [None, LeastSquares()])
@pytest.mark.parametrize(
    ("criterion", "pattern"),
    [(criteria.wanda, granularity.single), (SparseGPT(4), granularity.single), (SparseGPT(), NM(1, 2))],
    ids=in_words,
)
def test_convolutions_groups_and_half_precision(criterion, pattern, update):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = Residual().eval()
        model.first[0].two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        model.first[1].two = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        model.second[0].two = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)
        model, data = model.to(dtype), [torch.randn(4, 3, 6, 6, dtype=dtype) for _ in range(2)]
        dense = model(data[0]).detach()
        options = {"granularity": pattern, "data": data, "layer_by_layer": True, "update": update}
        masks = lp.prune(model, 0.4, criterion, **options)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        assert float((model(data[0]).detach() - dense).norm() / dense.norm()) < 0.9
        if pattern is granularity.single:
            assert alive(masks) == round(0.6 * sum(m.numel() for m in masks.values()))


def test_survivors_that_are_updated_change_the_network_less():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)]
    model, errors = nn.Sequential(*layers), {}
    data = [torch.randn(100, 8) @ torch.randn(8, 32) / 4 for _ in range(2)]  # inputs that depend on others
    for name, criterion, update in (
        ("magnitude", criteria.magnitude, None),
        ("magnitude, refit", criteria.magnitude, LeastSquares()),
        ("wanda", criteria.wanda, None),
        ("wanda, refit", criteria.wanda, LeastSquares()),
        ("sparsegpt", SparseGPT(), None),
    ):
        net = deepcopy(model)
        by_layer = criterion is not criteria.magnitude or update is not None
        how = {"data": data, "layer_by_layer": True, "update": update} if by_layer else {}
        lp.prune(net, 0.6, criterion, allocation.uniform, **how)
        errors[name] = sum(float((net(x) - model(x)).detach().square().sum()) for x in data)
    for name in ("magnitude", "wanda"):
        assert errors[f"{name}, refit"] < errors[name], errors
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"]), errors


def test_the_error_of_a_layer_is_never_larger_after_an_update():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer, x = nn.Linear(12, 6, bias=False).to(dtype), torch.randn(40, 12).to(dtype)
        dense = layer.weight.detach().double()
        plain, fitted = deepcopy(layer), deepcopy(layer)
        options = {"data": [x], "allocate": allocation.uniform, "criterion": criteria.wanda}
        masks = lp.prune(plain, 0.5, **options)
        assert same(lp.prune(fitted, 0.5, **options, layer_by_layer=True, update=LeastSquares()), masks)
        errors = [
            (x.double() @ (net.weight.detach().double() - dense).T).square().sum(0) for net in (fitted, plain)
        ]
        assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
        assert float(errors[0].sum()) < float(errors[1].sum())


def test_a_criterion_of_ones_own_and_mappings_as_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, *, x, scale):
            return self.two(self.one(x) * scale)

    seen = []

    def mine(params, batches, forward, model, masks, sparsity):
        seen.append((list(params), list(masks), len(batches), sparsity))
        return criteria.magnitude(params)

    data = [{"x": torch.randn(2, 4), "scale": torch.ones(1)}] * 3
    lp.prune(Named(), 0.5, mine, data=data, layer_by_layer=True)
    assert seen == [([f"{n}.weight"], [f"{n}.weight"], 3, 0.5) for n in ("one", "two")]


@pytest.mark.parametrize("criterion", [criteria.wanda, SparseGPT(4)], ids=in_words)
@pytest.mark.parametrize("pattern", [granularity.single, NM(2, 4)], ids=in_words)
def test_the_dead_of_a_pruning_before_stay_dead_and_count(criterion, pattern):
    model, data = case(dtype=torch.float32)
    first = lp.prune(model, 0.3, criteria.Random(), granularity=granularity.single)
    options = {"data": data, "layer_by_layer": True, "granularity": pattern, "masks": first}
    masks = lp.prune(model, 0.5, criterion, **options)
    assert not any(bool((masks[name] & ~first[name]).any()) for name in masks)
    assert all(not bool(p.detach()[~masks[name]].any()) for name, p in weights(model).items())
    if pattern is granularity.single:
        assert alive(masks) == round(0.5 * sum(mask.numel() for mask in masks.values()))
        again = lp.prune(model, 0.4, criterion, **{**options, "masks": masks})
        assert same(again, masks)


def test_a_schedule_says_how_far():
    model, data = case()
    masks = lp.prune(model, schedules.Geometric(0.3), criteria.wanda, data=data, layer_by_layer=True)
    assert alive(masks) == round(0.7 * sum(mask.numel() for mask in masks.values()))


# ----------------------------------------------------------------------------------------------- bad input


def refused(message, model=None, batches=None, error=ValueError, **options):
    """Nothing has changed, and no hook stays."""
    net, batches = (model, batches) if model is not None else case(dtype=torch.float32)
    before = deepcopy({**dict(net.named_parameters()), **dict(net.named_buffers())})
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()]
    options = {"criterion": criteria.wanda, "data": batches, "layer_by_layer": True, **options}
    with pytest.raises(error, match=message):
        lp.prune(net, **{"sparsity": 0.5, **options})
    assert same({**dict(net.named_parameters()), **dict(net.named_buffers())}, before)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()]
    assert not net.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "layer_by_layer=True: there are no data"),
        ({"data": []}, "layer_by_layer=True: there are no data"),
        ({"allocate": allocation.global_rank}, r"global_rank.* compares scores of all layers, which do not"),
        ({"allocate": allocation.lamp}, r"lamp.* compares scores of all layers"),
        ({"allocate": allocation.class_distributed}, r"class_distributed.* compares scores of all layers"),
        ({"allocate": AtLeast(2, of=allocation.global_rank)}, "compares scores of all layers"),
        ({"allocate": lambda scores, total: dict.fromkeys(scores, 1)}, "gave 14 survivors; allowed are the"),
        ({"criterion": criteria.saliency}, "asks for grads, of the whole network"),
        ({"criterion": criteria.taylor}, "asks for loss, of the whole network"),
        ({"sparsity": schedules.TopK(5)}, r"TopK.* reads the scores of all layers"),
        (
            {"criterion": SparseGPT(), "allocate": allocation.per_output},
            "counts the survivors of each",
        ),
        ({"criterion": SparseGPT(), "granularity": Filter()}, "allowed are single weights and NM"),
        (
            {"criterion": SparseGPT(), "granularity": NM(), "sparsity": 0.7},
            "sparsities up to 0.5 here",
        ),
        (
            {"criterion": SparseGPT(), "layer_by_layer": False},
            r"Allowed is lp.prune\(model, crit",
        ),
        ({"update": LeastSquares(), "layer_by_layer": False}, "update: .* needs what reaches a layer"),
        ({"sparsity": 1.5}, "sparsity=1.5: allowed is 0"),
    ],
)
def test_what_cannot_be_done_layer_by_layer_is_refused_with_the_reason(options, message):
    refused(message, **options)


def test_sparsegpt_is_refused_in_training_before_it_begins():
    from tests.test_bad_input import refused as refused_in_training

    pruner = lp.IterativeMagnitudePruning(schedules.Geometric(0.3), rounds=2, criterion=SparseGPT())
    refused_in_training(r"SparseGPT\(.*\) chooses masks and changes the survivors", pruner)


def test_layers_that_no_data_reach_are_refused_by_name():
    model, data = case(dtype=torch.float32)
    model.unused = nn.Linear(3, 3)
    refused(r"no data reach the layers of unused.weight\. .* Exclude these", model, data)
    masks = lp.prune(model, 0.5, criteria.wanda, exclude=["unused*"], data=data, layer_by_layer=True)
    assert len(masks) == 14


def test_whatever_fails_on_the_way_the_model_is_as_it_was():
    model, data = case(dtype=torch.float32)
    data[1][0, 0, 0] = torch.nan
    refused("what reaches the layer of embed.weight holds NaN", model, data, criterion=SparseGPT())
    calls = []

    def fails_late(params, batches):
        calls.append(list(params))
        if len(calls) > 4:
            raise KeyboardInterrupt("five layers")
        return criteria.magnitude(params)

    model, data = case(dtype=torch.float32)
    refused("five layers", model, data, KeyboardInterrupt, criterion=fails_late)
    calls.clear()
    wild = lambda weight, mask, moments: weight * torch.inf  # noqa: E731
    masks = lp.prune(model, 0.5, criteria.wanda, data=data, layer_by_layer=True, update=wild)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())  # no output is made worse
    assert alive(masks) == round(0.5 * sum(m.numel() for m in masks.values()))


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was():
    model, data = nn.Sequential(nn.Linear(40, 30)).eval(), [torch.randn(6, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused("see fewer tokens", model, data, UserWarning, criterion=SparseGPT())


@pytest.mark.filterwarnings("default:data. ")
def test_fewer_tokens_than_inputs_are_said_and_regularized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5))
    with pytest.warns(UserWarning, match="2 of 2 layers see fewer tokens, .* 0.weight for one"):
        lp.prune(model, 0.5, SparseGPT(), data=[torch.randn(6, 40)], layer_by_layer=True)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_layer_by_layer_without_effect_is_said():
    model, data = case()
    with pytest.warns(UserWarning, match="layer_by_layer=True has no effect: .*magnitude"):
        masks = lp.prune(deepcopy(model), 0.5, data=data, layer_by_layer=True)
    assert same(masks, lp.prune(model, 0.5, allocate=allocation.uniform))


def test_pruning_layer_by_layer_leaves_everything_else_alone():
    model, data = case(dtype=torch.float32)
    others = deepcopy({n: t for n, t in model.state_dict().items() if n not in weights(model)})
    model.embed.bias.requires_grad_(False)
    state = torch.get_rng_state()
    lp.prune(model, 0.5, SparseGPT(), data=data, layer_by_layer=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert same({n: model.state_dict()[n] for n in others}, others)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed.bias"]
    assert all(p.grad is None for p in model.parameters())
