"""State: what is checked before a callback takes over what a checkpoint holds of it."""

from collections.abc import Mapping
from typing import Any

from lightning_prune.callbacks.messages import warn

VERSION = 2  # of the callbacks' state in a checkpoint


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


def own(callback: object) -> dict[str, Any]:
    """A callback's attributes without those that Lightning lends it, the `log` of the module of a fit.

    >>> from types import SimpleNamespace
    >>> own(SimpleNamespace(rounds=3, log=print))
    {'rounds': 3}
    """
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
