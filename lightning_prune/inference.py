"""Inference: what zeros are worth. `accelerate` makes a pruned network faster, `summarize` adds it up.

Nothing here claims a speed-up: every time is measured on this machine, on the input that is given.
"""

import copy
import gzip
import io
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, cast, get_args
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_prune.storage import save_sparse

log = logging.getLogger(__name__)

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]  # what a model is called with
Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Product: TypeAlias = Callable[[Tensor], Tensor]  # (inputs, n) -> (outputs, n)
Pack: TypeAlias = Callable[[Tensor, Tensor | None], Product]  # weight (outputs, inputs) and bias -> product

_CLEARLY = 1.05  # a layer changes its form for a gain that is more than noise,
_AT_ALL = 1.02  # and a model, whose layers were measured already, for one that is just beyond it
_SECONDS = 0.05  # to time the forms of a layer; the whole model gets ten times as long


@dataclass(frozen=True)
class Choice:
    """What was measured on one layer: a row of `Acceleration`."""

    layer: str
    shape: tuple[int, ...]
    sparsity: float
    dense_us: float  # microseconds
    form: str  # dense | csr | compact | 2:4
    speed_up: float  # dense over this form, of this layer alone


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` measured and chose. `print` it for a table, `to_dict` for programs."""

    layers: tuple[Choice, ...]
    dense_us: float  # microseconds, the whole model
    speed_up: float  # of the model that was returned, end to end; 1 where that is dense
    measured: float  # of the forms in the table, end to end, also where they were not worth it
    where: str  # batch, threads, dtype, hardware

    def to_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        result = f"{self.speed_up:.2f}x end to end"
        if self.speed_up == 1:
            result = f"dense: these forms are {self.measured:.2f}x as fast end to end"
        return _table(f"{result} ({self.where})", [asdict(choice) for choice in self.layers])


def accelerate(model: nn.Module, example_input: Example) -> nn.Module:
    """A copy for inference in which each layer has the form measured fastest here, for this input.

    Linear layers and convolutions of kernel size 1 are `dense`; `csr`, a sparse matrix on the left of the
    product, for float32 and float64 on a CPU; `compact`, without rows and columns that are entirely zero; or
    `2:4`, two zeros in every four weights, where a GPU computes that. The forms of a layer are timed in turn
    on what reaches it, and then the whole models: if the copy is not faster, it is dense, and a log message
    says so. What gains depends on the machine. On CPUs csr begins to pay at 80 to 90 % of zeros, more the
    larger the layer and the batch; small layers gain nothing at batch 1, convolutions with larger kernels
    nothing at all.

    Activations stay transposed from one such layer to the next. Outputs are those of the model within
    rounding, for finite inputs of any size; sizes other than the example's may be slower. The copy has the
    names and the `state_dict` of the model, loads another one, and can be copied and pickled. What was
    measured is its attribute `acceleration`, an `Acceleration`.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> with torch.no_grad():
    ...     _ = model[0].weight.mul_(torch.arange(64) % 32 == 0)
    >>> x = torch.ones(16, 64)
    >>> fast = accelerate(model, x)
    >>> torch.allclose(fast(x), model(x), atol=1e-6), list(fast.state_dict()) == list(model.state_dict())
    (True, True)
    >>> [(choice.layer, choice.sparsity) for choice in fast.acceleration.layers]
    [('0', 0.96875), ('2', 0.0)]

    Args:
        model: any module in evaluation mode. It is not changed.
        example_input: a batch of the size that is to be fast: a tensor, a tuple of arguments or a dict of
            keyword arguments.

    Raises:
        ValueError: when the model is in training mode.
    """
    _refuse_training(model, "accelerate")
    with torch.inference_mode(False), torch.no_grad():
        dense = copy.deepcopy(model).requires_grad_(False)
        box = nn.Sequential(copy.deepcopy(dense))  # so that a model that is one layer can be replaced too
        forms = _forms(box)
    with torch.inference_mode():
        reached = _inputs(box, forms, example_input)
        forms = {name: its for name, its in forms.items() if name in reached}
        chosen = {name: "csr" if "csr" in its else "dense" for name, its in forms.items()}
        while True:
            _put(box, {name: forms[name][form] for name, form in chosen.items()})
            _keep_transposed(box, example_input)
            inputs = _inputs(box, forms, example_input)
            rows = {name: _choose(name, its, inputs[name]) for name, its in forms.items()}
            lost = [name for name, row in rows.items() if chosen[name] == "csr" != row.form]
            chosen = {name: row.form for name, row in rows.items()}
            if not lost:
                break
            for name in lost:  # its neighbours now receive another layout than they were timed on
                del forms[name]["csr"]
        _put(box, {name: forms[name][form] for name, form in chosen.items()})
        whole = [partial(_call, it, example_input) for it in (dense, box[0])]
        dense_times, fast_times = _alternated(whole, 10 * _SECONDS)
    measured = _ratio(dense_times, fast_times)
    gains = measured >= _AT_ALL and any(form != "dense" for form in chosen.values())
    result = box[0] if gains else dense
    report = Acceleration(
        tuple(rows.values()),
        1e6 * median(dense_times),
        measured if gains else 1.0,
        measured,
        _where(dense, example_input),
    )
    object.__setattr__(result, "acceleration", report)
    if not gains:
        log.warning("accelerate: nothing is gained (%.2fx as fast), so the copy is dense.", measured)
    return result


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
    latency_us: float  # microseconds


@dataclass(frozen=True)
class Summary:
    """What a network costs. `print` it for a table, `to_dict` for programs."""

    layers: tuple[LayerCost, ...]
    total: LayerCost
    where: str  # batch, threads, dtype, hardware

    @property
    def compression_ratio(self) -> float:
        """Parameters over parameters that are not 0, of the whole network: original size over new size."""
        return self.total.parameters / max(1, self.total.alive)

    @property
    def theoretical_speed_up(self) -> float:
        """Multiply-adds over those that remain: what zeros are worth to hardware that skips all of them."""
        return self.total.multiply_adds / max(1, self.total.effective_multiply_adds)

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, with both ratios."""
        ratios = {name: getattr(self, name) for name in ("compression_ratio", "theoretical_speed_up")}
        return {**asdict(self), **ratios}

    @override
    def __str__(self) -> str:
        ratios = f"compression {self.compression_ratio:.2f}x, theoretical {self.theoretical_speed_up:.2f}x"
        return _table(f"{ratios} ({self.where})", [asdict(row) for row in (*self.layers, self.total)])


def summarize(model: nn.Module, example_input: Example) -> Summary:
    """Parameters, multiply-adds, size on disk and measured latency, per layer and in total.

    Multiply-adds are those of matrix products and convolutions; recurrent layers are not counted. Those of a
    layer that are effective are in proportion to the density of its weight. The sizes of a layer are those of
    its tensors as they are, gzipped (-6), and in a sparse file; in total that is the file. A tensor that
    several layers share counts once, with the first of them. Latencies are medians.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.eye(4))
    >>> summary = summarize(model, torch.ones(3, 4))
    >>> [(row.layer, row.alive, row.multiply_adds, row.effective_multiply_adds) for row in summary.layers]
    [('0', 4, 48, 12), ('2', 8, 24, 24)]
    >>> summary.compression_ratio, summary.theoretical_speed_up
    (2.0, 2.0)

    Args:
        model: any module in evaluation mode. It is not changed.
        example_input: a batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        ValueError: when the model is in training mode.
        ModuleNotFoundError: without the extra `storage`, which sizes on disk need.

    Reference: Blalock et al. (2020), arXiv:2003.03033, section 6, for both ratios.
    """
    _refuse_training(model, "summarize")
    owners: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            owners.setdefault(key.rpartition(".")[0], {})[key] = tensor
    with torch.inference_mode():
        counts = _multiply_adds(model, example_input)
        microseconds = _latencies(model, owners, example_input)
    rows: list[LayerCost] = []
    for name, tensors in owners.items():
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        density = _density(weight) if isinstance(weight, Tensor) and weight.dim() > 1 else 1.0
        count = counts[name] - sum(
            counts[f"{name}.{child}".lstrip(".")] for child, _ in module.named_children()
        )
        rows.append(
            _cost(name, type(module).__name__, tensors, count, round(count * density), microseconds[name])
        )
    everything = {key: tensor for tensors in owners.values() for key, tensor in tensors.items()}
    zeros = sum(row.multiply_adds - row.effective_multiply_adds for row in rows)
    total = _cost("total", "", everything, counts[""], counts[""] - zeros, microseconds["total"])
    return Summary(tuple(rows), total, _where(model, example_input))


def _cost(
    name: str, kind: str, tensors: Mapping[str, Tensor], count: int, effective: int, microseconds: float
) -> LayerCost:
    parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
    total, alive = sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(tensors, file := Path(folder, "sparse"))
        sparse = file.stat().st_size
    as_bytes = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in tensors.values()]
    return LayerCost(
        layer=name,
        type=kind,
        parameters=total,
        alive=alive,
        density=alive / total if total else 1.0,
        multiply_adds=count,
        effective_multiply_adds=effective,
        raw_size=sum(t.nbytes for t in tensors.values()),
        gzip_size=sum(len(gzip.compress(data.tobytes(), 6)) for data in as_bytes),
        sparse_size=sparse,
        latency_us=microseconds,
    )


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / max(1, weight.numel())


def _multiply_adds(model: nn.Module, example: Example) -> Counter[str]:
    """By the name of the module, with all that it calls; the whole model is ''."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused transformer layers and attention are not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    root = type(model).__name__
    counts = Counter({"": counter.get_total_flops() // 2})
    for path, flops in counter.get_flop_counts().items():
        if path.startswith(f"{root}."):
            counts[path.removeprefix(f"{root}.")] = sum(flops.values()) // 2
    return counts


def _latencies(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, float]:
    """Median microseconds in each module in a call of the model, and in `total` without looking at them."""
    (whole,) = _alternated([partial(_call, model, example)], 10 * _SECONDS)
    spent: dict[str, list[float]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name) for name in names}
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def start(name: str, *_: Any) -> None:
        synchronize()
        spent[name][-1] -= time.perf_counter()

    def stop(name: str, *_: Any) -> None:
        synchronize()
        spent[name][-1] += time.perf_counter()

    handles = [m.register_forward_pre_hook(partial(start, name)) for name, m in modules.items()]
    handles += [m.register_forward_hook(partial(stop, name)) for name, m in modules.items()]
    try:
        for _ in range(min(50, max(5, len(whole) // 2))):
            for its in spent.values():
                its.append(0.0)
            _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: 1e6 * median(its) for name, its in (*spent.items(), ("total", whole))}


class _Packed(nn.Module):
    """A linear layer or a convolution of kernel size 1 as a product with a packed weight on the left.

    It has the parameters of the layer, and packs them when they are new: after loading, moving, unpickling,
    and every change that autograd could see, so not after one through `.data`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, pack: Pack) -> None:
        super().__init__()
        self.weight = layer.weight
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        self.dim = 1 - self.weight.dim() if self.weight.dim() > 2 else -1  # of the features in the input
        self.strides = tuple(slice(None, None, step) for step in getattr(layer, "stride", ()))
        self.pack = pack
        self.stays_transposed = (
            False  # leave the result as the next product needs it, features first in memory
        )
        self._product: Product | None = None
        self._packed_from: object = None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("an accelerated copy does not train: train the model it was made from.")
        product = self._current()
        x = x[(..., *self.strides)].movedim(self.dim, 0)
        y = product(x.reshape(x.shape[0], -1).contiguous())
        y = y.view(len(self.weight), *x.shape[1:]).movedim(0, self.dim)
        return y if self.stays_transposed else y.contiguous()

    def _current(self) -> Product:
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        state = [(p.data_ptr(), p._version) for p in parameters]
        if self._product is None or state != self._packed_from:
            with torch.inference_mode(False), torch.no_grad():
                bias = None if self.bias is None else self.bias.detach()
                self._product = self.pack(self.weight.detach().flatten(1), bias)
            self._packed_from = state
        return self._product

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}


def _csr(weight: Tensor, bias: Tensor | None) -> Product:
    with catch_warnings():
        simplefilter("ignore")  # torch calls its sparse layouts beta
        csr = weight.to_sparse_csr()
        # MKL wants 32 bits; from 64 it makes a copy at every product.
        places = csr.crow_indices().int(), csr.col_indices().int()
        csr = torch.sparse_csr_tensor(*places, csr.values(), csr.shape)
    return partial(torch.mm, csr) if bias is None else partial(torch.addmm, bias[:, None], csr)


def _compact(weight: Tensor, bias: Tensor | None) -> Product:
    alive = weight != 0
    rows, columns = (alive.any(dim).nonzero().flatten() for dim in (1, 0))
    small = weight[rows][:, columns]
    rest = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]

    def product(x: Tensor) -> Tensor:
        y = torch.addmm(rest[rows], small, x[columns])
        return rest.expand(-1, x.shape[1]).index_copy(0, rows, y)

    return product


def _two_four(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.sparse.to_sparse_semi_structured(weight)
    return lambda x: functional.linear(x.t(), packed, bias).t()


def _forms(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """By name: the layers whose form can change, and those that they can have beside `dense`, itself."""
    forms: dict[str, dict[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Layer) or type(layer) not in get_args(Layer):
            continue  # a subclass may compute something else
        if layer._forward_hooks or layer._forward_pre_hooks or parametrize.is_parametrized(layer):
            continue
        weight = layer.weight
        if weight[0, 0].numel() > 1 or getattr(layer, "groups", 1) > 1 or any(getattr(layer, "padding", ())):
            continue
        alive = weight.flatten(1) != 0
        packs: dict[str, Pack] = {}
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            packs["csr"] = _csr
        if not (alive.any(0).all() and alive.any(1).all()):
            packs["compact"] = _compact
        if weight.is_cuda and _is_two_four(alive, weight.dtype):
            packs["2:4"] = _two_four
        forms[name] = {"dense": layer, **{form: _Packed(layer, pack) for form, pack in packs.items()}}
    return forms


def _is_two_four(alive: Tensor, dtype: torch.dtype) -> bool:
    """Whether a row has at most two survivors in every four, and the GPU can make something of that."""
    rows, columns = alive.shape
    return (
        torch.cuda.get_device_capability(alive.device) >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and rows % 32 == 0
        and columns % 64 == 0
        and int(alive.view(rows, -1, 4).sum(-1).max()) <= 2
    )


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace layers wherever they are: a shared one has several places."""
    swaps = {model.get_submodule(name): layer for name, layer in layers.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in swaps:
                setattr(module, name, swaps[child])


def _inputs(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, Tensor]:
    """What reaches layers first when the model is called, of those that are called with one tensor."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            inputs.setdefault(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        _call(model.get_submodule("0"), example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _keep_transposed(model: nn.Module, example: Example) -> None:
    """Let a product leave its result transposed where it reaches another product like that.

    Elementwise functions keep the layout of memory, so nothing has to be known about what is between them.
    """
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, _Packed)}
    for layer in packed.values():
        layer.stays_transposed = False

    def transposed() -> int:
        inputs = _inputs(model, packed, example)
        return sum(x.movedim(packed[name].dim, 0).is_contiguous() for name, x in inputs.items())

    before = transposed()
    for layer in packed.values():
        layer.stays_transposed = True
        try:
            now = transposed()
        except RuntimeError:  # somebody asks for a view that this layout does not have
            now = 0
        layer.stays_transposed = now > before
        before = max(now, before)


def _choose(name: str, forms: Mapping[str, nn.Module], x: Tensor) -> Choice:
    """The form of a layer that is clearly the fastest on `x`, or `dense`."""
    times = dict(
        zip(forms, _alternated([partial(layer, x) for layer in forms.values()], _SECONDS), strict=True)
    )
    gains = {form: _ratio(times["dense"], its) for form, its in times.items()}
    best = max(gains, key=lambda form: gains[form])
    best = best if gains[best] >= _CLEARLY else "dense"
    weight = cast(Tensor, forms["dense"].weight)
    microseconds = 1e6 * median(times["dense"])
    return Choice(
        name[2:],
        tuple(weight.shape),
        1 - _density(weight),
        microseconds,
        best,
        gains[best],
    )


# -------------------------------------------------------------------------------------------------- measuring


def _alternated(works: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds of each, run in turn after a warm-up, so that a drift of the machine meets them alike."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for work in (*works, *works):
        work()
    times: list[list[float]] = [[] for _ in works]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 1000):
        for work, its in zip(works, times, strict=True):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            its.append(time.perf_counter() - start)
    return times


def _ratio(of: Sequence[float], against: Sequence[float]) -> float:
    """Median of the ratios pair by pair."""
    return median(a / b for a, b in zip(of, against, strict=True))


def _call(model: nn.Module, example: Example) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _where(model: nn.Module, example: Example) -> str:
    """Batch, threads, dtype and hardware of a measurement."""
    values = (
        example.values()
        if isinstance(example, Mapping)
        else example
        if isinstance(example, tuple)
        else [example]
    )
    batch = next((len(x) for x in values if isinstance(x, Tensor) and x.dim()), 1)
    weight = next(model.parameters(), torch.empty(0))
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else _processor()
    return f"batch {batch}, {torch.get_num_threads()} threads, {str(weight.dtype)[6:]}, {name}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rich is needed to print tables: pip install 'lightning-prune[report]'; to_dict() does without"
        ) from error
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items() if rows else ():
        table.add_column(name.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _refuse_training(model: nn.Module, function: str) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{function}: {name or type(model).__name__} is in training mode; "
                "allowed are models in evaluation mode: call model.eval() first."
            )
