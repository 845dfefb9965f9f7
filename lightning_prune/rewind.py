"""Rewinding: from where to go on.

A snapshot of a training copies in and copies out, so nothing can change it.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim


def copied(value: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples that shares no storage; tensors go to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    return deepcopy(value)


@dataclass(frozen=True)
class Snapshot:
    """Everything that training changes: parameters, all buffers, optimizers and learning rate schedulers.

    >>> model = nn.BatchNorm1d(2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> before = Snapshot.take(model, [optimizer])
    >>> _ = model(torch.randn(8, 2)).sum().backward(), optimizer.step()
    >>> before.restore(model, [optimizer])
    >>> model.running_mean, optimizer.state_dict()["state"]
    (tensor([0., 0.]), {})
    """

    tensors: dict[str, Tensor]  # parameters and buffers, non-persistent ones too
    extra: dict[str, Any]  # what modules with get_extra_state keep beside their tensors
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]

    @classmethod
    def take(
        cls, model: nn.Module, optimizers: Iterable[optim.Optimizer] = (), schedulers: Iterable[Any] = ()
    ) -> "Snapshot":
        """Copy the present state."""
        return cls(
            tensors=copied(_tensors(model)),
            extra=copied({name: m.get_extra_state() for name, m in _with_extra_state(model).items()}),
            optimizers=[copied(o.state_dict()) for o in optimizers],
            schedulers=[copied(s.state_dict()) for s in schedulers],
        )

    @torch.no_grad()
    def restore(
        self, model: nn.Module, optimizers: Sequence[optim.Optimizer] = (), schedulers: Sequence[Any] = ()
    ) -> None:
        """Put the state back, bit for bit, into the same parameters, optimizers and schedulers.

        Raises:
            ValueError: when the model, or the number of optimizers or schedulers, is not that of the
                snapshot.
        """
        now = _tensors(model)
        for what, there, here in (
            ("tensors", _shapes(self.tensors), _shapes(now)),
            ("optimizers", len(self.optimizers), len(optimizers)),
            ("schedulers", len(self.schedulers), len(schedulers)),
        ):
            if there != here:
                raise ValueError(
                    f"{what}: {_difference(there, here)} Allowed is the training that the snapshot was "
                    "taken of. Take another snapshot."
                )
        for name, tensor in now.items():
            tensor.copy_(self.tensors[name])
        for name, module in _with_extra_state(model).items():
            module.set_extra_state(copied(self.extra[name]))
        # load_state_dict keeps references to what it is given
        for optimizer, state in zip(optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(copied(state))
            _keep_precision(optimizer, state)
        for scheduler, state in zip(schedulers, self.schedulers, strict=True):
            scheduler.load_state_dict(copied(state))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        return {k: getattr(self, k) for k in ("tensors", "extra", "optimizers", "schedulers")}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}


def _keep_precision(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Undo the cast to the parameter's dtype that load_state_dict makes of NAdam's and ASGD's numbers."""
    keys = [key for group in state.get("param_groups", ()) for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=False):  # Lightning's stand-in for no optimizer has no keys
        for what, value in state["state"].get(key, {}).items():
            loaded = optimizer.state[p][what]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[p][what] = value.to(loaded.device, copy=True)


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    default = nn.Module.get_extra_state
    return {name: m for name, m in model.named_modules() if type(m).get_extra_state is not default}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, int):
        return f"{there} in the snapshot, {here} here."
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{n}: {there.get(n)} in the snapshot, {here.get(n)} here" for n in names[:5]) + "."
