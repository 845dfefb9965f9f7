"""A folder of runs, read: whatever state they are in, and whatever became of their files."""

import glob
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import final

from lightning_prune.masks import Masks
from lightning_prune.study.configs import flattened, left_of, renamed
from lightning_prune.study.configs import load as load_config
from lightning_prune.study.names import FREE
from lightning_prune.study.parameters import spelled, values, varying
from lightning_prune.study.records import SEPARATOR, Record, plain_kind, read
from lightning_prune.study.round_masks import masks_of

log = logging.getLogger(__name__)


@final
@dataclass
class Run:
    """One run, or the part of it that is there.

    Attributes:
        kind: ticket, reinit, random, ..., and the parameters by which runs of that kind differ.
        state: "finished", "unfinished", "failed", or "recorded" where only its records are at hand.
        records: under that kind.
        folder: of the run, if it is at hand.
        made: what `run.json` says: command, commit, versions.
        parameters: by which the runs of a sweep differ, {key: value}.
    """

    kind: str
    seed: Any
    state: str
    records: list[Record]
    folder: Path | None = None
    made: dict[str, Any] = field(default_factory=dict[str, Any])
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def masks(self) -> Mapping[int, Masks]:
        """Its masks by round; none where its files are missing or cannot be read, which is logged."""
        try:
            return masks_of(self.folder) if self.folder else {}
        except ValueError as error:
            log.warning("%s", error)
            return {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its resolved config."""
        path = self.folder / "config.yaml" if self.folder else None
        return _yaml(path) if path and path.is_file() else {}

    def tell_apart(self, parameters: Mapping[str, Any]) -> None:
        """Name the run and its records by these parameters, too."""
        self.parameters = dict(parameters)
        self.kind = labelled(self.kind, parameters)
        self.records = [_labelled(record, parameters) for record in self.records]


@final
@dataclass
class Runs:
    """The runs of an experiment, or of several.

    Attributes:
        name: of the experiment.
        config: of the experiment: that of its first run.
        broken: {file: numbers of its lines that are no records}.
        measured: rows of `measured.jsonl`: what networks with the masks of these runs cost.
        idle: which parameters tell runs apart that have the same records, in words.
    """

    name: str
    runs: list[Run]
    config: Any
    broken: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    measured: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    idle: list[str] = field(default_factory=list[str])

    @cached_property
    def records(self) -> list[Record]:
        """All their records."""
        return [record for run in self.runs for record in run.records]

    def of(self, kind: str) -> list[Run]:
        """The runs of a kind that have records."""
        return [run for run in self.runs if run.kind == kind and run.records]

    @cached_property
    def seeds(self) -> list[tuple[Any, Any]]:
        """Of each run the seed of its initialization and that of its data order."""
        return [_pair(run) for run in self.runs]

    @property
    def over(self) -> str:
        """What the means are taken over, as far as the seeds of the runs differ."""
        initializations, orders = ({pair[i] for pair in self.seeds} for i in (0, 1))
        if len(set(self.seeds)) == 1 or all(a == b for a, b in self.seeds):
            return "seeds"
        if len(initializations) == 1:
            return "data orders of one seed"
        return "seeds with one data order" if len(orders) == 1 else "pairs of seed and data order"

    @property
    def groups(self) -> dict[str, list[Run]]:
        """The runs that have the same parameters, whatever their kind: {these in words: runs}."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(worded(run.parameters), []).append(run)
        return found


def worded(parameters: Mapping[str, Any]) -> str:
    """Parameters in words.

    >>> worded({"optimizer.lr": 0.001, "batch_size": 60})
    'optimizer.lr=0.001, batch_size=60'
    """
    return ", ".join(f"{key}={spelled(value)}" for key, value in parameters.items())


def labelled(kind: str, parameters: Mapping[str, Any]) -> str:
    """A kind of run with the parameters that tell it apart; `records.plain_kind` takes them off."""
    return f"{kind}{SEPARATOR}{worded(parameters)}" if parameters else kind


def _labelled(record: Record, parameters: Mapping[str, Any]) -> Record:
    if not parameters:
        return record
    return {**record, "kind": labelled(plain_kind(record["kind"]), parameters), "parameters": parameters}


def load(*places: Path | str) -> Runs:
    """Read the runs in folders of runs, the merged records in a report's folder, or single runs.

    Args:
        places: folders, or patterns such as `runs/mnist1d/ticket-*`.

    Raises:
        SystemExit: when there is nothing to read.
    """
    runs: list[Run] = []
    broken: dict[str, list[int]] = {}
    folders = [folder for place in places for folder in _matching(place)]
    for folder in folders:
        found, bad = _of_folder(folder)
        runs += found
        broken |= bad
    if not any(run.records for run in runs):
        raise SystemExit(f"{', '.join(map(str, places))}: no records. {_why_none(places, folders, runs)}")
    runs = once(runs)
    configured = [run for run in runs if run.config]
    kinds = [(run.kind, run.seed, run.config) for run in configured]
    keys = varying(kinds)
    for run in configured:
        run.tell_apart(values(run.config, keys))
    orders(runs)
    first = next((run.folder for run in runs if run.folder), folders[0])
    config: Any = load_config(first / "config.yaml")
    measured = [json.loads(line) for folder in folders for line in _lines(folder / "measured.jsonl")]
    names = dict.fromkeys(run.config.get("name", config.name) for run in runs)
    return Runs(", ".join(names), runs, config, broken, measured, idle(runs))


def _why_none(places: Sequence[Path | str], folders: Sequence[Path], runs: Sequence[Run]) -> str:
    """Why there are no records, and what to do."""
    if failed := next((run for run in runs if run.folder and run.state == "failed"), None):
        return f"{failed.folder} failed: {failure(failed)}\nMend that, and give the same command again."
    if not any(folder.is_dir() for folder in folders):
        return (
            "There is no such folder. Name one that `lightning-prune run` has written, such as runs/mnist1d."
        )
    below = sorted({path.parents[1] for folder in folders for path in folder.glob("*/*/config.yaml")})
    if below:
        every = " ".join(f"'{place}/*'" for place in places)
        return f"The runs lie one folder deeper. Name an experiment, such as {below[0]}, or all: {every}."
    return "Run an experiment first: lightning-prune run"


def failure(run: Run) -> str | None:
    """The last lines of what ended a failed run."""
    path = run.folder / "FAILED" if run.folder else None
    return "\n".join(path.read_text().splitlines()[-4:]) if path and path.is_file() else None


def once(runs: Sequence[Run]) -> list[Run]:
    """These runs without those that are the same as another: of the same config, in another folder.

    A command that says what is the default anyway has a folder of its own. Counted twice such a run would
    look like another seed. The one with more records stays.
    """
    kept: dict[Any, Run] = {}
    for n, run in enumerate(runs):
        config = left_of(flattened(run.config), FREE)
        same = (run.kind, run.seed, frozenset((k, repr(v)) for k, v in config.items())) if config else n
        other = kept.setdefault(same, run)
        if other is run:
            continue
        if (run.state == "finished", len(run.records)) > (other.state == "finished", len(other.records)):
            kept[same], run, other = run, other, run
        log.warning("%s is the same run as %s, and counted once.", run.folder, other.folder)
    return list(kept.values())


def orders(runs: Sequence[Run]) -> None:
    """Where runs of one seed have several data orders, tell these apart as seeds are."""
    if all(run.config.get("order_seed", run.seed) == run.seed for run in runs):
        return
    for run in runs:
        run.seed = f"{run.seed}, order {run.config.get('order_seed', run.seed)}"
        run.records = [{**record, "seed": run.seed} for record in run.records]


def idle(runs: Sequence[Run]) -> list[str]:
    """Which parameters change nothing, in words: they tell runs apart whose records are the same."""
    same: dict[tuple[Any, ...], dict[str, None]] = {}
    for run in runs:
        if run.parameters and run.records:
            without = ("kind", "parameters", "seconds")
            numbers = [{k: v for k, v in record.items() if k not in without} for record in run.records]
            key = (plain_kind(run.kind), str(run.seed), json.dumps(numbers, sort_keys=True))
            same.setdefault(key, {})[worded(run.parameters)] = None
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (kind, seed, _), words in same.items():
        if len(words) > 1:
            found.setdefault((kind, tuple(words)), []).append(seed)
    return [
        f"{kind}, seed {'; '.join(seeds)}: {' and '.join(words)} gave the same records. What these differ in "
        "has no effect on this kind of run: see whether anything reads it."
        for (kind, words), seeds in found.items()
    ]


def _pair(run: Run) -> tuple[Any, Any]:
    """The seed of a run's initialization, and that of its data order."""
    config, seed = run.config, str(run.seed).partition(", order ")
    if not config and seed[1]:  # records alone, as `orders` has named them
        return seed[0], seed[2]
    return config.get("seed", run.seed), config.get("order_seed", config.get("seed", run.seed))


def _matching(place: Path | str) -> list[Path]:
    if Path(place).is_dir() or not glob.has_magic(str(place)):
        return [Path(place)]
    return [Path(path) for path in sorted(glob.glob(str(place))) if Path(path).is_dir()]


def _of_folder(folder: Path) -> tuple[list[Run], dict[str, list[int]]]:
    """The runs in a folder, and what is broken of their files."""
    runs: list[Run] = []
    broken: dict[str, list[int]] = {}
    configs = list(folder.glob("*/config.yaml"))
    if any((folder / name).is_file() for name in ("run.json", "DONE", "FAILED")):
        configs = [folder / "config.yaml"]
    for config in sorted(configs, key=lambda path: _natural(path.parent.name)):
        here = config.parent
        records, bad = read(here / "records.jsonl")
        if bad:
            broken[f"{here.name}/records.jsonl"] = bad
        kind, _, seed = here.name.split(",")[0].rpartition("-")
        state = "unfinished"
        for name, said in (("DONE", "finished"), ("FAILED", "failed")):
            state = said if (here / name).is_file() else state
        made = _json(here / "run.json")
        runs.append(Run(kind, int(seed) if seed.isdigit() else seed, state, latest(records), here, made))
    if configs:
        return runs, broken
    records, bad = read(folder / "records.jsonl")
    if bad:
        broken["records.jsonl"] = bad
    for kind, seed in dict.fromkeys((r["kind"], r.get("seed")) for r in records):
        rounds = latest([r for r in records if (r["kind"], r.get("seed")) == (kind, seed)])
        runs.append(Run(kind, seed, "recorded", rounds, parameters=rounds[0].get("parameters", {})))
    return runs, broken


def latest(records: list[Record]) -> list[Record]:
    """One record a round of each kind and seed: the last one.

    The first version wrote two of round 0 where a run was pruned before its first step, and the first of them
    was of a round that was never trained.
    """
    return list({(r["kind"], r.get("seed"), r["round"]): r for r in records}.values())


def _natural(name: str) -> tuple[str, int, str]:
    first, _, rest = name.partition(",")
    kind, _, seed = first.rpartition("-")
    return (kind, int(seed), rest) if seed.isdigit() else (name, 0, seed)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.load(renamed(path.read_text()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
