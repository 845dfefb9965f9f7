"""Trial: what may be removed is tried on a copy of the network, and the reason is given where that fails."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_prune.structured.surgery import cut
from lightning_prune.structured.units import Coupling, Couplings, cut_of

TOLERANCE = 1e-5  # of the largest output: float rounding of a sum that has fewer terms
UNEVEN = "some of what goes together would be all of a layer"
ROUNDING = 1e-2  # it may be this much in a deep network with drawn weights: then float64 decides


# ------------------------------------------------------------------------------------------------ the copy


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, without the graphs of tensors that its modules keep as attributes or in containers.

    Raises:
        ValueError: when something in the model cannot be copied.
    """
    try:
        return deepcopy(model, {id(t): t.detach().clone() for _, t in kept_graphs(model)})
    except Exception as error:  # whatever a user's attribute raises
        raise ValueError(
            f"{type(model).__name__} cannot be copied, as is needed: a cut is tried on a copy first "
            f"({first_line(error)}). "
            "Remove what cannot be copied, or detach what it keeps of a forward pass."
        ) from error


def kept_graphs(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors with a graph that modules keep, as attributes or in lists and dicts, and the names of these."""
    return [
        (f"{name}.{attribute}".lstrip("."), t)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, (Tensor, list, tuple, dict)) and attribute[:1] != "_"
        for t in tree_flatten(value)[0]
        if isinstance(t, Tensor) and not t.is_leaf
    ]


def synthetic(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy in full precision, all of it trained, with random weights; and the example to go with it.

    Weights are drawn anew, so that no zero or saturated one hides an error.
    """
    copy = copied(model).float()
    generator = torch.Generator().manual_seed(0)
    draw = lambda t, a, b: t.data.copy_(torch.empty(t.shape).uniform_(a, b, generator=generator))  # noqa: E731
    for name, p in copy.named_parameters():
        if not p.is_floating_point():
            continue
        p.requires_grad_(True)
        if p.dim() > 1:  # variance 2 / inputs
            bound = math.sqrt(6 * p.shape[0] / max(1, p.numel()))
            draw(p, -bound, bound)
        else:
            draw(p, *((0.5, 1.5) if name.endswith("weight") else (-0.2, 0.2)))
    for name, buffer in copy.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            draw(buffer, *((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    device = next(copy.parameters()).device
    here = tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, example)
    return copy, _floating(here, torch.float32)


# ------------------------------------------------------------------------------------------------ running it


def as_input(example: Any) -> Any:
    """An example input; numbers in [0, 1) of a shape, where that is what is given.

    >>> as_input([2, 3]).shape, as_input(torch.zeros(1, 4).shape).shape
    (torch.Size([2, 3]), torch.Size([1, 4]))

    Raises:
        ValueError: when a size in a shape is below 1.
    """
    is_shape = isinstance(example, Sequence) and len(example) > 0 and not isinstance(example, str)
    if not is_shape or not all(isinstance(size, int) for size in example):
        return example
    sizes = [int(size) for size in example]
    if min(sizes) < 1:
        raise ValueError(
            f"example_input={sizes}: allowed are sizes from 1 on, the first of them that of the "
            "batch, such as [2, 3, 32, 32]."
        )
    return torch.rand(sizes, generator=torch.Generator().manual_seed(0))


class Through(NamedTuple):
    """An example that another function than a model's forward takes, such as a batch for a training step."""

    forward: Callable[[Any, Any], Any]  # (model, batch) -> what depends on the weights
    batch: Any


def run(model: nn.Module, example: Any, training: bool = False) -> Any:
    """Run the model; in training its branches are those of training, its layers still those of evaluation."""
    for module in model.modules():
        module.training = training and any(True for _ in module.children())
    with _without_compilation():
        if isinstance(example, Through):
            return example.forward(model, example.batch)
        if isinstance(example, dict):
            return model(**example)
        return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _without_compilation() -> AbstractContextManager[Any]:
    """What torch.compile has compiled hides its layers; where it was never imported, nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in an output: in tuples, lists, dicts and dataclasses."""
    return list(_tensors_in(output))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors_in([getattr(leaf, field.name) for field in fields(leaf)])


class Unsuitable(Exception):
    """The output of a model is none that can be differentiated; says why."""


def refused(model: nn.Module, failure: str) -> ValueError:
    """The error for a model that cannot be traced."""
    return ValueError(
        f"{type(model).__name__} is refused: its channels cannot be traced ({failure}). Allowed are "
        "models whose forward runs on the example input and whose outputs depend on the weights by a "
        "gradient. Give an example_input= of the right shape and type, or use IterativeMagnitudePruning."
    )


def differentiable_outputs(model: nn.Module, example: Any, training: bool) -> list[Tensor]:
    """The tensors of the output that depend on weights by a gradient.

    Raises:
        Unsuitable: when there is none.
    """
    output = run(model, example, training)
    tensors = tensors_in(output)
    if not tensors:
        raise Unsuitable(f"there is no tensor in its output, a {type(output).__name__}")
    if not (found := [t for t in tensors if t.requires_grad]):
        raise Unsuitable(
            "none of its outputs has a gradient: they are computed under no_grad, detached, or are indices "
            "such as those of argmax; return logits"
        )
    return found


class _Opaque(torch.autograd.Function):
    """The outputs of a layer as one operation, whatever is computed inside: f(number, *outputs, *inputs)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in args[1 : 1 + args[0]])


def as_one_operation(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: to autograd a layer is one operation, whatever it computes inside."""
    plain = [a.data if isinstance(a, PackedSequence) else a for a in args]
    inputs = [t for t in tree_flatten(plain)[0] if isinstance(t, Tensor)]
    leaves, structure = tree_flatten(output)
    tensors = [t.detach() for t in leaves if isinstance(t, Tensor)]
    new = iter(_Opaque.apply(len(tensors), *tensors, *inputs))
    return tree_unflatten([next(new) if isinstance(t, Tensor) else t for t in leaves], structure)


def first_line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)  # the generators are put back by the caller
    found = tensors_in(run(model, example))
    return [(torch.view_as_real(t) if t.is_complex() else t).double() for t in found]


# -------------------------------------------------------------------------------------------------- the trial


@torch.no_grad()
def why_not(model: nn.Module, example: Any, couplings: Couplings) -> dict[str, str]:
    """Why channels cannot go, by name, for those that fail; the others can go together.

    A trial removes some of the units: the copy must run, in training and in evaluation, give outputs of the
    same shapes, and those of the network in which the same channels are zero. All are tried at once, and
    halves of them where that fails.

    Args:
        model: from `synthetic`; it is not changed.
        example: an input on its device.
        couplings: what is to be tried.
    """
    if whole := {name: UNEVEN for name, coupling in couplings.items() if _uneven(model, coupling)}:
        return whole | why_not(model, example, {n: c for n, c in couplings.items() if n not in whole})
    if not couplings or not (reason := _fails(model, example, couplings)):
        return {}
    if len(couplings) == 1:
        return dict.fromkeys(couplings, reason)
    items = list(couplings.items())
    halves = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
    failed = why_not(model, example, halves[0]) | why_not(model, example, halves[1])
    good = {name: coupling for name, coupling in items if name not in failed}
    if good and len(good) < len(couplings):
        reason = _fails(model, example, good)
    return dict.fromkeys(couplings, reason) if good and reason else failed  # each alone works, not together


def _fails(model: nn.Module, example: Any, couplings: Couplings) -> str:
    """Why the network fails without some of the units, or nothing."""
    generator = torch.Generator().manual_seed(0)
    alive = {
        name: torch.rand(coupling.units, generator=generator).argsort() >= _part(name, coupling.units)
        for name, coupling in couplings.items()
    }
    removed, copy = cut_of(couplings, alive), copied(model)
    for site, gone in removed.items():
        tensor = getattr(copy.get_submodule(site[0]), site[1])
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(site[2], gone.to(tensor.device), 0)
    how = "where some of them are zero"
    try:
        want = _outputs(copy, example)
        how = "without some of them"
        cut(copy, removed)
        got = _outputs(copy, example)
    except Exception as error:  # whatever a model's forward raises on tensors of another size
        return f"{how} the model fails with {first_line(error)}"
    if [t.shape for t in got] != [t.shape for t in want]:
        return "without some of them the model's output has another shape"
    if not any(bool(t.any()) for t in want):
        return "the model's outputs are all zero or empty on the example, so nothing can be compared"
    if not (far := _relative(want, got)) <= TOLERANCE:  # NaN, too
        if far < ROUNDING and next(model.parameters()).dtype != torch.float64:
            with suppress(Exception):
                return _fails(copied(model).double(), _floating(example, torch.float64), couplings)
        return "a network without some of them is not that in which they are zero"
    return _fails_in_training(model, copy, example)


def _uneven(model: nn.Module, coupling: Coupling) -> bool:
    """Whether a tensor would lose all of a dimension with some of the units."""
    for (module, name, dim), (indices, units) in coupling.sites.items():
        size = getattr(model.get_submodule(module), name).shape[dim]
        if len(indices) == size and len(units.unique()) < coupling.units:
            return True
    return False


def _part(name: str, units: int) -> int:
    """A third, a half or two thirds: equal parts everywhere would hide what is taken for something else."""
    return max(min(1, units - 1), units * (2 + crc32(name.encode()) % 3) // 6)


def _fails_in_training(model: nn.Module, smaller: nn.Module, example: Any) -> str:
    try:
        run(model, example, training=True)
    except Exception:  # a model that wants targets in training, say, has nothing to be compared with
        return ""
    try:
        run(smaller, example, training=True)
    except Exception as error:
        return f"in training mode the model fails without some of them: {first_line(error)}"
    return ""


def _floating(example: Any, dtype: torch.dtype) -> Any:
    of = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return tree_map(of, example)


def _relative(want: list[Tensor], got: list[Tensor]) -> float:
    scale = max(float(t.abs().max()) for t in want if t.numel())
    return max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel()) / scale
