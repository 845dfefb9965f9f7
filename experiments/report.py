"""A folder of runs -> tables, claims and figures: `python -m experiments.report runs/mnist1d`."""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.figures import LABELS, PANELS
from experiments.records import Record, by_round, kinds_of, read, write


def load(folder: Path) -> list[Record]:
    """All records of the runs in a folder, or of the merged file in it."""
    files = sorted(folder.glob("*/records.jsonl")) or [folder / "records.jsonl"]
    records: list[Record] = []
    for file in files:
        found, broken = read(file)
        records += found
        if broken:
            print(f"{file}: {broken} lines are no records and were skipped")
    if not records:
        raise SystemExit(f"{folder}: no records. Run an experiment first: python -m experiments.run")
    return records


def table(records: list[Record], metric: str) -> list[list[str]]:
    """Rows of text: round, weights left, and of each kind the mean of a metric over seeds, with its range."""
    records = [r for r in records if metric in r["metrics"]]
    kinds = kinds_of(records)
    rows = [["round", "weights left", *(LABELS.get(k, k) for k in kinds)]]
    for round, by_kind in sorted(by_round(records).items()):
        left = fmean(r["alive"] / r["total"] for r in next(iter(by_kind.values())))
        row = [str(round), f"{left:.2%}"]
        for kind in kinds:  # whose weights left are others than the row says is no part of it
            its = [r for r in by_kind.get(kind, []) if abs(r["alive"] / r["total"] - left) < 0.02]
            values = [r["metrics"][metric] for r in its]
            low, mean, high = (shown(metric, f(values)) if values else "" for f in (min, fmean, max))
            row.append(f"{mean} ({low} to {high})" if len(values) > 1 else mean)
        rows.append(row)
    return rows


def shown(metric: str, value: float) -> str:
    """A metric with its unit.

    >>> shown("test_acc", 0.9), shown("gzip_bytes", 1234567), shown("speed_up", 2)
    ('90.00%', '1.235 MB', '2.000')
    """
    if metric.endswith("_bytes"):
        return f"{value / 1e6:.3f} MB"
    if "_acc" in metric:
        return f"{value:.2%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def markdown(rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table, the first row its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(folder: Path, out: Path) -> None:
    """Write the merged records, the config, the figures and `report.md` to `out`, and print the table."""
    records = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    file = next(iter(sorted(folder.glob("*/config.yaml"))), folder / "config.yaml")
    config: Any = OmegaConf.load(file)
    seeds = len({r["seed"] for r in records})
    title = f"{config.name}: " + (f"{seeds} seeds, mean and range" if seeds > 1 else "1 seed")
    figures = [figure(folder, records, out, title) for figure in instantiate(config.figures, _convert_="all")]
    verdicts = [claim.check(records) for claim in instantiate(config.claims, _convert_="all")]

    text = [f"# {config.name}\n"]
    tables = config.get("tables") or dict(list(PANELS.items())[:2])
    for metric, label in tables.items():
        spread = f", mean over {seeds} seeds (lowest to highest)" if seeds > 1 else ""
        text += [f"{label[0].upper()}{label[1:]}{spread}:\n", markdown(table(records, metric))]
    if timed := [r for r in records if "censored" in r["metrics"]]:
        censored = sum(r["metrics"]["censored"] for r in timed)
        text += [f"In {censored} of {len(timed)} rounds the minimum was at the last evaluation (censored).\n"]
    if verdicts:
        rows = [["claim", "source", "verdict", "mean [95 % interval]"]]
        text += [
            "## Claims\n",
            markdown(rows + [[v.claim, v.source, v.verdict, v.numbers] for v in verdicts]),
        ]
    (out / "report.md").write_text("\n".join(text))
    write(out / "records.jsonl", records)
    if file.parent != out:
        (out / "config.yaml").write_text(file.read_text())

    console = Console()
    metric, label = next(iter(tables.items()))
    head, *body = table(records, metric)
    printed = Table(*head, title=f"{config.name}: {label}")
    for row in body:
        printed.add_row(*row)
    console.print(printed)
    for v in verdicts:
        console.print(f"[bold]{v.verdict}[/bold]: {v.claim} ({v.source}): {v.numbers}", highlight=False)
    for path in (out / "records.jsonl", *figures, out / "report.md"):
        if path is not None:
            console.print(f"written: {path}", highlight=False, soft_wrap=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of runs, for instance runs/mnist1d")
    parser.add_argument("--out", type=Path, help="where to write; the folder itself by default")
    args = parser.parse_args()
    report(args.folder, args.out or args.folder)


if __name__ == "__main__":
    main()
