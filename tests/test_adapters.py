"""Adapters that are masked as the weights are: what is merged is what was trained, and zeros stay."""

import copy

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import adapters
from tests.networks import Net, fitter


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def trained(model, steps=5):
    x, y = torch.randn(16, 6).to(model[0].weight.dtype), torch.randint(0, 3, (16,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_merged_is_what_was_trained_to_the_bit_and_zeros_stay(dtype):
    model = network(dtype)
    masks = lp.prune(model, 0.6)
    names, identities = list(model.state_dict()), [id(p) for p in model.parameters()]
    before = copy.deepcopy(model)
    adapters.attach(model, masks, rank=2, scale=0.5)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model[::2], before[::2], strict=True))
    x = trained(model)
    was = model(x)
    adapters.merge(model)
    assert torch.equal(model(x), was)
    assert set(model.state_dict()) == set(names)
    assert {id(p) for p in model.parameters()} == set(identities)
    assert all(p.requires_grad for p in model.parameters())
    for name, mask in masks.items():
        p = model.get_parameter(name)
        dead = p[~mask]
        assert torch.equal(dead, torch.zeros_like(dead))
        assert not dead.signbit().any()
        assert not torch.equal(p[mask], before.get_parameter(name)[mask])


def test_the_update_is_the_masked_product_of_its_factors():
    model = network()
    masks = lp.prune(model, 0.6)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters.attach(model, masks, rank=2, scale=0.5)
    trained(model)
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if ".up" in n or ".down" in n}
    adapters.merge(model)
    for name, mask in masks.items():
        place = name.replace("weight", "parametrizations.weight.0")
        product = factors[f"{place}.up"] @ factors[f"{place}.down"]
        torch.testing.assert_close(model.get_parameter(name), base[name] + mask * 0.5 * product)


def test_only_the_factors_of_masked_weights_and_what_else_is_trainable_learn():
    model = network()
    model.requires_grad_(False)
    adapters.attach(model, lp.prune(model, 0.5), rank=1)
    assert all(n.endswith((".up", ".down")) for n, p in model.named_parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith((".up", ".down"))}
    adapters.merge(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_convolutions_and_a_lightning_fit():
    model = Net()
    masks = lp.prune(model, 0.5)
    adapters.attach(model, masks, rank=2)
    fitter(epochs=2).fit(model)
    adapters.merge(model)
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())
    conv = nn.Conv2d(3, 4, 3)
    masks = lp.prune(conv, 0.5)
    adapters.attach(conv, masks)
    with torch.no_grad():
        conv.parametrizations.weight[0].up.fill_(1.0)
    y = conv(torch.ones(1, 3, 5, 5))
    adapters.merge(conv)
    assert torch.equal(conv(torch.ones(1, 3, 5, 5)), y)
    assert int((conv.weight == 0).sum()) == int((~masks["weight"]).sum())


def test_the_global_generator_is_not_used_and_a_seed_draws_the_same():
    model = network()
    masks = lp.prune(model, 0.5)
    other = copy.deepcopy(model)
    state = torch.get_rng_state()
    adapters.attach(model, masks, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    adapters.attach(other, masks, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_cannot_have_an_adapter_is_refused_and_nothing_changes():
    model = network()
    masks = lp.prune(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    wrong = [
        ({"rank": 0}, masks, "rank=0"),
        ({"scale": 0.0}, masks, r"scale=0\.0"),
        ({"scale": float("nan")}, masks, "scale=nan"),
        ({"seed": -1}, masks, "seed=-1"),
        ({}, {**masks, "2.gone": masks["2.weight"]}, r"2\.gone"),
        ({}, {"0.weight": masks["2.weight"]}, r"0\.weight is torch\.bool"),
        ({}, {"0.bias": torch.ones(8, dtype=torch.bool)}, r"0\.bias is of 1 dimensions"),
    ]
    for options, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            adapters.attach(model, given, **options)
    with pytest.raises(ValueError, match="no adapters to merge"):
        adapters.merge(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"shared by 0\.weight, 1\.weight"):
        adapters.attach(tied, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
