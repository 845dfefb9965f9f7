"""A folder of runs, read: whatever state they are in, and whatever became of their files."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import final

from lightning_prune.masks import Masks
from lightning_prune.study.configs import load as load_config
from lightning_prune.study.configs import renamed
from lightning_prune.study.records import Record, read
from lightning_prune.study.round_masks import masks_of

log = logging.getLogger(__name__)


@final
@dataclass
class Run:
    """One run, or the part of it that is there.

    Attributes:
        state: "finished", "unfinished", "failed", or "recorded" where only its records are at hand.
        folder: of the run, if it is at hand.
        made: what `run.json` says: command, commit, versions.
    """

    kind: str
    seed: Any
    state: str
    records: list[Record]
    folder: Path | None = None
    made: dict[str, Any] = field(default_factory=dict[str, Any])

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


@final
@dataclass
class Runs:
    """The runs of an experiment.

    Attributes:
        config: of the experiment: that of its first run.
        broken: {file: numbers of its lines that are no records}.
        measured: rows of `measured.jsonl`: what networks with the masks of these runs cost.
    """

    name: str
    runs: list[Run]
    config: Any
    broken: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    measured: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @cached_property
    def records(self) -> list[Record]:
        """All their records."""
        return [record for run in self.runs for record in run.records]

    def of(self, kind: str) -> list[Run]:
        """The runs of a kind that have records."""
        return [run for run in self.runs if run.kind == kind and run.records]


def load(folder: Path) -> Runs:
    """Read the runs in a folder, or the merged records in it.

    Raises:
        SystemExit: when there is nothing to read.
    """
    runs: list[Run] = []
    broken: dict[str, list[int]] = {}
    for config in sorted(folder.glob("*/config.yaml"), key=lambda path: _natural(path.parent.name)):
        its = config.parent
        records, bad = read(its / "records.jsonl")
        records = latest(records)
        if bad:
            broken[f"{its.name}/records.jsonl"] = bad
        kind, _, seed = its.name.rpartition("-")
        state = (
            "failed"
            if (its / "FAILED").is_file()
            else "finished"
            if (its / "DONE").is_file()
            else "unfinished"
        )
        runs.append(
            Run(kind, int(seed) if seed.isdigit() else seed, state, records, its, _json(its / "run.json"))
        )
    if not runs:
        records, bad = read(folder / "records.jsonl")
        records = latest(records)
        if bad:
            broken["records.jsonl"] = bad
        for kind, seed in dict.fromkeys((r["kind"], r.get("seed")) for r in records):
            its = [r for r in records if (r["kind"], r.get("seed")) == (kind, seed)]
            runs.append(Run(kind, seed, "recorded", its))
    if not any(run.records for run in runs):
        raise SystemExit(f"{folder}: no records. Run an experiment first: lightning-prune run")
    first = next((run.folder for run in runs if run.folder), folder)
    config: Any = load_config(first / "config.yaml")
    measured = [json.loads(line) for line in _lines(folder / "measured.jsonl")]
    return Runs(config.name, runs, config, broken, measured)


def latest(records: list[Record]) -> list[Record]:
    """One record a round of each kind and seed: the last one.

    The first version wrote two of round 0 where a run was pruned before its first step, and the first of them
    was of a round that was never trained.
    """
    return list({(r["kind"], r.get("seed"), r["round"]): r for r in records}.values())


def _natural(name: str) -> tuple[str, int, str]:
    kind, _, seed = name.rpartition("-")
    return (kind, int(seed), "") if seed.isdigit() else (name, 0, seed)


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
