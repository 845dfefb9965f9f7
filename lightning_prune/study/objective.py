"""The one number that a run gives to a sweeper which optimizes it."""

from pathlib import Path

from omegaconf import DictConfig

from lightning_prune.study.records import read


def objective(cfg: DictConfig, folder: Path) -> float | None:
    """The metric `cfg.objective` of a finished run; None where the config names none.

    It is read in the last round, or where the fraction of weights left is nearest to `cfg.objective_at`.

    Raises:
        ValueError: when the records do not have it.
    """
    if cfg.objective is None:
        return None
    records, _ = read(folder / "records.jsonl")
    its = records[-1]
    if cfg.objective_at is not None:
        its = min(records, key=lambda r: abs(r["alive"] / r["total"] - cfg.objective_at))
    if cfg.objective not in its["metrics"]:
        raise ValueError(
            f"objective={cfg.objective}: the records of {folder} have no such metric. Allowed is one of "
            f"{', '.join(sorted(its['metrics']))}. Give one of these."
        )
    return float(its["metrics"][cfg.objective])
