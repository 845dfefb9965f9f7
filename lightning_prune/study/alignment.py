"""Alignment: which unit of one trained network is which of another, and a mask put in the other's order.

Two trainings from different initializations find much the same units in another order. Units are those of
`lightning_prune.structured`: channels, or attention heads, that can be exchanged without a change of what the
network computes.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lightning_prune.structured.units import Coupling, Couplings, is_maker, out_dimension, parameter

State = Mapping[str, Tensor]
Orders = Mapping[str, Tensor]  # of each coupling: at the place of a unit the unit that comes there

_SLICE = 256  # inputs that are looked at together


def matched(
    network: nn.Module, couplings: Couplings, of: State, to: State, inputs: Iterable[Tensor]
) -> dict[str, Tensor]:
    """The order in which the units of one network do the most like those of another, by what they compute.

    Of each coupling it is the permutation P that minimizes |Z - P Y|, where row i of Z is what unit i of the
    network `to` passes on for all inputs, and of Y that of `of`: the largest sum of inner products. What a
    unit passes on is what the layers that read it get.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    >>> here = {k: v.clone() for k, v in net.state_dict().items()}
    >>> here["0.weight"] = torch.tensor([[1.0], [-1.0]])
    >>> there = here | {"0.weight": here["0.weight"].flip(0), "0.bias": here["0.bias"].flip(0)}
    >>> from lightning_prune.structured import discover
    >>> x = torch.tensor([[2.0], [-2.0]])
    >>> matched(net, discover(net, x), here, there, [x])
    {'0.weight': tensor([1, 0])}

    Args:
        network: any with these state dicts; it is changed.
        couplings: what `lightning_prune.structured.discover` found in it.
        of: state dict of the one.
        to: state dict of the other.
        inputs: batches.

    Returns:
        {name of a coupling: at the place of each unit of `to` that unit of `of`}.

    Raises:
        ValueError: when no linear or convolutional layer reads the units of a coupling.

    Reference: Ainsworth et al. (2023), "Git Re-Basin", arXiv:2209.04836, Section 3.1 (activation matching);
        as in Adnan et al. (2025), arXiv:2505.05143.
    """
    alike = {name: torch.zeros(c.units, c.units, dtype=torch.float64) for name, c in couplings.items()}
    network.eval()
    for batch in inputs:
        for part in batch.split(_SLICE):
            passed: list[dict[str, list[Tensor]]] = []
            for state in (of, to):
                network.load_state_dict(state)
                passed.append(_passed_on(network, couplings, part))
            for name, total in alike.items():
                for y, z in zip(passed[0][name], passed[1][name], strict=True):
                    total += (z.T @ y).double()
    return {n: torch.as_tensor(linear_sum_assignment(s.numpy(), maximize=True)[1]) for n, s in alike.items()}


def permuted(tensors: State, couplings: Couplings, orders: Orders) -> dict[str, Tensor]:
    """Tensors of a network, weights or masks, with the units in another order.

    Args:
        tensors: by the names of the parameters.
        couplings: which units there are.
        orders: as `matched` gives them.
    """
    found = dict(tensors)
    for name, coupling in couplings.items():
        for site, (indices, units) in coupling.sites.items():
            if (tensor := found.get(key := parameter(site))) is None:
                continue
            places = torch.arange(tensor.shape[site[2]])
            there = _by_unit(indices, units, coupling.units)
            for unit, other in enumerate(orders[name].tolist()):
                places[there[unit]] = there[other]
            found[key] = tensor.index_select(site[2], places.to(tensor.device))
    return found


def _by_unit(indices: Tensor, units: Tensor, n: int) -> list[Tensor]:
    """The indices of each unit, in their order."""
    return [indices[units == unit].sort().values for unit in range(n)]


def _passed_on(network: nn.Module, couplings: Couplings, inputs: Tensor) -> dict[str, list[Tensor]]:
    """What the units of each coupling pass on: a matrix for each of its readers, with a column a unit."""
    passed: dict[str, list[Tensor]] = {name: [] for name in couplings}

    def note(name: str, places: list[Tensor], dim: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        read = args[0].movedim(dim, -1)
        each = torch.stack([read[..., at] for at in places], -1)
        passed[name].append(each.reshape(-1, len(places)))

    hooks: list[Any] = []
    for name, coupling in couplings.items():
        for layer, places in _readers(network, name, coupling):
            dim = -1 if isinstance(layer, nn.Linear) else 1
            hooks.append(layer.register_forward_pre_hook(partial(note, name, places, dim)))
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _readers(network: nn.Module, name: str, coupling: Coupling) -> list[tuple[nn.Module, list[Tensor]]]:
    """The layers that read all units of a coupling, and of each unit the indices of its inputs."""
    found: list[tuple[nn.Module, list[Tensor]]] = []
    for site, (indices, units) in coupling.sites.items():
        layer = network.get_submodule(site[0])
        if not is_maker(layer) or site[1] != "weight" or getattr(layer, "groups", 1) != 1:
            continue
        if site[2] == 1 - out_dimension(layer) and len(units.unique()) == coupling.units:
            found.append((layer, _by_unit(indices, units, coupling.units)))
    if not found:
        raise ValueError(
            f"no linear or convolutional layer without groups reads the channels that {name} makes, so that "
            "nothing says which is which. Allowed are networks in which one does. Leave kind=aligned out."
        )
    return found
