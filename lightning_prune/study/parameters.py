"""What varies between runs: the keys of their configs that a sweep changed, and their values."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lightning_prune.study.configs import flattened, left_of
from lightning_prune.study.names import FREE, quoted

# Of these a report keeps account on its own, or they follow from the kind of a run.
_NOT_SWEPT = (*FREE, "kind", "seed", "order_seed", "run", "oneshot", "hydra")
Config = Mapping[str, Any]


def varying(runs: Sequence[tuple[str, Any, Config]]) -> list[str]:
    """The keys that tell runs of one kind apart, in the order of the config.

    Keys that always change together, as those do that a config fills from one another, are one: the shortest
    of them, and where one of two functions or classes was chosen, the key that names it. What equals the
    seed is no parameter, and neither is an argument that each choice has at one value.

    >>> make = lambda lr: {"optimizer": {"lr": lr}, "task": {"optimizer": {"lr": lr}}, "rate": 0.2}
    >>> varying([("ticket", 1, make(0.1)), ("ticket", 1, make(0.2)), ("reinit", 1, make(0.1))])
    ['optimizer.lr']
    >>> get = lambda name: {"criterion": {"_target_": "hydra.utils.get_method", "path": f"criteria.{name}"}}
    >>> drawn = {"criterion": {"_target_": "criteria.Random", "seed": 1}}
    >>> varying([("ticket", 1, get("magnitude")), ("ticket", 1, get("wanda")), ("ticket", 1, drawn)])
    ['criterion._target_']

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
    configs = [config for _, _, config in flat]
    chosen = [min(keys, key=lambda key: (not _names(key), len(key))) for keys in together.values()]
    return [key for key in chosen if not _follows(key, chosen, configs)]


def _follows(key: str, keys: Sequence[str], configs: Sequence[Config]) -> bool:
    """Whether the choice of a function or class, among these keys, says what the value of its argument is."""
    choice = f"{key.rpartition('.')[0]}._target_"
    if key == choice or choice not in keys:
        return False
    values = {(config.get(choice), _hashable(config.get(key))) for config in configs}
    return len(values) == len({config.get(choice) for config in configs})


def values(config: Config, keys: Sequence[str]) -> dict[str, Any]:
    """The values of these keys in a config, as they are shown.

    >>> values({"schedule": {"_target_": "lightning_prune.schedules.OneShot"}}, ["schedule._target_"])
    {'schedule': 'OneShot'}
    """
    flat = _swept(config)
    return {
        key.removesuffix("._target_") if _names(key) else key: str(value).split(".")[-1]
        if _names(key)
        else value
        for key in keys
        if (value := flat.get(key)) is not None
    }


def _swept(config: Config) -> dict[str, Any]:
    return left_of(flattened({key: _plain(value) for key, value in config.items()}), _NOT_SWEPT)


def _plain(node: Any) -> Any:
    """A node in which a function that is named, not called, is written as one that is."""
    if not isinstance(node, Mapping):
        return node
    if str(node.get("_target_")).startswith("hydra.utils.get_"):
        return {"_target_": node.get("path")}
    return {key: _plain(value) for key, value in node.items()}


def _names(key: str) -> bool:
    """Whether a key names a function or class."""
    return key.endswith("._target_")


def spelled(value: Any) -> Any:
    """A value as it is shown: a text that looks like a number has its quotes.

    >>> spelled(1), spelled("1"), spelled("sgd")
    (1, "'1'", 'sgd')
    """
    return quoted(value) if isinstance(value, str) else value


def _hashable(value: Any) -> Hashable:
    """Numbers as they are; of all else no two that are written in two ways are equal, as 1 and true are."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)
