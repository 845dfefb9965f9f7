"""Evidence: what criteria, allocations and schedules may ask for, and how to gather it without a trace.

A function gets, by keyword, those of the names in `EVIDENCE` that its signature has. What has a default there
is optional.
"""

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune import rng
from lightning_prune.checks import named
from lightning_prune.copies import remember
from lightning_prune.shards import is_sharded, like, settle

EVIDENCE = {
    "params": "The weights are always there.",
    "masks": "Masks are always there.",
    "scores": "Only schedules and allocations get scores.",
    "sparsity": "A schedule that reads the scores says how far only after them.",
    "initial": "A callback keeps it from the first batch of its first fit on; `prune` takes it as initial=.",
    "model": "`next_masks` takes it as model=.",
    "batches": "`prune` takes them as data=.",
    "loss": "`prune` takes it as loss=, with pairs (input, target) as data=.",
    "forward": "`prune` takes batches as data=.",
    "grads": "They need batches and a loss: `prune` takes them as data= and loss=.",
    "momentum": "DynamicSparseTraining reads it off an optimizer that keeps it: SGD with momentum, Adam.",
    "generator": "`next_masks` takes it as generator=.",
    "layout": "Only granularities get the layout of a weight.",
    "layouts": "`next_masks` takes them as layouts=, or reads them off model=.",
    "channels": "It scores coupled channels: StructuredChannelPruning has them.",
    "final": "The state in which a round ended: only policies of LotteryTicketRewind get it.",
    "faster": "Only StructuredChannelPruning and prune_channels measure how fast a network is.",
    "stored": "Only StructuredChannelPruning and prune_channels know how many bytes a network takes.",
    "removed": "Only StructuredChannelPruning knows what a sparsity removes.",
    "together": "Ranks that hold parts of the tensors give it to allocations.",
}

# What runs the model, or reads the training data.
OF_A_RUN = frozenset({"model", "batches", "loss", "forward", "grads"})

# What is made of an argument of `prune` and `prune_channels`.
USES = {
    "data": frozenset({"batches", "loss", "forward", "grads"}),
    "loss": frozenset({"loss", "grads"}),
    "initial": frozenset({"initial"}),
}

Loss = Callable[[nn.Module, Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


def asked(function: Callable[..., Any], given: int = 1) -> dict[str, bool]:
    """The evidence that a function's signature names after the `given` first arguments: name -> must it be?

    >>> asked(lambda params, grads, model=None: params)
    {'grads': True, 'model': False}
    """
    rest = list(parameters_of(function).values())[given:]
    return {p.name: p.default is p.empty for p in rest if p.name in EVIDENCE}


def runs_model(criterion: Callable[..., Any]) -> bool:
    """Whether a criterion asks for what runs the model, or reads the training data.

    >>> runs_model(lambda params, batches: params), runs_model(lambda params: params)
    (True, False)
    """
    return not OF_A_RUN.isdisjoint(asked(criterion))


def without_use(
    functions: Mapping[str, tuple[Callable[..., Any], int]], given: Mapping[str, object]
) -> Iterator[str]:
    """A sentence for each argument that was given, and that none of the functions asks for.

    >>> list(without_use({"criterion": (lambda params: params, 1)}, {"data": [1], "loss": None}))
    ['data has no effect: criterion=<lambda> does not ask for it. Leave it out.']

    Args:
        functions: name of an argument -> its function, and how many arguments that has before evidence.
        given: `data`, `loss` and `initial`, or some of these; None is not given.
    """
    wanted = {name for function, first in functions.values() for name in asked(function, first)}
    who = [f"{argument}={named(function)}" for argument, (function, _) in functions.items()]
    for argument, value in given.items():
        if value is not None and USES[argument].isdisjoint(wanted):
            does = "does not ask" if len(who) == 1 else "do not ask"
            yield f"{argument} has no effect: {' and '.join(who)} {does} for it. Leave it out."


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters in a function's signature; none where there is no signature to read.

    >>> parameters_of({}.__getitem__)
    {}
    """
    try:
        return inspect.signature(function).parameters
    except ValueError:  # as of some builtins
        return {}


def check_asked(name: str, function: Callable[..., Any], given: int) -> None:
    """Refuse a function that must have something besides the `given` first arguments which nobody has.

    Raises:
        ValueError: then.
    """
    parameters = list(parameters_of(function).values())
    rest = [p for p in parameters[given:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unknown := [p.name for p in rest if p.default is p.empty and p.name not in EVIDENCE]:
        raise ValueError(
            f"{name} asks for `{'`, `'.join(unknown)}`, which nobody has; allowed are {', '.join(EVIDENCE)}. "
            "Name those, or give the others a default."
        )


def call(function: Callable[..., Any], *args: Any, **evidence: Any) -> Any:
    """Call a function with what it asks for.

    Raises:
        ValueError: when it must have something that is not there.
    """
    who, wanted = named(function), asked(function, len(args))
    check_asked(who, function, len(args))
    for name, needed in wanted.items():
        if needed and evidence.get(name) is None:
            raise ValueError(
                f"{who} asks for `{name}`, and there is none here. {EVIDENCE[name]} Give it, or use another."
            )
    return function(*args, **{name: evidence[name] for name in wanted if evidence.get(name) is not None})


def inputs(batch: Any) -> Any:
    """The input in a batch: the first of several things, or the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model with the input in a batch; with keyword arguments, where the batch is a mapping."""
    return model(**batch) if isinstance(batch, Mapping) else model(inputs(batch))


@contextmanager
def differentiable(
    model: nn.Module, names: Mapping[str, Any]
) -> Generator[dict[str, nn.Parameter], None, None]:
    """The live parameters of these names, frozen ones too, ready to be differentiated by."""
    parameters = settle(model)
    live = {name: parameters[name] for name in names}
    frozen = [p for p in live.values() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield live
    finally:
        for p in frozen:
            p.requires_grad_(False)


def gradients(params: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Any) -> dict[str, Tensor]:
    """The gradient of the loss on one batch by the weights of these names; `.grad` is left alone.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> gradients({"weight": model.weight}, model, lambda m, x: m(x).sum(), torch.tensor([[1.0, 3.0]]))
    {'weight': tensor([[1., 3.]])}
    """
    if any(map(is_sharded, settle(model).values())):
        return _gradients_of_shards(params, model, loss, batch)
    with differentiable(model, params) as live:
        value = _scalar(loss(model, batch))
        found = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
    return dict(zip(live, found, strict=True))


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"loss: it gave {value!r}; a scalar tensor that depends on the weights is needed. Return it "
            "before `.item()` or `.detach()`."
        )
    return value


def _gradients_of_shards(
    params: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Any
) -> dict[str, Tensor]:
    """The same of sharded weights; all processes must call it, each with its batch.

    By a backward pass, as FSDP2 computes with copies of the weights; it leaves in `.grad` the mean over the
    processes that have other data.
    """
    live = settle(model)
    if frozen := [name for name in params if not live[name].requires_grad]:
        raise ValueError(
            f"requires_grad=False: {', '.join(frozen)} frozen, and where weights are sharded over processes "
            "only those that are trained have gradients; allowed are these. Exclude the others."
        )
    before = [(p, p.grad) for p in live.values()]
    try:
        for p, _ in before:
            p.grad = None
        with torch.enable_grad():
            _scalar(loss(model, batch)).backward()
        settle(model)
        grads = {name: live[name].grad for name in params}
        return {
            name: torch.zeros_like(live[name]) if g is None else like(g.detach(), live[name])
            for name, g in grads.items()
        }
    finally:
        settle(model)
        for p, g in before:
            p.grad = g


def mean_gradients(
    params: Mapping[str, Any], model: nn.Module, loss: Loss, batches: list[Any]
) -> dict[str, Tensor]:
    """The mean over the batches of the gradient of the loss."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        for name, g in gradients(params, model, loss, batch).items():
            total[name] = total[name] + g if name in total else g
    if not total:
        raise ValueError(
            "batches: there are none; at least one is needed for gradients. Give data that is not empty."
        )
    return {name: g / len(batches) for name, g in total.items()}


@contextmanager
def undisturbed(model: nn.Module, seed: int | None = None) -> Generator[None, None, None]:
    """Run a model in any way inside; afterwards it and the random number generators are as they were.

    Put back: buffers, train/eval mode, gradients, `requires_grad`, submodules, hooks, the global generators,
    and what modules keep as attributes: numbers, tensors of any kind, arrays, generators, and what is in
    lists, dicts and sets, however deeply nested. What is new is removed. The elements of parameters, and
    what objects of other classes hold, are not put back. Of FSDP2 a model shows its shards, before and
    afterwards.

    >>> model = nn.BatchNorm1d(2)
    >>> with undisturbed(model):
    ...     _ = model(torch.rand(8, 2)).sum().backward()
    >>> model.running_mean, model.weight.grad
    (tensor([0., 0.]), None)

    Args:
        model: any module.
        seed: seeds the global generators for the time inside.
    """
    generators = rng.capture()
    settle(model)  # or what was gathered would be put back, without the memory that it has now
    put_back = remember(*(vars(module) for module in model.modules() if not _is_lazy(module)))
    try:
        if seed is not None:
            rng.seed(seed)
        yield
    finally:
        try:
            settle(model)
            put_back()
        finally:
            rng.restore(generators)


def _is_lazy(module: nn.Module) -> bool:
    """Whether a first call makes another module of it, which cannot be undone."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(is_lazy(tensor) for tensor in own)
