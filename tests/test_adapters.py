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
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == identities
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
        ({}, {**masks, "0.bias": torch.ones(8, dtype=torch.bool)}, r"0\.bias is of 1 dimensions"),
        ({}, None, "masks=None"),
        ({}, [masks], r"masks=\["),
        ({}, {}, r"masks=\{\}"),
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
    small = nn.Linear(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"weight is of torch\.float8_e4m3fn"):
        adapters.attach(small, {"weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="model='net'"):
        adapters.attach("net", masks)


def test_a_copy_merges_on_its_own():
    model = network()
    adapters.attach(model, lp.prune(model, 0.5), rank=2)
    trained(model)
    other = copy.deepcopy(model)
    x = torch.randn(4, 6)
    was = model(x)
    adapters.merge(model)
    assert torch.equal(other(x), was)
    adapters.merge(other)
    assert torch.equal(model(x), was)
    assert torch.equal(other(x), was)
    assert type(other[0]) is nn.Linear


def test_a_fit_goes_on_after_merging_with_the_optimizer_state_of_before():
    model = network()
    masks = lp.prune(model, 0.5)
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    adapters.attach(model, masks)
    adapters.merge(model)
    again = torch.optim.Adam(model.parameters())
    again.load_state_dict(state)
    assert all(again.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_under_autocast_what_is_merged_is_what_was_trained():
    model = network()
    adapters.attach(model, lp.prune(model, 0.5), rank=2)
    x = trained(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        was = model(x)
        adapters.merge(model)
        assert torch.equal(model(x), was)


def test_masks_are_those_of_the_moment_and_are_in_checkpoints():
    model = network()
    masks = lp.prune(model, 0.5)
    kept = {name: mask.clone() for name, mask in masks.items()}
    adapters.attach(model, masks, rank=2)
    for mask in masks.values():
        mask.fill_(True)
    trained(model)
    fresh = network()
    adapters.attach(fresh, {name: torch.ones_like(mask) for name, mask in masks.items()}, rank=2)
    fresh.load_state_dict(model.state_dict())
    for one in (model, fresh):
        adapters.merge(one)
        assert all(torch.equal(one.get_parameter(n) != 0, m) for n, m in kept.items())


def test_an_update_that_is_not_finite_is_refused_and_stays():
    model = network()
    adapters.attach(model, lp.prune(model, 0.5), rank=2)
    with torch.no_grad():
        model[2].parametrizations.weight[0].up.fill_(float("nan"))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"the updates of 2\.weight are not finite"):
        adapters.merge(model)
    assert list(model.state_dict()) == before


def test_strides_and_parametrizations_of_others_stay():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = conv.weight.stride()
    adapters.attach(conv, lp.prune(conv, 0.5))
    adapters.merge(conv)
    assert conv.weight.stride() == strides
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model.register_parameter("other", nn.Parameter(torch.randn(3, 4)))
    adapters.attach(model, {"other": torch.rand(3, 4) > 0.5})
    y, names = model(torch.ones(1, 4)), ["bias", "other"]
    adapters.merge(model)
    assert torch.equal(model(torch.ones(1, 4)), y)
    assert [n for n, p in model.named_parameters(recurse=False)] == names


def test_calls_that_need_the_weights_say_that_adapters_are_attached():
    model = network()
    masks = lp.prune(model, 0.5)
    adapters.attach(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: lp.apply_masks(model, masks),
        lambda: lp.hold(model, optimizer, masks),
        lambda: adapters.attach(model, masks),
    ):
        with pytest.raises(ValueError, match=r"0\.weight, 2\.weight are computed by a parametrization"):
            call()
