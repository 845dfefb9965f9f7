"""Units: coupled channels as plain values, and what goes from each tensor when some of them go.

A unit is the smallest set of channels that can go alone: one channel, or one of every group of a grouped
convolution, or an attention head. Sparsity, allocation and ties speak of units.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as Convolution

from lightning_prune.masks import Masks, pack, unpack
from lightning_prune.structured import surgery
from lightning_prune.structured.surgery import Cut, Site


@dataclass(frozen=True)
class Coupling:
    """Channels that are coupled: where each unit of them lies in the tensors of a network."""

    name: str  # of the weight of the first layer that makes them
    units: int
    sites: dict[Site, tuple[Tensor, Tensor]]  # indices along the dimension, and the unit of each
    filters: tuple[Site, ...]  # those of the sites that are outputs of the weights that make the channels
    scales: tuple[Site, ...]  # those that are scales of batch normalizations
    structure: tuple[str, ...]  # equal where channels are coupled alike

    @property
    def per_unit(self) -> int:
        """Channels of the first layer in a unit."""
        return len(self.sites[self.filters[0]][0]) // self.units

    @property
    def parts(self) -> list[Tensor]:
        """The units in tensors that have only some: one of these has to stay, so that something is left."""
        sets = {tuple(units.unique().tolist()) for _, units in self.sites.values()}
        return [torch.tensor(part) for part in sorted(sets) if len(part) < self.units]


Couplings = dict[str, Coupling]
HEADS = ("heads",)  # the structure of heads of an attention
MAKERS = (nn.Linear, Convolution)  # the layers that make channels


def is_maker(module: nn.Module) -> bool:
    """Whether a layer makes channels."""
    return isinstance(module, MAKERS) or surgery.inputs_first(module)


def out_dimension(module: nn.Module) -> int:
    """The dimension of a layer's weight along which its outputs lie."""
    return 1 if getattr(module, "transposed", False) or surgery.inputs_first(module) else 0


def parameter(site: Site) -> str:
    """The name of a site's tensor in the model.

    >>> parameter(("net.0", "weight", 1)), parameter(("", "scale", 0))
    ('net.0.weight', 'scale')
    """
    return f"{site[0]}.{site[1]}" if site[0] else site[1]


def all_units(couplings: Couplings) -> Masks:
    """The masks of a network from which nothing is gone: every unit is alive."""
    return {name: torch.ones(coupling.units, dtype=torch.bool) for name, coupling in couplings.items()}


def cut_of(couplings: Couplings, alive: Masks) -> Cut:
    """What goes from each tensor: the indices of all units that are not alive.

    >>> site = ("fc", "weight", 0)
    >>> fc = Coupling("fc.weight", 2, {site: (torch.arange(4), torch.tensor([0, 0, 1, 1]))}, (site,), (), ())
    >>> cut_of({"fc.weight": fc}, {"fc.weight": torch.tensor([True, False])})
    {('fc', 'weight', 0): tensor([2, 3])}
    """
    gone: dict[Site, list[Tensor]] = defaultdict(list)
    for name, coupling in couplings.items():
        dead = ~alive[name].cpu()
        for site, (indices, units) in coupling.sites.items():
            gone[site].append(indices[dead[units]])
    every = {site: torch.cat(parts).sort().values for site, parts in gone.items()}
    return {site: indices for site, indices in every.items() if len(indices)}


def after(couplings: Couplings, alive: Masks) -> Couplings:
    """The couplings in the coordinates of the network in which only these units are left."""
    removed, found = cut_of(couplings, alive), Couplings()
    for name, coupling in couplings.items():
        number = alive[name].cpu().cumsum(0) - 1
        sites: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, (indices, units) in coupling.sites.items():
            stay = alive[name].cpu()[units]
            shift = torch.searchsorted(removed[site], indices[stay]) if site in removed else 0
            sites[site] = (indices[stay] - shift, number[units[stay]])
        left = int(alive[name].sum())
        found[name] = Coupling(name, left, sites, coupling.filters, coupling.scales, coupling.structure)
    return found


def with_copies(couplings: Couplings, copies: Mapping[str, str]) -> Couplings:
    """Couplings that take the same channels from copies: {name of a copy's tensor: name of the original}."""
    found: Couplings = {}
    for name, coupling in couplings.items():
        sites = dict(coupling.sites)
        for copy, original in copies.items():
            module, _, tensor = copy.rpartition(".")
            sites |= {
                (module, tensor, s[2]): at for s, at in coupling.sites.items() if parameter(s) == original
            }
        found[name] = replace(coupling, sites=sites)
    return found


def weight_masks(couplings: Couplings, alive: Masks, params: Mapping[str, Tensor]) -> Masks:
    """Masks of the parameters: False where a weight belongs to a unit that is not alive."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    for site, gone in cut_of(couplings, alive).items():
        if (mask := masks.get(parameter(site))) is not None:
            mask.index_fill_(site[2], gone.to(mask.device), False)
    return masks


def parameters(couplings: Couplings, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a removal of channels touches, by name, in the model's order."""
    touched = {parameter(site) for coupling in couplings.values() for site in coupling.sites}
    return {name: p for name, p in model.named_parameters() if name in touched}


def as_state(couplings: Couplings, alive: Masks, left: Masks) -> dict[str, Any]:
    """Plain containers for a checkpoint, from which `load_pruned` cuts what is in it.

    Args:
        couplings: in the coordinates of the full-size network.
        alive: units that are not pruned.
        left: units that the network beside it in the checkpoint still has; the others are cut already.
    """
    plain = {name: vars(coupling) for name, coupling in couplings.items()}
    return {"groups": plain, "channels": pack(alive), "left": pack(left)}


def of_state(state: Mapping[str, Any]) -> tuple[Couplings, Masks, Masks]:
    """Couplings, units alive and units left, of what `as_state` gave."""
    couplings = {name: Coupling(**values) for name, values in state["groups"].items()}
    return couplings, unpack(state["channels"]), unpack(state["left"])


def has_state(state: Any) -> bool:
    """Whether a checkpoint's value is what `as_state` gave, perhaps with more beside it."""
    return isinstance(state, Mapping) and {"groups", "channels", "left"} <= state.keys()
