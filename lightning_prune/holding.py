"""Holding: masks stay on while an optimizer trains.

Nothing is added to the model, and the hooks go when the hold is removed.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, finalize, ref

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import final

from lightning_prune.masks import Masks, bits, masks_of, zero_dead_
from lightning_prune.shards import is_sharded, like, local, settle

# Optimizers that update each weight from its own gradient alone. Under any other, the gradient of a dead
# weight reaches living ones (through a norm, a line search, a row's mean square, an orthogonalization), so
# gradients are masked too.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.Rprop,
    optim.ASGD,
    optim.SparseAdam,
)


@final
class Handle:
    """Masks held on parameters: after every step of every optimizer, dead weights are exactly +0.0.

    Whoever made the optimizer and whenever: torch calls a hook after each step of any optimizer in the
    process, also of one within another. Those that are given are also held where torch has not prepared their
    `step`.

    Args:
        params: the masked parameters, by name.
        masks: one for each.
        optimizers: those that step these parameters.
        gradients: also mask each gradient as soon as it exists, so that dead weights count nothing in a norm
            that is clipped, nor in an optimizer that mixes weights.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        masks: Masks,
        optimizers: Iterable[optim.Optimizer],
        *,
        gradients: bool,
        forget: bool = True,
    ) -> None:
        self._params = dict(params)
        self._ids = {id(p) for p in self._params.values()}
        self._optimizers: list[optim.Optimizer] = []
        self._steps: WeakKeyDictionary[optim.Optimizer, int] = WeakKeyDictionary()  # ours -> its groups
        self._wrapped: WeakSet[optim.Optimizer] = WeakSet()  # whose `step` torch has not prepared
        self._bits: dict[str, Tensor] = {}
        self._views: list[_View] = []
        self._hooks: list[Any] = []
        self._gradients = False
        self._lets_gradients_be = False
        check_fit(masks, self._params)
        self._hooks.append(_after_every_step(self._stepped))
        finalize(self, _dead.append, self._hooks[0])
        self.watch(optimizers, gradients=gradients)
        self._put_on(masks)
        if forget:
            self.forget()

    def watch(self, optimizers: Iterable[optim.Optimizer], *, gradients: bool) -> None:
        """Hold with these optimizers from now on, such as some that were made anew."""
        self._optimizers = list(optimizers)
        for o in self._optimizers:
            if not _calls_hooks(o) and o not in self._wrapped:
                self._wrapped.add(o)
                self._hooks.append(_Wrapped(o, self.apply))
            elif _calls_hooks(o):
                self._hooks.append(o.register_step_post_hook(self._is_kept_alive))
        for o in self._optimizers:
            self._zero_state(o)
        if not gradients or self._gradients:
            return
        self._gradients = True
        for name, p in self._params.items():
            frozen = not p.requires_grad  # now; it may be trained later
            p.requires_grad_(True)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._mask_gradient(name)))
            p.requires_grad_(not frozen)

    def set(self, masks: Masks) -> None:
        """Hold these masks from now on: on the weights, their gradients, and what optimizers remember.

        Raises:
            ValueError: when the masks do not fit, or the hold was removed.
        """
        if not self._hooks:
            raise ValueError(
                "masks: this hold was removed, and nothing would keep them on; allowed is before remove(). "
                "Call lightning_prune.hold again."
            )
        self._put_on(masks)
        self.forget()

    def _put_on(self, masks: Masks) -> None:
        check_fit(masks, self._params)
        masks = {name: like(masks[name], p) for name, p in self._params.items()}
        # of shards, the parts that this process has
        pruned = {name: p for name, p in self._params.items() if not bool(local(masks[name]).all())}
        self._bits = {name: bits(masks[name], like=p) for name, p in pruned.items()}
        self._views = []
        for name, p in pruned.items():
            zero_dead_(p.detach(), self._bits[name])
            self._mask_gradient(name)(p)

    def _is_kept_alive(self, *args: Any) -> None:
        """Done by the hook after every step; this one keeps the hold alive as long as its optimizer."""

    def forget(self) -> None:
        """Zero what optimizers remember of the weights that are dead now."""
        for optimizer in {id(o): o for o in (*self._optimizers, *self._steps)}.values():
            self._zero_state(optimizer)

    def _zero_state(self, optimizer: optim.Optimizer) -> None:
        # A dead weight's momentum would otherwise decay into denormals, which a CPU computes slowly.
        zero_dead_state(optimizer, {self._params[name]: dead for name, dead in self._bits.items()})

    def _stepped(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._steps.get(optimizer) != len(optimizer.param_groups):
            if not any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"]):
                return
            self._steps[optimizer] = len(optimizer.param_groups)
        self.apply()

    def apply(self) -> None:
        """Set dead weights to +0.0, of all that are held.

        Of the others nothing changes, so a backward pass that is still to come through weights that no
        optimizer has stepped is as if nothing had been written.
        """
        for address, at, _, _ in self._views:
            if address() != at:
                self._views = []
                break
        if not self._views:
            # made once: on a small network making them costs as much as the masking itself
            self._views = [_view(self._params[name], alive_bits) for name, alive_bits in self._bits.items()]
        for _, _, view, alive_bits in self._views:
            view.bitwise_and_(alive_bits)

    def _mask_gradient(self, name: str) -> Any:
        reference = ref(self)  # A parameter's hooks are no part of a cycle that Python's collector sees.

        def hook(p: Tensor) -> None:
            held = reference()
            living = None if held is None or held.lets_gradients_be else held.bits_of(name)
            if living is not None and p.grad is not None and p.grad.layout == torch.strided:
                if is_sharded(p.grad):
                    p.grad = like(p.grad, p)  # that of a tensor parallel layer may lie in another way
                zero_dead_(p.grad, living)

        return hook

    @property
    def lets_gradients_be(self) -> bool:
        """Whether gradients of dead weights are left as they are for a while."""
        return self._lets_gradients_be

    @contextmanager
    def gradients_of_all(self) -> Generator[None, None, None]:
        """Inside, a backward pass leaves the gradients of the dead, too."""
        self._lets_gradients_be = True
        try:
            yield
        finally:
            self._lets_gradients_be = False

    def bits_of(self, name: str) -> Tensor | None:
        """The mask of a weight as integers, ones where alive; None where nothing is dead."""
        return self._bits.get(name)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        _sweep()


# What tells where a weight lies now, where it lay, its memory as integers, its mask as integers.
_View: TypeAlias = tuple[Callable[[], int], int, Tensor, Tensor]


def _view(p: nn.Parameter, alive_bits: Tensor) -> _View:
    # A shard of a parameter may be another tensor later; a parameter stays itself, whatever its memory is.
    address = (lambda: local(p).data_ptr()) if is_sharded(p) else p.data_ptr
    # Of `.data`, since autograd counts what is written to views of a parameter as changes of it, and refuses
    # a backward pass through it. An optimizer that changed it has been counted.
    return address, address(), local(p).data.view(alive_bits.dtype), alive_bits


# Hooks of holds that nobody removed before they died. Python may collect one at any moment, also while torch
# goes through its hooks, which must not become fewer then: so they go when the next hold comes or goes.
_dead: list[Any] = []


def _sweep() -> None:
    while _dead:
        _dead.pop().remove()


def _after_every_step(method: Callable[..., None]) -> Any:
    """Call a method after each step of any optimizer, as long as its object lives."""
    _sweep()
    reference = WeakMethod(method)

    def hook(*args: Any) -> None:
        if (stepped := reference()) is not None:
            stepped(*args)

    return register_optimizer_step_post_hook(hook)


def _calls_hooks(optimizer: optim.Optimizer) -> bool:
    """Whether torch calls hooks after this optimizer's steps: not, where its class skips `__init__`."""
    return getattr(type(optimizer).step, "hooked", False)


@final
class _Wrapped:
    """An optimizer's `step` that does something afterwards, until `remove`."""

    def __init__(self, optimizer: Any, then: Callable[[], None]) -> None:
        self._optimizer, self._then = optimizer, then
        self._before = vars(optimizer).get("step")
        step = optimizer.step

        @wraps(step)
        def stepped(_: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._then()
            return result

        # A method, since learning rate schedulers wrap the function of one.
        self._ours = optimizer.step = MethodType(stepped, optimizer)

    def remove(self) -> None:
        self._then = lambda: None  # where somebody else has wrapped it since
        if vars(self._optimizer).get("step") is not self._ours:
            return
        if self._before is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._before


# What begins above zero in the state of a fresh optimizer, and which of its settings says how far: where it
# were 0, Rprop would never move what grows.
_FRESH = {optim.Rprop: ("step_size", "lr"), optim.Adagrad: ("sum", "initial_accumulator_value")}


def _fresh_of(optimizer: optim.Optimizer, p: Tensor) -> tuple[str, float]:
    """Which state of a weight begins above zero, and at what."""
    for kind, (key, setting) in _FRESH.items():
        if isinstance(optimizer, kind):
            group = next(g for g in optimizer.param_groups if any(p is other for other in g["params"]))
            return key, float(group[setting])
    return "", 0.0


def zero_dead_state(optimizer: optim.Optimizer, alive_bits: dict[Tensor, Tensor]) -> None:
    """Make what an optimizer keeps for dead weights, of the weight's shape, what a fresh one keeps: zero.

    But Rprop's step sizes are its learning rate, and Adagrad's sums its `initial_accumulator_value`.

    Args:
        optimizer: any.
        alive_bits: parameter -> its mask as `lightning_prune.masks.bits` makes it.
    """
    state: Any = getattr(optimizer, "state", {})
    for p, living in alive_bits.items():
        kept = state.get(p, {})
        key, begins = _fresh_of(optimizer, p) if kept else ("", 0.0)
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                here, on = local(value), living.to(local(value).device)
                if name == key and begins:
                    here.masked_fill_(on == 0, begins)
                elif here.is_floating_point() and here.itemsize == on.itemsize:
                    zero_dead_(here, on)  # much faster
                else:
                    here.masked_fill_(on == 0, 0)
    if isinstance(optimizer, optim.LBFGS) and not any(
        map(is_sharded, alive_bits)
    ):  # keeps vectors over all of its parameters, under the first
        params: list[Tensor] = optimizer.param_groups[0]["params"]
        all_alive = torch.zeros(1, dtype=torch.bool)
        parts = [
            alive_bits[p] == 0 if p in alive_bits else all_alive.to(p.device).expand(p.shape) for p in params
        ]
        dead = torch.cat([part.reshape(-1) for part in parts])
        for value in optimizer.state.get(params[0], {}).values():
            for vector in value if isinstance(value, list) else [value]:
                if isinstance(vector, Tensor) and vector.shape == dead.shape:
                    vector.masked_fill_(dead, 0)


def mixes_weights(optimizer: optim.Optimizer) -> bool:
    """Whether the gradient of one weight may reach another through this optimizer."""
    return type(optimizer) not in ELEMENTWISE


def check_fit(masks: Masks, params: Mapping[str, Tensor]) -> None:
    """Make sure that the masks are those of these weights.

    Raises:
        ValueError: when a name is in only one of the two, or the shapes differ.
    """
    for name in sorted(set(masks) ^ set(params)):
        here, there = ("masks", "model") if name in masks else ("model", "masks")
        raise ValueError(
            f"masks: {name} is in the {here}, not in the {there}; both must name the same weights. "
            "Use masks of this model."
        )
    for name, p in params.items():
        mask: Any = masks[name]
        if not isinstance(mask, Tensor) or mask.shape != p.shape or mask.dtype != torch.bool:
            tensor = isinstance(mask, Tensor)
            given = f"{mask.dtype} {tuple(mask.shape)}" if tensor else f"a {type(mask).__name__}"
            raise ValueError(
                f"masks: {name} is {given}; allowed is torch.bool of shape {tuple(p.shape)}. Use "
                "masks of this model."
            )


def hold(model: nn.Module, optimizer: optim.Optimizer | Sequence[optim.Optimizer], masks: Masks) -> Handle:
    """Keep masks on while a plain PyTorch (or Fabric) loop trains.

    >>> import lightning_prune as lp
    >>> model = nn.Linear(4, 2)
    >>> masks = lp.prune(model, sparsity=0.5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> handle = lp.hold(model, optimizer, masks)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> bool((model.weight[~masks["weight"]] == 0).all())
    True
    >>> handle.remove()

    Args:
        model: the module whose parameters the masks name.
        optimizer: the optimizer, or several, that step the model.
        masks: as `lightning_prune.prune` returns them.

    Returns:
        A handle: `.set(masks)` changes the masks, `.remove()` takes the hooks away.

    Raises:
        ValueError: when the masks do not fit the model, or what is given is no optimizer.
    """
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"masks={masks!r}: allowed are masks by name, as lightning_prune.prune returns them. Give those."
        )
    parameters = settle(model)
    masks, optimizers = masks_of(parameters, masks, "model's"), _optimizers(optimizer)
    # A plain loop may clip at any place between backward and step, so gradients are always masked here.
    return Handle({name: parameters[name] for name in masks}, masks, optimizers, gradients=True)


def _optimizers(given: Any) -> list[optim.Optimizer]:
    """One optimizer or several, as a list."""
    several = [given] if hasattr(given, "param_groups") else given
    if not isinstance(several, Sequence) or not all(hasattr(o, "param_groups") for o in several):
        raise ValueError(
            f"optimizer={given!r}: allowed are a torch optimizer, or a list of several. Give those that "
            "step the model."
        )
    return list(several)
