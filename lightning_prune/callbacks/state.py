"""State: what is checked before a callback takes over what a checkpoint holds of it."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning_prune.callbacks.messages import warn

log = logging.getLogger(__name__)

VERSION = 2  # of the callbacks' state in a checkpoint

# Arguments that nothing reads after the last pruning, or update.
_OF_PRUNINGS = (
    *("schedule", "sparsity", "criterion", "drop", "grow", "fraction", "allocate", "granularity"),
    *("max_sparsity", "stop_below", "score_batches", "round_to", "at_least"),
)


def check_version(name: str, state: Mapping[str, Any]) -> None:
    """Refuse the state of another version.

    >>> check_version("Callback", {"version": 2})

    Args:
        name: of the callback.
        state: what the checkpoint holds of it. The first version wrote no number.

    Raises:
        ValueError: naming both versions.
    """
    if (version := state.get("version", 1)) != VERSION:
        raise ValueError(
            f"ckpt_path: the checkpoint holds the state of a {name} of version {version}, and this is "
            f"version {VERSION}; allowed is the same. Finish that run with the release of lightning_prune "
            "that began it, or start anew with masks=<the checkpoint>."
        )


def check_settings(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than those of the checkpoint.

    Args:
        name: of the callback.
        there: settings in the checkpoint.
        here: settings of the callback that is to go on.

    Raises:
        ValueError: naming each setting that differs, with both values.
    """
    if changed := [key for key in here if there.get(key) != here[key]]:
        shown = "; ".join(f"{key}={there.get(key)!r} there, {key}={here[key]!r} here" for key in changed)
        raise ValueError(
            f"ckpt_path: the checkpoint is of a {name} with {shown}. Allowed are the same, since the rounds "
            "of the checkpoint are counted by them. Give them as they were, or start another run."
        )


def check_begun(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Say which arguments differ from those that the checkpoint's fit has begun with, and have no effect.

    Args:
        name: of the callback.
        there: what only the beginning of a fit reads, in the checkpoint.
        here: the same of the callback that is to go on.
    """
    for key in [key for key in here if key in there and there[key] != here[key]]:
        warn(
            f"{name}({key}={here[key]}) has no effect: ckpt_path= goes on with a fit that has begun with "
            f"{key}={there[key]}. Start another fit, without ckpt_path=, for it to have one."
        )


def say_changed(name: str, there: Mapping[str, str], here: Mapping[str, str], last: str | None) -> None:
    """Say which arguments are not those of the checkpoint, and whether they hold from here on.

    Args:
        name: of the callback.
        there: arguments in words, in the checkpoint; one that was written earlier does not have all.
        here: what the callback that goes on reads again and again.
        last: why there is no pruning to come that would read them; None: there is one.
    """
    changed = [key for key in here if key in there and there[key] != here[key]]
    idle = [key for key in changed if last and key in _OF_PRUNINGS]
    for key in idle:
        warn(
            f"{name}({key}={here[key]}) has no effect: {last}, and the fit that ckpt_path= goes on with had "
            f"{key}={there[key]}. Start another fit, without ckpt_path=, for it to have one."
        )
    if rest := [f"{key}={here[key]} instead of {there[key]}" for key in changed if key not in idle]:
        log.info(f"{name}: from here on with other arguments than those of the checkpoint: {', '.join(rest)}")


def own(callback: object) -> dict[str, Any]:
    """A callback's attributes without those that Lightning lends it, the `log` of the module of a fit.

    >>> from types import SimpleNamespace
    >>> own(SimpleNamespace(rounds=3, log=print))
    {'rounds': 3}
    """
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
