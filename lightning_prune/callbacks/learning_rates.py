"""Learning rates and their schedules: whether they fit a round, and how they are held still."""

import sys
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, optim
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_prune.callbacks.messages import warn
from lightning_prune.checks import named

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
            f"policy={named(policy)}: it holds the learning rates, and "
            f"{type(trainer.lightning_module).__name__} steps its schedulers itself "
            "(automatic_optimization=False). Allowed are modules without schedulers, or with automatic "
            "optimization. Use one of these, or another policy."
        )


def steps_per_epoch(trainer: Trainer) -> int | float:
    """Of one optimizer that steps once for each batch or, with gradient accumulation, for several."""
    batches = trainer.num_training_batches
    return batches if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)


@dataclass(frozen=True)
class Span:
    """Where a schedule is when a round ends that began with a rewind, by the schedule's own steps.

    Args:
        round: when any of these rounds ends.
        last: when the last one ends, which goes on to the end of the fit.
        fit: when the fit would end without rewinds.
    """

    round: float
    last: float
    fit: float


LOOK_AHEAD = 300_000  # steps of a schedule that are looked at; each takes about 10 microseconds
_WHERE = "as the trainer says in configure_optimizers (estimated_stepping_batches, max_epochs)."
DIFFERENT = 0.05  # of the highest learning rate: what makes a difference between two of them


def warn_of_schedules(trainer: Trainer, spans: Mapping[str, Span], ends: str) -> None:
    """Warn of schedules whose learning rates at the end of a round are not those at their own end.

    Each schedule is stepped on a copy, through a round and on, whatever its class is. One that waits for a
    metric, or that a module steps itself, cannot be known beforehand.

    Args:
        trainer: whose schedules have not been stepped yet.
        spans: {"step" or "epoch": how far schedules come that step once in each}.
        ends: the setting of the trainer with which a fit ends with its last round, such as "max_epochs=9".
    """
    if not trainer.lightning_module.automatic_optimization:
        return
    for config in trainer.lr_scheduler_configs:
        span = spans[config.interval]
        if isinstance(config.scheduler, ReduceLROnPlateau) or span.round == float("inf"):
            continue
        every = config.frequency
        round, last, fit = (int(min(n, 10 * LOOK_AHEAD) // every) for n in (span.round, span.last, span.fit))
        rates = ahead(config.scheduler, trainer, min(max(round, last, fit) + 1, LOOK_AHEAD))
        if rates and (said := misfit(rates, round, last, every, config.interval, ends)):
            warn(f"{type(config.scheduler).__name__}: {said}")


def misfit(
    rates: list[list[float]], round: int, last: int, every: int, interval: str, ends: str = ""
) -> str | None:
    """What of a schedule does not go with rounds that rewind it; None where all does.

    >>> falls = [[1 - i / 8] for i in range(9)]  # from 1 to 0 in 8 steps
    >>> misfit(falls, round=4, last=4, every=1, interval="step")[:71]
    'a round ends at the learning rate 0.5, and the schedule goes down to 0 '
    >>> misfit(falls, round=8, last=8, every=1, interval="step")

    Args:
        rates: the learning rates of all groups at the beginning and after each of the schedule's steps, up
            to one that raises an error.
        round: how many of its steps lie before the end of a round.
        last: how many lie before the end of the last round.
        every: how many batches, or epochs, make one of its steps.
        interval: which of the two it counts.
        ends: the setting with which a fit ends with its last round.
    """
    length = f"{round * every} {interval}{'' if round * every == 1 else 's'}"
    if len(rates) <= round < LOOK_AHEAD:
        return (
            f"a round takes it to {length}, and it ends after {(len(rates) - 1) * every}. Make it for "
            f"{length}, {_WHERE}"
        )
    if not 0 < round < len(rates):
        return None
    for group, highest in enumerate(map(max, zip(*rates, strict=True))):
        of_group = [rate[group] for rate in rates]
        end, lowest = min(of_group[round - 1 : round + 1]), min(of_group[round:])
        if end - lowest > DIFFERENT * highest:
            return _unfinished(end, f"down to {lowest:.3g}", group, length)
        end = max(of_group[round - 1 : round + 1])
        if end == max(of_group[: round + 1]) and highest - end > DIFFERENT * highest:
            return _unfinished(end, f"up to {highest:.3g}", group, length)
        if max(of_group[round:last], default=end) - end > DIFFERENT * highest:
            return _overrun(length, last * every, interval, "where it goes up again", ends)
    raises = len(rates) <= last < LOOK_AHEAD
    return _overrun(length, last * every, interval, "where it raises an error", ends) if raises else None


def _unfinished(end: float, goes: str, group: int, length: str) -> str:
    return (
        f"a round ends at the learning rate {end:.3g}, and the schedule goes {goes} later (parameter group "
        f"{group}): every round rewinds it before. Make it for {length}, {_WHERE}"
    )


def _overrun(length: str, last: int, interval: str, what: str, ends: str) -> str:
    return (
        f"a round takes it to {length}, and the last round, which goes on to the end of the fit, to {last} "
        f"{interval}s, beyond its end, {what}. Let the fit end with the last round ({ends}), or ask for more "
        "rounds."
    )


def ahead(scheduler: Any, trainer: Trainer, steps: int) -> list[list[float]]:
    """The learning rates of all groups at so many steps to come, or up to the step that raises an error.

    Taken from a copy, whose optimizer has the settings of the true one and no parameters. Empty for a
    schedule that cannot be copied.
    """
    optimizer, module = scheduler.optimizer, trainer.lightning_module
    stand_in = optim.SGD([torch.zeros(())], lr=0.0)
    groups: list[dict[str, Any]] = [{**_copied(g), "params": []} for g in optimizer.param_groups]
    stand_in.param_groups = groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the order of steps
        try:
            # What is not to be copied stands for itself; a function of a module's may be a schedule's.
            copy: Any = deepcopy(scheduler, {id(optimizer): stand_in, id(module): module})
        except Exception:
            return []
        rates: list[list[float]] = []
        for _ in range(steps):
            rates.append([float(group["lr"]) for group in groups])
            try:
                copy.step()
            except Exception:
                break
    return rates
