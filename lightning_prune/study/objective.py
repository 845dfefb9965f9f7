"""The one number that a run gives to a sweeper which optimizes it."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from typing_extensions import final, override

from lightning_prune.study.recording import evaluated, grows, pruner_of
from lightning_prune.study.records import read, summary


def objective(cfg: DictConfig, folder: Path) -> float | None:
    """The metric `cfg.objective` of a finished run; None where the config names none.

    It is read in the last round, or where the fraction of weights left is nearest to `cfg.objective_at`.

    Raises:
        ValueError: when the records do not have it.
    """
    if cfg.objective is None:
        return None
    records, _ = read(folder / "records.jsonl")
    record = records[-1]
    if cfg.objective_at is not None:
        record = min(records, key=lambda r: abs(r["alive"] / r["total"] - cfg.objective_at))
    if cfg.objective not in record["metrics"]:
        raise ValueError(
            f"objective={cfg.objective}: the records of {folder} have no such metric. Allowed is one of "
            f"{', '.join(sorted(record['metrics']))}. Give one of these."
        )
    return float(record["metrics"][cfg.objective])


@final
class Objective(Callback):
    """Refuse, at the first evaluation, an objective that no record of this training will have.

    Args:
        metric: the objective.
        monitor: a metric of the evaluations, by which the best of a round is found.
    """

    def __init__(self, metric: str, monitor: str) -> None:
        self.metric, self.monitor = metric, monitor

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = dict.fromkeys(evaluated(trainer, self.monitor), 0.0)  # a loss may be NaN at first
        allowed = {*summary([{"step": 0, **found}], self.monitor)}
        allowed |= {"explored"} if grows(pruner_of(trainer)) else set()
        if self.monitor in found and self.metric not in allowed:
            raise ValueError(
                f"objective={self.metric}: no record will have it. Allowed is one of "
                f"{', '.join(sorted(allowed))}. Give one of these, or log it in validation_step."
            )
