"""The callbacks: thin shells that say when. What they do is in the modules beside this package."""

from lightning_prune.callbacks.channels import StructuredChannelPruning
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.callbacks.rewinding import LotteryTicketRewind

__all__ = ["IterativeMagnitudePruning", "LotteryTicketRewind", "StructuredChannelPruning"]
