"""A model on an example: how it is called, what reaches its layers, and where that was measured."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.deploy.timing import hardware
from lightning_prune.shards import local, sum_of

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]  # what a model is called with


def call(model: nn.Module, example: Example) -> Any:
    """Call a model: with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def calls(model: nn.Module, modules: Mapping[str, nn.Module], example: Example) -> dict[str, partial[Any]]:
    """The first call of each of the modules that is called when the model is."""
    found: dict[str, partial[Any]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(name, partial(module, *args, **kwargs))

    hooks = [
        m.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in modules if name in found}


def where(model: nn.Module, example: Example) -> str:
    """Batch, threads, dtype and hardware of a measurement."""
    given = example.values() if isinstance(example, Mapping) else example
    given = given if not isinstance(given, Tensor) else (given,)
    batch = next((len(x) for x in given if isinstance(x, Tensor) and x.dim()), 1)
    weight = next(model.parameters(), torch.empty(0))
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"batch {batch}, {torch.get_num_threads()} threads, {dtype}, {hardware(weight.device)}"


def density(weight: Tensor) -> float:
    """The fraction of a weight that is not 0."""
    return sum_of(int(local(weight).count_nonzero()), weight) / max(1, weight.numel())


def refuse_training(model: nn.Module, function: str) -> None:
    """Refuse a model that is not in evaluation mode.

    Raises:
        ValueError: then, with the name of the module and of the function.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{function}: {name or type(model).__name__} is in training mode; "
                "allowed are models in evaluation mode: call model.eval() first."
            )
