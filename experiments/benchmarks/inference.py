"""Inference of pruned networks: `accelerate` against dense networks in the fastest ways that a user has.

`python -m experiments.benchmarks.inference [--threads N ...] [--sparsity S ...]`. Dense are torch,
`torch.compile`, ONNX Runtime and OpenVINO, in float32 and int8, as far as they are installed (`peers`). All
run in turn with `accelerate` at each sparsity, every layer equally sparse, and each is called once before it
is timed, so that threads of the others have come to rest. The first table has times, the second ratios.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from experiments.benchmarks.peers import PEERS, Case, Run, error, runs, unlogged
from lightning_prune.deploy.timing import Ratio, alternated, low, machine, ratio, seconds
from lightning_prune.study.models import LeNet

MLP = "1024-2048-1024"
DENSE = "dense copy"
INT8 = {peer.name for peer in PEERS if peer.int8}


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024))


@dataclass(frozen=True)
class Network:
    """What is measured."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    batches: tuple[int, ...]


NETWORKS = (
    Network("LeNet-300-100", LeNet, (784,), (1, 32, 256)),
    Network(MLP, wide, (1024,), (1, 32, 256)),
)


@dataclass(frozen=True)
class Measured:
    """One network, batch and number of threads."""

    where: str
    times: dict[str, list[float]]  # seconds: of the peers by name
    ours: dict[float, list[float]]  # of `accelerate` by sparsity
    forms: dict[float, str]  # of its layers
    errors: dict[str, float]

    def fastest(self, int8: bool) -> str:
        """The dense way that takes the least time, among those in float32 or among all."""
        return min((n for n in self.times if int8 or n not in INT8), key=lambda n: low(self.times[n]))

    def gain(self, sparsity: float, over: str) -> Ratio:
        """How many times as fast `accelerate` is."""
        return ratio(self.times[over], self.ours[sparsity])

    def wins_from(self, int8: bool) -> str:
        """From which sparsity on a sparse form is faster than every dense way, in all parts of the runs."""
        found = "-"
        for sparsity in sorted(self.ours, reverse=True):
            gain = self.gain(sparsity, self.fastest(int8))
            if self.forms[sparsity] == DENSE or not gain.exceeds(1.02):
                break
            found = f"{sparsity:.0%}"
        return found


def burst(run: Run) -> Callable[[], float]:
    """A measurement: call once, and then measure a call."""

    def measure() -> float:
        run()
        return seconds(run)

    return measure


def sparse(model: nn.Module, x: torch.Tensor, sparsity: float) -> nn.Module:
    """A copy of a network with this sparsity in every layer, as `accelerate` makes it."""
    pruned = copy.deepcopy(model)
    lp.prune(pruned, sparsity, allocate=lp.allocation.uniform)
    return lp.accelerate(pruned, x)


def form(fast: nn.Module) -> str:
    """What `accelerate` chose, in short.

    >>> form(nn.Linear(1, 1))
    'dense copy'
    """
    report = vars(fast).get("acceleration")
    if report is None or report.speed_up == 1:
        return DENSE
    names = [choice.form for choice in report.layers]
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def measure(
    network: Network, batch: int, sparsities: Sequence[float], rounds: int, at_least: float
) -> tuple[Measured, dict[str, str]]:
    """All ways in turn, and what was left out, with the reason."""
    torch.manual_seed(0)
    model, x = network.build().eval(), torch.randn(batch, *network.shape)
    expected = model(x).detach()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(model, x, Path(folder))
        works: dict[Any, Run] = dict(runs(case))
        with torch.inference_mode():
            errors = {name: error(run(), expected) for name, run in works.items()}
            fast = {sparsity: sparse(model, x, sparsity) for sparsity in sparsities}
            works |= {sparsity: partial(cast(Any, module), x) for sparsity, module in fast.items()}
            times: dict[Any, list[float]] = alternated(
                {n: burst(run) for n, run in works.items()}, rounds, at_least, warm_up=3
            )
    where = f"{network.name}, batch {batch}, {torch.get_num_threads()} threads"
    ours = {sparsity: times.pop(sparsity) for sparsity in sparsities}
    forms = {sparsity: form(module) for sparsity, module in fast.items()}
    return Measured(where, times, ours, forms, errors), case.left_out


def rows(found: Sequence[Measured]) -> list[str]:
    """Two Markdown tables."""
    names = list(dict.fromkeys(name for one in found for name in one.times))
    sparsities = list(found[0].ours)
    lines = ["", "Microseconds, the fastest tenth of the runs:", ""]
    lines += _head(["", *names, *(f"ours {s:.0%}" for s in sparsities)])
    for one in found:
        columns: list[Any] = [one.times.get(name) for name in names]
        columns += [one.ours[s] for s in sparsities]
        lines.append(_row([one.where, *(f"{1e6 * low(c):,.0f}" if c else "-" for c in columns)]))
    lines += ["", "Ours over the fastest dense way, in float32 and of all:", ""]
    lines += _head(["", "fastest", *(f"{s:.0%}" for s in sparsities), "faster from", "forms"])
    for one in found:
        for int8 in (False, True):
            fastest = one.fastest(int8)
            if int8 and fastest == one.fastest(False):
                continue
            gains = (str(one.gain(s, fastest)) for s in sparsities)
            forms = "; ".join(f"{name} from {s:.0%}" for name, (s, *_) in grouped(one.forms))
            lines.append(_row([one.where, fastest, *gains, one.wins_from(int8), forms]))
    worst = {n: max(one.errors[n] for one in found if n in one.errors) for n in names}
    told = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    return [*lines, "", f"Largest difference of dense outputs, over the largest output: {told}"]


def grouped(forms: Mapping[float, str]) -> list[tuple[str, list[float]]]:
    """Sparsities, in rising order, that follow one another with the same forms.

    >>> grouped({0.8: "dense copy", 0.9: "2 csr", 0.95: "2 csr"})
    [('dense copy', [0.8]), ('2 csr', [0.9, 0.95])]
    """
    return [(name, list(group)) for name, group in groupby(sorted(forms), key=lambda s: forms[s])]


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|" + len(cells) * "---|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tell(found: Sequence[Measured]) -> None:
    """The headlines: at 95 %, against torch and the fastest dense way in float32."""
    aims: Mapping[str, float] = {"LeNet-300-100, batch 256": 2, f"{MLP}, batch 32": 3.5}
    for one in found:
        aim = next((aim for start, aim in aims.items() if one.where.startswith(f"{start},")), 0)
        if aim and 0.95 in one.ours:
            headline(f"accelerate at 95 % over torch, {one.where}", one.gain(0.95, "torch"), aim)
            fastest = one.fastest(int8=False)
            headline(f"the same over {fastest}, the fastest dense float32", one.gain(0.95, fastest), 1)


@unlogged()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31, help="of each way, at least")
    parser.add_argument("--seconds", type=float, default=5, help="for each network, batch and threads")
    given = parser.parse_args()
    print(machine())
    found: list[Measured] = []
    left_out: dict[str, str] = {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        for network in NETWORKS:
            for batch in network.batches:
                one, without = measure(network, batch, given.sparsity, given.rounds, given.seconds)
                found.append(one)
                left_out |= without
                print(f"{one.where}: measured {len(one.times['torch'])} times", flush=True)
    print(*rows(found), *(f"Left out: {name} ({why})" for name, why in left_out.items()), sep="\n")
    tell(found)


if __name__ == "__main__":
    main()
