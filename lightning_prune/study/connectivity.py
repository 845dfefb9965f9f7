"""Linear mode connectivity: are two trainings from one state joined by a line of low error?

From the state that a finished ticket rewound to, two copies of the network with the masks of one of its
rounds are trained in different data orders, and the error is measured along the line between their weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_prune.study.figures import Axis, Figure, axis_of, lines
from lightning_prune.study.oneshot import evaluate
from lightning_prune.study.records import Record, described, read
from lightning_prune.study.run_folders import Runs
from lightning_prune.study.statistics import interval
from lightning_prune.study.tickets import Begin, each_round, finished, trained_from
from lightning_prune.study.training import built

Loader = Iterable[tuple[Tensor, Tensor]]
State = Mapping[str, Tensor]

STABLE = 0.02  # the barrier below which two trainings count as joined
MATCHING = 0.002  # how far below the dense network's accuracy a subnetwork still matches it


def interpolated(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) a + alpha b, of BatchNorm statistics too; what is not floating point is that of `a`.

    >>> interpolated({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([2.0, 0.0])}, alpha=0.25)
    {'w': tensor([0.5000, 3.0000])}
    """
    return {n: torch.lerp(t, b[n], alpha) if t.is_floating_point() else t.clone() for n, t in a.items()}


def path(
    network: nn.Module,
    a: State,
    b: State,
    splits: Mapping[str, Loader],
    points: int = 30,
    reestimate: Loader | None = None,
) -> dict[str, list[float]]:
    """The error along the line from `a` to `b`, at evenly spaced points, both ends among them.

    Args:
        network: any with these state dicts; it is changed.
        a: state dict of one end.
        b: of the other.
        splits: {name: batches} of the data that the error is measured on.
        points: 2 or more.
        reestimate: batches from which BatchNorm statistics are estimated anew at each point, which lowers
            barriers; None: they are interpolated as the weights are.

    Returns:
        `alpha`, and `<name>_error`, a fraction, for each of the splits.

    Reference: Frankle et al. (2020), arXiv:1912.05671, Section 2.
    """
    if points < 2:
        raise ValueError(f"points={points}: allowed are whole numbers from 2 on, such as 11.")
    alphas = [i / (points - 1) for i in range(points)]
    errors: dict[str, list[float]] = {f"{name}_error": [] for name in splits}
    for alpha in alphas:
        network.load_state_dict(interpolated(a, b, alpha))
        if reestimate is not None:
            update_bn(reestimate, network)
        for name, batches in splits.items():
            errors[f"{name}_error"].append(1 - evaluate(network, batches)[1])
    return {"alpha": alphas, **errors}


def barrier(errors: Sequence[float]) -> float:
    """How far the error rises on the way above the mean of the errors at the ends ("instability").

    >>> barrier([0.25, 1.0, 0.75])
    0.5
    """
    return max(errors) - (errors[0] + errors[-1]) / 2


def train(cfg: DictConfig, folder: Path, points: int = 30, reestimate: bool = False) -> None:
    """Train two copies at each of the ticket's rounds `cfg.controls_at` and record the path between them.

    Metrics of a round: for `train` and `test` the `_error`, mean of the two copies, and the `_barrier`;
    `stable`, whether the barrier on the test set is below 2 points; `matching`, whether the copies are at
    most 0.2 points less accurate than the ticket's dense round at its end. The errors along the path are the
    record's `path`.
    """
    ticket = finished(cfg)
    records, _ = read(Path(to_absolute_path(cfg.ticket)) / "records.jsonl")
    dense = next(r["metrics"]["test_acc"] for r in records if r["round"] == 0)

    def train_one(round: int, folder: Path) -> list[Record]:
        start = ticket.start(round)
        ends: list[State] = []
        seconds = 0.0
        for copy in (1, 2):
            own = folder / f"copy-{copy}"
            begin = Begin(start, ticket.snapshot)
            ends.append(trained_from(cfg, own, round, ticket.steps, begin, order=1000 * copy + cfg.seed))
            seconds += read(own / "records.jsonl")[0][0]["seconds"]
        batches = instantiate(cfg.batches)
        train_set, test_set = (
            list(batches.in_order(pair)) for pair in (batches.splits.train, batches.splits.test)
        )
        splits = {"train": train_set, "test": test_set}
        anew = train_set if reestimate else None
        found = path(built(cfg), ends[0], ends[1], splits, points, anew)
        metrics: dict[str, Any] = {}
        for name in ("train", "test"):
            errors = found[f"{name}_error"]
            metrics[f"{name}_error"] = (errors[0] + errors[-1]) / 2
            metrics[f"{name}_barrier"] = barrier(errors)
        metrics["stable"] = metrics["test_barrier"] < STABLE
        metrics["matching"] = 1 - metrics["test_error"] >= dense - MATCHING
        record = {"kind": cfg.kind, "seed": cfg.seed, **described(round, start.masks), "metrics": metrics}
        shown = {name: [float(f"{v:.6g}") for v in values] for name, values in found.items()}
        return [{**record, "path": shown, "seconds": seconds}]

    each_round(cfg, folder, ticket.rounds, train_one)


@dataclass(frozen=True)
class Paths:
    """The error along the paths: a chart a split, a line a round, mean over seeds and its interval."""

    name: str = "paths"

    def __call__(self, runs: Runs) -> Figure | None:
        """Draw it."""
        found = [r for r in runs.records if "path" in r]
        shown: dict[int, str] = {}
        for r in sorted(found, key=lambda r: r["round"]):
            shown[r["round"]] = f"{r['alive'] / r['total']:.1%} of the weights" if r["round"] else "dense"
        charts: list[Any] = []
        for split in ("train", "test"):
            rows: list[dict[str, Any]] = []
            for round, label in shown.items():
                paths = [r["path"] for r in found if r["round"] == round]
                for alpha, *errors in zip(
                    paths[0]["alpha"], *(p[f"{split}_error"] for p in paths), strict=True
                ):
                    low, mean, high = interval(errors)
                    band = {"low": low, "high": high} if isfinite(low) else {}
                    rows.append(
                        {"kind": label, "round": round, "x": alpha, "y": mean, "n": len(paths)} | band
                    )
            x, y = Axis("interpolation"), axis_of("_acc", "error")
            charts.append(lines(rows, list(shown.values()), x, y, f"{split} error between two trainings"))
        caption = (
            "Error on the line between two trainings from the same state, mean over seeds and 95 % interval."
        )
        return Figure(self.name, "Linear mode connectivity", caption, charts, 2) if found else None
