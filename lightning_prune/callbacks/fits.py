"""Fits: what lives as long as a fit, and is gone with it, however it ends."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn, optim
from typing_extensions import final

from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.beside import mask_averages
from lightning_prune.callbacks.checkpoints import WholeCheckpointIO
from lightning_prune.callbacks.patience import RoundPatience
from lightning_prune.holding import Handle, check_fit, mixes_weights
from lightning_prune.masks import Masks
from lightning_prune.shards import is_sharded


def check_free(name: str, last: Trainer | None, trainer: Trainer) -> None:
    """Refuse a fit within a fit of another trainer that has the same callback.

    Raises:
        ValueError: then.
    """
    if last is not None and last is not trainer and _lightning.is_running(last):
        raise ValueError(
            f"{name}: it is in a fit of another Trainer that is still under way; allowed is one fit at a "
            "time. Give the second Trainer a callback of its own."
        )


@final
class Fit:
    """A fit under way: its trainer, the weights that are held, and everything that must be taken away again.

    Args:
        trainer: whose fit it is. Its default way to write checkpoints is replaced until `leave`.
        before: the callback's attributes as they were before the fit.

    Attributes:
        before: what a fit that fails gives back to the callback; empty as soon as training may have changed
            the network.
        params: the masked weights, by name.
        trained: the ids of the parameters that optimizers held as the masks were put under them.
        followed: {name of a copy: name of the weight that it copies}; copies are held, too.
        begun: whether training has begun.
        since: the global step at which training, or the round, began.
        epoch: what it takes to draw the batches of the epoch under way again.
        noted: the epoch whose order another callback has drawn, of which `epoch` is.
        announce: whether the round is to be logged with the next batch.
        looked: whether the dead weights were looked at after the first step of the round.
        late: whether the state of a checkpoint came after the fit had started.
        tried: whether what updates will run was run once, on the first batch.
        explained: whether it was said why there are fewer prunings than were asked for.
        patience: of `EarlyStopping`, where that ends a round.
        cut: whether `EarlyStopping` ended the round before it had its length.
        varies: whether rounds may have other lengths than the arguments say, and the last one has its own.
    """

    def __init__(self, trainer: Trainer, before: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.before = {name: value for name, value in before.items() if name != "_fit"}
        self.trained: set[int] = set()
        self.params: dict[str, nn.Parameter] = {}
        self.followed: dict[str, str] = {}
        self.begun = False
        self.since = 0
        self.epoch: dict[str, Any] | None = None
        self.noted: int | None = None
        self.announce = True
        self.looked = False
        self.tried = False
        self.explained = False
        self.late = False
        self.patience: RoundPatience | None = None
        self.cut = False
        self.varies = False
        self._handle: Handle | None = None
        self._optimizers: list[optim.Optimizer] = []  # that the hold watches
        self._ours: WholeCheckpointIO | None = None
        strategy = trainer.strategy
        self._theirs = strategy.checkpoint_io
        if type(self._theirs) is TorchCheckpointIO:
            strategy.checkpoint_io = self._ours = WholeCheckpointIO()

    @property
    def sharded(self) -> bool:
        """Whether a masked weight is sharded over processes."""
        return any(map(is_sharded, self.params.values()))

    def hold(self, pl_module: LightningModule, masks: Masks, gradients: bool) -> None:
        """Hold these masks on the weights and on what follows them, under the trainer's optimizers.

        Where the state of a checkpoint came late, optimizers know of dead weights what they did then.
        """
        check_fit(masks, self.params)
        copies = {name: pl_module.get_parameter(name) for name in self.followed}
        held, optimizers = self._with_copies(masks), self.trainer.optimizers
        if self._handle is not None:
            self._handle.remove()
        self._handle = Handle(
            {**self.params, **copies}, held, optimizers, gradients=gradients, forget=not self.late
        )
        self._optimizers = list(optimizers)
        self.trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        mask_averages(self.trainer, masks)

    def set(self, masks: Masks) -> None:
        """Hold other masks from now on."""
        if self._handle is not None:
            self._handle.set(self._with_copies(masks))
        mask_averages(self.trainer, masks)

    def apply(self) -> None:
        """Set dead weights to +0.0."""
        if self._handle is not None:
            self._handle.apply()

    def forget(self) -> None:
        """Zero what optimizers remember of dead weights."""
        if self._handle is not None:
            self._handle.forget()

    def gradients_of_all(self) -> AbstractContextManager[None]:
        """Inside, a backward pass leaves the gradients of the dead, too, wherever they are masked."""
        return nullcontext() if self._handle is None else self._handle.gradients_of_all()

    def has_new_optimizers(self) -> bool:
        """Whether the trainer has other optimizers than those that are watched: they were made anew."""
        return self.trainer.optimizers != self._optimizers  # an optimizer equals itself alone

    def watch(self, gradients: bool) -> None:
        """Hold the masks under the optimizers that the trainer has now."""
        if self._handle is not None:
            self._handle.watch(self.trainer.optimizers, gradients=gradients)
        self._optimizers = list(self.trainer.optimizers)

    def leave(self) -> None:
        """Take away everything that acts on module, optimizers, strategy or trainer."""
        if self.patience is not None:
            self.patience.give_back()
        if self._handle is not None:
            self._handle.remove()
        strategy = self.trainer.strategy
        if self._ours is not None and strategy.checkpoint_io is self._ours:
            strategy.checkpoint_io = self._theirs

    def _with_copies(self, masks: Masks) -> Masks:
        return {**masks, **{copy: masks[of] for copy, of in self.followed.items()}}


def reads_gradients(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether a dead weight's gradient may reach a living one, by clipping or in an optimizer's step."""
    hooks = ("on_after_backward", "on_before_optimizer_step")
    of_module = (*hooks, "backward", "configure_gradient_clipping", "optimizer_step")
    return bool(
        trainer.gradient_clip_val
        or not pl_module.automatic_optimization
        or any(mixes_weights(optimizer) for optimizer in trainer.optimizers)
        or any(is_overridden(hook, pl_module) for hook in of_module)
        or any(is_overridden(hook, c) for c in _lightning.callbacks_of(trainer) for hook in hooks)
    )
