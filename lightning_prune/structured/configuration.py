"""Configuration: what a model of transformers says of its sizes in one number for all of its layers.

`save_pretrained` writes that configuration, and `from_pretrained` builds the model from it. A cut model loads
where its configuration describes it: all layers lose as many heads and as many channels within their
feed-forward networks, and the configuration has a size of heads of its own.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn

from lightning_prune import rng

# What configurations call their numbers of heads, and the channels within their feed-forward networks.
HEADS = ("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads")
INNER = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
MOST = 16  # configurations that are tried for one model

Shapes = dict[str, tuple[int, ...]]


def follow(model: nn.Module) -> None:
    """Give the models of transformers in a network a configuration of the sizes that they have now.

    The configuration is a copy, since others may have been built from the one before. It stays as it is where
    none describes the network, as one number cannot say that layers differ.

    Args:
        model: any module; most have no configuration.
    """
    for outermost in _described(model):
        config = outermost.config
        if not (numbers := _numbers(outermost, config)):
            continue
        # some parts have a copy of it; a configuration of another class is of something else
        own = [module for module in outermost.modules() if type(vars(module).get("config")) is type(config)]
        new = {id(module.config): _with(module.config, numbers) for module in own}
        for module in own:
            module.config = new[id(module.config)]


def _described(model: nn.Module) -> Iterator[Any]:
    """The outermost modules of transformers' own classes: to build one of another class may do anything."""
    if type(model).__module__.startswith("transformers.models.") and hasattr(type(model), "config_class"):
        yield model
        return
    for child in model.children():
        yield from _described(child)


def _numbers(model: nn.Module, config: Any) -> dict[str, int]:
    """The numbers with which the configuration builds a model of these shapes; none where there are none."""
    own, full = _shapes(model), _built(model, config)
    if full == own or full.keys() != own.keys():
        return {}
    pairs = {pair for name in own for pair in zip(full[name], own[name], strict=False)}
    fewer = {(before, now) for before, now in pairs if before != now}
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    of_each = _number(config, "head_dim") or hidden // max(1, heads)
    options: dict[str, list[int]] = {}
    for name in (*HEADS, *INNER):
        value, wide = getattr(config, name, 0), of_each if name in HEADS else 1
        if value is None or type(value) is int:  # None: a multiple of another number
            found = sorted({now // wide for before, now in fewer if value is None or before == value * wide})
            options |= {name: [*([] if value is None else [value]), *found]} if found else {}
    if prod(map(len, options.values())) > MOST:
        return {}
    for values in product(*options.values()):
        numbers = dict(zip(options, values, strict=True))
        if not numbers.keys().isdisjoint(HEADS):
            numbers["head_dim"] = of_each  # else it would follow from the number of heads
        if _built(model, _with(config, numbers)) == own:
            return numbers
    return {}


def _number(config: Any, name: str) -> int:
    """A number that holds for all layers, or 0: some configurations have a list."""
    value = getattr(config, name, 0)
    return value if type(value) is int else 0


def _with(config: Any, numbers: dict[str, int]) -> Any:
    """A copy of a configuration with other numbers."""
    new = deepcopy(config)
    for name, value in numbers.items():
        setattr(new, name, value)
    return new


def _shapes(model: nn.Module) -> Shapes:
    return {
        name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items() if hasattr(t, "shape")
    }


def _built(model: nn.Module, config: Any) -> Shapes:
    """The shapes of the model that a configuration builds, when it is read from a file; none if none is."""
    try:
        with rng.kept(), torch.device("meta"):
            return _shapes(type(model)(type(config).from_dict(config.to_dict())))
    except Exception:  # whatever a model or a configuration says to numbers that it was not written for
        return {}
