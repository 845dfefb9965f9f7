"""Which keys of a command nothing of the run reads: they have no effect, and that is said."""

import re
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from lightning_prune.study.configs import flattened
from lightning_prune.study.names import FREE, PLACED

# What the functions of this package read of a config by name. They read all else through these.
READ = (
    *("batches", "calibration_batches", "evaluate_every", "latency_batch", "methods", "monitor"),
    *("oneshot", "order_seed", "pruner", "retraining", "retraining_steps", "rewind", "rounds", "run"),
    *("sparsities", "steps_per_round", "task", "threads", "trainer"),
)
_INTERPOLATED = re.compile(r"\$\{(\.*)([\w.]+)[\w.\[\]]*\}")


def unread(cfg: DictConfig, overrides: Sequence[str] | None = None) -> list[str]:
    """The keys of these overrides that nothing of the run reads.

    A key is read when it lies in what the run is made of (`READ`), or is named there by an interpolation,
    or by what is named there. A run that is a function of one's own may read anything: none is said of it.
    Whether a class uses an argument that it accepts is not known here: a report says which runs differ by
    nothing.

    >>> own = {"run": {"_target_": "lightning_prune.study.training.train"}, "lr": 0.1, "momentum": 0.9}
    >>> unread(OmegaConf.create({**own, "task": {"lr": "${lr}"}}), ["lr=0.2", "momentum=0.5", "seed=2"])
    ['momentum']

    Args:
        cfg: of the run, before anything of it is built, which may put values in place of interpolations.
        overrides: as on Hydra's command line; None: those of the command that runs.
    """
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    if not str(OmegaConf.select(cfg, "run._target_")).startswith("lightning_prune."):
        return []
    small = str(OmegaConf.select(cfg, "run._target_")).endswith(".small_dense")
    there = reached(cfg, (*READ, "model") if small else READ)
    keys: dict[str, None] = {}
    for given in OverridesParser.create().parse_overrides(list(overrides)):
        key = given.key_or_group.replace("/", ".")
        elsewhere = any(_within(key, out) for out in (*FREE, *PLACED))
        if given.type is not OverrideType.DEL and not elsewhere and not _touches(key, there):
            keys[key] = None
    return list(keys)


def reached(cfg: DictConfig, roots: Sequence[str]) -> set[str]:
    """These keys, and all that are named below them, or below what is named there.

    >>> sorted(reached(OmegaConf.create({"a": {"x": "${b}"}, "b": "${.c}", "c": 1, "d": 2}), ["a"]))
    ['a', 'b', 'c']
    """
    leaves = {key: str(value) for key, value in flattened(OmegaConf.to_container(cfg)).items()}
    found: set[str] = set()
    todo = list(roots)
    while todo:
        key = todo.pop()
        if key in found:
            continue
        found.add(key)
        for leaf, value in leaves.items():
            if _within(leaf, key) or _within(key, leaf):
                todo += [_named(leaf, *named) for named in _INTERPOLATED.findall(value)]
    return found


def _named(leaf: str, dots: str, name: str) -> str:
    """What an interpolation in a leaf names: with dots before it, beside the leaf, or further up."""
    beside = leaf.split(".")[: -len(dots)] if dots else []
    return ".".join([*beside, name])


def _within(key: str, other: str) -> bool:
    """Whether a key is another, or lies below it."""
    return f"{key}.".startswith(f"{other}.")


def _touches(key: str, keys: set[str]) -> bool:
    """Whether a key is one of these, lies below one, or holds one."""
    return any(_within(key, other) or _within(other, key) for other in keys)
