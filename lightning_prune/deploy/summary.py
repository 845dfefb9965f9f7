"""What a network costs: `summarize` adds up parameters, multiply-adds, sizes and measured latencies."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_prune.deploy.running import Example, call, calls, density, refuse_training, where
from lightning_prune.deploy.sizes import size
from lightning_prune.deploy.timing import Ratio, alternated, low, parts, timed, yardstick
from lightning_prune.evidence import undisturbed
from lightning_prune.shards import is_sharded, settle
from lightning_prune.tables import table

_SECONDS = 0.05  # to time a layer; the whole model gets ten times as long


@dataclass(frozen=True)
class LayerCost:
    """A row of `Summary`: a module that has parameters of its own. Sizes are in bytes."""

    layer: str
    type: str
    parameters: int
    alive: int  # parameters that are not 0
    density: float
    multiply_adds: int  # for the whole batch
    effective_multiply_adds: int  # of them, those with a weight that is not 0
    raw_size: int
    gzip_size: int
    sparse_size: int
    latency_us: float  # microseconds; NaN where it is not measured


@dataclass(frozen=True)
class Summary:
    """What a network costs. `print` it for a table, `to_dict` for programs."""

    layers: tuple[LayerCost, ...]
    total: LayerCost
    where: str  # batch, threads, dtype, hardware
    spread_us: tuple[float, float]  # lowest and highest of the latencies in three parts of the runs
    yardstick_us: float  # time of a fixed matrix product in the same minute

    @property
    def compression_ratio(self) -> float:
        """Parameters over parameters that are not 0, of the whole network: original size over new size."""
        return self.total.parameters / max(1, self.total.alive)

    @property
    def theoretical_speed_up(self) -> float:
        """Multiply-adds over those that remain: what zeros are worth to hardware that skips all of them."""
        return self.total.multiply_adds / max(1, self.total.effective_multiply_adds)

    def speed_up(self, before: "Summary") -> Ratio:
        """How many times as fast this network is; its range says how far the two measurements agree.

        They were made at different times. The range covers the spread of each, and what a fixed piece of work
        took beside each: a machine that was busier during one of them makes it wide. It is NaN where one of
        the two was not timed, as over shards.
        """
        value = before.total.latency_us / self.total.latency_us
        busier = self.yardstick_us / before.yardstick_us
        (fast, slow), (fast_before, slow_before) = self.spread_us, before.spread_us
        range_ = [value, value * busier, fast_before / slow, slow_before / fast]
        return Ratio(value, min(range_), max(range_))

    def against(self, before: "Summary") -> str:
        """A table of the whole network before and after: a cut, say."""
        rows = replace(before.total, layer="before"), replace(self.total, layer="after")
        smaller, faster = before.total.parameters / self.total.parameters, self.speed_up(before)
        said = "not timed" if isnan(faster.value) else f"{faster} as fast"
        return table(f"{smaller:.2f}x smaller, {said} ({self.where})", rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, with both ratios."""
        ratios = {name: getattr(self, name) for name in ("compression_ratio", "theoretical_speed_up")}
        return {**asdict(self), **ratios}

    @override
    def __str__(self) -> str:
        ratios = (
            f"compression {self.compression_ratio:.2f}x (parameters over those that are not 0), theoretical "
            f"{self.theoretical_speed_up:.2f}x (multiply-adds over those with a weight that is not 0: the "
            "speed-up where zeros are skipped)"
        )
        return table(f"{ratios}; {self.where}", (*self.layers, self.total))


def summarize(model: nn.Module, example_input: Example) -> Summary:
    """Parameters, multiply-adds, size on disk and measured latency, per layer and in total.

    Multiply-adds are those of matrix products and convolutions; recurrent layers are not counted. Those of a
    layer that are effective are in proportion to the density of its weight. The sizes of a layer are those of
    its tensors as they are, gzipped (-6), and in a sparse file; in total that is the file. A tensor that
    several layers share counts once, with the first of them. Latencies are those that the fastest tenth of
    the runs keep, those of a layer of it alone, on what reaches it first; 0 where it is not called.

    Over shards all processes call it, each with an example of its own. Parameters and sizes are those of the
    whole network, put together tensor by tensor, multiply-adds those of this process's example in the whole
    network, as on one process. Nothing is timed there: latencies are NaN.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.eye(4))
    >>> summary = summarize(model, torch.ones(3, 4))
    >>> [(row.layer, row.alive, row.multiply_adds, row.effective_multiply_adds) for row in summary.layers]
    [('0', 4, 48, 12), ('2', 8, 24, 24)]
    >>> summary.compression_ratio, summary.theoretical_speed_up
    (2.0, 2.0)

    Args:
        model: any module in evaluation mode. It is not changed, nor are the global random generators.
        example_input: a batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        ValueError: when the model is in training mode, or sharded in another way than by DTensor.
        ModuleNotFoundError: without the extra `storage`, which sizes on disk need.

    Reference: Blalock et al. (2020), arXiv:2003.03033, section 6, for both ratios.
    """
    sharded = any(map(is_sharded, settle(model).values()))
    refuse_training(model, "summarize")
    owners, everything = _owners(model)
    modules = {name: model.get_submodule(name) for name in owners}
    with undisturbed(model), torch.inference_mode():
        counts = multiply_adds(model, example_input)
        settle(model)
        times = _Times({}, [nan], [nan]) if sharded else _timed(model, modules, everything, example_input)
    rows: list[LayerCost] = []
    for name, module in modules.items():
        inside = (f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
        count = counts[name] - sum(counts[child] for child in inside)
        weight = getattr(module, "weight", None)
        alive = density(weight) if isinstance(weight, Tensor) and weight.dim() > 1 else 1.0
        latency = low(times.layers.get(name, [nan if sharded else 0.0]))
        rows.append(_cost(name, type(module).__name__, owners[name], count, round(count * alive), latency))
    skipped = sum(row.multiply_adds - row.effective_multiply_adds for row in rows)
    total = _cost("total", "", everything, counts[""], counts[""] - skipped, low(times.model))
    each = [1e6 * low(part) for part in parts(times.model)]
    at = where(model, example_input) + (", over shards, not timed" if sharded else "")
    return Summary(tuple(rows), total, at, (min(each), max(each)), 1e6 * low(times.yardstick))


class _Times(NamedTuple):
    """Seconds of runs: of each layer that is called, of the model and of the yardstick."""

    layers: Mapping[str, list[float]]
    model: list[float]
    yardstick: list[float]


def _timed(
    model: nn.Module, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], example: Example
) -> _Times:
    spent = {
        name: alternated({"": timed(work)}, at_least=_SECONDS, warm_up=2)[""]
        for name, work in calls(model, modules, example).items()
    }
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    works = {"model": timed(partial(call, model, example)), "yardstick": yardstick(device)}
    whole = alternated(works, at_least=10 * _SECONDS, warm_up=2)
    return _Times(spent, whole["model"], whole["yardstick"])


def _owners(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each module, by its name, and those of all; a shared one is that of the first."""
    owners: dict[str, dict[str, Tensor]] = {}
    everything: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and all(tensor is not other for other in everything.values()):
            everything[key] = owners.setdefault(key.rpartition(".")[0], {})[key] = tensor
    return owners, everything


def _cost(
    name: str, kind: str, tensors: Mapping[str, Tensor], count: int, effective: int, seconds: float
) -> LayerCost:
    sizes = size(tensors)
    alive = sizes.alive / sizes.parameters if sizes.parameters else 1.0
    stored = sizes.raw, sizes.gzip, sizes.sparse
    return LayerCost(
        name, kind, sizes.parameters, sizes.alive, alive, count, effective, *stored, 1e6 * seconds
    )


def multiply_adds(model: nn.Module, example: Any, run: Callable[..., Any] = call) -> Counter[str]:
    """By the name of the module, with all that it calls; the whole model is ''.

    >>> multiply_adds(nn.Sequential(nn.Linear(3, 2)), torch.zeros(4, 3))[""]
    24
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused transformer layers and attention are not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    counts = Counter({"": counter.get_total_flops() // 2})
    for path, flops in counter.get_flop_counts().items():
        if path.startswith(root := f"{type(model).__name__}."):
            counts[path.removeprefix(root)] = sum(flops.values()) // 2
    return counts
