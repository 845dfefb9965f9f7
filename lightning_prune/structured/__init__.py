"""Structured pruning: whole channels go, so that a network becomes smaller and faster on any machine.

One word for each thing here:

- a *channel* is one index of a layer's outputs, and what lies at it in other tensors
- a *site* is a dimension of a tensor of the model: (module, parameter or buffer, dimension)
- a *coupling* (`Coupling`) is channels of several layers that go together; `Couplings` are those of a network
- a *unit* is the smallest part of a coupling that can go alone; masks of units say which are alive
- a *cut* (`Cut`) says which indices go from each site

`discover` finds couplings (`coupling` knows torch-pruning, `trial` tries on a copy), `filters` says which
units stay, `units` turns masks of units into cuts, `surgery` carries a cut out, and `loading` loads what was
cut; `configuration` is what a model of transformers says of its sizes then.
"""

from lightning_prune.structured.discovery import discover
from lightning_prune.structured.surgery import Cut, Site, cut
from lightning_prune.structured.units import Coupling, Couplings, cut_of

__all__ = ["Coupling", "Couplings", "Cut", "Site", "cut", "cut_of", "discover"]
