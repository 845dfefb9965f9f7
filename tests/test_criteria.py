"""Criteria: equal to their oracles, whatever they need gathered without a trace."""

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.evidence import undisturbed
from lightning_prune.layers import prunable
from lightning_prune.pruning import next_masks
from lightning_prune.selection import keep_top
from tests import reference_methods as oracle
from tests.networks import same

LINEAR = {
    "Linear": lambda: (nn.Linear(4, 3), False),
    "transformers' Conv1D": lambda: (pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4), True),
}


def weights(model):
    return {name: p.detach().clone() for name, p in prunable(model).items()}


def dense(params):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data(n=3, inputs=5, classes=3):
    return [(torch.randn(6, inputs), torch.randint(0, classes, (6,))) for _ in range(n)]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_gradients_are_those_of_backward_averaged_over_the_batches():
    model, batches = mlp(), data()
    sum(loss_of(model, batch) for batch in batches).div(len(batches)).backward()
    grads = {name: p.grad for name, p in prunable(model).items()}
    seen = {}

    def spy(params, grads):
        seen.update(grads)
        return criteria.magnitude(params)

    lp.prune(model, 0.5, spy, data=batches, loss=nn.functional.cross_entropy)
    assert all(torch.allclose(seen[name], grads[name], atol=1e-6) for name in grads)


def test_first_order_criteria():
    model, batches = mlp(), data()
    params = weights(model)
    per_batch = []
    for batch in batches:
        twin = deepcopy(model)
        loss_of(twin, batch).backward()
        per_batch.append({name: p.grad for name, p in prunable(twin).items()})
    mean = {name: sum(g[name] for g in per_batch) / 3 for name in params}
    salient, sensitive = criteria.saliency(params, mean), criteria.snip(params, mean)
    total = sum(s.sum() for s in salient.values())
    for name, w in params.items():
        assert torch.equal(salient[name], (w * mean[name]).abs())
        assert torch.allclose(sensitive[name], salient[name] / total)
        squares = sum((w * g[name]) ** 2 for g in per_batch) / 3
        assert torch.allclose(criteria.taylor(params, model, batches, loss_of)[name], squares, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_w_times_the_hessian_times_the_gradient(temperature):
    model, batches = mlp().double(), [(x.double(), y) for x, y in data()]
    params = weights(model)

    def loss(flat):
        parts = flat.split([w.numel() for w in params.values()])
        tensors = {n: p.view(w.shape) for (n, w), p in zip(params.items(), parts, strict=True)}
        logits = [torch.func.functional_call(model, tensors, (x,)) / temperature for x, _ in batches]
        losses = (nn.functional.cross_entropy(z, y) for z, (_, y) in zip(logits, batches, strict=True))
        return sum(losses) / len(batches)

    expected = oracle.grasp(loss, torch.cat([w.flatten() for w in params.values()]))
    scores = criteria.GraSP(temperature)(params, model, batches, loss_of)
    assert torch.allclose(torch.cat([s.flatten() for s in scores.values()]), expected, rtol=1e-6, atol=1e-15)
    assert any(bool((s < 0).any()) for s in scores.values())
    assert not model._forward_hooks


def test_grasp_refuses_logits_that_the_loss_does_not_compute():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)})
    with pytest.raises(ValueError, match="logits='unused': the loss does not call this module"):
        criteria.GraSP(logits="unused")(weights(model), model, data(), lambda m, b: loss_of(m["used"], b))


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
@pytest.mark.parametrize("rounds", [1, 5, 100])
def test_synflow_keeps_what_its_iteration_keeps(rounds, sparsity):
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((6, 9), (9, 8), (8, 4)))).double()
    params = weights(model)
    masks = lp.prune(model, sparsity, criteria.SynFlow(rounds, input_shape=(6,)), lp.allocation.AtLeast(0))
    expected = oracle.synflow([w.numpy() for w in params.values()], 1 - sparsity, rounds)
    assert all(np.array_equal(mask.numpy(), e) for mask, e in zip(masks.values(), expected, strict=True))


def test_synflow_ranks_the_dead_by_the_round_of_their_death():
    model = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Linear(20, 4, bias=False))
    params = weights(model)
    scores = criteria.SynFlow(10, (6,))(params, model, dense(params), sparsity=0.9)
    flat = torch.cat([s.flatten() for s in scores.values()])
    for k in range(1, 11):  # score k - 11 or more: survived round k - 1
        assert int((flat >= k - 11).sum()) == round(200 * 0.1 ** ((k - 1) / 10))
    assert int((flat >= 0).sum()) == round(200 * 0.1 ** (9 / 10))


def test_synflow_survives_batch_norm_and_depth_and_leaves_the_model_alone():
    blocks = [m for _ in range(30) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Flatten(), nn.Linear(8 * 16, 5))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):  # as after training; means as large would silence a network
            m.running_mean.uniform_(0, 50)
            m.running_var.uniform_(0.5, 2)
    before = deepcopy(model.state_dict())
    params = weights(model)
    with undisturbed(model):
        scores = criteria.SynFlow(2, (3, 6, 6))(params, model, dense(params), sparsity=0.5)
    assert same(dict(model.state_dict()), dict(before))
    assert model.training
    assert all(bool(s.isfinite().all()) and bool((s > 0).any()) for s in scores.values())


def test_synflow_goes_on_from_the_masks_it_finds():
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 4, bias=False))
    params = prunable(model)
    half = next_masks(params, dense(params), [(list(params), 0.5)])
    masks = next_masks(params, half, [(list(params), 0.8)], criteria.SynFlow(7, (6,)), model=model)
    assert sum(int(m.sum()) for m in masks.values()) == 18
    assert not any(bool((masks[n] & ~half[n]).any()) for n in masks)


def test_wanda_of_a_linear_layer_on_tokens():
    layer, x = nn.Linear(4, 3), torch.randn(5, 7, 4)
    scores = criteria.wanda({"weight": layer.weight.detach()}, layer, [x[:2], x[2:]], lambda m, b: m(b))
    assert torch.allclose(scores["weight"], oracle.wanda_linear(layer.weight.detach(), x.reshape(-1, 4)))


def test_wanda_of_the_linear_layer_of_gpt2_whose_weight_is_inputs_x_outputs():
    layer, x = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4), torch.randn(5, 7, 4)
    scores = criteria.wanda({"weight": layer.weight.detach()}, layer, [x], lambda m, b: m(b))["weight"]
    assert torch.allclose(scores, oracle.wanda_linear(layer.weight.detach().T, x.reshape(-1, 4)).T)


def test_wanda_of_a_subclass_is_by_what_it_computes():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(torch.cat([x, x]))

    layer, x = Twice(4, 3), torch.randn(5, 4)
    scores = criteria.wanda({"weight": layer.weight.detach()}, layer, [x], lambda m, b: m(b))["weight"]
    assert torch.allclose(scores, 2**0.5 * oracle.wanda_linear(layer.weight.detach(), x))


def test_wanda_does_not_overflow_in_half_precision():
    layer, x = nn.Linear(4, 3).half(), torch.full((64, 4), 300.0).half()
    scores = criteria.wanda({"weight": layer.weight.detach()}, layer, [x], lambda m, b: m(b))["weight"]
    assert torch.allclose(scores, layer.weight.detach().float().abs() * 2400, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}])
def test_wanda_of_a_convolution(options):
    layer, x = nn.Conv2d(4, 6, 3, **options), torch.randn(3, 4, 9, 9)
    scores = criteria.wanda({"weight": layer.weight.detach()}, layer, [x], lambda m, b: m(b))
    assert torch.allclose(scores["weight"], oracle.wanda_conv(layer, x), atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_ria_of_a_linear_layer(name):
    torch.manual_seed(1)
    layer, flip = LINEAR[name]()
    layer.double()
    with torch.no_grad():
        layer.weight[0] = 0  # an output, or an input, without weights
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    scores = criteria.ria({"weight": layer.weight.detach()}, layer, [x[:2], x[2:]], lambda m, b: m(b))
    weight = layer.weight.detach().T if flip else layer.weight.detach()
    expected = oracle.ria(weight, x.reshape(-1, 4))
    assert torch.allclose(scores["weight"], expected.T if flip else expected, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}])
def test_ria_of_a_convolution_is_that_of_the_matrix_of_each_group(options):
    layer, x = nn.Conv2d(4, 6, 3, **options).double(), torch.randn(3, 4, 9, 9, dtype=torch.float64)
    scores = criteria.ria({"weight": layer.weight.detach()}, layer, [x], lambda m, b: m(b))["weight"]
    patches = nn.functional.unfold(x, 3, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
    groups = zip(
        layer.weight.detach().flatten(1).chunk(layer.groups), patches.chunk(layer.groups, dim=1), strict=True
    )
    expected = torch.cat([oracle.ria(weight, inputs) for weight, inputs in groups])
    assert torch.allclose(scores.flatten(1), expected, atol=1e-12)


def test_ria_does_not_overflow_in_half_precision():
    layer, x = nn.Linear(4, 3), torch.full((64, 4), 300.0)
    forward = lambda m, b: m(b)  # noqa: E731
    exact = criteria.ria({"weight": layer.weight.detach().half().float()}, layer, [x], forward)["weight"]
    layer.half()
    scores = criteria.ria({"weight": layer.weight.detach()}, layer, [x.half()], forward)["weight"]
    assert torch.allclose(scores, exact, rtol=1e-2)


def test_wanda_refuses_a_layer_that_is_not_called():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)})
    with pytest.raises(ValueError, match=r"criterion: the layers of unused.weight are not called"):
        criteria.wanda(weights(model), model, [torch.randn(2, 5)], lambda m, b: m["used"](b))


def test_large_init_large_final_keeps_the_same_percentile_of_both():
    generator = torch.Generator().manual_seed(0)
    now, start = torch.randn(2, 30, 5, generator=generator)
    alive = torch.rand(30, 5, generator=generator) < 0.8
    scores = criteria.large_init_large_final({"w": now}, {"w": start}, {"w": alive})["w"].masked_fill(
        ~alive, -9
    )
    compared = 0
    for keep in range(1, int(alive.sum())):
        expected = oracle.large_init_large_final(now, start, alive, keep)
        if expected is not None:
            compared += 1
            assert torch.equal(keep_top(scores, keep), expected)
    assert compared > 50


def test_criteria_of_the_initial_weights():
    now, start = {"w": torch.tensor([[-3.0, 1.0]])}, {"w": torch.tensor([[1.0, -2.0]])}
    assert criteria.large_init(now, start)["w"].tolist() == [[1, 2]]
    assert criteria.magnitude_increase(now, start)["w"].tolist() == [[2, -1]]
    assert criteria.movement(now, start)["w"].tolist() == [[4, 3]]
    assert criteria.small_final(now)["w"].tolist() == [[-3, -1]]
    masks = lp.prune(
        nn.Linear(2, 1), 0.5, criteria.large_init, initial={"weight": torch.tensor([[1.0, -2.0]])}
    )
    assert masks["weight"].tolist() == [[False, True]]


def test_random_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone():
    params = {"a": torch.zeros(40, 5), "b": torch.zeros(7)}
    before = torch.get_rng_state()
    first, again, other = (criteria.Random(seed)(params) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[n], again[n]) for n in params)
    assert not torch.equal(first["a"], other["a"])
    assert 0.4 < float(first["a"].mean()) < 0.6


class Eventful(nn.Module):
    """Changes everything it can when it is run."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.inner.bias.requires_grad_(False)
        self.count, self.seen, self.best, self.mean = 0, [], {}, torch.zeros(3)

    def forward(self, x):
        out = self.drop(self.norm(self.inner(x)))
        self.count += 1
        self.seen.append(x)
        self.best["x"] = x
        self.mean += out.detach().mean(0)
        self.new = out
        random.random(), np.random.rand()
        return out


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "criterion",
    [criteria.snip, criteria.taylor, criteria.wanda, criteria.GraSP()],
    ids=["snip", "taylor", "wanda", "grasp"],
)
def test_evidence_is_gathered_without_a_trace(criterion, mode):
    model = Eventful().train(mode)
    model.inner.weight.requires_grad_(False)  # frozen weights have scores too
    model.norm.weight.grad = torch.full((3,), 7.0)
    batches, mean = data(), model.mean.clone()
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    twin = deepcopy(model)
    loss = None if criterion is criteria.wanda else nn.functional.cross_entropy
    masks = lp.prune(model, 0.4, criterion, data=batches, loss=loss)
    twin.inner.weight.data[~masks["inner.weight"]] = 0
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert same(model.mean, mean)
    assert (model.count, model.seen, model.best, hasattr(model, "new")) == (0, [], {}, False)
    assert model.training is model.drop.training is mode
    assert not model.inner.weight.requires_grad
    assert model.inner.weight.grad is None
    assert model.norm.weight.grad.tolist() == [7.0] * 3
    assert not model._forward_hooks
    assert not model.inner._forward_pre_hooks
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])


@pytest.mark.parametrize(
    ("criterion", "name"),
    [(criteria.snip, "grads"), (criteria.wanda, "batches"), (criteria.movement, "initial")],
)
def test_missing_evidence_is_named(criterion, name):
    with pytest.raises(ValueError, match=f"asks for `{name}`, and there is none here"):
        lp.prune(mlp(), 0.5, criterion)


def test_initial_weights_must_fit():
    for initial in ({}, {"0.weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match=r"initial: 0.weight of shape \(7, 5\) is needed"):
            lp.prune(mlp(), 0.5, criteria.movement, initial=initial)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: criteria.Ln(0), "n=0: allowed are finite numbers above 0"),
        (lambda: criteria.GraSP(temperature=0), "temperature=0: allowed are finite numbers above 0"),
        (lambda: criteria.SynFlow(rounds=0), "rounds=0: allowed are whole numbers from 1 on"),
    ],
)
def test_bad_parameters_are_refused_when_constructed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
