"""Alignment: which unit of one trained network is which of another, and a mask put in the other's order.

Two trainings from different initializations find much the same units in another order. Units are those of
`lightning_prune.structured`: channels, or attention heads, that can be exchanged without a change of what the
network computes.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
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
        network: any with these state dicts; it is not changed.
        couplings: what `lightning_prune.structured.discover` found in it.
        of: state dict of the one.
        to: state dict of the other.
        inputs: batches.

    Returns:
        {name of a coupling: at the place of each unit of `to` that unit of `of`}.

    Raises:
        ValueError: when no linear or convolutional layer reads the units of a coupling, or some of its units
            lie in other tensors than the others, so that they cannot be exchanged.

    Reference: Ainsworth et al. (2023), "Git Re-Basin", arXiv:2209.04836, Section 3.1 (activation matching);
        as in Adnan et al. (2025), arXiv:2505.05143.
    """
    if apart := [name for name, coupling in couplings.items() if coupling.parts]:
        raise ValueError(
            f"{', '.join(apart)}: some of the channels lie in other tensors than the others, so that they "
            "cannot be exchanged. Allowed are channels that lie in the same. Leave kind=aligned out."
        )
    networks = [deepcopy(network).eval() for _ in range(2)]
    for each, state in zip(networks, (of, to), strict=True):
        each.load_state_dict(state)
    alike = {name: torch.zeros(c.units, c.units, dtype=torch.float64) for name, c in couplings.items()}
    with ExitStack() as stack:
        passed = [stack.enter_context(_passed_on(each, couplings)) for each in networks]
        for batch in inputs:
            for part in batch.split(_SLICE):
                with torch.no_grad():
                    for each in networks:
                        each(part)
                for name, total in alike.items():
                    for y, z in zip(*(p.pop(name) for p in passed), strict=True):
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
            places[there] = there[orders[name]]
            found[key] = tensor.index_select(site[2], places.to(tensor.device))
    return found


def _by_unit(indices: Tensor, units: Tensor, n: int) -> Tensor:
    """The indices of each unit, in their order: a row a unit."""
    order = indices.argsort()
    return indices[order][units[order].argsort(stable=True)].reshape(n, -1)


@contextmanager
def _passed_on(network: nn.Module, couplings: Couplings) -> Generator[dict[str, list[Tensor]]]:
    """What the units of each coupling pass on, as the network runs: a matrix a reader, a column a unit."""
    passed: dict[str, list[Tensor]] = {}

    def note(name: str, places: Tensor, dim: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        read = args[0].movedim(dim, -1)[..., places]
        passed.setdefault(name, []).append(read.movedim(-2, -1).reshape(-1, len(places)))

    hooks: list[Any] = []
    try:
        for name, coupling in couplings.items():
            for layer, places in _readers(network, name, coupling):
                dim = -1 if isinstance(layer, nn.Linear) else 1
                hooks.append(layer.register_forward_pre_hook(partial(note, name, places, dim)))
        yield passed
    finally:
        for hook in hooks:
            hook.remove()


def _readers(network: nn.Module, name: str, coupling: Coupling) -> list[tuple[nn.Module, Tensor]]:
    """The layers that read all units of a coupling, and of each unit the indices of its inputs."""
    found: list[tuple[nn.Module, Tensor]] = []
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
