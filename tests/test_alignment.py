"""Alignment: units in another order compute the same, and are found again by what they compute."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_prune.structured import discover
from lightning_prune.study.alignment import matched, permuted
from lightning_prune.study.models import LeNet, ResidualMLP, ResNet20
from tests.networks import same


class Convs(nn.Sequential):
    """Convolutions, a batch normalization, and channels that are flattened."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(4 * 4 * 4, 8), nn.ReLU(), nn.Linear(8, 3)),
        )


NETWORKS = {
    "LeNet": (lambda: LeNet(20, (12, 7), 5), (20,)),
    "residual": (lambda: ResidualMLP(20, 12, 5), (20,)),
    "convolutions": (Convs, (1, 8, 8)),
    "ResNet-20": (lambda: ResNet20(width=4), (3, 8, 8)),
}


def shuffled(name):
    """A network in evaluation, an input, its couplings, orders of their units, and its state in these."""
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    net, x = make(), torch.randn(60, *shape)
    net(x)  # statistics of batch normalization
    net.eval()
    couplings = discover(net, x[:2])
    orders = {n: torch.randperm(c.units) for n, c in couplings.items()}
    here = {k: v.clone() for k, v in net.state_dict().items()}
    return net, x, couplings, orders, here, permuted(here, couplings, orders)


@pytest.mark.parametrize("name", NETWORKS)
def test_units_in_another_order_compute_the_same(name):
    net, x, _, orders, here, there = shuffled(name)
    expected = net(x)
    assert all((order != torch.arange(len(order))).any() for order in orders.values())
    assert not same(here, there)
    net.load_state_dict(there)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_units_in_another_order_are_found_again(name):
    net, x, couplings, orders, here, there = shuffled(name)
    assert same(matched(net, couplings, here, there, [x[:40], x[40:]]), orders)
    assert same(permuted(here, couplings, matched(net, couplings, here, here, [x])), here)


def test_the_order_is_that_of_the_least_distance_of_what_units_pass_on():
    """All permutations are tried."""
    torch.manual_seed(2)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).eval(), torch.randn(30, 3)
    one, two = ({k: torch.randn_like(v) for k, v in net.state_dict().items()} for _ in range(2))
    passed = [torch.tanh(x @ s["0.weight"].T + s["0.bias"]) for s in (one, two)]

    def distance(order):
        return float((passed[1] - passed[0][:, list(order)]).square().sum())

    best = min(itertools.permutations(range(5)), key=distance)
    found = matched(net, discover(net, x), one, two, [x])
    assert found["0.weight"].tolist() == list(best)


def test_units_of_which_some_lie_elsewhere_are_refused():
    net, x, couplings, _, here, _ = shuffled("LeNet")
    coupling = next(iter(couplings.values()))
    site, (indices, units) = next(iter(coupling.sites.items()))
    fewer = {**coupling.sites, site: (indices[1:], units[1:])}
    apart = {coupling.name: replace(coupling, sites=fewer)}
    with pytest.raises(ValueError, match=f"{coupling.name}: some of the channels lie in other tensors"):
        matched(net, apart, here, here, [x])


def test_units_that_no_layer_reads_in_full_are_refused():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Tanh())
    x = torch.randn(2, 1, 2, 2)
    couplings = discover(nn.Sequential(net, nn.Linear(16, 2)), x)
    couplings = {n.removeprefix("0."): c for n, c in couplings.items()}
    short = {n: replace(c, sites={}) for n, c in couplings.items()}
    with pytest.raises(ValueError, match="no linear or convolutional layer without groups reads"):
        matched(net, short, net.state_dict(), net.state_dict(), [x])
