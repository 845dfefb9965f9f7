"""Learning rates and their schedules: whether they fit a round, and how they are held still."""

import sys
import warnings
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import lr_scheduler

Rates = list[list[dict[str, Any]]]  # of each optimizer's groups: all of their settings


def rates_of(trainer: Trainer) -> Rates:
    """The settings of all parameter groups, copied."""
    return [[_copied(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in group.items() if name != "params"}
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in settings.items()}


def hold(trainer: Trainer, rates: Rates) -> None:
    """Give the parameter groups these settings, and never step a scheduler again.

    Groups that were added since keep theirs.
    """
    for optimizer, groups in zip(trainer.optimizers, rates, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=False):
            for name, value in settings.items():
                tensor = isinstance(value, Tensor)
                group[name] = value.to(group[name].device, copy=True) if tensor else value
    for config in trainer.lr_scheduler_configs:
        config.frequency = sys.maxsize  # Lightning never comes to step it


def check_held(trainer: Trainer, policy: Any) -> None:
    """Make sure that no module steps schedulers that are to be held.

    Raises:
        ValueError: when it does.
    """
    if trainer.lr_scheduler_configs and not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            f"policy={policy}: it holds the learning rates, and "
            f"{type(trainer.lightning_module).__name__} steps its schedulers itself "
            "(automatic_optimization=False). Allowed are modules without schedulers, or with automatic "
            "optimization. Use one of these, or another policy."
        )


def steps_per_epoch(trainer: Trainer) -> int | float:
    """Of one optimizer that steps once for each batch or, with gradient accumulation, for several."""
    batches = trainer.num_training_batches
    return batches if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)


def warn_of_schedules(
    trainer: Trainer, lengths: dict[str, tuple[int | float, int | float]], shorten: bool, held: bool
) -> None:
    """Warn of schedules that a round does not come to the end of, or goes beyond.

    Args:
        trainer: whose.
        lengths: {"step" or "epoch": length of a round, where it begins when rewound}.
        shorten: whether such rounds are that much shorter.
        held: whether learning rates are held after the first round.
    """
    for config in trainer.lr_scheduler_configs:
        horizon = _horizon(config.scheduler)
        if horizon is None or config.interval not in lengths:
            continue
        made_for, (length, k) = horizon * config.frequency, lengths[config.interval]
        end = length if shorten else length + k
        name = f"{type(config.scheduler).__name__} is made for {made_for} {config.interval}s and a round"
        if made_for > end:
            warnings.warn(
                f"{name} has {end}: every round rewinds it before its end. Make it for the pruning "
                "callback's `steps_per_round`.",
                stacklevel=2,
            )
        elif length <= made_for < end and not held:
            warnings.warn(
                f"{name} has {length} from {k} on, where it is rewound to: it runs beyond its end. Set "
                "shorten=True, which ends such rounds sooner.",
                stacklevel=2,
            )


def _horizon(scheduler: Any) -> int | None:
    """How many of its steps a scheduler that ends somewhere is made for."""
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return int(scheduler.total_steps)
    if isinstance(scheduler, (lr_scheduler.LinearLR, lr_scheduler.PolynomialLR)):
        return int(scheduler.total_iters)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        parts, starts = scheduler._schedulers, scheduler._milestones  # noqa: SLF001  torch has no public names
        last = _horizon(parts[-1])
        return None if last is None else int(starts[-1]) + last
    return None
