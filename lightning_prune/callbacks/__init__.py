"""The callbacks: when to prune, rewind and cut; what to log and to checkpoint.

- `pruning`, `rewinding`, `channels`: one callback each
- `evidence`: batches and the loss of a training under way, gathered without a trace
- `checkpoints`: written all or nothing, checked when they are read
- `generators`: random numbers of a resumed run
- `learning_rates`: schedules and rounds; rates that are held
- `beside`: Lightning's own callbacks, whose averages and comparisons follow the rounds
- `ranks`: what processes tell each other
"""

from lightning_prune.callbacks.channels import StructuredChannelPruning
from lightning_prune.callbacks.growing import DynamicSparseTraining
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.callbacks.rewinding import LotteryTicketRewind

__all__ = [
    "DynamicSparseTraining",
    "IterativeMagnitudePruning",
    "LotteryTicketRewind",
    "StructuredChannelPruning",
]
