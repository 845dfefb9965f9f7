"""Figures of a folder of runs. An experiment's config lists its own; each writes one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from experiments.records import Record, by_round, kinds_of
from lightning_prune.callbacks.pruning import load_masks

LABELS = {"ticket": "ticket", "reinit": "re-initialised", "random": "random mask"}
COLOURS = {"ticket": "#0072b2", "reinit": "#d55e00", "random": "#009e73"}
# Okabe & Ito's palette, safe for colour-blind readers
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PANELS = {
    "test_acc": "test accuracy at the end of the round",
    "test_acc_at_early_stop": "test accuracy at minimum validation loss",
    "early_stop_step": "step of minimum validation loss (hollow: censored)",
}


@dataclass(frozen=True)
class WeightsLeft:
    """Accuracy and early-stop step against weights left: mean over seeds in a band of their range."""

    name: str = "figure"

    def __call__(self, folder: Path, records: list[Record], out: Path, title: str) -> Path:
        """Draw and write the figure."""
        fig, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
        dense = [r for r in records if r["round"] == 0 and r["kind"] == "ticket"]
        for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
            lines(axis, records, kinds_of(records), metric, lambda r: 100 * r["alive"] / r["total"])
            if values := [r["metrics"][metric] for r in dense if metric in r["metrics"]]:
                axis.axhline(fmean(values), color="0.4", linewidth=1, linestyle="--", label="dense")
            axis.set_xscale("log")
            axis.invert_xaxis()
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            least = 100 * min(r["alive"] / r["total"] for r in records)
            axis.set_xticks([x for x in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if x >= least * 0.9])
            axis.minorticks_off()
            axis.set_xlabel("weights left (%)")
            axis.set_title(label, fontsize=10)
        axes[0].legend(frameon=False, fontsize=9)
        return save(fig, out / f"{self.name}.png", title)


@dataclass(frozen=True)
class BySparsity:
    """Metrics against sparsity, one line a kind of run, one panel a metric.

    Args:
        name: of the file.
        panels: {metric: its label}.
        kinds: which runs; None: all.
        log: metrics drawn on a logarithmic axis.
        limits: {metric: (lowest, highest) shown}; what lies outside is cut off.
    """

    name: str
    panels: dict[str, str]
    kinds: Sequence[str] | None = None
    log: Sequence[str] = ()
    limits: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def __call__(self, folder: Path, records: list[Record], out: Path, title: str) -> Path:
        """Draw and write the figure."""
        kinds = list(self.kinds) if self.kinds is not None else kinds_of(records)
        n = len(self.panels)
        fig, axes = plt.subplots(1, n, figsize=(6 * n, 4.2), layout="constrained", squeeze=False)
        for axis, (metric, label) in zip(axes[0], self.panels.items(), strict=True):
            lines(axis, records, kinds, metric, lambda r: 100 * r["sparsity"])
            axis.set_xlabel("sparsity (%)")
            axis.set_title(label, fontsize=10)
            if metric in self.log:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                axis.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
            if metric in self.limits:
                axis.set_ylim(*self.limits[metric])
        axes[0][0].legend(frameon=False, fontsize=9)
        return save(fig, out / f"{self.name}.png", title)


@dataclass(frozen=True)
class Against:
    """A metric against others, one line a kind of run, one panel for each of the others.

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

    def __call__(self, folder: Path, records: list[Record], out: Path, title: str) -> Path:
        """Draw and write the figure."""
        n = len(self.panels)
        fig, axes = plt.subplots(1, n, figsize=(6 * n, 4.2), layout="constrained", squeeze=False)
        for axis, (metric, label) in zip(axes[0], self.panels.items(), strict=True):
            lines(axis, records, kinds_of(records), self.metric, lambda r, m=metric: r["metrics"][m])
            if metric == "multiply_adds":
                axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g} M"))
            axis.set_xlabel(label)
            axis.set_ylabel(self.label)
        axes[0][0].legend(frameon=False, fontsize=9)
        return save(fig, out / f"{self.name}.png", title)


@dataclass(frozen=True)
class FirstLayer:
    """What a network over images keeps of its input: mask and weight magnitude of the first layer as images.

    A row of pictures for some neurons, one for the mean over all neurons; of the last round of each kind's
    first run.

    Args:
        kinds: which runs.
        neurons: which rows of the weight.
        name: of the file.
        shape: of an input.
    """

    kinds: Sequence[str]
    neurons: Sequence[int] = (0, 1, 2, 3)
    name: str = "first_layer"
    shape: tuple[int, int] = (28, 28)

    def __call__(self, folder: Path, records: list[Record], out: Path, title: str) -> Path | None:
        """Draw and write the figure, where the checkpoints are at hand."""
        runs = {kind: sorted(folder.glob(f"{kind}-*/final.ckpt")) for kind in self.kinds}
        found = {kind: paths[0] for kind, paths in runs.items() if paths}
        if not found:
            return None
        columns, rows = len(self.neurons) + 1, 2 * len(found)
        size = (1.6 * columns + 0.6, 1.75 * rows)
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        path = Path()
        for place, (kind, path) in enumerate(found.items()):
            name, mask = next(iter(load_masks(path).items()))
            weight = torch.load(path, map_location="cpu", weights_only=True)["state_dict"][name].abs()
            shown = ((mask.float(), "mask", "gray"), (weight, "|weight|", "viridis"))
            for row, (tensor, label, cmap) in enumerate(shown):
                pictures = [tensor[neuron] for neuron in self.neurons] + [tensor.mean(0)]
                for column, picture in enumerate(pictures):
                    axis = axes[2 * place + row][column]
                    axis.imshow(picture.view(self.shape), cmap=cmap, vmin=0)
                    axis.set_xticks([])
                    axis.set_yticks([])
                    if column == 0:
                        axis.set_ylabel(f"{LABELS.get(kind, kind)}\n{label}", fontsize=8)
                    if place == row == 0:
                        mean = column == len(self.neurons)
                        axis.set_title("mean" if mean else f"neuron {self.neurons[column]}", fontsize=9)
        experiment, seed = title.split(":")[0], path.parent.name.rpartition("-")[2]
        return save(
            fig, out / f"{self.name}.png", f"{experiment}: first layer in the last round, seed {seed}"
        )


def lines(axis: Any, records: list[Record], kinds: Sequence[str], metric: str, x: Any) -> None:
    """One line a kind: the mean of a metric over seeds, in a band of their range."""
    for i, kind in enumerate(kinds):
        rounds = [its[kind] for its in by_round(records).values() if kind in its]
        rounds = [its for its in rounds if all(metric in r["metrics"] for r in its)]
        rounds.sort(key=lambda its: fmean(x(r) for r in its))
        at = [fmean(x(r) for r in its) for its in rounds]
        values = [[r["metrics"][metric] for r in its] for its in rounds]
        means = [fmean(v) for v in values]
        own = all(k in COLOURS for k in kinds)
        colour = COLOURS[kind] if own else PALETTE[i % len(PALETTE)]
        style: dict[str, Any] = {"color": colour, "label": LABELS.get(kind, kind)}
        axis.plot(at, means, marker="o", markersize=3.5, linewidth=1.5, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(at, low, high, alpha=0.15, color=colour, linewidth=0)
        if len(at) == 1:  # a band of no width
            axis.vlines(at, low, high, color=colour, linewidth=1)
        if metric == "early_stop_step":  # hollow: the minimum of some seed is at the last evaluation
            late = [j for j, its in enumerate(rounds) if any(r["metrics"]["censored"] for r in its)]
            hollow: dict[str, Any] = {"facecolors": "white", "edgecolors": colour, "zorder": 3}
            axis.scatter([at[j] for j in late], [means[j] for j in late], s=16, **hollow)
    if "_acc" in metric:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    if metric.endswith("_bytes"):
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e6:g} MB"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(fig: Any, path: Path, title: str) -> Path:
    """Write a figure and let it go."""
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
