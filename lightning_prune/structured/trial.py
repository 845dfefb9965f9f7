"""Trial: what may be removed is tried on a copy of the network, and the reason is given where that fails."""

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from functools import cached_property
from traceback import walk_tb
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_prune import rng
from lightning_prune.copies import put_back
from lightning_prune.masks import Masks
from lightning_prune.structured.surgery import Cut, Prepared, smaller, within, zeroed
from lightning_prune.structured.units import Couplings, cut_of, is_maker, out_dimension

TOLERANCE = 1e-5  # of the largest output: float rounding of a sum that has fewer terms
TORCHS = vars(nn.Module()).keys()  # what every module has
NEAR = 4  # couplings that are tried alone where the network goes wrong
POOL = 1_000_003  # random numbers for drawn weights
ROUNDING = 1e-2  # it may be this much in a deep network with drawn weights: then float64 decides


# ------------------------------------------------------------------------------------------------ the copy


def copied(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy, without the graphs of tensors that its modules keep as attributes or in containers.

    Args:
        model: any module.
        instead: tensors by the identities of those in whose place they are to be in the copy.

    Raises:
        ValueError: when something in the model cannot be copied.
    """
    try:
        kept = {id(t): t.detach().clone() for _, t in kept_graphs(model)}
        return _uncompiled(deepcopy(model, {**kept, **(instead or {})}))
    except Exception as error:  # whatever a user's attribute raises
        raise ValueError(
            f"{type(model).__name__} cannot be copied, as is needed: a cut is tried on a copy first "
            f"({first_line(error)}). "
            "Remove what cannot be copied, or detach what it keeps of a forward pass."
        ) from error


def _uncompiled(copy: nn.Module) -> nn.Module:
    """A copy whose modules run themselves: what torch.compile put into them runs the original."""
    for module in copy.modules():
        if hasattr(module, "_orig_mod"):  # torch's own wrapper, which is made anew by a copy
            continue
        vars(module).pop("_compiled_call_impl", None)
        for name in [n for n, v in vars(module).items() if hasattr(v, "_torchdynamo_orig_callable")]:
            delattr(module, name)
    return copy


def kept_graphs(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors with a graph that modules keep, as attributes or in lists and dicts, and the names of these."""
    return [(name, t) for name, t in _attributes(model) if not t.is_leaf]


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep as attributes or in lists and dicts, and the names of these."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (Tensor, list, tuple, dict)) and attribute[:1] != "_":
                for t in tree_flatten(value)[0]:
                    if isinstance(t, Tensor):
                        yield f"{name}.{attribute}".lstrip("."), t


def synthetic(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy in full precision, all of it trained, with random weights; and the example to go with it.

    Weights are drawn anew, so that no zero or saturated one hides an error: from a pool, as many random
    numbers take longer than all else here. Its size is a prime, so that no two filters are alike. The example
    of a model in another precision is one for which forward's own casts are to full precision, too.
    """
    pool, start = torch.rand(POOL, generator=torch.Generator().manual_seed(0)), 0

    def draw(t: Tensor, low: float, high: float) -> None:
        """The pool goes on where the last tensor ended, and from its begin again: the same on any device."""
        nonlocal start
        in_place = t.device.type == "cpu" and t.is_contiguous()
        numbers = t.data if in_place else torch.empty(t.shape)
        flat, done = numbers.view(-1), 0
        while done < len(flat):
            part = flat[done : done + POOL - start]
            torch.mul(pool[start : start + len(part)], high - low, out=part).add_(low)
            done, start = done + len(part), (start + len(part)) % POOL
        if not in_place:
            t.data.copy_(numbers)

    new: dict[int, Tensor] = {}
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point():
            continue
        new[id(p)] = nn.Parameter(torch.empty_like(p, dtype=torch.float32))
        if p.dim() > 1:  # variance 2 / inputs
            bound = math.sqrt(6 * p.shape[0] / max(1, p.numel()))
            draw(new[id(p)], -bound, bound)
        else:
            draw(new[id(p)], *((0.5, 1.5) if name.endswith("weight") else (-0.2, 0.2)))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            new[id(buffer)] = torch.empty(buffer.shape, device=buffer.device)
            draw(new[id(buffer)], *((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    own = (*model.parameters(), *model.buffers(), *(t for _, t in _attributes(model)))
    others = [t for t in own if t.is_floating_point() and t.dtype != torch.float32]
    kept = {id(t): t.detach().float() for t in others if not isinstance(t, nn.Parameter)}
    drawn = copied(model, {**kept, **new}).float()
    for p in drawn.parameters():
        p.requires_grad_(p.is_floating_point())
    device = next(drawn.parameters()).device
    here = tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, example)
    return drawn, InOneDtype(here, torch.float32) if others else _floating(here, torch.float32)


# ------------------------------------------------------------------------------------------------ running it


def as_input(example: Any) -> Any:
    """An example input; numbers in [0, 1) of a shape, where that is what is given.

    >>> as_input([2, 3]).shape, as_input(torch.zeros(1, 4).shape).shape
    (torch.Size([2, 3]), torch.Size([1, 4]))

    Raises:
        ValueError: when a size in a shape is below 1.
    """
    if not _is_shape(example):
        return example
    sizes = [int(size) for size in example]
    if min(sizes) < 1:
        raise ValueError(
            f"example_input={sizes}: allowed are sizes from 1 on, the first of them that of the "
            "batch, such as [2, 3, 32, 32]."
        )
    return torch.rand(sizes, generator=torch.Generator().manual_seed(0))


def _is_shape(example: Any) -> bool:
    is_one = isinstance(example, Sequence) and len(example) > 0 and not isinstance(example, str)
    return is_one and all(isinstance(size, int) for size in example)


def input_of(model: nn.Module, example: Any) -> Any:
    """An example input on the model's device; of a shape, numbers in the precision of its weights.

    >>> input_of(nn.Linear(4, 2).half(), [3, 4]).dtype
    torch.float16
    """
    first = next(model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    here = _floating(as_input(example), dtype) if _is_shape(example) else example
    return tree_map(lambda t: t.to(first.device) if isinstance(t, Tensor) else t, here)


@contextmanager
def runs_itself(model: nn.Module) -> Generator[None, None, None]:
    """Inside, a model runs itself, not a copy in full precision; an error is one of the example input.

    Raises:
        ValueError: when it does not run.
    """
    try:
        yield
    except Exception as error:  # whatever a forward raises
        raise ValueError(
            f"example_input: {type(model).__name__} does not run on it ({first_line(error)}). Allowed is "
            "what its forward takes, in the precision of its weights. Give that, or a shape."
        ) from error


class Through(NamedTuple):
    """An example that another function than a model's forward takes, such as a batch for a training step.

    The branches of the model are those of training then: a detector has losses there only.
    """

    forward: Callable[[Any, Any], Any]  # (model, batch) -> what depends on the weights
    batch: Any


class InOneDtype(NamedTuple):
    """An example for a copy of another precision than its model's: where forward casts, it casts to that."""

    example: Any
    dtype: torch.dtype


def run(model: nn.Module, example: Any, training: bool = False) -> Any:
    """Run the model; in training its branches are those of training, its layers still those of evaluation."""
    if isinstance(example, InOneDtype):
        with _Casts(example.dtype):
            return run(model, _floating(example.example, example.dtype), training)
    training = training or isinstance(example, Through)
    for module in model.modules():
        module.training = training and any(True for _ in module.children())
    with _without_compilation(), _WithoutDropout() if training else nullcontext():
        if isinstance(example, Through):
            return example.forward(model, example.batch)
        if isinstance(example, dict):
            return model(**example)
        return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _without_compilation() -> AbstractContextManager[Any]:
    """What torch.compile has compiled hides its layers; where it was never imported, nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _WithoutDropout(TorchFunctionMode):
    """Functions that drop at random in training do not: what they drop depends on the number of channels."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "scaled_dot_product_attention":
            args, kwargs["dropout_p"] = (*args[:4], *args[5:6]), 0.0
            if len(args) > 4:
                args, kwargs["is_causal"] = args[:4], args[4]
        elif name == "multi_head_attention_forward":
            kwargs["training"] = False
        elif "dropout" in name and (args or "input" in kwargs):
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


class _Casts(TorchFunctionMode):
    """Whatever dtype of floats a function is asked for, it gives this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("half", "bfloat16", "float", "double"):
            func, args = Tensor.to, (args[0], self.dtype)
        out = func(*map(self._mine, args), **{key: self._mine(v) for key, v in (kwargs or {}).items()})
        is_new = isinstance(out, Tensor) and name != "__get__" and not name.endswith("_")
        return out.to(self.dtype) if is_new and out.is_floating_point() else out

    def _mine(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


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


def _outputs(model: nn.Module, example: Any, seed: int = 0) -> list[Tensor]:
    rng.seed(seed)  # the generators are put back by the caller
    found = tensors_in(run(model, example))
    return [(torch.view_as_real(t) if t.is_complex() else t).double() for t in found]


# -------------------------------------------------------------------------------------------------- the trial


@torch.no_grad()
def why_not(model: nn.Module, example: Any, couplings: Couplings) -> dict[str, str]:
    """Why channels cannot go, by name, for those that fail; the others can go together.

    A trial removes some of the units: the copy must run, in training and in evaluation, give outputs of the
    same shapes, and those of the network in which the same channels are zero. All are tried at once; where
    that fails, those that lie in the first layer that goes wrong are tried alone, and halves of all if it is
    none of them.

    Args:
        model: from `synthetic`; it is not changed.
        example: an input on its device.
        couplings: what is to be tried.
    """
    trials = _Trials(model, example)
    failed: dict[str, str] = {}
    while good := {name: coupling for name, coupling in couplings.items() if name not in failed}:
        reason, suspects = trials.fails(good)
        if not reason:
            break
        near = [name for name in good if any(site[0] in suspects for site in good[name].sites)]
        found: dict[str, str] = {}
        if len(good) > 1 and len(near) <= NEAR:
            alone = {name: trials.fails({name: good[name]})[0] for name in near}
            found = {name: why for name, why in alone.items() if why}
        failed |= found or _bisected(trials, good, reason)
    return failed


def _bisected(trials: "_Trials", couplings: Couplings, reason: str) -> dict[str, str]:
    """Why channels cannot go, of couplings that fail together for this reason."""
    if not reason or len(couplings) == 1:
        return dict.fromkeys(couplings, reason) if reason else {}
    items = list(couplings.items())
    halves = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
    failed: dict[str, str] = {}
    for half in halves:
        failed |= _bisected(trials, half, trials.fails(half)[0])
    return failed or dict.fromkeys(couplings, reason)  # each half works, not both together


class _Trials:
    """Trials on one copy, which is as it was after each of them."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.example = example
        self._buffers = [(b, b.clone()) for b in model.buffers()]
        self._attributes = [
            (vars(m), {name: _plain_copy(v) for name, v in vars(m).items() if name not in TORCHS})
            for m in model.modules()
        ]

    def _put_back(self) -> None:
        """What a forward pass may have left: caches, counters, masks of a shape."""
        for own, before in self._attributes:
            if len(own) > len(before) + len(TORCHS):
                for name in own.keys() - before.keys() - TORCHS:
                    del own[name]
            for name, value in before.items():
                if own[name] is not value:
                    own[name] = _plain_copy(value)
        for buffer, before in self._buffers:
            put_back(buffer, before)

    def fails(self, couplings: Couplings) -> tuple[str, set[str]]:
        """Why the network fails without some of the units, or nothing; and the module where it goes wrong."""
        try:
            return self._fails(couplings, cut_of(couplings, _some(couplings)))
        finally:
            self._put_back()

    def _fails(self, couplings: Couplings, removed: Cut) -> tuple[str, set[str]]:
        try:
            with within(ready := smaller(self.model, removed)):
                got = _outputs(self.model, self.example)
        except Exception as error:  # whatever a forward raises on tensors of another size
            return f"without some of them the model fails with {first_line(error)}", self._raised(error)
        self._put_back()
        try:
            with zeroed(self.model, removed):
                want = _outputs(self.model, self.example)
        except Exception as error:
            return f"where some of them are zero the model fails with {first_line(error)}", set()
        if [t.shape for t in got] != [t.shape for t in want]:
            return "without some of them the model's output has another shape", set()
        if not any(bool(t.any()) for t in want):
            return (
                "the model's outputs are all zero or empty on the example, so nothing can be compared",
                set(),
            )
        if not (far := _relative(want, got)) <= TOLERANCE:  # NaN, too
            suspects = self._differs(removed, ready)
            rounded = far < ROUNDING or not suspects  # which may decide what is selected after the last layer
            if rounded and next(self.model.parameters()).dtype != torch.float64:
                with suppress(Exception):
                    return _Trials(copied(self.model).double(), _exact(self.example)).fails(couplings)
            return self._why_different(removed, suspects, want), suspects
        return self._in_training(ready), set()

    def _why_different(self, removed: Cut, suspects: set[str], want: list[Tensor]) -> str:
        """Why the outputs are not those of the network in which channels are zero, if it can be told."""
        for module in map(self.model.get_submodule, suspects):
            if not is_maker(module):
                return f"{type(module).__name__} computes something else without some of them"
        if any(bool(t.isnan().any()) for t in want):
            return "the model's outputs hold NaN where some of them are zero, so nothing can be compared"
        with zeroed(self.model, removed):
            again = _outputs(self.model, self.example, seed=1)
        if not _relative(want, again) <= TOLERANCE:
            return "the model's outputs differ from one evaluation to the next, so nothing can be compared"
        return "a network without some of them is not that in which they are zero"

    @cached_property
    def _trains(self) -> bool:
        """Whether it runs in training mode; a model that wants targets there does not."""
        try:
            run(self.model, self.example, training=True)
        except Exception:
            return False
        return True

    def _in_training(self, ready: Prepared) -> str:
        try:
            with within(ready):
                run(self.model, self.example, training=True)
        except Exception as error:
            if self._trains:
                return f"in training mode the model fails without some of them: {first_line(error)}"
        return ""

    def _raised(self, error: Exception) -> set[str]:
        """The innermost module that was running, and what is in it."""
        names = {id(module): name for name, module in self.model.named_modules()}
        inner = ""
        for frame, _ in walk_tb(error.__traceback__):
            inner = names.get(id(frame.f_locals.get("self")), inner)
        return {name for name in names.values() if name == inner or name.startswith(f"{inner}.")}

    def _differs(self, removed: Cut, ready: Prepared) -> set[str]:
        """The first layer whose outputs are not those of the network in which channels are zero.

        A module with a weight for each channel, such as a normalization, is one of the layers.
        """
        scaling = {module for module, name, dim in removed if (name, dim) == ("weight", 0)}
        layers = {name: m for name, m in self.model.named_modules() if is_maker(m) or name in scaling}

        def outputs() -> list[tuple[str, Tensor]]:
            seen: list[tuple[str, Tensor]] = []
            hooks = [
                m.register_forward_hook(lambda m, a, y, name=name: seen.append((name, y)))
                for name, m in layers.items()
            ]
            try:
                run(self.model, self.example)
            finally:
                for hook in hooks:
                    hook.remove()
            return seen

        with within(ready):
            got = outputs()
        self._put_back()
        with zeroed(self.model, removed):
            want = outputs()
        for (name, small), (_, wide) in zip(got, want, strict=False):
            dims = [dim for dim, size in enumerate(wide.shape) if small.shape[dim : dim + 1] != (size,)]
            dim = dims[0] if dims else 0
            gone = removed.get((name, "weight", out_dimension(layers[name]))) if dims else None
            stays = torch.ones(wide.shape[dim], dtype=torch.bool)
            if gone is not None:
                stays[gone] = False
            rest = wide.index_select(dim, stays.nonzero().flatten().to(wide.device))
            if rest.shape != small.shape or not torch.allclose(rest, small, rtol=1e-3, atol=1e-4):
                return {name}
        return set()


def _plain_copy(value: Any) -> Any:
    return copy(value) if isinstance(value, (dict, list, set)) else value


def _some(couplings: Couplings) -> Masks:
    """Which units are alive in a trial: some of each coupling, and of each tensor that they lie in.

    The first and the last go: one of these that a forward singles out, as by `x[:, :1]`, shows only then.
    """
    generator = torch.Generator().manual_seed(0)
    alive: Masks = {}
    for name, coupling in couplings.items():
        order = torch.rand(coupling.units, generator=generator)
        order[-1], order[0] = 2.0, 3.0
        mask = torch.ones(coupling.units, dtype=torch.bool)
        mask[order.topk(_part(name, coupling.units)).indices] = False
        for part in coupling.parts:
            mask[part[:1]] |= not mask[part].any()
        alive[name] = mask
    return alive


def _part(name: str, units: int) -> int:
    """A third, a half or two thirds: equal parts everywhere would hide what is taken for something else."""
    return max(min(1, units - 1), units * (2 + crc32(name.encode()) % 3) // 6)


def _floating(example: Any, dtype: torch.dtype) -> Any:
    of = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return tree_map(of, example)


def _exact(example: Any) -> InOneDtype:
    return InOneDtype(example.example if isinstance(example, InOneDtype) else example, torch.float64)


def _relative(want: list[Tensor], got: list[Tensor]) -> float:
    scale = max(float(t.abs().max()) for t in want if t.numel())
    return max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel()) / scale
