"""lightning_prune: pruning and lottery-ticket experiments for PyTorch Lightning.

*The criterion says which weights, the schedule says how far, the allocation says how many where, the rewind
says from where to go on.*

- `masks`: masks, as bool tensors, as bits of a weight, and packed
- `selection`: the one function in which masks are born
- `shards`: tensors of which each process holds a part
- `checks`: arguments that are numbers
- `copies`: values copied out and put back
- `files`: files that are written whole or not at all
- `folders`: checkpoints to which each process wrote its part
- `criteria`: which; parameters -> scores
- `schedules`: how far; round (and scores) -> sparsity
- `allocation`: how many where; scores and a total -> survivors per tensor
- `adaptive`: how many where, by the ratios of LAMP, without a sort
- `granularity`: weights, blocks, kernels or filters; what lives and dies together
- `layers`: which weights may be pruned, and where outputs and inputs lie in them
- `evidence`: what these may ask for, and how to gather it without a trace
- `updates`: what survivors become; optimal updates, given what reaches a layer
- `reaching`: in which order data reach the layers, and what reaches each
- `layerwise`: layer by layer; each on what the pruned ones before it give
- `pruning`: score, allocate, keep; and `prune` for any module
- `holding`: masks stay on while an optimizer trains; `hold` for plain loops
- `adapters`: low-rank updates of a pruned network, masked as its weights are
- `rewind`: from where; the snapshot, and the policies that say what of it comes back
- `structured`: which channels are coupled, tried on a copy, and cut out of a model and its optimizers;
  `filters`: which of them stay, and `prune_channels` for any module
- `growth`: connections that go, and others that come
- `doctor`: what may be wrong with masks, weights and optimizers, and what to do
- `rng`: the state of the random number generators
- `deploy`: what zeros are worth; sparse files, `accelerate`, `summarize`; one way to time, one to size
- `metrics`: what masks say, as torchmetrics
- `models`: the feed-forward network of pruning studies
- `tables`: rows as text
- `callbacks`: when
- `study`: experiments from configs, their controls and reports
"""

from lightning_prune import (
    allocation,
    criteria,
    granularity,
    metrics,
    models,
    rewind,
    schedules,
    updates,
)
from lightning_prune.callbacks import (
    DynamicSparseTraining,
    IterativeMagnitudePruning,
    LotteryTicketRewind,
    StructuredChannelPruning,
)
from lightning_prune.deploy.accelerate import accelerate
from lightning_prune.deploy.storage import load_sparse, save_sparse
from lightning_prune.deploy.summary import summarize
from lightning_prune.holding import hold
from lightning_prune.layers import targets
from lightning_prune.masks import apply_masks
from lightning_prune.pruning import prune
from lightning_prune.structured import filters
from lightning_prune.structured.filters import prune_channels
from lightning_prune.structured.loading import load_pruned

__version__ = "0.1.0"

__all__ = [
    "DynamicSparseTraining",
    "IterativeMagnitudePruning",
    "LotteryTicketRewind",
    "StructuredChannelPruning",
    "accelerate",
    "allocation",
    "apply_masks",
    "criteria",
    "filters",
    "granularity",
    "hold",
    "load_pruned",
    "load_sparse",
    "metrics",
    "models",
    "prune",
    "prune_channels",
    "rewind",
    "save_sparse",
    "schedules",
    "summarize",
    "targets",
    "updates",
]
