"""What a sweep would do, before it does it: runs, rounds, weights left, disk and time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import final

from lightning_prune.callbacks.growing import DynamicSparseTraining
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.evidence import asked
from lightning_prune.layers import prunable
from lightning_prune.pruning import budget, scheduled
from lightning_prune.study.configs import plain
from lightning_prune.study.densities import at, steps_of
from lightning_prune.study.provenance import content
from lightning_prune.study.records import read
from lightning_prune.study.round_masks import file_size
from lightning_prune.study.shared_rounds import LATER, dense_round
from lightning_prune.study.training import Cost, trial

_NAME = 24  # characters that the name of a run has in a table, at least, if it has as many
_BORDERS = " | "  # of a column

HEAD = ("run", "state", "rounds to train", "weights left", "disk", "time")


@final
class Plan:
    """The runs of a command, one after another.

    Time and disk come from a trial: the real training for as many steps as there are between two evaluations,
    one evaluation, one checkpoint, all of it thrown away. Runs that train the same network on the same data
    share it.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.seconds, self.bytes = 0.0, 0
        self._trials: dict[str, Cost] = {}
        self._data: dict[str, str] = {}
        self._dense: set[Path] = set()
        self._idle: dict[str, list[str]] = {}
        self._lengths: list[str] = []

    def add(
        self, cfg: DictConfig, folder: Path, state: str, idle: Sequence[str] = (), length: str | None = None
    ) -> None:
        """Add a run, in a state.

        Args:
            cfg: of the run.
            folder: of the run.
            state: new, finished, ...
            idle: keys of the command that nothing reads.
            length: what to say of the length of its training.
        """
        if length and length not in self._lengths:
            self._lengths.append(length)
        name = f"{cfg.name}/{folder.name}"
        for key in idle:
            self._idle.setdefault(key, []).append(name)
        control = cfg.run._target_.startswith("lightning_prune.study.controls.")
        grows = cfg.run._target_ == "lightning_prune.study.densities.train"
        if cfg.run._target_ != "lightning_prune.study.training.train" and not control and not grows:
            self.rows.append((name, state, "", "", "?", "?"))
            return
        lengths = [*steps_of(cfg).values()] if grows else []
        if grows:
            cfg = at(cfg, -1)  # its last training
        pruner: IterativeMagnitudePruning | DynamicSparseTraining = instantiate(cfg.pruner)
        task = instantiate(cfg.task)
        params = prunable(task, pruner.layers, pruner.include, pruner.exclude)
        weights = {name: p.numel() for name, p in params.items()}
        left = weights_left(weights, pruner)
        shown = "?" if left is None else f"{left} ({left / sum(weights.values()):.2%})"
        if state == "finished" or state.startswith("refused"):
            self.rows.append((name, state, "0", shown, "", ""))
            return
        rounds = cfg.rounds + 1 if not control or cfg.controls_at is None else len(cfg.controls_at)
        lengths = lengths or [cfg.steps_per_round] * rounds
        rounds = len(lengths)
        trained = 0 if state == "failed" else len(read(folder / "records.jsonl")[0])
        dense = None if control else dense_round(cfg, folder, pruner, self._content(cfg))
        if dense is not None and not trained:
            trained = int(dense.path in self._dense or dense.path.is_file())
            self._dense.add(dense.path)
        try:
            cost = self._cost(cfg)
        except ValueError as error:  # what the fit would refuse as it starts
            self.rows.append((name, f"refused: {error}", "0", shown, "", ""))
            return
        seconds = sum(lengths[trained:]) * cost.seconds_per_step
        size = 2 * cost.checkpoint_bytes  # resume, final
        if not control:  # which keeps no masks of its own
            masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
            size += rounds * file_size(masks)
        self.seconds, self.bytes = self.seconds + seconds, self.bytes + size
        of = f"{rounds - trained} of {rounds}"
        self.rows.append((name, state, of, shown, f"{size / 1e6:.1f} MB", duration(seconds)))

    def _content(self, cfg: DictConfig) -> str:
        key = json.dumps(plain(cfg.batches), sort_keys=True)
        if key not in self._data:
            self._data[key] = content(instantiate(cfg.batches), plain(cfg.batches))
        return self._data[key]

    def _cost(self, cfg: DictConfig) -> Cost:
        key = json.dumps(plain(cfg, (*LATER, "seed")), sort_keys=True)
        if key not in self._trials:
            self._trials[key] = trial(cfg)
        return self._trials[key]

    def show(self, console: Console | None = None) -> None:
        """Print it: as a table where the terminal is wide enough, else a few lines for each run."""
        console = console or Console()
        rows = [(name, state.partition(": ")[0], *rest) for name, state, *rest in self.rows]
        widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
        if min(widths[0], _NAME) + sum(widths[1:]) + len(_BORDERS) * len(HEAD) <= console.width:
            table = Table(
                Column(HEAD[0], overflow="fold"), *(Column(name, no_wrap=True) for name in HEAD[1:])
            )
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
        else:
            for name, *values in rows:
                console.print(name, markup=False, highlight=False)
                console.print(Padding(_in_words(*values), (0, 0, 0, 4)), highlight=False)
        for name, state, *_ in self.rows:
            if ": " in state:
                console.print(f"{name}: {state}", markup=False, highlight=False)
        for key, runs in self._idle.items():
            of = runs[0] if len(runs) == 1 else f"{runs[0]} and {len(runs) - 1} more"
            console.print(f"{key}: nothing of {of} reads it, so that it has no effect. Leave it out.")
        for said in self._lengths:
            console.print(said, markup=False, highlight=False)
        total = f"{self.bytes / 1e6:.1f} MB and about {duration(self.seconds)}, one run after another"
        console.print(
            f"{len(self.rows)} runs: {total}. Nothing was trained but trials of a few steps.", highlight=False
        )


def _in_words(state: str, rounds: str, left: str, disk: str, time: str) -> str:
    """The values of a run in one line."""
    words = (state, f"rounds to train: {rounds}", f"weights left: {left}", disk, time)
    return ", ".join(word for word in words if word and not word.endswith(": "))


def weights_left(weights: dict[str, int], pruner: Any) -> int | None:
    """How many weights the last round has; None when the schedule reads scores, or counts updates.

    >>> import lightning_prune as lp
    >>> weights_left({"a": 100, "b": 50}, lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.5), rounds=2))
    38
    """
    if isinstance(pruner, DynamicSparseTraining):
        return None if callable(pruner.target) else budget(pruner.target, sum(weights.values()))
    left = 0
    for names, schedule in scheduled(list(weights), pruner.schedule, pruner.rounds):
        if asked(schedule):
            return None
        left += budget(schedule(pruner.rounds), sum(weights[name] for name in names))
    return left


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(5.2), duration(192), duration(8000)
    ('5 s', '3 min', '2 h 13 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
