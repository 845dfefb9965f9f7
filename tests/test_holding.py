"""Dead weights stay dead, under every optimizer, and the others train as if the dead were not there."""

import gc
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import lightning_prune as lp
from lightning_prune.holding import ELEMENTWISE, Handle, check_fit, hold, mixes_weights
from tests.naming import in_words
from tests.networks import bits_of, dead_are_zero, same, samples

OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value is not torch.optim.Optimizer
}
REFUSED = {
    "SparseAdam": "steps only sparse gradients, which no prunable layer has: only embeddings make them",
}
OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "ASGD": {"lr": 0.1, "weight_decay": 0.1, "t0": 2},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1, "fused": True},
    "Adamax": {"lr": 0.05, "weight_decay": 0.1},
    "LBFGS": {"lr": 0.2, "max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "NAdam": {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.05, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "centered": True},
    "Rprop": {"lr": 0.01},
}
RUNNING = sorted(set(OPTIMIZERS) - set(REFUSED))


class Masked(nn.Module):
    """The oracle: the same network with its masks in the forward pass."""

    def __init__(self, model, masks):
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, x):
        weights = {n: p * self.masks[n] for n, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, (x,))


def network():
    return nn.Sequential(nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False))


def train(model, optimizer, steps=6, clip=None):
    x, y = samples().tensors
    for i in range(steps):
        batch = slice(8 * (i % 3), 8 * (i % 3) + 8)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            if clip:
                clip(model.parameters())
            return loss

        optimizer.step(closure)
        yield


@torch.no_grad()
def put_on(model, masks):
    for name, p in model.named_parameters():
        p[~masks[name]] = 0


def test_every_optimizer_of_torch_runs_or_is_refused_with_a_reason():
    assert set(OPTIMIZERS) <= set(OPTIONS) | set(REFUSED), "a new optimizer: give it its options here"
    model = network()
    refusing = train(model, torch.optim.SparseAdam(model.parameters()), 1)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):  # torch itself says so
        next(refusing)


@pytest.mark.parametrize("name", RUNNING)
def test_dead_weights_stay_dead_and_the_living_do_not_feel_them(name):
    model = network()
    masks = lp.prune(model, 0.6)
    theirs = deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    reference = OPTIMIZERS[name](theirs.parameters(), **OPTIONS[name])
    handle, start = hold(model, optimizer, masks), deepcopy(model.state_dict())
    for _ in zip(train(model, optimizer), train(Masked(theirs, masks), reference), strict=True):
        assert dead_are_zero(dict(model.named_parameters()), masks)
        put_on(theirs, masks)
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert all(bool((p != start[n]).any()) for n, p in model.named_parameters())
    handle.remove()


@pytest.mark.parametrize("name", RUNNING)
def test_without_gradient_masks_only_elementwise_optimizers_leave_the_living_alone(name):
    """The list of those whose gradients need no mask is right: the dead gradient reaches no living weight."""
    model = network()
    masks = lp.prune(model, 0.6)
    theirs = deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    reference = OPTIMIZERS[name](theirs.parameters(), **OPTIONS[name])
    Handle(dict(model.named_parameters()), masks, [optimizer], gradients=False)
    equal = True
    for _ in zip(train(model, optimizer), train(Masked(theirs, masks), reference), strict=True):
        put_on(theirs, masks)
        pairs = zip(model.parameters(), theirs.parameters(), strict=True)
        equal &= all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in pairs)
    assert equal != mixes_weights(optimizer)


def test_a_subclass_of_an_elementwise_optimizer_may_mix_weights():
    class Mine(torch.optim.SGD):
        pass

    p = [nn.Parameter(torch.ones(2, 2))]
    assert mixes_weights(Mine(p))
    assert not mixes_weights(torch.optim.SGD(p))
    assert {c.__name__ for c in ELEMENTWISE} <= set(OPTIMIZERS)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_pruned_weights_contribute_nothing_to_the_clipped_gradient(kind):
    clip = {
        "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.05),
        "value": lambda params: nn.utils.clip_grad_value_(params, 0.02),
    }[kind]
    model = network()
    masks = lp.prune(model, 0.6)
    theirs = deepcopy(model)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, theirs))
    hold(model, optimizer, masks)
    pairs = zip(
        train(model, optimizer, clip=clip), train(Masked(theirs, masks), reference, clip=clip), strict=True
    )
    for _ in pairs:
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_gradient_is_masked_as_soon_as_it_exists_and_while_it_accumulates():
    model = network()
    masks = lp.prune(model, 0.6)
    hold(model, torch.optim.SGD(model.parameters()), masks)
    x, y = samples().tensors
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        assert dead_are_zero({n: p.grad for n, p in model.named_parameters()}, masks)


def test_a_weight_that_is_unfrozen_later_has_its_gradient_masked_too():
    model = network()
    masks = lp.prune(model, 0.6)
    model[0].weight.requires_grad_(False)
    handle = hold(model, torch.optim.SGD(model.parameters()), masks)
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    x, y = samples().tensors
    nn.functional.cross_entropy(model(x), y).backward()
    assert dead_are_zero({n: p.grad for n, p in model.named_parameters()}, masks)
    handle.remove()


@pytest.mark.parametrize("name", RUNNING)
def test_an_optimizer_forgets_what_it_knew_of_weights_as_they_die(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), **OPTIONS[name])
    dense = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    handle = hold(model, optimizer, dense)
    list(train(model, optimizer, 3))
    before = deepcopy(optimizer.state_dict()["state"])
    masks = lp.prune(model, 0.6)
    handle.set(masks)
    seen = 0
    for i, (n, p) in enumerate(model.named_parameters()):
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value) and value.shape == p.shape:
                seen += 1
                settings = optimizer.param_groups[0]  # a fresh Rprop and Adagrad begin with these
                fresh = {"step_size": "lr", "sum": "initial_accumulator_value"}.get(key)
                begins = 0 if fresh is None else settings[fresh]
                assert bool((value[~masks[n]] == begins).all()), key
                assert torch.equal(value[masks[n]], before[i][key][masks[n]]), key
    if name == "LBFGS":
        dead = ~torch.cat([masks[n].flatten() for n, _ in model.named_parameters()])
        known = optimizer.state[model[0].weight]
        for vector in (known["d"], known["prev_flat_grad"], *known["old_dirs"], *known["old_stps"]):
            seen += 1
            assert not bool(vector[dead].any())
            assert bool(vector[~dead].any())
    assert seen or name == "Adafactor"  # which keeps rows and columns


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, -0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=in_words)
def test_dead_weights_are_plus_zero_after_a_step_whatever_they_were(odd, dtype):
    model = nn.Linear(4, 4, bias=False).to(dtype)
    masks = lp.prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold(model, optimizer, masks)
    with torch.no_grad():
        model.weight[~masks["weight"]] = odd
    optimizer.step()
    assert not bits_of(model.weight)[~masks["weight"]].any()


def test_channels_last_weights_are_held():
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    masks = lp.prune(model, 0.7)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    hold(model, optimizer, masks)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert dead_are_zero({"weight": model.weight}, masks)


def test_several_optimizers_are_held():
    model = network()
    masks = lp.prune(model, 0.6)
    optimizers = [torch.optim.SGD([p], lr=0.1, weight_decay=0.1) for p in model.parameters()]
    hold(model, optimizers, masks)
    x, y = samples().tensors
    for optimizer in (*optimizers, *optimizers):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert dead_are_zero(dict(model.named_parameters()), masks)


def test_a_removed_hold_leaves_nothing_behind():
    model = network()
    before, keys = [vars(p).copy() for p in model.parameters()], list(model.state_dict())
    masks = lp.prune(model, 0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = hold(model, optimizer, masks)
    list(train(model, optimizer, 2))
    handle.remove()
    handle.remove()  # twice does no harm
    assert not optimizer._optimizer_step_post_hooks
    assert [vars(p) for p in model.parameters()] == before
    assert list(model.state_dict()) == keys
    list(train(model, optimizer, 1))
    for n, p in model.named_parameters():  # they live again
        assert bool(p[~masks[n]].any())
        assert bool(p.grad[~masks[n]].any())


def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    good = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    before = deepcopy(model.state_dict())
    for masks, message in (
        (
            {**good, "3.weight": good["0.weight"]},
            r"masks: 3\.weight: allowed are names of the model's parameters.*0\.weight, 2\.weight",
        ),
        (
            {**good, "0.weight": good["0.weight"].t()},
            r"masks: 0\.weight is torch.bool \(6, 12\); allowed is .*\(12, 6\)",
        ),
        (
            {**good, "0.weight": good["0.weight"].float()},
            r"masks: 0\.weight is torch.float32 .*allowed is torch.bool",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hold(model, optimizer, masks)
        assert same(model.state_dict(), before)
        assert not optimizer._optimizer_step_post_hooks
    handle = hold(model, optimizer, {"0.weight": good["0.weight"]})  # some of the weights is enough
    state = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"masks: 2\.weight is in the masks, not in the model"):
        handle.set(good)
    assert same(model.state_dict(), state)
    with pytest.raises(ValueError, match=r"masks: a is in the model, not in the masks"):
        check_fit({}, {"a": torch.ones(1)})


def nothing_held():
    return hold(nn.Linear(4, 4), [], {"weight": torch.ones(4, 4, dtype=torch.bool)})


def test_a_hold_that_is_dropped_with_its_model_leaves_nothing_behind():
    gc.collect()
    nothing_held().remove()
    before = len(torch_optimizer._global_optimizer_post_hooks)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold(model, optimizer, {"weight": torch.rand(4, 4) < 0.5})  # without a handle it holds all the same
    gc.collect()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert int((model.weight == 0).sum()) > 0
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del model, optimizer
    gc.collect()
    nothing_held().remove()  # the hook of one that was collected goes when the next comes or goes
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


def test_a_hold_that_python_collects_while_another_optimizer_steps_does_not_disturb_that_step():
    """Torch goes through its hooks then, and Python's collector may run at any moment."""
    held = [nothing_held()]

    def collect(*args):
        held.clear()
        gc.collect()

    handle = torch_optimizer.register_optimizer_step_post_hook(collect)
    later = torch_optimizer.register_optimizer_step_post_hook(lambda *args: None)
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], 0.5).step()
    assert weight.item() == 0.5
    handle.remove()
    later.remove()


@pytest.mark.parametrize("given", [None, "SGD", [None], 3], ids=in_words)
def test_what_is_no_optimizer_and_what_are_no_masks_is_refused_by_hold(given):
    model = nn.Linear(4, 4)
    masks = {"weight": torch.ones(4, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"optimizer=.*: allowed are a torch optimizer, or a list"):
        hold(model, given, masks)
    with pytest.raises(ValueError, match=r"masks=.*: allowed are masks by name"):
        hold(model, torch.optim.SGD(model.parameters(), 0.1), given)
    assert not model.weight._post_accumulate_grad_hooks


class ByData(torch.optim.SGD):
    """An optimizer of the old kind: it writes by `.data`, which autograd does not count."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, ByData])
def test_a_graph_through_weights_that_were_not_stepped_can_still_go_backward(kind):
    def trained(held):
        torch.manual_seed(0)
        g, d = nn.Linear(3, 4), nn.Linear(4, 2)
        shared = nn.Linear(4, 4)  # both optimizers have it, and only G's changes it
        model = nn.ModuleDict({"g": g, "d": d, "s": shared})
        masks = lp.prune(model, sparsity=0.5)
        of_g = kind([*g.parameters(), *shared.parameters()], lr=0.1)
        of_d = kind([*d.parameters(), *shared.parameters()], lr=0.1)
        handle = hold(model, [of_g, of_d], masks) if held else None
        for _ in range(3):
            for o in (of_d, of_g):  # what G made is used after D was stepped
                o.zero_grad()
            made = shared(g(torch.randn(8, 3)))
            d(made.detach()).square().sum().backward()
            of_d.step()
            versions = [p._version for p in (*g.parameters(), *shared.parameters())]
            of_g.zero_grad()
            d(made).square().sum().backward()
            assert versions == [p._version for p in (*g.parameters(), *shared.parameters())]
            of_g.step()
            if held:
                assert all(not bool(model.get_parameter(n)[~m].any()) for n, m in masks.items())
        if handle:
            handle.remove()
        return model

    trained(held=False)  # torch itself allows it
    trained(held=True)


def test_new_masks_count_as_a_change_of_the_weights():
    model = nn.Linear(3, 2)
    masks = lp.prune(model, sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = hold(model, optimizer, masks)
    x = torch.randn(4, 3, requires_grad=True)
    out = model(x).sum()
    handle.set({name: ~mask for name, mask in masks.items()})
    with pytest.raises(RuntimeError, match="inplace"):
        out.backward()
    handle.remove()
