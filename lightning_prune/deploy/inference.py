"""Inference: what zeros are worth. `accelerate` makes a pruned network faster, `summarize` adds it up.

Nothing here claims a speed-up: every time is measured on this machine, on the input that is given.
"""

import copy
import gzip
import logging
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypeGuard, cast, get_args
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_prune.deploy.storage import save_sparse
from lightning_prune.tables import table

log = logging.getLogger(__name__)

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]  # what a model is called with
Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Product: TypeAlias = Callable[[Tensor], Tensor]  # (inputs, n) -> (outputs, n)
Pack: TypeAlias = Callable[[Tensor, Tensor | None], Product]  # weight (outputs, inputs) and bias -> product

_CLEARLY = 1.05  # a layer changes its form for a gain that is more than noise,
_AT_ALL = 1.02  # and a model, whose layers were measured already, for one that is just beyond it
_SECONDS = 0.05  # to time a layer; the whole model gets ten times as long


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
        forms = "dense: these forms are " if self.speed_up == 1 else "these forms are "
        return table(f"{forms}{self.measured:.2f}x as fast end to end ({self.where})", self.layers)


def accelerate(model: nn.Module, example_input: Example) -> nn.Module:
    """A copy for inference in which each layer has the form measured fastest here, for this input.

    A linear layer or a convolution of kernel size 1 can be `csr`, a sparse matrix on the left of the product
    (float32 and float64, on a CPU), `compact`, without rows and columns that are entirely zero, or `2:4`, two
    zeros in every four weights (on a GPU that computes that). Its forms are timed in turn on what reaches it,
    then the whole models: if the copy is not faster, it is dense, and a log message says so. On CPUs csr
    begins to pay at 80 to 90 % of zeros, the larger the layer and the batch the more; small layers gain
    nothing at batch 1, larger kernels nothing at all.

    Outputs are those of the model within rounding, for finite inputs of any size; other sizes than the
    example's may be slower. The copy has the `state_dict` of the model, loads another one, and can be copied
    and pickled. Its attribute `acceleration` is what was measured, an `Acceleration`.

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
        forms = {name: _forms(layer) for name, layer in box.named_modules() if _is_product(layer)}
    with torch.inference_mode():
        rows = _choose(box, forms, example_input)
        whole = [partial(_call, it, example_input) for it in (dense, box[0])]
        dense_times, fast_times = _alternated(whole, 10 * _SECONDS)
    measured = _ratio(dense_times, fast_times)
    gains = measured >= _AT_ALL and any(row.form != "dense" for row in rows)
    if not gains:
        log.warning("accelerate: nothing is gained (%.2fx as fast), so the copy is dense.", measured)
    result, speed_up = (box[0], measured) if gains else (dense, 1.0)
    where = _where(dense, example_input)
    result.__dict__["acceleration"] = Acceleration(rows, 1e6 * median(dense_times), speed_up, measured, where)
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

    def against(self, before: "Summary") -> str:
        """A table of the whole network before and after: a cut, say."""
        rows = replace(before.total, layer="before"), replace(self.total, layer="after")
        smaller = before.total.parameters / self.total.parameters
        faster = before.total.latency_us / self.total.latency_us
        return table(f"{smaller:.2f}x smaller, {faster:.2f}x as fast ({self.where})", rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, with both ratios."""
        ratios = {name: getattr(self, name) for name in ("compression_ratio", "theoretical_speed_up")}
        return {**asdict(self), **ratios}

    @override
    def __str__(self) -> str:
        ratios = f"compression {self.compression_ratio:.2f}x, theoretical {self.theoretical_speed_up:.2f}x"
        return table(f"{ratios} ({self.where})", (*self.layers, self.total))


def summarize(model: nn.Module, example_input: Example) -> Summary:
    """Parameters, multiply-adds, size on disk and measured latency, per layer and in total.

    Multiply-adds are those of matrix products and convolutions; recurrent layers are not counted. Those of a
    layer that are effective are in proportion to the density of its weight. The sizes of a layer are those of
    its tensors as they are, gzipped (-6), and in a sparse file; in total that is the file. A tensor that
    several layers share counts once, with the first of them. Latencies are medians, those of a layer of it
    alone, on what reaches it first; 0 where it is not called.

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
    everything: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and all(tensor is not other for other in everything.values()):
            everything[key] = owners.setdefault(key.rpartition(".")[0], {})[key] = tensor
    modules = {name: model.get_submodule(name) for name in owners}
    with torch.inference_mode():
        counts = _multiply_adds(model, example_input)
        calls = {**_calls(model, modules, example_input), "total": partial(_call, model, example_input)}
        spent = {name: 1e6 * median(_alternated([call], _SECONDS)[0]) for name, call in calls.items()}
    rows: list[LayerCost] = []
    for name, module in modules.items():
        inside = (f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
        count = counts[name] - sum(counts[child] for child in inside)
        weight = getattr(module, "weight", None)
        density = _density(weight) if isinstance(weight, Tensor) and weight.dim() > 1 else 1.0
        work = count, round(count * density)
        rows.append(_cost(name, type(module).__name__, owners[name], *work, spent.get(name, 0.0)))
    skipped = sum(row.multiply_adds - row.effective_multiply_adds for row in rows)
    total = _cost("total", "", everything, counts[""], counts[""] - skipped, spent["total"])
    return Summary(tuple(rows), total, _where(model, example_input))


def _cost(
    name: str, kind: str, tensors: Mapping[str, Tensor], count: int, effective: int, microseconds: float
) -> LayerCost:
    parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
    total, alive = sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)
    flat = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in tensors.values())
    zipped = sum(len(gzip.compress(data.numpy().tobytes(), 6)) for data in flat)
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(tensors, file := Path(folder, "sparse"))
        sizes = sum(t.nbytes for t in tensors.values()), zipped, file.stat().st_size
    density = alive / total if total else 1.0
    return LayerCost(name, kind, total, alive, density, count, effective, *sizes, microseconds)


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
    counts = Counter({"": counter.get_total_flops() // 2})
    for path, flops in counter.get_flop_counts().items():
        if path.startswith(root := f"{type(model).__name__}."):
            counts[path.removeprefix(root)] = sum(flops.values()) // 2
    return counts


# ------------------------------------------------------------------------------------------- forms of a layer


class _Packed(nn.Module):
    """A linear layer or a convolution of kernel size 1 as a product with a packed weight on the left.

    It has the parameters of the layer, and packs them when they are new: after loading, moving, unpickling,
    and every change that autograd could see, so not after one through `.data`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, pack: Pack) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.dim = 1 - self.weight.dim() if self.weight.dim() > 2 else -1  # of the features in the input
        self.strides = tuple(slice(None, None, step) for step in getattr(layer, "stride", ()))
        self.pack = pack
        self.stays_transposed = False  # leave the result as the next product needs it, features first
        self._product: tuple[object, Product] | None = None  # and what it was packed from
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(
                "training=True: an accelerated copy is allowed to infer only. Train the model it was "
                "made from."
            )
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        state = [(p.data_ptr(), p._version) for p in parameters]
        if self._product is None or self._product[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._product = state, self.pack(self.weight.flatten(1), self.bias)
        x = input[(..., *self.strides)].movedim(self.dim, 0)
        y = self._product[1](x.reshape(x.shape[0], -1).contiguous())
        y = y.view(len(self.weight), *x.shape[1:]).movedim(0, self.dim)
        return y if self.stays_transposed else y.contiguous()

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


def _is_two_four(alive: Tensor, dtype: torch.dtype) -> bool:
    """Whether a row has at most two survivors in every four, and the GPU can make something of that."""
    return (
        torch.cuda.get_device_capability(alive.device) >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and (alive.shape[0] % 32, alive.shape[1] % 64) == (0, 0)
        and int(alive.view(-1, 4).sum(1).max()) <= 2
    )


def _is_product(layer: nn.Module) -> TypeGuard[Layer]:
    """Whether a layer is its weight times its input and no more; a subclass may compute something else."""
    return (
        type(layer) in get_args(Layer)
        and cast(Layer, layer).weight.shape[2:].numel() == 1
        and getattr(layer, "groups", 1) == 1
        and not any(getattr(layer, "padding", ()))
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _forms(layer: Layer) -> dict[str, nn.Module]:
    """What a layer can be; `dense` is itself."""
    weight, alive = layer.weight, layer.weight.flatten(1) != 0
    forms: dict[str, nn.Module] = {"dense": layer}
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        forms["csr"] = _Packed(layer, _csr)
    if not (alive.any(0).all() and alive.any(1).all()):
        forms["compact"] = _Packed(layer, _compact)
    if weight.is_cuda and _is_two_four(alive, weight.dtype):
        forms["2:4"] = _Packed(layer, _two_four)
    return forms


def _choose(
    box: nn.Sequential, forms: dict[str, dict[str, nn.Module]], example: Example
) -> tuple[Choice, ...]:
    """Put each layer that is called into the form that is clearly the fastest on what reaches it.

    All begin as csr where they can be. What is slower so than dense loses that form, and all are timed again:
    its neighbours now receive another layout.
    """
    now = {name: its["dense"] for name, its in forms.items()}
    names = {layer: name for name, layer in now.items()}
    places = [
        p for p in box.named_modules(remove_duplicate=False) if p[1] in names
    ]  # a shared layer has several
    chosen = {name: "csr" if "csr" in forms[name] else "dense" for name in _calls(box[0], now, example)}
    before, rows = None, dict[str, Choice]()
    while chosen != before:
        now = {name: forms[name][form] for name, form in chosen.items()}
        for place, layer in places:
            box.set_submodule(place, now.get(names[layer], layer))
        _keep_transposed(box[0], {name: it for name, it in now.items() if isinstance(it, _Packed)}, example)
        for name, call in _calls(box[0], now, example).items():
            works = [partial(form, *call.args, **call.keywords) for form in forms[name].values()]
            times = dict(zip(forms[name], _alternated(works, _SECONDS), strict=True))
            gains = {form: _ratio(times["dense"], its) for form, its in times.items()}
            best = max(gains, key=lambda form: gains[form])
            best = best if gains[best] >= _CLEARLY else "dense"
            weight, dense = forms[name]["dense"].get_parameter("weight"), 1e6 * median(times["dense"])
            shape, sparsity = tuple(weight.shape), 1 - _density(weight)
            rows[name] = Choice(name[2:], shape, sparsity, dense, best, gains[best])
        before, chosen = chosen, {name: rows[name].form for name in now}
        for name, form in before.items():
            if form not in ("dense", chosen[name]):
                del forms[name][form]
    return tuple(rows.values())


def _keep_transposed(model: nn.Module, packed: Mapping[str, _Packed], example: Example) -> None:
    """Let a product leave its result transposed where it reaches another product like that.

    Elementwise functions keep the layout of memory, so nothing has to be known about what is between them.
    """

    def transposed() -> int:
        try:
            calls = _calls(model, packed, example)
        except RuntimeError:  # somebody asks for a view that this layout does not have
            return 0
        inputs = {name: next(iter((*call.args, *call.keywords.values()))) for name, call in calls.items()}
        return sum(x.movedim(packed[name].dim, 0).is_contiguous() for name, x in inputs.items())

    for layer in packed.values():
        layer.stays_transposed = False
    most = transposed()
    for layer in packed.values():
        layer.stays_transposed = True
        layer.stays_transposed, most = (found := transposed()) > most, max(found, most)


# -------------------------------------------------------------------------------------------------- measuring


def _call(model: nn.Module, example: Example) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _calls(model: nn.Module, modules: Mapping[str, nn.Module], example: Example) -> dict[str, partial[Any]]:
    """The first call of each of the modules that is called when the model is."""
    calls: dict[str, partial[Any]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, partial(module, *args, **kwargs))

    hooks = [
        m.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: calls[name] for name in modules if name in calls}


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


def _where(model: nn.Module, example: Example) -> str:
    """Batch, threads, dtype and hardware of a measurement."""
    given = example.values() if isinstance(example, Mapping) else example
    given = given if not isinstance(given, Tensor) else (given,)
    batch = next((len(x) for x in given if isinstance(x, Tensor) and x.dim()), 1)
    weight = next(model.parameters(), torch.empty(0))
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = cpu[1] if cpu else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else name
    return f"batch {batch}, {torch.get_num_threads()} threads, {str(weight.dtype)[6:]}, {name}"


def _refuse_training(model: nn.Module, function: str) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{function}: {name or type(model).__name__} is in training mode; "
                "allowed are models in evaluation mode: call model.eval() first."
            )
