"""A folder of runs -> table, claims and figure: `python -m experiments.report runs/mnist1d`."""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.claims import Record, Verdict
from experiments.records import read, write

KINDS = ("ticket", "reinit", "random")
LABELS = {"ticket": "ticket", "reinit": "re-initialised", "random": "random mask"}
COLOURS = {
    "ticket": "#0072b2",
    "reinit": "#d55e00",
    "random": "#009e73",
}  # Okabe & Ito: safe for colour-blind readers
PANELS = {
    "test_acc": "test accuracy at the end of the round",
    "test_acc_at_early_stop": "test accuracy at minimum validation loss",
    "early_stop_step": "step of minimum validation loss (hollow: censored)",
}
Cells = dict[int, dict[str, list[Record]]]  # round -> kind -> one record a seed


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


def cells(records: list[Record]) -> Cells:
    """Records by round and kind."""
    table: Cells = defaultdict(lambda: defaultdict(list))
    for record in records:
        table[record["round"]][record["kind"]].append(record)
    return table


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds of run there are, the known ones first."""
    there = {r["kind"] for r in records}
    return [k for k in KINDS if k in there] + sorted(there - set(KINDS))


def table(records: list[Record], metric: str) -> list[list[str]]:
    """Rows of text: round, weights left, and of each kind the mean of a metric over seeds, with its range."""
    kinds = kinds_of(records)
    rows = [["round", "weights left", *(LABELS.get(k, k) for k in kinds)]]
    for round, by_kind in sorted(cells(records).items()):
        some = next(iter(by_kind.values()))[0]
        row = [str(round), f"{some['alive'] / some['total']:.2%}"]
        for kind in kinds:
            values = [r["metrics"][metric] for r in by_kind.get(kind, []) if metric in r["metrics"]]
            spread = f" ({min(values):.2%} to {max(values):.2%})" if len(values) > 1 else ""
            row.append(f"{fmean(values):.2%}{spread}" if values else "")
        rows.append(row)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table, the first row its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figure(records: list[Record], path: Path, title: str) -> None:
    """Accuracy and early-stop step against weights left: mean over seeds in a band of their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    fig, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    by_round = cells(records)
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        left: list[float] = []
        for kind in kinds_of(records):
            rounds = [by_kind[kind] for by_kind in by_round.values() if kind in by_kind]
            rounds = [its for its in rounds if all(metric in r["metrics"] for r in its)]
            rounds.sort(key=lambda its: its[0]["alive"])
            left = [100 * its[0]["alive"] / its[0]["total"] for its in rounds]
            values = [[r["metrics"][metric] for r in its] for its in rounds]
            means = [fmean(v) for v in values]
            style: dict[str, Any] = {"color": COLOURS.get(kind), "label": LABELS.get(kind, kind)}
            axis.plot(left, means, marker="o", markersize=3.5, linewidth=1.5, **style)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(left, low, high, alpha=0.15, color=COLOURS.get(kind), linewidth=0)
            if metric == "early_stop_step":  # hollow: the minimum of some seed is at the last evaluation
                at = [i for i, its in enumerate(rounds) if any(r["metrics"]["censored"] for r in its)]
                hollow: dict[str, Any] = {"facecolors": "white", "edgecolors": COLOURS.get(kind), "zorder": 3}
                axis.scatter([left[i] for i in at], [means[i] for i in at], s=16, **hollow)
        dense = [
            r["metrics"][metric] for r in by_round.get(0, {}).get("ticket", []) if metric in r["metrics"]
        ]
        if dense:
            axis.axhline(fmean(dense), color="0.4", linewidth=1, linestyle="--", label="dense")
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_xticks([x for x in (100, 50, 20, 10, 5, 2, 1) if x >= min(left, default=100) * 0.9])
        axis.minorticks_off()
        if metric.startswith("test_acc"):
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axis.set_xlabel("weights left (%)")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def verdicts(config: Path, records: list[Record]) -> list[Verdict]:
    """The claims of an experiment's config, held against its records."""
    claims = instantiate(OmegaConf.load(config).claims, _convert_="all") if config.is_file() else []
    return [claim.check(records) for claim in claims]


def report(folder: Path, out: Path) -> None:
    """Write the merged records, the config, the figure and `report.md` to `out`, and print the table."""
    records = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    config = next(iter(sorted(folder.glob("ticket-*/config.yaml"))), folder / "config.yaml")
    seeds = len({r["seed"] for r in records})
    title = f"{folder.name}: " + (f"{seeds} seeds, mean and range" if seeds > 1 else "1 seed")
    figure(records, out / "figure.png", title)

    text = [f"# {folder.name}\n"]
    for metric, label in list(PANELS.items())[:2]:
        rows = table(records, metric)
        spread = f", mean over {seeds} seeds (lowest to highest)" if seeds > 1 else ""
        text += [f"{label[0].upper()}{label[1:]}{spread}:\n", markdown(rows)]
    censored = sum(bool(r["metrics"].get("censored")) for r in records)
    text += [f"In {censored} of {len(records)} rounds the minimum was at the last evaluation (censored).\n"]
    if found := verdicts(config, records):
        rows = [["claim", "source", "verdict", "mean [95 % interval]"]]
        text += ["## Claims\n", markdown(rows + [[v.claim, v.source, v.verdict, v.numbers] for v in found])]
    (out / "report.md").write_text("\n".join(text))
    if out != folder or not (folder / "records.jsonl").is_file():
        write(out / "records.jsonl", records)
    if config.is_file() and config.parent != out:
        (out / "config.yaml").write_text(config.read_text())

    console = Console()
    head, *body = table(records, "test_acc")
    shown = Table(*head, title=f"{folder.name}: {PANELS['test_acc']}")
    for row in body:
        shown.add_row(*row)
    console.print(shown)
    for v in found:
        console.print(f"[bold]{v.verdict}[/bold]: {v.claim} ({v.source}): {v.numbers}", highlight=False)
    for name in ("records.jsonl", "figure.png", "report.md"):
        console.print(f"written: {out / name}", highlight=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of runs, for instance runs/mnist1d")
    parser.add_argument("--out", type=Path, help="where to write; the folder itself by default")
    args = parser.parse_args()
    report(args.folder, args.out or args.folder)


if __name__ == "__main__":
    main()
