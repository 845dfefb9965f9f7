"""A folder of runs -> one page, figures for papers, tables: `lightning-prune report runs/mnist1d`."""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from glob import has_magic
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import vl_convert
from hydra.utils import instantiate
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from lightning_prune import files
from lightning_prune.study.claims import FAMILIES, Verdict, covered
from lightning_prune.study.configs import flattened
from lightning_prune.study.configs import load as load_config
from lightning_prune.study.costs import measure
from lightning_prune.study.figures import (
    CONFIG,
    DARK,
    PALETTE,
    STANDARD,
    AgainstParameter,
    ByParameter,
    Figure,
    label_of,
    panels,
)
from lightning_prune.study.parameters import spelled
from lightning_prune.study.records import Record, by_round, finite, kinds_of, plain_kind, write
from lightning_prune.study.run_folders import Run, Runs, failure, load
from lightning_prune.study.statistics import interval, paired_by_round

Cell = str | int | float | None


def table(records: list[Record], metric: str) -> list[list[str]]:
    """Rows of text: round, weights left, and of each kind the mean of a metric over seeds, with its range."""
    records = [r for r in records if metric in r["metrics"]]
    kinds = kinds_of(records)
    rows = [["round", "weights left", *(label_of(k) for k in kinds)]]
    for round, left, by_kind in _alike(records):
        row = [str(round), f"{left:.2%}"]
        for kind in kinds:
            group = by_kind.get(kind, [])
            values = [v for r in group if isfinite(v := r["metrics"][metric])]
            low, mean, high = (shown(metric, f(values)) if values else "" for f in (min, fmean, max))
            cell = f"{mean} ({low} to {high})" if len(values) > 1 else mean
            lost = f"{len(group) - len(values)} NaN" if len(group) > len(values) else ""
            row.append(" and ".join(filter(None, (cell, lost))))
        rows.append(row)
    return rows


def _alike(records: list[Record]) -> Iterator[tuple[int, float, dict[str, list[Record]]]]:
    """Records by round, by weights left (those within two points are alike), and by kind."""
    for round, by_kind in sorted(by_round(records).items()):
        rest = by_kind
        while rest:
            left = fmean(r["alive"] / r["total"] for r in next(iter(rest.values())))
            near = {
                k: [r for r in group if abs(r["alive"] / r["total"] - left) < 0.02]
                for k, group in rest.items()
            }
            if not any(near.values()):  # their own mean is far from each of them
                near = {next(iter(rest)): next(iter(rest.values()))}
            yield round, left, {k: group for k, group in near.items() if group}
            taken = {id(r) for group in near.values() for r in group}
            rest = {
                k: others for k, group in rest.items() if (others := [r for r in group if id(r) not in taken])
            }


def differences(records: list[Record], metric: str, against: str = "ticket") -> list[list[str]]:
    """Rows of text: round, and of each other kind the mean difference, paired by seed, with its interval."""
    kinds = [kind for kind in kinds_of(records) if plain_kind(kind) != against]
    found = {
        kind: paired_by_round(records, metric, kind, against + kind.removeprefix(plain_kind(kind)))
        for kind in kinds
    }
    found = {kind: paired for kind, paired in found.items() if paired}
    rows = [["round", *(label_of(kind) for kind in found)]]
    for round in sorted({round for paired in found.values() for round in paired}):
        row = [str(round)]
        for paired in found.values():
            spread = paired[round][1] if round in paired else None
            ends = [shown(metric, end) for end in spread.interval if isfinite(end)] if spread else []
            row.append(
                shown(metric, spread.mean) + (f" [{', '.join(ends)}]" if ends else "") if spread else ""
            )
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


def rounds(runs: Runs, metrics: Mapping[str, str]) -> list[dict[str, Cell]]:
    """A row for each kind and round: how many runs, and the mean of each metric with its 95 % interval."""
    rows: list[dict[str, Cell]] = []
    for round, by_kind in sorted(by_round(runs.records).items()):
        for kind, group in by_kind.items():
            row: dict[str, Cell] = {"kind": label_of(kind), "round": round, "n": len(group)}
            row["weights left"] = f"{fmean(r['alive'] / r['total'] for r in group):.2%}"
            for metric, label in metrics.items():
                values = [v for r in group if isfinite(v := r["metrics"].get(metric, nan))]
                low, mean, high = interval(values) if values else (0.0, 0.0, 0.0)
                spread = f" [{shown(metric, low)}, {shown(metric, high)}]" if values and isfinite(low) else ""
                row[label] = shown(metric, mean) + spread if values else None
            rows.append(row)
    return rows


def listed(runs: Runs) -> list[dict[str, Cell]]:
    """A row for each run."""
    rows: list[dict[str, Cell]] = []
    metric, label = "test_acc", "test accuracy"
    if not any(metric in r["metrics"] for r in runs.records):
        metric, label = next(iter(panels(runs).items()), (metric, label))
    for run in runs.runs:
        last = run.records[-1] if run.records else None
        metrics = last["metrics"] if last else {}
        value = metrics.get(metric)
        parameters = {key: spelled(given) for key, given in run.parameters.items()}
        row: dict[str, Cell] = {"kind": plain_kind(run.kind), **parameters, "seed": run.seed}
        row["state"] = run.state
        row["rounds trained"] = len({r["round"] for r in run.records})
        row["weights left"] = f"{last['alive'] / last['total']:.2%}" if last else None
        row[label] = None if value is None else shown(metric, value)
        row["minutes"] = round(sum(r.get("seconds") or 0 for r in run.records) / 60, 1)
        row["started"] = str(run.made.get("date", ""))[:16].replace("T", " ")
        row["commit"] = str(run.made.get("commit", ""))[:10] + ("+" if run.made.get("changed") else "")
        rows.append(row)
    return rows


def made(runs: Sequence[Run]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config that all runs have in common, and for each run what made it and where its config differs."""
    configs = [flattened(run.config) if run.config else {} for run in runs]
    there = [config for config in configs if config]
    same = {k: v for k, v in (there[0] if there else {}).items() if all(c.get(k, ...) == v for c in there)}
    details = []
    for run, config in zip(runs, configs, strict=True):
        own = {k: spelled(v) for k, v in config.items() if k not in same}
        name = run.folder.name if run.folder else f"{run.kind}-{run.seed}"
        details.append(
            {"name": name, "state": run.state, "made": run.made, "config": own, "error": failure(run)}
        )
    return same, details


def flat(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as rows of a table: metrics and densities as columns of their own, without the curves."""
    rows: list[dict[str, Any]] = []
    for record in records:
        row = {k: v for k, v in record.items() if k not in ("metrics", "layers", "curve")}
        row |= record["metrics"] | {f"density {name}": d for name, d in record.get("layers", {}).items()}
        rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Rows as a Parquet file, where pyarrow is installed."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return False
    with files.replacing(path) as file:
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
    return True


def page(
    runs: Runs, figures: Sequence[Figure], verdicts: Sequence[Verdict], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The report as one HTML page that needs nothing beside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    metrics = panels(runs)
    same, details = made(runs.runs)
    states = {
        state: sum(run.state == state for run in runs.runs)
        for state in dict.fromkeys(r.state for r in runs.runs)
    }
    specs = {f"{figure.name}-{i}": spec for figure in figures for i, spec in enumerate(figure.specs())}
    return environment.get_template("report.html").render(
        runs=runs,
        states=states,
        seeds=len({run.seed for run in runs.runs}),
        over=runs.over,
        kinds=[label_of(k) for k in kinds_of(runs.records)],
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        verdicts=[asdict(v) for v in verdicts],
        covered=covered(runs.seeds),
        families=FAMILIES,
        figures=figures,
        rounds=rounds(runs, metrics),
        listed=listed(runs),
        same=same,
        details=details,
        csv=_script(as_csv(rows)),
        specs=_script(specs),
        config=_script({k: v for k, v in CONFIG.items() if k != "background"}),
        dark=_script(dict(zip(PALETTE, DARK, strict=True))),
        library=_library(),
    )


def _library() -> str:
    bundle: Callable[[], str] = vl_convert.javascript_bundle  # type: ignore[assignment]  # has a default
    return bundle().replace("</script", "<\\/script")


def _script(content: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(finite(content), allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def report(
    *places: Path | str, out: Path, measured: bool = False, x: str | None = None, by: str | None = None
) -> None:
    """Write the page, the figures and the tables of runs to `out`, and print the main one.

    Args:
        places: folders of runs, or patterns such as `runs/mnist1d/ticket-*`.
        out: gets `report.html`, `report.md`, the figures as PNG and SVG, `records.csv` and `records.parquet`,
            the merged `records.jsonl` and the config.
        measured: measure, on this machine, size and latency of networks with the masks of the rounds first.
        x: a parameter that varies between the runs, to be drawn on the horizontal axis.
        by: one of which each value gets a chart of its own.

    Raises:
        ValueError: when `x` or `by` does not vary, or the values of `x` are no numbers.
    """
    runs = load(*places)
    against = [AgainstParameter(x)(runs)] if x is not None else []
    against += [ByParameter(by)(runs)] if by is not None else []
    out.mkdir(parents=True, exist_ok=True)
    if measured:
        runs.measured = measure(runs)
    records, config = runs.records, runs.config
    own = [figure(runs) for figure in instantiate(config.figures, _convert_="all")]
    drawn = [*against, *(figure for figure in own if figure is not None)]
    names = {figure.name for figure in drawn}
    drawn += [figure for make in STANDARD if (figure := make(runs)) is not None and figure.name not in names]
    verdicts = judged(runs)
    rows = flat(records)

    written = [path for figure in drawn for path in figure.write(out, about(runs))]
    files.write(out / "report.html", page(runs, drawn, verdicts, rows))
    files.write(out / "report.md", text(runs, verdicts))
    files.write(out / "records.csv", as_csv(rows))
    written += [out / "records.parquet"] if write_parquet(rows, out / "records.parquet") else []
    write(out / "records.jsonl", records)
    if runs.measured:
        write(out / "measured.jsonl", runs.measured)
    source = next((run.folder for run in runs.runs if run.folder), Path(places[0]))
    if source != out:
        files.write(out / "config.yaml", (source / "config.yaml").read_bytes())
    written += [out / name for name in ("records.csv", "records.jsonl", "report.md", "report.html")]
    say(runs, verdicts, written)


def judged(runs: Runs) -> list[Verdict]:
    """The claims of the runs' configs, held against their records; those of each parameter on their own."""
    verdicts: list[Verdict] = []
    for words, group in runs.groups.items():
        records = [{**r, "kind": plain_kind(r["kind"])} for run in group for r in run.records]
        first = next((run.folder for run in group if run.folder and run.config), None)
        config = runs.config if first is None else load_config(first / "config.yaml")
        for claim in instantiate(config.claims, _convert_="all"):
            verdict = claim.check(records)
            verdicts.append(replace(verdict, claim=f"{verdict.claim} ({words})") if words else verdict)
    return verdicts


def about(runs: Runs) -> str:
    """Of what a figure is: the experiment, and how many runs of each kind a mean is of."""
    return f"{runs.name}, n = {_seeds_of_each(runs)}"


def _seeds_of_each(runs: Runs) -> str:
    # What is no training names its records otherwise than its run.
    kinds = (
        kinds_of(runs.records) if any(map(runs.of, kinds_of(runs.records))) else [r.kind for r in runs.runs]
    )
    n = sorted({len({run.seed for run in runs.of(kind)}) for kind in kinds} - {0})
    if n[-1] == 1:
        return "1 seed"
    return f"{n[0] if len(n) == 1 else f'{n[0]} to {n[-1]}'} {runs.over}"


def sources_of_variation(runs: Runs, metric: str) -> list[list[str]]:
    """Rows of text: of each kind how a metric of the last round spreads over initializations and orders.

    The standard deviation over the seeds of one, of the means over those of the other. There is a row where
    there are several of both.
    """
    found: dict[str, dict[tuple[Any, Any], float]] = {}
    for run, key in zip(runs.runs, runs.seeds, strict=True):
        if run.records and isfinite(value := run.records[-1]["metrics"].get(metric, nan)):
            found.setdefault(run.kind, {})[key] = value
    rows = [["kind", "over initializations", "over orders of the data"]]
    for kind, values in found.items():
        groups: list[list[float]] = []
        for i in (0, 1):
            by: dict[Any, list[float]] = {}
            for key, value in values.items():
                by.setdefault(key[i], []).append(value)
            groups.append([fmean(alike) for alike in by.values()])
        if all(len(means) > 1 for means in groups) and len(values) > max(map(len, groups)):
            rows.append([label_of(kind), *(shown(metric, stdev(means)) for means in groups)])
    return rows


def text(runs: Runs, verdicts: Sequence[Verdict]) -> str:
    """The report in Markdown: tables and claims."""
    each = _seeds_of_each(runs)
    parts = [f"# {runs.name}\n", *(f"{words}\n" for words in runs.idle)]
    for metric, label in tables(runs).items():
        spread = "" if each == "1 seed" else f", mean over {each} (lowest to highest)"
        parts += [f"{label[0].upper()}{label[1:]}{spread}:\n", markdown(table(runs.records, metric))]
    metric, label = next(iter(tables(runs).items()))
    if len(rows := differences(runs.records, metric)) > 1:
        parts += [
            f"Less the ticket's of the same seed, {label} (mean and its 95 % interval):\n",
            markdown(rows),
        ]
    if len(rows := sources_of_variation(runs, metric)) > 1:
        parts += [f"Standard deviation of {label} in the last round:\n", markdown(rows)]
    if timed := [r for r in runs.records if "censored" in r["metrics"]]:
        censored = sum(r["metrics"]["censored"] for r in timed)
        parts += [
            f"In {censored} of {len(timed)} rounds the minimum was at the last evaluation (censored).\n"
        ]
    if verdicts:
        rows = [["claim", "source", "verdict", "mean [95 % interval]"]]
        parts += [
            "## Claims\n",
            f"{covered(runs.seeds)} {FAMILIES}\n",
            markdown(rows + [[v.claim, v.source, v.verdict, v.numbers] for v in verdicts]),
        ]
    return "\n".join(parts)


def tables(runs: Runs) -> dict[str, str]:
    """What is tabulated: {metric: its label}."""
    return runs.config.get("tables") or dict(list(panels(runs).items())[:2])


def say(runs: Runs, verdicts: Sequence[Verdict], written: Sequence[Path]) -> None:
    """Print the main table, the verdicts, what was skipped and what was written."""
    console = Console()
    metric, label = next(iter(tables(runs).items()))
    rows = table(runs.records, metric)
    if sum(3 + max(map(len, column)) for column in zip(*rows, strict=True)) >= console.width:
        rows = [[cell.split(" (")[0] for cell in row] for row in rows]  # the means alone; ranges are written
    names, *body = rows
    widths = [max(map(len, column)) for column in zip(*body, strict=True)] or [None] * len(names)
    head = [Column(n, min_width=w, overflow="fold") for n, w in zip(names, widths, strict=True)]
    printed = Table(*head, title=f"{runs.name}: {label}", box=SIMPLE_HEAD, padding=0)
    for row in body:
        printed.add_row(*row)
    console.print(printed)
    for v in verdicts:
        console.print(f"[bold]{v.verdict}[/bold]: {v.claim} ({v.source}): {v.numbers}", highlight=False)
    for words in runs.idle:
        console.print(words, highlight=False)
    for file, numbers in runs.broken.items():
        where = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        console.print(
            f"{file}: {len(numbers)} lines are no records and were skipped: {where}", highlight=False
        )
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lightning-prune report", description=__doc__)
    parser.add_argument("folder", nargs="+", help="of runs, such as runs/mnist1d; or a pattern of folders")
    parser.add_argument("--out", type=Path, help="where to write; where there is one folder, that by default")
    parser.add_argument("--x", metavar="KEY", help="a parameter that varies, for the horizontal axis")
    parser.add_argument("--by", metavar="KEY", help="a parameter that varies, for a chart of each value")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure size and latency of networks with the masks of the rounds",
    )
    args = parser.parse_args(arguments)
    one = Path(args.folder[0])
    if args.out is None and (len(args.folder) > 1 or (has_magic(str(one)) and not one.is_dir())):
        parser.error("--out: several folders have no place in common. Give a folder to write to.")
    try:
        report(*args.folder, out=args.out or one, measured=args.measure, x=args.x, by=args.by)
    except ValueError as error:
        parser.error(str(error))
