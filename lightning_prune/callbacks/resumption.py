"""Resumption: what a checkpoint of Lightning lacks, so that the training goes on as if it had not ended."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import final

from lightning_prune.callbacks import _lightning, generators
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.ranks import of_ranks
from lightning_prune.masks import Masks


def beginning(trainer: Trainer) -> dict[str, Any]:
    """As an epoch begins: what it takes to draw the batches of this epoch again."""
    return {**generators.capture(trainer), "drawn": _lightning.has_drawn(trainer)}


def capture(trainer: Trainer | None, epoch: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint written now has to give back, in plain containers.

    Args:
        trainer: of the fit that is under way, if there is one.
        epoch: what `beginning` returned as the epoch under way began.
    """
    if trainer is None:
        mine = {**generators.capture(None), "epoch": None}
        return {"ranks": [mine], "metrics": {}, "gradients": {}, "evaluates": None}
    begun = epoch if _lightning.is_within_epoch(trainer) else None
    return {
        "ranks": [{**generators.capture(trainer), "epoch": begun}],
        "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
        "gradients": _gradients(trainer, trainer.lightning_module),
        "evaluates": [*_grid(trainer), trainer.val_check_batch],
    }


def interrupted(trainer: Trainer, begun: bool, epoch: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint has to give back that is written because an exception has ended the fit."""
    evaluating = trainer.validating or trainer.sanity_checking
    return {**capture(trainer if begun else None, epoch), "evaluating": evaluating}


def complete(trainer: Trainer, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """As a checkpoint is written: add what Lightning knows, and what the other processes captured."""
    if "loops" in checkpoint:
        state["progress"] = checkpoint["loops"]["fit_loop"]
    state["ranks"] = of_ranks(trainer, state["ranks"][0])


def _grid(trainer: Trainer) -> list[Any]:
    """What Lightning makes the number of batches from after which it validates."""
    return [trainer.val_check_interval, trainer.num_training_batches]


def _gradients(trainer: Trainer, pl_module: LightningModule) -> Masks:
    """The gradients that may go into a step still to come, where one process has the whole of them.

    While Lightning accumulates, each process has gradients of its own. A module that steps its optimizers
    itself may use whatever gradients it keeps, and they are the same in every process.
    """
    if pl_module.automatic_optimization and (trainer.world_size > 1 or not _lightning.accumulates(trainer)):
        return {}
    return {
        name: p.grad.to("cpu", copy=True)
        for name, p in pl_module.named_parameters()
        if type(p.grad) is Tensor
    }


@final
class Resumption:
    """What a checkpoint gives back to the fit that goes on from it.

    Lightning restores weights, optimizers, schedules and counters. Here are the place in the epoch, the
    random number generators of each process, the batches of the epoch under way, the gradients of an
    accumulation under way, the logged metrics, and whether EarlyStopping had decided.

    Args:
        state: as `capture` and `complete` made it.
        arguments: of the callback that wrote it, in words, as far as they are known.
    """

    def __init__(self, state: dict[str, Any], arguments: Mapping[str, str]) -> None:
        self.state = state
        self.arguments = arguments

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged last when the checkpoint was written, of one number each."""
        return {name: float(value) for name, value in self.state["metrics"].items() if value.numel() == 1}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """Give everything back. Returns what `beginning` returned as the epoch under way began."""
        if "progress" not in self.state:  # The state did not come from a checkpoint.
            return None
        metrics = {name: value.to(pl_module.device) for name, value in self.state["metrics"].items()}
        _lightning.show_metrics(trainer, metrics)
        if (evaluates := self.state["evaluates"]) and evaluates[:-1] == _grid(trainer):
            trainer.val_check_batch = evaluates[-1]  # A callback may have set it to something else.
        place = _lightning.go_on_from(trainer, self.state["progress"])
        for name, gradient in self.state["gradients"].items():
            p = pl_module.get_parameter(name)
            p.grad = gradient.to(p.device)
        for other in _lightning.callbacks_of(trainer):
            if isinstance(other, EarlyStopping) and other.wait_count >= other.patience:
                trainer.should_stop = True

        ranks, doubts = self.state["ranks"], list[str]()
        mine = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else None
        if mine is None:
            doubts.append(
                f"it has the random number generators of {len(ranks)} processes, and here are "
                f"{trainer.world_size}"
            )
        _lightning.load_places(trainer)
        if place.within_epoch and not place.is_last:
            doubts += _go_to(trainer, place, mine["epoch"] if mine else None)
        if place.is_last:
            _lightning.end_epoch(trainer)
        if mine:
            generators.restore(trainer, mine)
        if doubts := [*doubts, *_doubts(trainer, pl_module, place, self.state)]:
            warn(
                "ckpt_path: masks, weights and rounds go on from the checkpoint, but not bit for bit as "
                f"without an interruption: {'; '.join(doubts)}."
            )
        return mine["epoch"] if mine else None


def _go_to(trainer: Trainer, place: _lightning.Place, epoch: dict[str, Any] | None) -> list[str]:
    """Draw the batches of the epoch again up to the place of the checkpoint. Returns what is not exact."""
    loaders = _loaders(trainer)
    stateful = [_lightning.keeps_its_place(loader) for loader in loaders]
    if all(stateful):
        ahead = "a loader of unknown length is one batch ahead in the checkpoint"
        return [ahead] if _lightning.fetches_ahead(trainer) else []
    if any(stateful):
        return ["it was written within an epoch, and only some of the loaders have a state_dict"]
    if _lightning.lets_module_fetch(trainer):
        return ["it was written within an epoch, and training_step draws batches from dataloader_iter"]
    if epoch is None:
        return ["it was written within an epoch, and does not tell how the epoch began"]
    if not epoch["drawn"]:
        generators.restore(trainer, epoch)
        _lightning.draw_anew(trainer)
    else:
        _lightning.draw_anew(trainer)
        generators.restore(trainer, epoch)
    _lightning.pass_over(trainer, place.batches)
    if epoch["drawn"] and (_lightning.fetches_ahead(trainer) or any(map(_workers, loaders))):
        return [
            "it was written within the first epoch of a fit, whose order the workers of the DataLoader (or a "
            "loader of unknown length) had drawn before"
        ]
    return []


def _doubts(
    trainer: Trainer, pl_module: LightningModule, place: _lightning.Place, state: dict[str, Any]
) -> list[str]:
    """What else is not as it was."""
    doubts: list[str] = []
    if place.within_batch:
        doubts.append("it was written within a batch, which is trained anew")
    if place.before_end_of_batch and is_overridden("on_train_batch_end", pl_module):
        doubts.append(
            f"it was written before on_train_batch_end of {type(pl_module).__name__}, which is not called "
            "again"
        )
    if state.get("evaluating"):
        doubts.append("an exception ended the fit within a validation, which is not done again")
    if trainer.world_size > 1 and _lightning.accumulates(trainer):
        doubts.append("it was written within an accumulation, and has no gradients of several processes")
    if any(_workers(loader) and loader.persistent_workers for loader in _loaders(trainer)):
        doubts.append(
            "persistent_workers=True: random numbers that data sets draw in worker processes (not the order "
            "of samples) begin anew"
        )
    return doubts


def _loaders(trainer: Trainer) -> list[Any]:
    running = _lightning.loaders_of(trainer)
    return running.flattened if running is not None else []


def _workers(loader: Any) -> int:
    return getattr(loader, "num_workers", 0)
