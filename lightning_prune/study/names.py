"""What a run's folder is called: its kind, its seed, and what else its command changes."""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from typing_extensions import final, override

# What does not change the numbers of a run may differ when it is resumed, and is no part of its name.
FREE = (
    *("after", "checkpoint_every_n_epochs", "claims", "controls_at", "figures", "fixed", "folder", "grows"),
    *("hydra", "kinds", "logger", "objective", "objective_at", "progress", "runs", "tables", "ticket"),
    *("unnamed", "variant"),
    # Where data that everybody has alike lie on this machine.
    *(f"{of}.{key}" for of in ("data", "batches.splits") for key in ("root", "download")),
)
# What a kind whose masks grow is told; what it makes of them stands in `pruner`.
GROWTH = ("sparsity", "every_n_train_steps", "updates")
PLACED = ("runs", "name", "experiment", "kind", "seed")  # these have a place of their own in the path
_LONGEST = 120  # characters; a file system allows 255 for kind, seed and this


def variant(overrides: Sequence[str], without: Sequence[str] = ()) -> str:
    """The end of a folder's name: what these overrides change, in the order of their keys.

    What does not change the numbers of a run is left out, and so is what the path says elsewhere. A value
    that a file's name cannot hold, or a name that would be too long, ends in a digest.

    >>> variant(["seed=2", "optimizer.lr=1e-3", "batch_size=60", "logger=csv"])
    ',batch_size=60,optimizer.lr=0.001'
    >>> variant(["experiment=mnist1d", "kind=reinit", "data.root=/somewhere"])
    ''
    >>> variant(["data.path=a/b.npz"])
    ',data.path=a-b.npz-ea9ec5'
    >>> variant(["task.note=1"]), variant(["task.note='1'"])
    (',task.note=1', ',task.note=1-9a7622')

    Args:
        overrides: as on Hydra's command line.
        without: keys that are left out, too, with all below them.
    """
    out = tuple(f"{key}." for key in (*FREE, *PLACED, *without))
    parts: dict[str, str] = {}
    for given in OverridesParser.create().parse_overrides(list(overrides)):
        if not f"{given.key_or_group}.".startswith(out):
            parts[_spelled(given.key_or_group)] = _spelled(_text(given))
    whole = "".join(f",{key}={value}" for key, value in sorted(parts.items()))
    return whole if len(whole) <= _LONGEST else f"{whole[: _LONGEST - 7]}-{_digest(whole)}"


def _text(given: Override) -> str:
    if given.type is OverrideType.DEL:
        return "deleted"
    value = given.value()
    if isinstance(value, (list, dict)):
        return given.get_value_element_as_str()
    if isinstance(value, (str, QuotedString)):
        return quoted(value if isinstance(value, str) else value.text)
    return str(value)  # 1e-3 is 0.001


@cache
def quoted(text: str) -> str:
    """A text, in quotes where it would be taken for a number, a truth value or nothing without them.

    >>> quoted("sgd"), quoted("1e-3"), quoted("true")
    ('sgd', "'1e-3'", "'true'")
    """
    try:
        given = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text
    return repr(text) if given is None or text == "None" or isinstance(given, (bool, int, float)) else text


def _spelled(text: str) -> str:
    safe = re.sub(r"[^\w.+@-]+", "-", text).strip("-")
    return safe if safe == text else f"{safe}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _of_this_job(*without: str, _parent_: Any, _root_: Any) -> str:
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return variant(overrides, (*without, *(OmegaConf.select(_root_, "unnamed") or ())))


# `${variant:}` in a config: of the command that runs it; `${variant:run}`: without `run` and all below it.
OmegaConf.register_new_resolver("variant", _of_this_job, replace=True)


@final
class OneFolderEach(Callback):
    """Refuse a sweep two runs of which would have one folder, before any of them starts."""

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            return  # which runs there will be is not known yet; one that is there gives its objective
        given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        if problem := shared([*given, *config.hydra.overrides.task]):
            raise SystemExit(problem)  # Hydra makes a warning of anything else


def shared(overrides: Sequence[str]) -> str | None:
    """Which runs of a sweep would have one folder, and why; None: none of them.

    >>> shared(["seed=1,2", "optimizer.lr=0.1,0.2"])
    >>> print(shared(["seed=1", "logger=csv,tensorboard"]))
    logger=csv and logger=tensorboard would be two runs in one folder. logger does not change ...
    """
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
    seen: dict[tuple[str, ...], list[str]] = {}
    for job in jobs:
        values = {given.partition("=")[0].lstrip("+"): given.partition("=")[2] for given in job}
        name = values.get("name", values.get("experiment", ""))
        where = (values.get("runs", ""), name, values.get("kind", ""), values.get("seed", ""), variant(job))
        if where in seen:
            first, second = (sorted(set(a) - set(b)) for a, b in ((seen[where], job), (job, seen[where])))
            keys = ", ".join(dict.fromkeys(given.partition("=")[0] for given in first))
            return (
                f"{' '.join(first) or ' '.join(job)} and {' '.join(second) or 'the same again'} would be two "
                f"runs in one folder. {keys or 'That'} does not change the numbers of a run, so that one run "
                "is all there is to make. Give it one value, or runs=<another folder> for each."
            )
        seen[where] = job
    return None
