"""`accelerate`: a copy of a pruned network for inference, each layer in the form measured fastest here.

Nothing here claims a speed-up: every time is measured on this machine, on the input that is given.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias, TypeGuard, cast, get_args
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_prune.deploy.running import Example, call, calls, density, refuse_training, where
from lightning_prune.deploy.timing import Ratio, low, ratio, settled, timed
from lightning_prune.evidence import undisturbed
from lightning_prune.shards import refuse, settle
from lightning_prune.tables import table

log = logging.getLogger(__name__)

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Product: TypeAlias = Callable[[Tensor], Tensor]  # (inputs, n) -> (outputs, n)
Pack: TypeAlias = Callable[[Tensor, Tensor | None], Product]  # weight (outputs, inputs) and bias -> product
Forms: TypeAlias = dict[str, Callable[..., Tensor]]  # what a layer can be: name -> what takes its input

_CLEARLY = 1.05  # a layer changes its form for a gain that is more than noise,
_AT_ALL = 1.02  # and a model, whose layers were measured already, for one that is just beyond it
_SECONDS = 0.05  # to time a layer, longer on a busy machine; the whole model gets ten times as long


@dataclass(frozen=True)
class Choice:
    """What was measured on one layer: a row of `Acceleration`."""

    layer: str
    shape: tuple[int, ...]
    sparsity: float
    dense_us: float  # microseconds
    form: str  # dense | csr | compact | 2:4
    speed_up: float  # dense over this form, of this layer alone
    noisy: bool  # whether the runs disagree on it by more than a quarter


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` measured and chose. `print` it for a table, `to_dict` for programs."""

    layers: tuple[Choice, ...]
    dense_us: float  # microseconds, the whole model
    speed_up: float  # of the model that was returned, end to end; 1 where that is dense
    measured: Ratio  # of the forms in the table, end to end, also where they were not worth it
    where: str  # batch, threads, dtype, hardware

    def to_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        forms = "dense: these forms are " if self.speed_up == 1 else "these forms are "
        return table(f"{forms}{self.measured} as fast end to end ({self.where})", self.layers)


def accelerate(model: nn.Module, example_input: Example) -> nn.Module:
    """A copy for inference in which each layer has the form measured fastest here, for this input.

    A linear layer or a convolution of kernel size 1 can be `csr`, a sparse matrix on the left of the product
    (float32 and float64, on a CPU), `compact`, without rows and columns that are entirely zero, or `2:4`, two
    zeros in every four weights (on a GPU that computes that). Its forms are timed in turn on what reaches it,
    then the whole models: if the copy is not faster, or the machine too busy to say, it is dense, and a log
    message says so. On CPUs csr begins to pay at 80 to 90 % of zeros, the larger the layer and the batch the
    more; small layers gain nothing at batch 1, larger kernels nothing at all.

    Outputs are those of the model within rounding, for finite inputs of any size; other sizes than the
    example's may be slower. Its layers are copies of those of the model, with all attributes; only how they
    compute is another. It has the `state_dict` of the model, loads another one, and can be copied and
    pickled. Its attribute `acceleration` is what was measured, an `Acceleration`.

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
        model: any module in evaluation mode. It is not changed, nor are the global random generators.
        example_input: a batch of the size that is to be fast: a tensor, a tuple of arguments or a dict of
            keyword arguments.

    Raises:
        ValueError: when the model is in training mode, sharded over processes, or cannot be copied.
    """
    refuse(
        settle(model).values(),
        "accelerate",
        "Allowed are whole weights, as forms of a layer are measured on all of it. Load the checkpoint into "
        "a model on one device with load_pruned, and accelerate that one.",
    )
    refuse_training(model, "accelerate")
    with torch.inference_mode(False), torch.no_grad():
        dense = _copied(model).requires_grad_(False)
        fast = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # the parameters are shared
        forms = {name: _forms(layer) for name, layer in fast.named_modules() if _is_product(layer)}
    with undisturbed(dense), undisturbed(fast), torch.inference_mode():
        rows = _choose(fast, forms, example_input)
        whole = {"dense": dense, "fast": fast}
        works = {name: timed(partial(call, module, example_input)) for name, module in whole.items()}
        times = settled(works, 10 * _SECONDS)
    measured = ratio(times["dense"], times["fast"])
    gains = measured.exceeds(_AT_ALL) and any(row.form != "dense" for row in rows)
    if gains:
        for row in rows:
            _use(fast.get_submodule(row.layer), forms[row.layer][row.form])
    elif measured.noisy:
        advice = "Try again when nothing else is running."
        log.warning("accelerate: %s as fast, so the copy is dense. %s", measured, advice)
    else:
        log.warning("accelerate: nothing is gained (%s as fast), so the copy is dense.", measured)
    result, speed_up = (fast, measured.value) if gains else (dense, 1.0)
    vars(result)["acceleration"] = Acceleration(
        rows, 1e6 * low(times["dense"]), speed_up, measured, where(dense, example_input)
    )
    return result


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, in which tensors that a graph was kept of have none, and each layer its own form."""
    values = [value for m in model.modules() for value in (*vars(m).values(), *m.buffers(recurse=False))]
    no_leaves = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    try:
        result = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in no_leaves})
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"accelerate: the {type(model).__name__} cannot be copied ({error}); allowed are models that "
            "copy.deepcopy copies. Remove from it what cannot be copied."
        ) from error
    for layer in result.modules():
        if isinstance(vars(layer).get("forward"), _Packed):
            del layer.forward
    return result


# ------------------------------------------------------------------------------------------- forms of a layer


class _Packed:
    """Takes the place of a layer's `forward`: a product with its packed weight on the left.

    It packs the parameters of the layer when they are new: after loading, moving, unpickling, and every
    change that autograd could see, so not after one through `.data`.
    """

    def __init__(self, layer: Layer, pack: Pack) -> None:
        self.layer, self.pack = layer, pack
        self.dim = 1 - layer.weight.dim() if layer.weight.dim() > 2 else -1  # of the features in the input
        self.strides = tuple(slice(None, None, step) for step in getattr(layer, "stride", ()))
        self.stays_transposed = False  # leave the result as the next product needs it, features first
        self._made: tuple[list[Tensor], list[int], Product] | None = (
            None  # what of, in which state, the product
        )

    def __call__(self, input: Tensor) -> Tensor:
        if self.layer.training:
            raise RuntimeError(
                "training=True: an accelerated copy is allowed to infer only. Train the model it was "
                "made from."
            )
        x = input[(..., *self.strides)].movedim(self.dim, 0)
        y = self._product()(x.reshape(x.shape[0], -1).contiguous())
        y = y.view(len(y), *x.shape[1:]).movedim(0, self.dim)
        return y if self.stays_transposed else y.contiguous()

    def _product(self) -> Product:
        weight, bias = self.layer.weight, self.layer.bias
        now = [weight] if bias is None else [weight, bias]
        states = [0 if p.is_inference() else p._version for p in now]  # noqa: SLF001  torch has no public name
        if self._made is not None:
            before, then, product = self._made
            if states == then and all(map(_is_same_memory, now, before)):
                return product
        with torch.inference_mode(False), torch.no_grad():
            product = self.pack(weight.flatten(1), bias)
            self._made = [p.detach() for p in now], states, product  # kept, so that no other has their memory
        return product

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.device) == (b.data_ptr(), b.dtype, b.device)


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
        and not {"forward", "_forward_hooks", "_forward_pre_hooks"} & {k for k, v in vars(layer).items() if v}
    )


def _forms(layer: Layer) -> Forms:
    """What a layer can be; `dense` is as its class computes it."""
    weight, alive = layer.weight, layer.weight.flatten(1) != 0
    forms: Forms = {"dense": partial(type(layer).forward, layer)}
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        forms["csr"] = _Packed(layer, _csr)
    if not (alive.any(0).all() and alive.any(1).all()):
        forms["compact"] = _Packed(layer, _compact)
    if weight.is_cuda and _is_two_four(alive, weight.dtype):
        forms["2:4"] = _Packed(layer, _two_four)
    return forms


def _use(layer: nn.Module, form: Callable[..., Tensor]) -> None:
    """Let a layer compute like that."""
    if isinstance(form, _Packed):
        layer.forward = form
    else:
        vars(layer).pop("forward", None)


def _choose(model: nn.Module, forms: dict[str, Forms], example: Example) -> tuple[Choice, ...]:
    """Put each layer that is called into the form that is clearly the fastest on what reaches it.

    All begin as csr where they can be. What is slower so than dense loses that form, and all are timed again:
    its neighbours now receive another layout.
    """
    layers = {name: model.get_submodule(name) for name in forms}
    layers = {name: layers[name] for name in calls(model, layers, example)}
    chosen = {name: "csr" if "csr" in forms[name] else "dense" for name in layers}
    before, rows = None, dict[str, Choice]()
    while chosen != before:
        now = {name: forms[name][form] for name, form in chosen.items()}
        for name, form in now.items():
            _use(layers[name], form)
        packed = {name: form for name, form in now.items() if isinstance(form, _Packed)}
        _keep_transposed(model, packed, example)
        for name, reached in calls(model, layers, example).items():
            rows[name] = _race(name, cast(Layer, layers[name]), forms[name], reached)
        before, chosen = chosen, {name: rows[name].form for name in layers}
        for name, form in before.items():
            if form not in ("dense", chosen[name]):
                del forms[name][form]
    return tuple(rows.values())


def _race(name: str, layer: Layer, forms: Forms, reached: partial[Any]) -> Choice:
    """Time the forms of a layer on what reaches it."""
    works = {form: timed(partial(run, *reached.args, **reached.keywords)) for form, run in forms.items()}
    times = settled(works, _SECONDS)
    gains = {form: ratio(times["dense"], taken) for form, taken in times.items()}
    fastest = max(gains, key=lambda form: gains[form].value)
    form = fastest if gains[fastest].exceeds(_CLEARLY) else "dense"
    sparsity, dense_us = 1 - density(layer.weight), 1e6 * low(times["dense"])
    speed_up, noisy = gains[form].value, gains[fastest].noisy
    return Choice(name, tuple(layer.weight.shape), sparsity, dense_us, form, speed_up, noisy)


def _keep_transposed(model: nn.Module, packed: Mapping[str, _Packed], example: Example) -> None:
    """Let a product leave its result transposed where it reaches another product like that.

    Elementwise functions keep the layout of memory, so nothing has to be known about what is between them.
    """

    def transposed() -> int:
        try:
            reached = calls(model, {name: product.layer for name, product in packed.items()}, example)
        except RuntimeError:  # somebody asks for a view that this layout does not have
            return 0
        inputs = {
            name: next(iter((*bound.args, *bound.keywords.values()))) for name, bound in reached.items()
        }
        return sum(x.movedim(packed[name].dim, 0).is_contiguous() for name, x in inputs.items())

    for form in packed.values():
        form.stays_transposed = False
    most = transposed()
    for form in packed.values():
        form.stays_transposed = True
        form.stays_transposed, most = (found := transposed()) > most, max(found, most)
