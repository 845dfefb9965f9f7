"""The state of the random number generators that training draws from, in plain containers."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def capture(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of others, in plain containers."""
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
        "others": [generator.get_state() for generator in generators],
    }


def restore(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Set the generators to the states that `capture` returned; as many of the others as there are states.

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
    for generator, its in zip(generators, state["others"], strict=False):
        generator.set_state(its.cpu())
