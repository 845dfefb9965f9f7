"""Rewinding: from where to go on.

A snapshot of a training copies in and copies out, so nothing can change it. A policy says what a round begins
with: a function of the early snapshot and, by keyword if its signature names it, of the `final` state, in
which the round before ended.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Concatenate

import torch
from torch import Tensor, nn, optim

from lightning_prune.checks import number, whole
from lightning_prune.copies import copied, put_back
from lightning_prune.masks import Masks, count
from lightning_prune.shards import is_sharded, like, settle


@dataclass(frozen=True)
class Snapshot:
    """Everything that training changes: parameters, all buffers, optimizers and learning rate schedulers.

    With the averages of the weights that are kept beside the model. `schedulers=None` in what a policy
    returns means that no schedule goes on: the learning rates of the last step hold.

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
    schedulers: list[dict[str, Any]] | None
    averages: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])

    @classmethod
    def take(
        cls,
        model: nn.Module,
        optimizers: Iterable[optim.Optimizer] = (),
        schedulers: Iterable[Any] = (),
        averages: Iterable[nn.Module] = (),
    ) -> "Snapshot":
        """Copy the present state."""
        return cls(
            tensors=copied(_tensors(model)),
            extra=copied({name: m.get_extra_state() for name, m in _with_extra_state(model).items()}),
            optimizers=[copied(o.state_dict()) for o in optimizers],
            schedulers=[copied(s.state_dict()) for s in schedulers],
            averages=[copied(_tensors(average)) for average in averages],
        )

    @torch.no_grad()
    def restore(
        self,
        model: nn.Module,
        optimizers: Sequence[optim.Optimizer] = (),
        schedulers: Sequence[Any] = (),
        averages: Sequence[nn.Module] = (),
    ) -> None:
        """Put the state back, bit for bit, into the same parameters, optimizers, schedulers and averages.

        Parameter groups that an optimizer got since keep their settings; what it knows of their parameters
        is forgotten, as it knew nothing of them.

        Raises:
            ValueError: when the model, an optimizer's groups of then, or the number of optimizers, schedulers
                or averages, is not that of the snapshot. Nothing is changed then.
        """
        schedules = [None] * len(schedulers) if self.schedulers is None else self.schedulers
        for what, there, here in (
            ("tensors", _shapes(self.tensors), _shapes(_tensors(model))),
            ("optimizers", len(self.optimizers), len(optimizers)),
            ("parameter groups", *_groups(self.optimizers, optimizers)),
            ("settings", *_settings(self.optimizers, optimizers)),
            ("schedulers", len(schedules), len(schedulers)),
            ("averages", len(self.averages), len(averages)),
        ):
            if there != here:
                raise ValueError(
                    f"{what}: {_difference(there, here)} Allowed is the training that the snapshot was "
                    "taken of. Take another snapshot."
                )
        for module, tensors in zip((model, *averages), (self.tensors, *self.averages), strict=True):
            for name, tensor in _tensors(module).items():
                put_back(tensor, tensors[name])
        for name, module in _with_extra_state(model).items():
            module.set_extra_state(copied(self.extra[name]))
        # load_state_dict keeps references to what it is given
        for optimizer, state in zip(optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(_with_later_groups(copied(state), optimizer))
            _keep_precision(optimizer, state)
        for scheduler, state in zip(schedulers, schedules, strict=True):
            if state is not None:
                scheduler.load_state_dict(copied(state))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, sharded ones as they are."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def cut(self, model: nn.Module, optimizers: Sequence[optim.Optimizer] = ()) -> "Snapshot":
        """The snapshot with each tensor sharded as what it is to be restored into, if that is sharded."""
        here = _tensors(model)
        tensors = {name: _lying(t, here[name]) if name in here else t for name, t in self.tensors.items()}
        return replace(
            self,
            tensors=tensors,
            optimizers=[_cut(state, o) for state, o in zip(self.optimizers, optimizers, strict=True)],
        )


# (the early snapshot, and by keyword the final state) -> what a round begins with
if TYPE_CHECKING:
    Policy = Callable[Concatenate[Snapshot, ...], Snapshot]
else:  # LightningCLI reads type hints at run time, and knows no Concatenate
    Policy = Callable[..., Snapshot]


def everything(early: Snapshot) -> Snapshot:
    """All as it was: weights, buffers, optimizers, averages and schedules ("weight rewinding").

    Reference: Frankle & Carbin (2019), arXiv:1803.03635 (to initialization); Frankle et al. (2020),
        arXiv:1912.05671 (to a later step); Renda et al. (2020), arXiv:2003.02389.
    """
    return early


def weights(early: Snapshot, final: Snapshot) -> Snapshot:
    """The network as it was, weights and buffers, and its averages; optimizers and schedules go on.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635.
    """
    return replace(early, optimizers=final.optimizers, schedulers=final.schedulers)


def learning_rate(early: Snapshot, final: Snapshot) -> Snapshot:
    """Learning rate rewinding: schedules go on from where they were, the trained weights stay.

    What the optimizers remember of the weights, such as momentum, stays with them, as in the authors' code.

    Reference: Renda et al. (2020), arXiv:2003.02389, Section 2.
    """
    groups = [{k: v for k, v in state.items() if k == "param_groups"} for state in early.optimizers]
    optimizers = [{**now, **then} for now, then in zip(final.optimizers, groups, strict=True)]
    return replace(final, optimizers=optimizers, schedulers=early.schedulers)


def fine_tune(early: Snapshot, final: Snapshot) -> Snapshot:
    """Fine-tuning: nothing goes back, and the learning rates of the last step hold from now on.

    Reference: Han et al. (2015), arXiv:1506.02626; Renda et al. (2020), arXiv:2003.02389, Section 2.
    """
    return replace(final, schedulers=None)


def nothing(early: Snapshot, final: Snapshot) -> Snapshot:
    """All goes on as it is, schedules too."""
    return final


@dataclass(frozen=True)
class EarlyBird:
    """Whether an early-bird ticket has emerged: the masks that one would draw have stopped changing.

    Of the last `masks` masks that were drawn, one at each check, the newest differs from every other in less
    than a fraction `distance` of all weights (normalized Hamming distance).

    >>> a, b = ({"w": torch.tensor([True, True, last])} for last in (True, False))
    >>> emerged = EarlyBird(distance=0.4, masks=2)
    >>> emerged([a]), emerged([a, a]), emerged([a, b]), EarlyBird(0.3, 2)([a, b])
    (False, True, True, False)

    Args:
        distance: above 0 and at most 1.
        masks: how many are compared, 2 or more.
        every_n_train_steps: optimizer steps between two checks. None: one at the end of each epoch.

    Raises:
        ValueError: for other values.

    Reference: You et al. (2020), arXiv:1909.11957, Section 3.
    """

    distance: float = 0.1
    masks: int = 5
    every_n_train_steps: int | None = None

    def __post_init__(self) -> None:
        allowed = "is above 0 and at most 1, such as 0.1"
        number("distance", self.distance, allowed, lambda v: 0 < v <= 1)
        whole("masks", self.masks, 2, such_as=5)
        if self.every_n_train_steps is not None:
            whole("every_n_train_steps", self.every_n_train_steps, 1, such_as=5)

    def __call__(self, drawn: Sequence[Masks]) -> bool:
        *others, newest = drawn[-self.masks :]
        return len(others) == self.masks - 1 and all(hamming(old, newest) < self.distance for old in others)


def hamming(a: Masks, b: Masks) -> float:
    """The fraction of all weights that are alive in one and dead in the other.

    >>> hamming({"w": torch.tensor([True, False])}, {"w": torch.tensor([True, True])})
    0.5
    """
    differ = sum(count(a[name] ^ b[name]) for name in a)
    return differ / max(1, sum(mask.numel() for mask in a.values()))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # a sparse tensor and its `detach()` do not see what is written into the other
    tensors = {**settle(model), **dict(model.named_buffers())}
    return {name: p.detach() if p.layout == torch.strided else p for name, p in tensors.items()}


def _lying(tensor: Tensor, like_this: Tensor) -> Tensor:
    differ = is_sharded(tensor) or is_sharded(like_this)
    return copied(like(tensor, like_this)) if differ and tensor.shape == like_this.shape else tensor


def _cut(state: dict[str, Any], optimizer: optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with what it knows of each parameter sharded as that is."""
    keys = [key for group in state.get("param_groups", ()) for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    known = dict(zip(keys, params, strict=False))
    cut = {
        key: {w: _lying(v, known[key]) if isinstance(v, Tensor) else v for w, v in values.items()}
        for key, values in state["state"].items()
    }
    return {**state, "state": cut}


def _groups(
    states: Sequence[dict[str, Any]], optimizers: Sequence[optim.Optimizer]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """How many parameters the groups of each optimizer have: in the snapshot, and as many groups here."""
    there = {f"of optimizer {i}": _sizes(state.get("param_groups", ())) for i, state in enumerate(states)}
    here = {
        name: _sizes(optimizer.param_groups)[: len(sizes)]
        for optimizer, (name, sizes) in zip(optimizers, there.items(), strict=False)
    }
    return there, here


def _settings(
    states: Sequence[dict[str, Any]], optimizers: Sequence[optim.Optimizer]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What each optimizer needs to know of a group: in the snapshot, and here. Another class needs others."""
    here = {
        f"of optimizer {i} ({type(o).__name__})": sorted(
            key for key in o.defaults if all(key in group for group in o.param_groups)
        )
        for i, o in enumerate(optimizers)
    }
    there = {
        name: [key for key in needed if all(key in group for group in state.get("param_groups", ()))]
        for (name, needed), state in zip(here.items(), states, strict=False)
    }
    return there, here


def _sizes(groups: Iterable[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _with_later_groups(state: dict[str, Any], optimizer: optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of then, with the groups that were added since, about which it knows nothing."""
    if "param_groups" not in state:  # Lightning's stand-in for no optimizer
        return state
    groups = state["param_groups"]
    later = optimizer.state_dict()["param_groups"][len(groups) :]
    return {**state, "param_groups": [*groups, *copied(later)]}


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
