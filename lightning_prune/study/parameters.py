"""What varies between runs: the keys of their configs that a sweep changed, and their values."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lightning_prune.study.configs import flattened
from lightning_prune.study.names import FREE

# Of these a report keeps account on its own, or they follow from the kind of a run.
_NOT_SWEPT = (*FREE, "kind", "seed", "order_seed", "run", "oneshot", "hydra")
Config = Mapping[str, Any]


def varying(runs: Sequence[tuple[str, Any, Config]]) -> list[str]:
    """The keys that tell runs of one kind apart, in the order of the config.

    Keys that always change together, as those do that a config fills from one another, are one: the shortest
    of them, and where one of two functions or classes was chosen, the key that names it. What equals the
    seed is no parameter.

    >>> make = lambda lr: {"optimizer": {"lr": lr}, "task": {"optimizer": {"lr": lr}}, "rate": 0.2}
    >>> varying([("ticket", 1, make(0.1)), ("ticket", 1, make(0.2)), ("reinit", 1, make(0.1))])
    ['optimizer.lr']

    Args:
        runs: kind, seed and config of each.
    """
    flat = [(kind, seed, _swept(config)) for kind, seed, config in runs if config]
    keys = dict.fromkeys(key for _, _, config in flat for key in config)
    together: dict[tuple[Hashable, ...], list[str]] = {}
    for key in keys:
        values = [_hashable(config.get(key)) for _, _, config in flat]
        by_kind: dict[str, set[Hashable]] = {}
        for (kind, _, _), value in zip(flat, values, strict=True):
            by_kind.setdefault(kind, set()).add(value)
        of_seed = all(value == seed for (_, seed, _), value in zip(flat, values, strict=True))
        if not of_seed and any(len(found) > 1 for found in by_kind.values()):
            numbers = {value: n for n, value in enumerate(dict.fromkeys(values))}
            together.setdefault(tuple(numbers[value] for value in values), []).append(key)
    return [min(keys, key=lambda key: (not _names(key), len(key))) for keys in together.values()]


def values(config: Config, keys: Sequence[str]) -> dict[str, Any]:
    """The values of these keys in a config, as they are shown.

    >>> values({"schedule": {"_target_": "lightning_prune.schedules.OneShot"}}, ["schedule._target_"])
    {'schedule': 'OneShot'}
    """
    flat = _swept(config)
    return {
        key.removesuffix("._target_").removesuffix(".path") if _names(key) else key: str(value).split(".")[-1]
        if _names(key)
        else value
        for key in keys
        if (value := flat.get(key)) is not None
    }


def _swept(config: Config) -> dict[str, Any]:
    return flattened({key: value for key, value in config.items() if key not in _NOT_SWEPT})


def _names(key: str) -> bool:
    """Whether a key names a function or class."""
    return key.endswith("._target_")


def _hashable(value: Any) -> Hashable:
    return str(value) if isinstance(value, (list, dict)) else value
