"""The callbacks: when to prune, rewind and cut; what to log and to checkpoint.

- `pruning`, `rewinding`, `channels`: one callback each
- `masked`: what those that prune have in common: which hook does what
- `fits`: what lives as long as a fit, and is gone with it
- `rounds`: where a training is in its rounds, as a value
- `history`: a row for each round that is over
- `shortfall`: fewer prunings than were asked for, in words
- `networks`: whether it is the network of the fit before
- `following`: copies of a network, which take the masks of their originals
- `state`: versions and settings of the state in a checkpoint
- `resumption`: what a checkpoint still has to give back
- `strategies`: on which of Lightning's strategies masks hold
- `messages`: a line for each pruning, where no logging is set up
- `evidence`: batches and the loss of a training under way, gathered without a trace
- `checkpoints`: written all or nothing, checked when they are read
- `generators`: random numbers of a resumed run
- `learning_rates`: schedules and rounds; rates that are held
- `beside`: Lightning's own callbacks, whose averages and comparisons follow the rounds
- `ranks`: what processes tell each other
- `home`: what the processes of a fit leave to the first one
"""

from lightning_prune.callbacks.channels import StructuredChannelPruning
from lightning_prune.callbacks.growing import DynamicSparseTraining
from lightning_prune.callbacks.messages import show_messages
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.callbacks.rewinding import LotteryTicketRewind

__all__ = [
    "DynamicSparseTraining",
    "IterativeMagnitudePruning",
    "LotteryTicketRewind",
    "StructuredChannelPruning",
]

show_messages()
