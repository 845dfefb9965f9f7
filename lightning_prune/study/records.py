"""Records: one JSON line a round, what it says, and how it is read and written."""

import json
import math
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from lightning_prune import files
from lightning_prune.masks import Masks, count

Record = dict[str, Any]
SEPARATOR = " · "  # between a kind of run and the parameters that tell it apart in a report
# In this order, before all others.
KINDS = (
    "ticket",
    "reinit",
    "aligned",
    "shuffled",
    "random",
    "shuffled_globally",
    "inverted",
    "one_shot",
    "sign_only",
    "signed_reinit",
    "small_dense",
)


def described(round: int, masks: Masks) -> dict[str, Any]:
    """What a record says of the masks."""
    alive = {name: count(mask) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    return {
        "round": round,
        "sparsity": (total - sum(alive.values())) / total,
        "alive": sum(alive.values()),
        "total": total,
        "layers": {name: alive[name] / mask.numel() for name, mask in masks.items()},
    }


def summary(evaluations: list[dict[str, float]], monitor: str = "val_loss") -> dict[str, Any]:
    """The metrics of a round from its evaluations, in order of their steps.

    These are the metrics of the last evaluation; and, where some value of `monitor` is finite, the step of
    the lowest one (the first of equals), the metrics at that step, and `censored`: whether that is the last
    evaluation, so that the loss might have fallen further.

    >>> first = {"step": 100, "val_loss": 0.3, "test_acc": 0.9}
    >>> summary([first, {"step": 200, "val_loss": 0.4, "test_acc": 0.8}])["test_acc_at_early_stop"]
    0.9
    """
    if not evaluations:
        return {}
    last = evaluations[-1]
    metrics: dict[str, Any] = {k: v for k, v in last.items() if k != "step"}
    finite = [e for e in evaluations if math.isfinite(e.get(monitor, math.nan))]
    if not finite:
        return metrics
    best = min(finite, key=lambda e: e[monitor])
    metrics["early_stop_step"] = best["step"]
    metrics |= {f"{k}_at_early_stop": v for k, v in best.items() if k != "step"}
    return {**metrics, "censored": best is last}


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
    """Replace the file by these records, all or nothing. NaN and infinity, which JSON lacks, become null."""
    files.write(path, "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records))


def finite(node: Any) -> Any:
    """JSON without NaN and infinity, which become null: a run that diverged is no reason to break a page."""
    if isinstance(node, dict):
        return {k: finite(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite(v) for v in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file, and the numbers of its lines that are no records. What is null there is NaN."""
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
            records.append({**record, "metrics": {k: _number(v) for k, v in record["metrics"].items()}})
            if "curve" in record:
                records[-1]["curve"] = {
                    k: [_number(v) for v in values] for k, values in record["curve"].items()
                }
        else:
            broken.append(number)
    return records, broken


def _is_record(record: Any) -> TypeGuard[Record]:
    if not isinstance(record, dict):
        return False
    types = {"round": int, "kind": str, "metrics": dict, "alive": int, "total": int}
    if not all(isinstance(record.get(key), wanted) for key, wanted in types.items()):
        return False
    numbers = all(isinstance(value, (int, float, NoneType)) for value in record["metrics"].values())
    return numbers and 0 <= record["alive"] <= record["total"] and record["total"] > 0


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def lost(records: list[Record]) -> dict[str, list[int]]:
    """The metrics that are NaN or infinite, and in which rounds: at the end of them, or at the best step.

    >>> lost([{"round": 0, "metrics": {"val_loss": 0.3}}, {"round": 1, "metrics": {"val_loss": math.nan}}])
    {'val_loss': [1]}
    """
    found: dict[str, list[int]] = {}
    for record in records:
        for metric, value in record["metrics"].items():
            names = metric, metric.removesuffix("_at_early_stop")
            said = [round for name in names for round in found.get(name, ())]
            if not math.isfinite(value) and record["round"] not in said:
                found.setdefault(metric, []).append(record["round"])
    return found


def by_round(records: list[Record]) -> dict[int, dict[str, list[Record]]]:
    """Records by round and kind."""
    table: dict[int, dict[str, list[Record]]] = {}
    for record in records:
        table.setdefault(record["round"], {}).setdefault(record["kind"], []).append(record)
    return table


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds of run there are, in the order in which figures show them."""
    there = dict.fromkeys(r["kind"] for r in records)
    known = [k for known in KINDS for k in there if plain_kind(k) == known]
    return known + [k for k in there if k not in known]


def plain_kind(kind: str) -> str:
    """A kind of run without the parameters that tell it apart.

    >>> plain_kind("reinit · optimizer.lr=0.001")
    'reinit'
    """
    return kind.partition(SEPARATOR)[0]
