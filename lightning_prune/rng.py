"""The state of the random number generators that training draws from, in plain containers."""

import collections.abc
import random
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def capture(generators: Mapping[str, Generator] = {}) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of others by name, in plain containers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "others": {name: state_of(generator) for name, generator in generators.items()},
    }


def restore(state: dict[str, Any], generators: Mapping[str, Generator] = {}) -> None:
    """Set the generators to the states that `capture` returned; of the others those whose names it knows.

    >>> state = capture(); first = torch.rand(1); restore(state); bool(torch.rand(1) == first)
    True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    for name in generators.keys() & state["others"].keys():
        set_state(generators[name], state["others"][name])


def seed(number: int) -> None:
    """Seed Python's, NumPy's and torch's generators.

    >>> seed(1); first = torch.rand(1); seed(1); bool(torch.rand(1) == first)
    True
    """
    random.seed(number)
    np.random.seed(number % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # without a device the same would note the call for later, with a traceback: slow
        torch.default_generator.manual_seed(number)


@contextmanager
def kept() -> collections.abc.Generator[None, None, None]:
    """Whatever is drawn inside, the generators are afterwards as they were before.

    >>> with kept(): first = torch.rand(1)
    >>> bool(torch.rand(1) == first)
    True
    """
    state = capture()
    try:
        yield
    finally:
        restore(state)


def state_of(generator: Generator) -> Any:
    """The state of one generator, in plain containers.

    >>> generator = np.random.default_rng(0); state = state_of(generator); first = generator.random()
    >>> set_state(generator, state); bool(generator.random() == first)
    True
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, list(internal), gauss]
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def set_state(generator: Generator, state: Any) -> None:
    """Set one generator to the state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _plain(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state
