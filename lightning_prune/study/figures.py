"""Figures of a folder of runs: each is drawn once, for the page and for paper.

A figure is a function of the runs -> `Figure`, or None where the runs do not have what it shows. An
experiment's config lists its own; `STANDARD` are the others that a report has.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import Any

import altair as alt
import torch
import vl_convert

from lightning_prune import files
from lightning_prune.callbacks.checkpoints import load_masks
from lightning_prune.masks import Masks, jaccard
from lightning_prune.study.parameters import spelled
from lightning_prune.study.records import Record, by_round, finite, kinds_of, plain_kind
from lightning_prune.study.run_folders import Runs, labelled
from lightning_prune.study.statistics import interval, overlap_of_seeds

LABELS = {
    "reinit": "re-initialised",
    "aligned": "re-initialised, mask aligned",
    "random": "random mask",
    "shuffled": "shuffled in layers",
    "shuffled_globally": "shuffled globally",
    "inverted": "inverted mask",
    "one_shot": "one-shot mask",
    "sign_only": "signs only",
    "signed_reinit": "re-initialised, same signs",
    "small_dense": "small dense",
}
# Okabe & Ito's hues, safe for colour-blind readers, and three more for those who compare ten kinds; on white
# paper and on dark, each line has a contrast of 3:1 or more
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#008060",
    "#b0518d",
    "#9a6700",
    "#6e6e6e",
    "#882255",
    "#7a7a1f",
    "#6a51a3",
    "#3a8fc7",
)
DARK = (
    "#4aa8e0",
    "#ff8c42",
    "#2ec99b",
    "#e39ac4",
    "#f0b429",
    "#a8a8a8",
    "#e0709c",
    "#c9c95a",
    "#ab98e0",
    "#8fd0f5",
)
DIFFERENCES = (-80, -40, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 40)  # ticks, in points
HEIGHT, WIDTH = 240, 320
LONG = 28  # letters of a name that two columns of a legend have no room for
SEEDS = 5  # as many of a kind are compared with each other
KINDS = 6  # as many have charts of their own


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, of which any page or paper can be made."""

    name: str
    title: str
    caption: str
    charts: Sequence[Any]  # of Altair
    columns: int = 3
    width: int | str = "container"  # of a chart on the page

    def specs(self) -> list[dict[str, Any]]:
        """The charts for a page, as Vega-Lite."""
        return [finite(chart.properties(width=self.width).to_dict()) for chart in self.charts]

    def write(self, out: Path, of: str = "") -> list[Path]:
        """Write the figure as PNG and SVG, which say of what runs it is and what is drawn."""
        width = WIDTH if isinstance(self.width, str) else self.width
        charts = [chart.properties(width=width) for chart in self.charts]
        across = min(self.columns, len(charts)) * width
        said = wrap(" ".join(filter(None, (f"{of}." if of else "", self.caption))), max(40, across // 6))
        title = alt.TitleParams(text=self.title, subtitle=said, anchor="start")
        whole = alt.concat(*charts, columns=self.columns, title=title).resolve_scale(color="independent")
        spec = finite(whole.configure(**CONFIG).to_dict())
        png, svg = out / f"{self.name}.png", out / f"{self.name}.svg"
        files.write(png, vl_convert.vegalite_to_png(spec, scale=2))
        files.write(svg, vl_convert.vegalite_to_svg(spec))
        return [png, svg]


CONFIG: dict[str, Any] = {
    "axis": {"gridOpacity": 0.4, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "labelLimit": 260, "columns": 2},
    "title": {"fontSize": 12, "fontWeight": "normal", "subtitleFontSize": 10},
    "view": {"stroke": None},
    "background": "white",
}


def panels(runs: Runs) -> dict[str, str]:
    """The metrics that a report shows first, {metric: label}: as the config says, or those that there are."""
    if tables := runs.config.get("tables"):
        return dict(tables)
    there = dict.fromkeys(name for record in runs.records for name in record["metrics"])
    monitor = runs.config.get("monitor") or "val_loss"
    lowest = "minimum validation loss" if monitor == "val_loss" else f"the lowest {monitor}"
    panels = {
        "test_acc": "test accuracy at the end of the round",
        "test_acc_at_early_stop": f"test accuracy at {lowest}",
    }
    if not panels.keys() & there:
        panels = {f"{monitor}_at_early_stop": lowest, monitor: f"{monitor} at the end of the round"}
    panels["early_stop_step"] = f"step of {lowest}"
    own = {name: name for name in there if not name.endswith("_early_stop") and name != "censored"}
    return {name: label for name, label in panels.items() if name in there} or own


# ------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class Axis:
    """What is on an axis, and how."""

    title: str
    format: str = ""
    log: bool = False
    reverse: bool = False
    values: Sequence[float] | None = None
    limits: Sequence[float] | None = None
    linear_within: float | None = None  # of a symmetric logarithm

    def options(self) -> dict[str, Any]:
        """For `alt.X` and `alt.Y`."""
        scale: dict[str, Any] = {"zero": False, "reverse": self.reverse, "nice": self.limits is None}
        if self.log:
            scale = {"type": "log", "reverse": self.reverse, "nice": False}
        if self.linear_within is not None:
            scale = {"type": "symlog", "constant": self.linear_within, "nice": False}
        if self.limits is not None:
            scale |= {"domain": list(self.limits)}
        axis: dict[str, Any] = {"values": list(self.values)} if self.values else {}
        if self.linear_within:
            axis["labelOverlap"] = False  # else every other tick goes, and 0 may be among them
        axis |= {"format": self.format or "~g"} if self.format or self.log else {}
        return {"title": self.title, "scale": alt.Scale(**scale), "axis": alt.Axis(**axis)}


def axis_of(metric: str, title: str, **options: Any) -> Axis:
    """The axis of a metric: fractions of test examples in percent, bytes with their prefix."""
    return Axis(title, "~%" if "_acc" in metric else "~s" if metric.endswith("_bytes") else "", **options)


def left(records: Sequence[Record]) -> Axis:
    """Weights left in percent, fewer to the right."""
    least = 100 * min(r["alive"] / r["total"] for r in records)
    ticks = [x for x in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if x >= least * 0.9]
    return Axis("weights left (%)", log=least > 0, reverse=True, values=ticks)


def label_of(kind: str) -> str:
    """What a kind is called in figures and tables.

    >>> label_of("reinit · optimizer.lr=0.001")
    're-initialised · optimizer.lr=0.001'
    """
    plain = plain_kind(kind)
    return LABELS.get(plain, plain) + kind.removeprefix(plain)


def labels(kinds: Iterable[str]) -> list[str]:
    """What kinds are called in figures."""
    return [label_of(kind) for kind in kinds]


def colour(kinds: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> alt.Color:
    """One colour a kind, the same in every figure of these kinds; the legend names those that are drawn."""
    names, drawn = labels(kinds), {row["kind"] for row in rows}
    scale = alt.Scale(domain=names, range=[PALETTE[i % len(PALETTE)] for i in range(len(names))])
    there = [name for name in names if name in drawn]
    long = max(map(len, there), default=0) > LONG  # one below another, so that each can be read whole
    room: dict[str, Any] = {"columns": 1, "labelLimit": WIDTH} if long else {}
    where = alt.Legend(title=None, orient="bottom", symbolOpacity=1, values=there, **room)
    return alt.Color("kind:N", scale=scale, legend=where)


def points(
    records: Sequence[Record],
    kinds: Sequence[str],
    x: Callable[[Record], float],
    y: Callable[[Record], float | None],
) -> list[dict[str, Any]]:
    """For each kind and round the mean over runs, with its 95 % interval where there are several."""
    rows: list[dict[str, Any]] = []
    for round, by_kind in sorted(by_round(list(records)).items()):
        for kind in kinds:
            pairs = [(r, value) for r in by_kind.get(kind, []) if (value := y(r)) is not None]
            pairs = [(r, value) for r, value in pairs if math.isfinite(value)]
            if not pairs:
                continue
            values = [value for _, value in pairs]
            low, mean, high = interval(values)
            row = {
                "kind": label_of(kind),
                "round": round,
                "x": fmean(x(r) for r, _ in pairs),
                "y": mean,
            }
            row |= {"low": low, "high": high} if math.isfinite(low) else {}
            late = sum(bool(r["metrics"].get("censored")) for r, _ in pairs)
            rows.append({**row, "n": len(values), "censored": late})
    return rows


def lines(
    rows: list[dict[str, Any]],
    kinds: Sequence[str],
    x: Axis,
    y: Axis,
    title: str,
    *,
    hollow: bool = False,
    dense: float | None = None,
    beside: Sequence[float] = (),
) -> Any:
    """One line a kind in the band of its interval; hollow points: censored in some seed.

    Args:
        rows: as `points` gives them.
        kinds: of run, in the order of their colours.
        x: the horizontal axis.
        y: the vertical axis.
        title: of the chart.
        hollow: whether points that are censored are.
        dense: where a dashed line says what the dense network has.
        beside: values that the caller draws over it.
    """
    high = [row[key] for row in rows for key in ("y", "low", "high") if key in row]
    x = _apart(x, [row["x"] for row in rows])
    y = _apart(y, [*high, *beside, *([] if dense is None else [dense])])
    y = _possible(y, [row["y"] for row in rows], high)
    inside, beyond = _split(rows, y.limits)
    base = alt.Chart(alt.Data(values=rows))
    where = {"x": alt.X("x:Q", **x.options())}
    untitled: dict[str, Any] = {**y.options(), "title": None}
    shown = alt.Y("y:Q", **untitled if y.title == title else y.options())
    tips = [
        alt.Tooltip("kind:N"),
        alt.Tooltip("round:Q"),
        alt.Tooltip("x:Q", title=x.title, format=".4~g"),
        alt.Tooltip(
            "y:Q",
            title=y.title,
            format=".2%" if y.format.endswith("%") else ".4~s" if y.format == "~s" else ".4~g",
        ),
    ]
    if any("low" in row for row in rows):
        form = ".2%" if y.format.endswith("%") else ".4~g"
        tips += [
            alt.Tooltip("low:Q", title="95 % from", format=form),
            alt.Tooltip("high:Q", title="to", format=form),
        ]
    tips += [alt.Tooltip("n:Q")] + ([alt.Tooltip("censored:Q")] if hollow else [])
    tone, layers = colour(kinds, rows), list[Any]()
    pick = picked(title)

    def unless_others_are_picked(opacity: float) -> Any:
        return alt.condition(pick, alt.value(opacity), alt.value(opacity / 8))

    if any("low" in row for row in rows):
        band = base.transform_filter("isValid(datum.low)").mark_area(clip=True)
        low = alt.Y("low:Q", **untitled)
        layers.append(
            band.encode(**where, y=low, y2="high:Q", color=tone, opacity=unless_others_are_picked(0.15))
        )
    line = base.mark_line(strokeWidth=1.8, clip=True).add_params(pick)
    layers.append(line.encode(**where, y=shown, color=tone, opacity=unless_others_are_picked(1)))
    near = alt.Chart(alt.Data(values=inside))
    for open_ in {hollow and row["censored"] > 0 for row in inside}:
        dots = near.transform_filter(
            f"{str(not hollow).lower()} || (datum.censored > 0) == {str(open_).lower()}"
        )
        layers.append(
            dots.mark_point(filled=not open_, size=32).encode(
                **where, y=shown, color=tone, tooltip=tips, opacity=unless_others_are_picked(1)
            )
        )
    for up in {row["up"] for row in beyond}:
        at = alt.Chart(alt.Data(values=[row for row in beyond if row["up"] == up]))
        mark = at.mark_point(shape=f"triangle-{'up' if up else 'down'}", filled=True, size=70)
        edge = alt.Y("edge:Q", **untitled)
        layers.append(
            mark.encode(**where, y=edge, color=tone, tooltip=tips, opacity=unless_others_are_picked(1))
        )
    if dense is not None:
        rule = alt.Chart(alt.Data(values=[{"y": dense, "what": "dense"}]))
        mark = rule.mark_rule(strokeDash=[5, 4], color="#888", strokeWidth=1.5)
        layers.insert(0, mark.encode(y="y:Q", tooltip=[alt.Tooltip("what:N", title="line"), tips[3]]))
    if beyond:
        furthest = max(beyond, key=lambda row: abs(row["y"] - row["edge"]))
        said = f"triangles lie beyond the axis, up to {furthest['y']:.3g} ({furthest['kind']})"
        return alt.layer(*layers, title=alt.TitleParams(text=title, subtitle=said), height=HEIGHT)
    return alt.layer(*layers, title=title, height=HEIGHT)


def _possible(axis: Axis, means: Sequence[float], ends: Sequence[float]) -> Axis:
    """The axis of a fraction, cut off at 0 and at 1 where only an interval goes on beyond them.

    >>> _possible(Axis("accuracy", "~%"), [0.1, 0.6], [-0.3, 0.1, 0.6, 0.8]).limits
    (0.0, 0.8)
    """
    impossible = min(ends, default=0.0) < 0 or max(ends, default=0.0) > 1
    if axis.limits is not None or axis.format != "~%" or not impossible:
        return axis
    if min(means) < 0 or max(means) > 1:  # no fraction, but a difference of two
        return axis
    return replace(axis, limits=(max(0.0, min(ends)), min(1.0, max(ends))))


def _apart(axis: Axis, values: Sequence[float]) -> Axis:
    """The axis, with room around the one value that all have, and that value as a tick.

    Without limits an axis of one value has ticks that all have one label, rounded to whole numbers.
    """
    if axis.limits is not None or len(set(values)) != 1:
        return axis
    (value,) = set(values)
    room = (abs(value) or 1) / 10
    limits = (value / 1.5, value * 1.5) if axis.log else (value - room, value + room)
    form = ".4~s" if axis.format.endswith("s") else ".4~%" if axis.format.endswith("%") else ".4~g"
    return replace(axis, format=form, values=[value], limits=limits)


def picked(chart: str) -> Any:
    """What is pressed in the legend of a chart; each chart needs one of a name of its own."""
    name = "pick_" + re.sub(r"\W", "_", chart)
    return alt.selection_point(name=name, fields=["kind"], bind="legend")


def _split(
    rows: list[dict[str, Any]], limits: Sequence[float] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows within the limits of an axis, and those beyond, with the edge at which they are marked."""
    if limits is None:
        return rows, []
    low, high = limits
    beyond = [{**r, "edge": high if r["y"] > high else low, "up": r["y"] > high} for r in rows]
    return [r for r in rows if low <= r["y"] <= high], [r for r in beyond if not low <= r["y"] <= high]


@dataclass(frozen=True)
class WeightsLeft:
    """Accuracy and early-stop step against weights left, the dense network as a line."""

    name: str = "figure"

    def __call__(self, runs: Runs) -> Figure | None:
        """Draw it."""
        records, charts = runs.records, []
        kinds = kinds_of(records)
        for metric, label in panels(runs).items():
            rows = points(records, kinds, _left, lambda r, metric=metric: r["metrics"].get(metric))
            dense = [r["y"] for r in rows if r["round"] == 0 and r["kind"] in labels(kinds[:1])]
            if rows:
                hollow = metric == "early_stop_step"
                y = axis_of(metric, label)
                charts.append(
                    lines(
                        rows, kinds, left(records), y, label, hollow=hollow, dense=dense[0] if dense else None
                    )
                )
        if not charts:
            return None
        caption = (
            f"Mean over {runs.over} in the band of its 95 % interval (Student's t), dashed: the dense "
            "network. Hollow: in some seed the minimum is the round's last evaluation (censored)."
        )
        return Figure(self.name, "Accuracy and early stopping", caption, charts)


@dataclass(frozen=True)
class BySparsity:
    """Metrics against sparsity, one line a kind of run, one chart a metric.

    Args:
        name: of the file.
        panels: {metric: its label}.
        kinds: which runs; None: all.
        log: metrics drawn on a logarithmic axis.
        limits: {metric: (lowest, highest) shown}; what lies outside is marked at the edge.
    """

    name: str
    panels: dict[str, str]
    kinds: Sequence[str] | None = None
    log: Sequence[str] = ()
    limits: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def __call__(self, runs: Runs) -> Figure | None:
        """Draw it."""
        kinds = kinds_of(runs.records)
        if self.kinds is not None:
            kinds = [k for kind in self.kinds for k in kinds if plain_kind(k) == kind]
        charts = []
        for metric, label in self.panels.items():
            rows = points(runs.records, kinds, _sparsity, lambda r, metric=metric: r["metrics"].get(metric))
            y = axis_of(metric, label, log=metric in self.log, limits=self.limits.get(metric))
            if rows:
                charts.append(lines(rows, kinds, Axis("sparsity (%)"), y, label))
        caption = f"Mean over {runs.over} in the band of its 95 % interval (Student's t)."
        return Figure(self.name, "Against sparsity", caption, charts) if charts else None


@dataclass(frozen=True)
class Against:
    """A metric against others, one line a kind of run, a chart for each of the others.

    Args:
        name: of the file.
        metric: on the vertical axis.
        label: of it.
        panels: {metric on the horizontal axis: its label}.
    """

    name: str
    metric: str
    label: str
    panels: dict[str, str]

    def __call__(self, runs: Runs) -> Figure | None:
        """Draw it."""
        kinds = kinds_of(runs.records)
        charts: list[Any] = []
        for metric, label in self.panels.items():
            records = [r for r in runs.records if metric in r["metrics"]]
            rows = points(
                records, kinds, lambda r, m=metric: r["metrics"][m], lambda r: r["metrics"].get(self.metric)
            )
            x = Axis(label, "~s" if metric == "multiply_adds" else "")
            if rows:
                charts.append(
                    lines(rows, kinds, x, axis_of(self.metric, self.label), f"{self.label} against {label}")
                )
        caption = f"Mean over {runs.over} in the band of its 95 % interval (Student's t)."
        return Figure(self.name, self.label, caption, charts) if charts else None


@dataclass(frozen=True)
class AgainstParameter:
    """Metrics against a parameter that varies between runs: before the first pruning and in last rounds.

    There is a chart of the last round that the runs of every value have, and, where some go further, one of
    the last round of all. Which rounds are drawn is said, and how much is left of the network in them.

    Args:
        key: of the parameter, such as `optimizer.lr`.
        name: of the file.
    """

    key: str
    name: str = "parameter"

    def __call__(self, runs: Runs) -> Figure:
        """Draw it.

        Raises:
            ValueError: when the parameter does not vary, or has values that are no numbers.
        """
        _check_varies("x", self.key, runs)
        given = [run.parameters.get(self.key) for run in runs.runs]
        if wrong := [v for v in given if isinstance(v, bool) or not isinstance(v, (int, float))]:
            raise ValueError(
                f"x={self.key}: {wrong[0]!r} is no number; an axis needs numbers. Leave --x out: the runs "
                "are told apart by it in any case."
            )
        values: set[Any] = set(given)
        records = [_without(record, self.key) for record in runs.records]
        kinds, charts = kinds_of(records), list[Any]()
        by_value = {v: {r["round"] for r in records if r["parameters"][self.key] == v} for v in values}
        there = [rounds for rounds in by_value.values() if rounds]
        shown = sorted({0, max(set.intersection(*there), default=0), max(set.union(*there))})
        wide = min(values) > 0 and max(values) >= 10 * min(values)
        for metric, label in panels(runs).items():
            for round in shown:
                in_round = [r for r in records if r["round"] == round]
                rows: list[dict[str, Any]] = []
                for value in sorted(values):
                    here = [r for r in in_round if r["parameters"][self.key] == value]
                    rows += points(here, kinds, lambda r: r["parameters"][self.key], _metric(metric))
                if rows:
                    x, y = Axis(self.key, log=wide), axis_of(metric, label)
                    charts.append(lines(rows, kinds, x, y, f"{label}, round {round}{_left_of(in_round)}"))
        caption = (
            f"Mean over {runs.over} in the band of its 95 % interval (Student's t). Drawn are rounds "
            f"{', '.join(map(str, shown))} of the {len(set.union(*there))} that there are."
        )
        for round in shown:
            if lacking := [f"{value:g}" for value in sorted(values) if round not in by_value[value]]:
                caption += f" Runs of {self.key}={', '.join(lacking)} have no round {round}."
        return Figure(self.name, f"Against {self.key}", caption, charts, 2)


@dataclass(frozen=True)
class ByParameter:
    """The first metric against weights left, a chart for each value of a parameter that varies between runs.

    Args:
        key: of the parameter, such as `optimizer.lr`.
        name: of the file.
    """

    key: str
    name: str = "multiples"

    def __call__(self, runs: Runs) -> Figure:
        """Draw it.

        Raises:
            ValueError: when the parameter does not vary.
        """
        _check_varies("by", self.key, runs)
        records = [_without(record, self.key) for record in runs.records]
        kinds = kinds_of(records)
        metric, label = next(iter(panels(runs).items()))
        alike: dict[str, list[Record]] = {}  # by the value in words: it may be a list
        for record in records:
            alike.setdefault(str(spelled(record["parameters"].get(self.key))), []).append(record)
        found = {value: points(here, kinds, _left, _metric(metric)) for value, here in alike.items()}
        ends = [row.get(key, row["y"]) for rows in found.values() for row in rows for key in ("low", "high")]
        y = axis_of(metric, label, limits=(min(ends), max(ends)) if ends and min(ends) < max(ends) else None)
        x = left(runs.records)
        charts = [lines(rows, kinds, x, y, f"{self.key}={value}") for value, rows in found.items() if rows]
        caption = (
            f"{label[0].upper()}{label[1:]}: mean over {runs.over} in the band of its 95 % interval "
            "(Student's t)."
        )
        return Figure(self.name, f"By {self.key}", caption, charts, 3)


def _left_of(records: Sequence[Record]) -> str:
    """How much is left of the networks, in words.

    >>> _left_of([{"alive": 1, "total": 5}, {"alive": 10, "total": 20}])
    ' (20 to 50 % left)'
    """
    ends = dict.fromkeys(f"{end(map(_left, records)):.3g}" for end in (min, max))
    return f" ({' to '.join(ends)} % left)"


def _check_varies(argument: str, key: str, runs: Runs) -> None:
    """Refuse a parameter that does not vary between runs.

    Raises:
        ValueError: naming those that do.
    """
    keys = list(dict.fromkeys(key for run in runs.runs for key in run.parameters))
    if key not in keys and key in ("seed", "order_seed"):
        raise ValueError(
            f"{argument}={key}: figures show means over the seeds, so that no seed has a place of its own. "
            f"Allowed is what else varies: {', '.join(keys) or 'nothing'}. Give one of these or leave it out."
        )
    if key not in keys:
        raise ValueError(
            f"{argument}={key}: it does not vary between these runs. Allowed is what does: "
            f"{', '.join(keys) or 'nothing'}. Give one of these, or leave it out."
        )


def _without(record: Record, key: str) -> Record:
    """The record, of a kind that does not say the parameter."""
    others = {k: v for k, v in record["parameters"].items() if k != key}
    return {**record, "kind": labelled(plain_kind(record["kind"]), others)}


def _metric(name: str) -> Callable[[Record], float | None]:
    return lambda record: record["metrics"].get(name)


def _left(record: Record) -> float:
    return 100 * record["alive"] / record["total"]


def _sparsity(record: Record) -> float:
    return 100 * record["sparsity"]


def from_dense(runs: Runs) -> Figure | None:
    """How far accuracies are from those of the dense network of the same seed, in points."""
    kinds, charts = kinds_of(runs.records), list[Any]()
    accuracies = {metric: label for metric, label in panels(runs).items() if "_acc" in metric}
    for metric, label in accuracies.items():
        dense = {
            (r["kind"], r["seed"]): r["metrics"][metric]
            for r in runs.records
            if r["alive"] == r["total"] and metric in r["metrics"]
        }

        def less(record: Record, metric: str = metric, dense: Mapping[Any, float] = dense) -> float | None:
            kind, seed = record["kind"], record["seed"]
            ticket = "ticket" + kind.removeprefix(plain_kind(kind))  # of the same parameters
            reference = dense.get((ticket, seed), dense.get((kind, seed)))
            value = record["metrics"].get(metric)
            return None if reference is None or value is None else 100 * (value - reference)

        rows = points([r for r in runs.records if r["round"]], kinds, _left, less)
        if rows:
            ends = [row.get(key, row["y"]) for row in rows for key in ("low", "high")]
            ticks = [t for t in DIFFERENCES if min(ends) - 1 <= t <= max(ends) + 1]
            y = Axis(f"{label}, points above dense", linear_within=0.5, values=ticks)
            charts.append(lines(rows, kinds, left(runs.records), y, label, dense=0.0))
    caption = (
        "Accuracy less that of the dense network of the same seed, in percentage points, on a symmetric "
        f"logarithmic axis that is linear within half a point: mean over {runs.over} in the band of its 95 % "
        "interval (Student's t). "
        "Dashed: as the dense network."
    )
    return Figure("from_dense", "Difference from dense", caption, charts) if charts else None


def relative_loss(runs: Runs) -> Figure | None:
    """The test loss as a multiple of the unpruned network's, against sparsity."""
    whole = [r for r in runs.records if r["alive"] == r["total"]]
    dense = {(r["kind"], r["seed"]): r["metrics"].get("test_loss") for r in whole}

    def ratio(record: Record) -> float | None:
        loss, reference = record["metrics"].get("test_loss"), dense.get((record["kind"], record["seed"]))
        return record["metrics"].get(
            "relative_loss", loss / reference if loss is not None and reference else None
        )

    kinds = kinds_of(runs.records)
    rows = points(runs.records, kinds, _sparsity, ratio)
    if not rows:
        return None
    y = Axis("test loss / that of round 0", log=max(r["y"] for r in rows) > 5 * min(r["y"] for r in rows) > 0)
    chart = lines(rows, kinds, Axis("sparsity (%)"), y, "relative test loss", dense=1.0)
    caption = (
        f"Test loss at the end of a round as a multiple of that of round 0: mean over {runs.over}, 95 % "
        "interval."
    )
    return Figure("relative_loss", "Relative loss", caption, [chart])


def sizes(runs: Runs) -> Figure | None:
    """File size, compression ratio and theoretical speed-up against sparsity."""
    kinds, x = kinds_of(runs.records), Axis("sparsity (%)")
    charts = []
    recorded = {"gzip_bytes": "gzip -6", "sparse_bytes": "sparse file"}
    for metric, label in recorded.items():
        rows = points(runs.records, kinds, _sparsity, lambda r, metric=metric: r["metrics"].get(metric))
        rows = rows or _measured(runs, metric)
        if rows:
            charts.append(lines(rows, kinds, x, Axis(f"bytes, {label}", "~s"), f"file size, {label}"))
    rows = points(runs.records, kinds, _sparsity, lambda r: r["total"] / r["alive"] if r["alive"] else None)
    charts.append(lines(rows, kinds, x, Axis("weights / weights left", log=True), "compression ratio"))
    if rows := _measured(runs, "theoretical_speed_up"):
        y = Axis("multiply-adds / those left", log=True)
        charts.append(lines(rows, kinds, x, y, "theoretical speed-up"))
    note = " Sizes and multiply-adds are those of networks with each round's mask." if runs.measured else ""
    return Figure("sizes", "Size and speed-up", f"Of the prunable weights.{note}", charts, 4)


def _measured(runs: Runs, metric: str) -> list[dict[str, Any]]:
    return [
        {
            "kind": label_of(m["kind"]),
            "round": m["round"],
            "x": 100 * m["sparsity"],
            "y": m[metric],
            "n": 1,
            "censored": 0,
        }
        for m in runs.measured
        if metric in m
    ]


def pareto(runs: Runs) -> Figure | None:
    """Accuracy against size and against measured latency."""
    kinds = kinds_of(runs.records)
    charts = []
    for metric, label, form in (
        ("sparse_bytes", "sparse file (bytes)", "~s"),
        ("gzip_bytes", "file after gzip (bytes)", "~s"),
        ("accelerated_us", "measured latency (µs)", "~g"),
    ):
        rows = _tradeoff(runs, kinds, metric)
        if rows and (metric != "gzip_bytes" or not charts):
            charts.append(_front(rows, kinds, label, form))
    caption = (
        "Each round of each kind; the line connects those that no other beats in both. Up and left is better."
    )
    return Figure("pareto", "Accuracy for size and latency", caption, charts, 2) if charts else None


def _tradeoff(runs: Runs, kinds: Sequence[str], metric: str) -> list[dict[str, Any]]:
    accuracy = {
        (p["kind"], p["round"]): p
        for p in points(runs.records, kinds, _sparsity, lambda r: r["metrics"].get("test_acc"))
    }
    costs = points(runs.records, kinds, _sparsity, lambda r: r["metrics"].get(metric))
    if runs.measured and metric in runs.measured[0]:
        costs = costs or _measured(runs, metric)
    rows = [
        {**accuracy[c["kind"], c["round"]], "cost": c["y"], "sparsity": c["x"]}
        for c in costs
        if (c["kind"], c["round"]) in accuracy
    ]
    best = -math.inf
    for row in sorted(rows, key=lambda row: (row["cost"], -row["y"])):
        row["front"] = row["y"] > best
        best = max(best, row["y"])
    return rows


def _front(rows: list[dict[str, Any]], kinds: Sequence[str], label: str, form: str) -> Any:
    base = alt.Chart(alt.Data(values=rows))
    x = alt.X(
        "cost:Q",
        title=label,
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format=form, tickCount=6),
    )
    y = alt.Y("y:Q", title="test accuracy", scale=alt.Scale(zero=False), axis=alt.Axis(format="~%"))
    tips = [
        alt.Tooltip("kind:N"),
        alt.Tooltip("round:Q"),
        alt.Tooltip("sparsity:Q", format=".2f", title="sparsity (%)"),
    ]
    tips += [
        alt.Tooltip("cost:Q", title=label, format=".4~s"),
        alt.Tooltip("y:Q", title="test accuracy", format=".2%"),
    ]
    line = base.transform_filter("datum.front").mark_line(
        color="#888", strokeWidth=1.5, interpolate="step-after"
    )
    pick = picked(label)
    seen = alt.condition(pick, alt.value(0.9), alt.value(0.1))
    spots = base.mark_point(filled=True, size=40).add_params(pick)
    spots = spots.encode(x=x, y=y, color=colour(kinds, rows), tooltip=tips, opacity=seen)
    return alt.layer(line.encode(x=x, y=y), spots, title=f"accuracy against {label}", height=HEIGHT)


# -------------------------------------------------------------------------------------------------- heat maps


def heat(
    rows: list[dict[str, Any]],
    x: str,
    y: str,
    title: str,
    value: str,
    domain: Sequence[float] | None = None,
    form: str = ".2%",
    sort: Any = None,
) -> alt.Chart:
    """A heat map: rows of x, y and `value`."""
    options: dict[str, Any] = {"domain": list(domain), "type": "sqrt"} if domain else {}
    scale = alt.Scale(scheme="viridis", **options)
    return (
        alt.Chart(alt.Data(values=rows), title=title, height=min(HEIGHT, 40 + 22 * len({r[y] for r in rows})))
        .mark_rect()
        .encode(
            x=alt.X(
                f"{x}:O", title=x, sort=sort, axis=alt.Axis(labelAngle=0, labelOverlap=True, labelLimit=90)
            ),
            y=alt.Y(f"{y}:O", title=None if y == "layer" else y, sort=sort, axis=alt.Axis(labelLimit=140)),
            color=alt.Color(
                f"{value}:Q",
                title=value,
                scale=scale,
                legend=alt.Legend(format=form, orient="bottom", gradientLength=160),
            ),
            tooltip=[
                alt.Tooltip(f"{x}:N"),
                alt.Tooltip(f"{y}:N"),
                alt.Tooltip(f"{value}:Q", format=".3%" if form.endswith("%") else form),
            ],
        )
    )


def density(runs: Runs) -> Figure | None:
    """How much is left of each layer in each round."""
    charts = []
    for kind in kinds_of(runs.records)[:KINDS]:
        rows: list[dict[str, Any]] = []
        order: list[str] = []
        for round, by_kind in sorted(by_round(runs.records).items()):
            densities = [r["layers"] for r in by_kind.get(kind, []) if r.get("layers")]
            for layer in densities[0] if densities else ():
                values = [layers[layer] for layers in densities if layer in layers]
                rows.append({"round": round, "layer": layer, "density": fmean(values)})
                order += [layer] if layer not in order else []
        if rows:
            charts.append(heat(rows, "round", "layer", label_of(kind), "density", (0, 1), "%", sort=order))
    caption = f"The fraction of a layer's weights that is left, mean over {runs.over}." + _some(runs)
    return Figure("density", "Density by layer", caption, charts) if charts else None


def _some(runs: Runs) -> str:
    n = len(kinds_of(runs.records))
    return f" The first {KINDS} of {n} kinds." if n > KINDS else ""


def overlap(runs: Runs) -> Figure | None:
    """How much masks of different seeds have in common."""
    shared: list[dict[str, Any]] = []
    chance: list[dict[str, Any]] = []
    last: dict[str, Mapping[int, Masks]] = {}
    charts: list[Any] = []
    for kind in kinds_of(runs.records):
        name = label_of(kind)
        by_seed = {run.seed: run.masks for run in runs.of(kind) if run.masks}
        by_seed = {
            seed: masks for seed, masks in by_seed.items() if _alike(masks, next(iter(by_seed.values())))
        }
        by_seed = dict(list(by_seed.items())[:SEEDS])
        if len(by_seed) < 2 or len(charts) == KINDS:
            continue
        records = {r["round"]: r for r in runs.of(kind)[0].records if r["round"]}
        records = {round: r for round, r in records.items() if all(round in m for m in by_seed.values())}
        if not records:
            continue
        for round, (spread, by_chance) in overlap_of_seeds(list(by_seed.values()), list(records)).items():
            row = {"kind": name, "round": round, "x": _left(records[round]), "y": spread.mean, "censored": 0}
            wide = len(by_seed) > 2 and math.isfinite(spread.interval[0])
            band = dict(zip(("low", "high"), spread.interval, strict=True)) if wide else {}
            shared.append({**row, **band, "n": len(by_seed)})
            chance.append({"x": row["x"], "y": by_chance})
        some = list(records)[:: -(-len(records) // 20)]
        pairs = list(combinations([{r: masks[r] for r in some} for masks in by_seed.values()], 2))[:3]
        between = [
            {"round": r, "round of another seed": s, "overlap": fmean(jaccard(a[r], b[s]) for a, b in pairs)}
            for r in some
            for s in some
        ]
        charts.append(heat(between, "round", "round of another seed", name, "overlap", (0, 1), "%"))
        last |= {f"{name} {seed}": {0: masks[max(records)]} for seed, masks in by_seed.items()}
    if not shared:
        return None
    y = Axis("alive in both / in either", "%")
    drawn = [row["y"] for row in chance]
    over = "overlap of two seeds' masks"
    line = lines(shared, kinds_of(runs.records), left(runs.records), y, over, beside=drawn)
    expected = alt.Chart(alt.Data(values=chance)).mark_point(shape="cross", color="#888", size=24)
    tip = alt.Tooltip("y:Q", title="by chance", format=".2%")
    charts.insert(0, line + expected.encode(x="x:Q", y="y:Q", tooltip=tip))
    whole = [
        {"mask": m, "other mask": n, "overlap": jaccard(a[0], b[0])}
        for m, a in last.items()
        for n, b in last.items()
        if _alike(a, b)
    ]
    charts.append(
        heat(whole, "mask", "other mask", "last round, every pair", "overlap", (0, 1), "%", list(last))
    )
    caption = (
        "Jaccard overlap of the masks of different seeds: weights alive in both over weights alive in "
        "either. Mean over pairs and 95 % interval; crosses: masks as dense in each layer, drawn at random. "
        f"At most {SEEDS} seeds of a kind. Masks of networks of different sizes have none."
    )
    return Figure("overlap", "Mask overlap", caption, charts)


def _alike(a: Mapping[int, Masks], b: Mapping[int, Masks]) -> bool:
    """Whether the masks by round are of networks of the same weights."""
    one, other = ({name: mask.shape for name, mask in next(iter(masks.values())).items()} for masks in (a, b))
    return one == other


@dataclass(frozen=True)
class FirstLayer:
    """What a network over images keeps of its input: mask and weight magnitude of the first layer as images.

    Pictures for some neurons, and of the mean over all neurons; of the last round of each kind's first
    finished run.

    Args:
        kinds: which runs; None: those in the folder, at most three.
        neurons: which rows of the weight.
        name: of the file.
        shape: of an input; None: a square, where the number of inputs is one.
    """

    kinds: Sequence[str] | None = None
    neurons: Sequence[int] = (0, 1, 2, 3)
    name: str = "first_layer"
    shape: tuple[int, int] | None = None

    def __call__(self, runs: Runs) -> Figure | None:
        """Draw it, where the checkpoints are at hand."""
        charts = []
        kinds = [k for k in kinds_of(runs.records) if self.kinds is None or plain_kind(k) in self.kinds]
        for kind in kinds if self.kinds else kinds[:3]:
            paths = [
                run.folder / "final.ckpt" for run in runs.of(kind) if run.folder and run.state == "finished"
            ]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                continue
            name, mask = next(iter(load_masks(path).items()))
            weight = torch.load(path, map_location="cpu", weights_only=True)["state_dict"][name].abs()
            side = math.isqrt(mask[0].numel())
            shape = self.shape or (side, side)
            if mask.dim() != 2 or math.prod(shape) != mask[0].numel():
                return None
            for tensor, what, scheme in ((mask.float(), "mask", "greys"), (weight, "|weight|", "viridis")):
                pictures = {f"neuron {n}": tensor[n] for n in self.neurons} | {"mean": tensor.mean(0)}
                for of, picture in pictures.items():
                    charts.append(image(picture.tolist(), shape, f"{label_of(kind)}: {what}, {of}", scheme))
        if not charts:
            return None
        caption = "Mask and magnitude of the first layer's weights over the input, in the last round."
        return Figure(self.name, "First layer", caption, charts, len(self.neurons) + 1, 130)


def image(values: Sequence[float], shape: tuple[int, int], title: str, scheme: Any) -> alt.Chart:
    """A picture of numbers, row by row."""
    data = alt.Data(values=[{"v": [float(f"{v:.3g}") for v in values]}])
    chart = (
        alt.Chart(data, title=title, height=130).transform_flatten(["v"]).transform_window(i="row_number()")
    )
    chart = chart.transform_calculate(x=f"(datum.i - 1) % {shape[1]}", y=f"floor((datum.i - 1) / {shape[1]})")
    return chart.mark_rect().encode(
        x=alt.X("x:O", axis=None),
        y=alt.Y("y:O", axis=None),
        color=alt.Color("v:Q", scale=alt.Scale(scheme=scheme), legend=None),
        tooltip=[alt.Tooltip("x:O"), alt.Tooltip("y:O"), alt.Tooltip("v:Q", title="value", format=".3~g")],
    )


def curves(runs: Runs) -> Figure | None:
    """How training went in each round."""
    charts = []
    for kind in kinds_of(runs.records)[:KINDS]:
        for metric, label in (("test_acc", "test accuracy"), ("val_loss", "validation loss")):
            rows: list[dict[str, Any]] = []
            for round, by_kind in sorted(by_round(runs.records).items()):
                records = [r for r in by_kind.get(kind, []) if metric in r.get("curve", {})]
                length = min((len(r["curve"][metric]) for r in records), default=0)
                for i in range(0, length, max(1, length // 60)):
                    value = fmean(r["curve"][metric][i] for r in records)
                    row = {"step": records[0]["curve"]["step"][i], "y": float(f"{value:.4g}"), "round": round}
                    rows.append({**row, "left": float(f"{_left(records[0]):.3g}")})
            if rows:
                charts.append(
                    _curves(rows, label, f"{label_of(kind)}: {label}", "%" if "acc" in metric else "~g")
                )
    caption = f"Mean over {runs.over} at each evaluation of a round, one line a round." + _some(runs)
    return Figure("curves", "Training curves", caption, charts, 2) if charts else None


def _curves(rows: list[dict[str, Any]], label: str, title: str, form: str) -> alt.Chart:
    values = sorted(row["y"] for row in rows)
    low, high = (
        values[len(values) // 50],
        values[-1 - len(values) // 50],
    )  # the first steps would flatten the rest
    domain = [low, high] if low < high else alt.Undefined
    shade = alt.Color(
        "left:Q",
        title="weights left (%)",
        scale=alt.Scale(scheme="viridis", type="log", reverse=True),
        legend=alt.Legend(orient="bottom", format="~g", gradientLength=160),
    )
    tips = [alt.Tooltip("round:O"), alt.Tooltip("left:Q", title="weights left (%)"), alt.Tooltip("step:Q")]
    return (
        alt.Chart(alt.Data(values=rows), title=title, height=HEIGHT)
        .mark_line(clip=True, strokeWidth=1.3)
        .encode(
            x=alt.X("step:Q", title="step of the round"),
            y=alt.Y(
                "y:Q", title=label, scale=alt.Scale(zero=False, domain=domain), axis=alt.Axis(format=form)
            ),
            color=shade,
            detail="round:O",
            tooltip=[*tips, alt.Tooltip("y:Q", title=label, format=".2%" if form == "%" else ".4~g")],
        )
    )


STANDARD: tuple[Callable[[Runs], Figure | None], ...] = (
    from_dense,
    relative_loss,
    sizes,
    pareto,
    density,
    overlap,
    FirstLayer(),
    curves,
)
