"""Copies: values copied out so that nothing can change them, and put back into the objects they came from."""

import random
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.shards import is_sharded, like, local, placed, whole


def copied(value: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples that shares no storage; tensors go to the CPU.

    A sharded tensor stays so: each process copies its part.
    """
    if is_sharded(value):
        return placed(local(value).to("cpu", copy=True), value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    return deepcopy(value)


def gathered(value: Any, keep: Callable[[Tensor], Any]) -> Any:
    """The same with whole tensors, for one file; all processes must call it for shards.

    One process after the other would keep everything: only process 0 keeps what was sharded, and the others
    have empty tensors in its place. One tensor after the other is whole.

    Args:
        value: nested dicts, lists and tuples.
        keep: what process 0 keeps of a tensor that was sharded.
    """
    if is_sharded(value):
        tensor = whole(value)
        return keep(tensor) if torch.distributed.get_rank() == 0 else torch.empty(0, dtype=tensor.dtype)
    if type(value) in (list, tuple):
        return type(value)(gathered(v, keep) for v in value)
    if type(value) is dict:
        return {k: gathered(v, keep) for k, v in value.items()}
    return value


@torch.no_grad()
def put_back(tensor: Tensor, content: Tensor) -> None:
    """Write a copy of a tensor into it again, in place: expanded and sparse tensors, too.

    >>> buffer = torch.zeros(1).expand(3)
    >>> put_back(buffer, torch.ones(3))
    >>> buffer, buffer.stride()
    (tensor([1., 1., 1.]), (0,))
    """
    if is_sharded(tensor):
        tensor, content = local(tensor), local(like(content, tensor))
    if tensor.layout == torch.strided:
        if not tensor.is_nested and 0 in tensor.stride():  # elements of one memory are written once
            once = tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())
            tensor, content = tensor[once], content[once]
    elif tensor.layout != torch.sparse_coo:
        tensor.resize_as_sparse_(content)
    tensor.copy_(content)


def remember(*values: Any) -> Callable[[], None]:
    """Remember what these hold, however deeply nested, and return the function that puts it back.

    Put back, into the same objects: the items of dicts, lists, sets and deques, the elements of tensors and
    NumPy arrays, the states of random number generators. Of parameters, and of other tensors that gradients
    are added to, also `grad` and `requires_grad`: their gradients are None from now on until they are put
    back. The elements of parameters, and what other objects hold, are left alone.

    >>> cache = {"seen": [1, 2]}
    >>> undo = remember(cache)
    >>> cache["seen"].append(3); cache["new"] = 0
    >>> undo(); cache
    {'seen': [1, 2]}
    """
    undo: list[Callable[[], object]] = []
    known: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            undo += _of_tensor(value)
        elif isinstance(value, (dict, list, set, tuple, deque)):
            waiting += value.values() if isinstance(value, dict) else value
            undo += _of_container(value)
        else:
            undo += _of_others(value)

    def put_all_back() -> None:
        for work in undo:
            work()

    return put_all_back


def _of_tensor(tensor: Tensor) -> list[Callable[[], object]]:
    undo: list[Callable[[], object]] = []
    if tensor.is_leaf and not tensor.is_inference():
        grad, requires_grad = tensor.grad, tensor.requires_grad
        tensor.grad = None

        def put_grad_back() -> None:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

        undo.append(put_grad_back)
    if isinstance(tensor, nn.Parameter) or is_lazy(tensor):
        return undo
    content = tensor.detach().clone()

    def put_content_back() -> None:
        with torch.inference_mode(tensor.is_inference()):
            # .data, so that a graph that saved the tensor does not take it for another one
            put_back(tensor.data if tensor.layout == torch.strided else tensor, content)

    return [put_content_back, *undo]


def _of_container(value: Any) -> list[Callable[[], object]]:
    if isinstance(value, tuple):
        return []
    content, items = list(value), list(value.items()) if isinstance(value, dict) else None

    def put_items_back() -> None:
        now, then = list(value), content
        if items is not None:
            now, then = [*now, *value.values()], [*content, *(item for _, item in items)]
        if len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True)):
            return
        value.clear()
        fill: Callable[[Any], None] = value.update if isinstance(value, (dict, set)) else value.extend
        fill(content if items is None else items)

    return [put_items_back]


def _of_others(value: Any) -> list[Callable[[], object]]:
    if isinstance(value, np.ndarray) and value.flags.writeable:
        array: np.ndarray[Any, Any] = value.copy()
        return [lambda: np.copyto(value, array)]
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return [lambda: value.set_state(state)]
    if isinstance(value, random.Random):
        python = value.getstate()
        return [lambda: value.setstate(python)]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        numpy = deepcopy(bits.state)
        return [lambda: setattr(bits, "state", numpy)]
    return []
