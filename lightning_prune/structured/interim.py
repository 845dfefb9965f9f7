"""The names of before, until the callback says the new ones; then this file goes."""

from lightning_prune.structured.discovery import discover
from lightning_prune.structured.loading import reshape
from lightning_prune.structured.surgery import check_optimizers, cut
from lightning_prune.structured.trial import as_input
from lightning_prune.structured.units import Coupling as Channels
from lightning_prune.structured.units import Couplings as Groups
from lightning_prune.structured.units import after, parameter, parameters, weight_masks
from lightning_prune.structured.units import cut_of as plan

__all__ = [
    "Channels",
    "Groups",
    "after",
    "as_input",
    "check_optimizers",
    "cut",
    "discover",
    "parameter",
    "parameters",
    "plan",
    "reshape",
    "weight_masks",
]
