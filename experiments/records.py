"""What is written while an experiment runs: one JSON line a round, and how long each weight survived."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_prune import IterativeMagnitudePruning, files
from lightning_prune.masks import Masks

Record = dict[str, Any]
# In this order, before all others.
KINDS = (
    "ticket",
    "reinit",
    "shuffled",
    "random",
    "shuffled_globally",
    "inverted",
    "one_shot",
    "sign_only",
    "signed_reinit",
    "small_dense",
)


class Records(Callback):
    """Append a line to `records.jsonl` when a round has been trained, and say when it is evaluated.

    Every so many steps of a round, and at its end, wherever that lies on Lightning's own grid of batches.

    A line: round, kind, seed, sparsity, alive, total, layers {name: density}, metrics, curve {metric: its
    values at the steps of the round's evaluations}, seconds. Early stopping is read off the evaluations of
    the round, not done: `early_stop_step` is the step of minimum validation loss (the first of equals) and
    `censored` says that it is the round's last evaluation. Accuracies are fractions.

    Args:
        folder: of the run.
        kind: ticket, reinit, random, ...
        seed: of the run.
        evaluate_every: steps.
    """

    def __init__(self, folder: str | Path, kind: str, seed: int, evaluate_every: int) -> None:
        self.path = Path(folder) / "records.jsonl"
        self.kind, self.seed, self.evaluate_every = kind, seed, evaluate_every
        self.survived: dict[str, Tensor] = {}
        self._round: dict[str, Any] = {}
        self._evaluations: list[dict[str, float]] = []
        self._began = 0
        self._seconds = 0.0
        self._since = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = pruner_of(trainer)
        if not self._round:
            # who is alive in round r has survived r prunings
            self.survived = {name: m.to(torch.uint8) * pruner.round for name, m in pruner.masks.items()}
            self._round = described(pruner.round, pruner.masks)
        self._since = time.monotonic()
        if not trainer.is_global_zero:
            return
        # A run that was killed may have finished rounds after its last checkpoint: they are trained again.
        write(self.path, [r for r in read(self.path)[0] if r["round"] < self._round["round"]])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step - self._began, self.evaluate_every
        last = self._evaluations[-1]["step"] if self._evaluations else 0
        ends = pruner_of(trainer).is_over(trainer) or trainer.global_step == trainer.max_steps
        now = step > last and (ends or step // every > last // every)  # a step may take several batches
        trainer.val_check_batch = 1 if now else sys.maxsize  # of the batches: every one, or none

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {
            k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val_", "test_"))
        }
        self._evaluations.append({"step": trainer.global_step - self._began, **metrics})

    def on_prune(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """The round is trained: write its line, and count who survived."""
        self._finish(trainer)
        for name, mask in masks.items():
            self.survived[name] += mask
        self._round = described(pruner_of(trainer).round, masks)
        self._began = trainer.global_step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)
        if trainer.is_global_zero:
            with files.replacing(self.path.with_name("survived.pt")) as file:
                torch.save(self.survived, file)

    def _finish(self, trainer: Trainer) -> None:
        seconds = self._seconds + time.monotonic() - self._since
        record = {"kind": self.kind, "seed": self.seed, **self._round, "metrics": summary(self._evaluations)}
        record |= {"curve": curve(self._evaluations), "seconds": round(seconds, 3)}
        if trainer.is_global_zero:
            write(self.path, [*read(self.path)[0], record])
        self._evaluations, self._seconds, self._since = [], 0.0, time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "survived": self.survived,
            "round": self._round,
            "evaluations": self._evaluations,
            "began": self._began,
            "seconds": self._seconds + time.monotonic() - self._since,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.survived = state_dict["survived"]
        self._round = state_dict["round"]
        self._evaluations = list(state_dict["evaluations"])
        self._began = state_dict["began"]
        self._seconds = state_dict["seconds"]


def pruner_of(trainer: Trainer) -> IterativeMagnitudePruning:
    """The pruning callback of a trainer."""
    return next(c for c in trainer.callbacks if isinstance(c, IterativeMagnitudePruning))  # type: ignore[attr-defined]


def described(round: int, masks: Masks) -> dict[str, Any]:
    """What a record says of the masks."""
    alive = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    return {
        "round": round,
        "sparsity": (total - sum(alive.values())) / total,
        "alive": sum(alive.values()),
        "total": total,
        "layers": {name: alive[name] / mask.numel() for name, mask in masks.items()},
    }


def summary(evaluations: list[dict[str, float]]) -> dict[str, Any]:
    """The metrics of a round from its evaluations, in order of their steps.

    >>> first = {"step": 100, "val_loss": 0.3, "test_acc": 0.9}
    >>> summary([first, {"step": 200, "val_loss": 0.4, "test_acc": 0.8}])["test_acc_at_early_stop"]
    0.9
    """
    if not evaluations:
        return {}
    last, best = evaluations[-1], min(evaluations, key=lambda e: e["val_loss"])
    return {
        **{k: v for k, v in last.items() if k != "step"},
        "early_stop_step": best["step"],
        **{f"{k}_at_early_stop": v for k, v in best.items() if k != "step"},
        "censored": best is last,
    }


def curve(evaluations: list[dict[str, float]]) -> dict[str, list[float]]:
    """The evaluations of a round as columns, to six digits.

    >>> curve([{"step": 100, "val_loss": 0.31415926}, {"step": 200, "val_loss": 0.2}])
    {'step': [100, 200], 'val_loss': [0.314159, 0.2]}
    """
    columns = {name: [e[name] for e in evaluations] for name in (evaluations[0] if evaluations else ())}
    return {
        name: [v if name == "step" else float(f"{v:.6g}") for v in column] for name, column in columns.items()
    }


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace the file by these records, all or nothing."""
    files.write(path, "".join(json.dumps(record) + "\n" for record in records))


def read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file, and the numbers of its lines that are no records."""
    records: list[dict[str, Any]] = []
    broken: list[int] = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        else:
            broken.append(number)
    return records, broken


def _is_record(record: Any) -> TypeGuard[Record]:
    if not isinstance(record, dict):
        return False
    types = {"round": int, "kind": str, "metrics": dict, "alive": int, "total": int}
    if not all(isinstance(record.get(key), its) for key, its in types.items()):
        return False
    numbers = all(isinstance(value, (int, float)) for value in record["metrics"].values())
    return numbers and 0 <= record["alive"] <= record["total"] and record["total"] > 0


def by_round(records: list[Record]) -> dict[int, dict[str, list[Record]]]:
    """Records by round and kind."""
    table: dict[int, dict[str, list[Record]]] = {}
    for record in records:
        table.setdefault(record["round"], {}).setdefault(record["kind"], []).append(record)
    return table


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds of run there are, in the order in which figures show them."""
    there = dict.fromkeys(r["kind"] for r in records)
    return [k for k in KINDS if k in there] + [k for k in there if k not in KINDS]
