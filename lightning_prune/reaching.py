"""In which order data reach the layers of a network, and what reaches each, without running all of it again.

`in_order` walks through a network while somebody changes the weights of each layer on the way, so that each
layer is seen with what the changed ones before it give. Where modules of a list are called one after the
other, the blocks of a transformer say, only the inputs of the block in hand are held, and no more than that
block runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.evidence import Forward

Run = Callable[[Any], Any]  # what runs a module on one of the calls that are held


@dataclass(frozen=True)
class Reached:
    """Layers that the same input reaches, and how to see it: `forward(model, batch)` for each of `batches`.

    `forward` ends as soon as it has called these layers, and then returns None.
    """

    names: list[str]
    batches: list[Any]
    forward: Forward


def in_order(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], forward: Forward
) -> Iterator[Reached]:
    """The layers of these weights, in the order in which data reach them, those of one input together.

    Whoever iterates may change the weights of what it is given: what comes next sees it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> for reached in in_order(model, ["0.weight", "1.weight"], [torch.ones(1, 2)], lambda m, x: m(x)):
    ...     print(reached.names)
    ['0.weight']
    ['1.weight']

    Args:
        model: any module; it runs in the mode it is in.
        names: of parameters of it.
        batches: as `forward` takes them; at least one.
        forward: (model, batch) -> anything: runs the model.

    Raises:
        ValueError: before anything is given, when no batch reaches one of the layers.
    """
    parameters = dict(model.named_parameters())
    known = {id(parameters[name]): name for name in names}
    owners: Owners = {}
    for module in model.modules():
        if mine := [known[id(p)] for p in module.parameters(recurse=False) if id(p) in known]:
            owners[module] = mine
    yield from _walk(model, owners, list(batches), torch.no_grad()(lambda batch: forward(model, batch)))


Owners = dict[nn.Module, list[str]]  # layers, and the names of their weights


class _Enough(BaseException):
    """Ends a forward pass, through whatever handlers for exceptions a model has."""


def _walk(root: nn.Module, owners: Owners, calls: list[Any], run: Run) -> Iterator[Reached]:
    """The same within a module that is run on the calls that are held."""
    mine = {module: owners[module] for module in root.modules() if module in owners}
    if not mine:
        return
    chains = _Chains.of(root, mine)
    trace = _traced([*mine, *chains.links], mine, calls, run)
    if missed := [name for module, owned in mine.items() if module not in trace.first for name in owned]:
        raise ValueError(
            f"layer_by_layer=True: no data reach the layers of {', '.join(sorted(missed))}. Allowed are "
            "layers that are called with data. Exclude these, or give data that reach them. Nothing was "
            "pruned."
        )
    done: set[nn.Module] = set()
    for layer in trace.first:
        if layer in done or layer not in mine:
            continue
        if blocks := chains.around(layer):
            if held := _held(blocks, trace, calls, run):
                done.update(module for block in blocks for module in block.modules())
                yield from _along(blocks, held, owners)
                continue
            chains.lists.remove(blocks)  # they are seen where they are
        group = [m for m in trace.together(layer) if m not in done and not chains.around(m)]
        done.update(group)
        names = list(dict.fromkeys(name for module in group for name in mine[module]))
        once = all(trace.counts[module] == 1 for module in group)
        yield Reached(names, calls, _until(group if once else [], run))


def _until(layers: Sequence[nn.Module], run: Run) -> Forward:
    """Runs a call, and ends when all of these layers were called."""

    def forward(_: nn.Module, call: Any) -> Any:
        left = set(layers)

        def reached(module: nn.Module, *_: Any) -> None:
            left.discard(module)
            if not left:
                raise _Enough

        # put on last, so that the hooks of whoever looks at the layers have run
        handles = [layer.register_forward_hook(reached) for layer in layers]
        try:
            return run(call)
        except _Enough:
            return None
        finally:
            for handle in handles:
                handle.remove()

    return forward


# --------------------------------------------------------------------------------------------- what is called


@dataclass
class _Trace:
    """In which order modules are called for the first time, how often, and which share an input."""

    first: dict[nn.Module, int] = field(default_factory=dict[nn.Module, int])  # -> number of its input
    counts: dict[nn.Module, int] = field(default_factory=dict[nn.Module, int])

    def together(self, layer: nn.Module) -> list[nn.Module]:
        return [module for module, shared in self.first.items() if shared == self.first[layer]]


def _traced(modules: Sequence[nn.Module], layers: Owners, calls: Sequence[Any], run: Run) -> _Trace:
    """Run calls until every layer was called, and look when the modules are."""
    trace = _Trace()
    last: list[Any] = [None]  # the input of the layer called last: layers of one input follow on each other
    number = 0

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal number
        trace.counts[module] = trace.counts.get(module, 0) + 1
        if module in layers:
            if not args or args[0] is not last[0]:
                number += 1
            last[0] = args[0] if args else None
        trace.first.setdefault(module, number if module in layers else -1)

    handles = [module.register_forward_pre_hook(see) for module in dict.fromkeys(modules)]
    try:
        for call in calls:
            counts, trace.counts = trace.counts, {}
            run(call)
            trace.counts = {m: max(counts.get(m, 0), trace.counts.get(m, 0)) for m in trace.first}
            if all(layer in trace.first for layer in layers):
                break
    finally:
        for handle in handles:
            handle.remove()
    return trace


@dataclass(frozen=True)
class _Chains:
    """The lists of modules in a module that may be called one after the other."""

    lists: list[list[nn.Module]]

    @classmethod
    def of(cls, root: nn.Module, layers: Owners) -> "_Chains":
        lists: list[list[nn.Module]] = []
        inside: set[nn.Module] = set()
        for module in root.modules():  # outer ones come first; what is in them is looked at when they run
            blocks = list(module.children())
            if module in inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
                continue
            if sum(any(m in layers for m in block.modules()) for block in blocks) > 1:
                lists.append(blocks)
                inside.update(m for block in blocks for m in block.modules())
        return cls(lists)

    @property
    def links(self) -> list[nn.Module]:
        return [block for blocks in self.lists for block in blocks]

    def around(self, layer: nn.Module) -> list[nn.Module]:
        """The list of blocks of which one holds a layer, or none."""
        for blocks in self.lists:
            if any(layer is module for block in blocks for module in block.modules()):
                return blocks
        return []


# ---------------------------------------------------------------------------- blocks one after the other


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Output(NamedTuple):
    """Stands, in the arguments of a block, for a tensor that the block before it gives: the n-th of these."""

    n: int


def _held(blocks: Sequence[nn.Module], trace: _Trace, calls: Sequence[Any], run: Run) -> list[list[_Call]]:
    """What each block is called with in each call; nothing, where blocks are not called one after another."""
    called = [module for module in trace.first if module in blocks]
    if called != blocks or any(trace.counts[block] != 1 for block in blocks):
        return []
    try:
        if not _is_chain(blocks, calls[0], run):
            return []
        return [_captured(blocks, call, run) for call in calls]
    except _NoChainError:
        return []


def _is_chain(blocks: Sequence[nn.Module], call: Any, run: Run) -> bool:
    """Whether blocks called on their own, one after the other, give what they do where they are.

    Tried on one call, with the output of the first block changed: what is handed on from block to block then
    changes, and what is not must not.
    """
    arguments = _captured(blocks, call, run)
    changed = blocks[0].register_forward_hook(lambda module, args, output: _mapped(output, _change))
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(_mapped(output, Tensor.clone))
        raise _Enough

    handle = blocks[-1].register_forward_hook(look)
    try:
        try:
            run(call)
        except _Enough:
            handle.remove()
        output = _run(blocks[0], arguments[0])
        for block, given in zip(blocks[1:], arguments[1:], strict=True):
            output = _run(block, _following(given, output))
    finally:
        changed.remove()
        handle.remove()
    pairs = zip(_tensors(seen[0]), _tensors(output), strict=False)
    same = [a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in pairs]
    return bool(same) and all(same)


def _change(tensor: Tensor) -> Tensor:
    return tensor * 1.25 + 0.125 if tensor.is_floating_point() else tensor


def _along(blocks: Sequence[nn.Module], held: list[list[_Call]], owners: Owners) -> Iterator[Reached]:
    """Block after block, each on the inputs that the ones before it gave."""
    inputs = [arguments.pop(0) for arguments in held]
    for block in blocks:
        yield from _walk(block, owners, inputs, lambda call, block=block: _run(block, call))
        for i, arguments in enumerate(held):
            if arguments:
                inputs[i] = _following(arguments.pop(0), _run(block, inputs[i]))


class _NoChainError(Exception):
    """A block does not get what the one before it gives."""


def _captured(blocks: Sequence[nn.Module], call: Any, run: Run) -> list[_Call]:
    """What each block is called with, with an `_Output` for what the one before it gives."""
    arguments: list[_Call] = []
    given: list[Tensor] = []  # by the block before
    once: dict[int, Any] = {}  # copies of objects that blocks may change: as the first of them got them

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        placed = {id(tensor): _Output(n) for n, tensor in enumerate(given)}
        keep = lambda value: placed.get(id(value), value)  # noqa: E731
        kept = _mapped((args, kwargs), keep, lambda value: _copy(value, once))
        if arguments and not any(isinstance(leaf, _Output) for leaf in _leaves(kept)):
            raise _NoChainError
        # the first block's own input may be changed in place by what comes after
        arguments.append(_Call(*(kept if arguments else _mapped(kept, Tensor.clone))))
        if len(arguments) == len(blocks):
            raise _Enough

    def after(module: nn.Module, args: Any, output: Any) -> None:
        given[:] = _tensors(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        run(call)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(arguments) < len(blocks):
        raise _NoChainError
    return arguments


@torch.no_grad()
def _run(block: nn.Module, call: _Call) -> Any:
    """A block on copies of what is held: it may change its arguments in place."""
    tensors: dict[int, Tensor] = {}
    objects: dict[int, Any] = {}
    args, kwargs = _mapped(
        tuple(call),
        lambda tensor: tensors.setdefault(id(tensor), tensor.clone()),
        lambda value: _copy(value, objects),
    )
    return block(*args, **kwargs)


def _following(arguments: _Call, output: Any) -> _Call:
    """A block's arguments, with what the block before it gave."""
    given = _tensors(output)
    fill = lambda value: given[value.n] if isinstance(value, _Output) else value  # noqa: E731
    return _Call(*_mapped(tuple(arguments), lambda tensor: tensor, fill))


_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None), _Output)


def _copy(value: Any, once: dict[int, Any]) -> Any:
    """A copy of an object that is no tensor, a cache of keys and values say; the same one each time."""
    if isinstance(value, _PLAIN) or callable(value):
        return value
    if id(value) not in once:
        try:
            once[id(value)] = deepcopy(value)
        except (TypeError, RuntimeError) as error:
            raise _NoChainError from error
    return once[id(value)]


def _mapped(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any] | None = None) -> Any:
    """Nested tuples, lists and dicts, with what is in them mapped."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, _Output) or type(value) not in (tuple, list, dict):
        return other(value) if other else value
    if isinstance(value, Mapping):
        return {key: _mapped(inner, tensor, other) for key, inner in value.items()}
    return type(value)(_mapped(inner, tensor, other) for inner in value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(value, found.append, found.append)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]
