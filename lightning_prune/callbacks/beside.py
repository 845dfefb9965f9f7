"""Lightning's own callbacks beside a pruning: what they keep follows the rounds and the masks."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from lightning_prune.callbacks import _lightning
from lightning_prune.masks import Masks, bits, zero_dead_


def averaging_of(trainer: Trainer) -> list[StochasticWeightAveraging]:
    """The callbacks of stochastic weight averaging."""
    return [c for c in _lightning.callbacks_of(trainer) if isinstance(c, StochasticWeightAveraging)]


def mask_averages(trainer: Trainer, masks: Masks) -> None:
    """An average over steps with other masks is not zero where the weight is dead."""
    for average in _lightning.averages_of(trainer):
        for name, mask in masks.items():
            zero_dead_(p := average.get_parameter(name), bits(mask, like=p))


def show(trainer: Trainer, values: dict[str, float], more: dict[str, float]) -> None:
    """Write values to bar, callback metrics and loggers, and more to the loggers alone.

    Not by `log`: what is logged on a step costs Lightning time on every step after it.
    """
    trainer.progress_bar_metrics.update(values)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    values = {**values, **more}
    trainer.logged_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step)


def compare_anew(trainer: Trainer) -> None:
    """As a round begins: patience and best score of `EarlyStopping` are those of the round.

    So is what a `ModelCheckpoint` compares whose file name has `{round...}`. The files of the round that is
    over stay.
    """
    for stopper in trainer.early_stopping_callbacks:
        stopper.wait_count = 0
        stopper.best_score = _worst("min" if stopper.monitor_op == torch.lt else "max")
    # Metrics that learning rate schedules read, which fail without them.
    waited = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    for checkpoint in _of_rounds(trainer):
        checkpoint.best_k_models = {}
        checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
        checkpoint.best_model_score = checkpoint.current_score = None
        checkpoint.kth_value = _worst(checkpoint.mode)
        # Between validations it would compare by what the network of the round before came to. Without that,
        # Lightning lets it wait for the next validation.
        if _lightning.saves_between_validations(checkpoint) and checkpoint.monitor not in waited:
            trainer.callback_metrics.pop(checkpoint.monitor or "", None)


def best_of_round(trainer: Trainer) -> tuple[float | None, str]:
    """What the first `ModelCheckpoint` that compares within rounds monitors, at its best, and the file."""
    for checkpoint in _of_rounds(trainer):
        if path := checkpoint.best_model_path:
            score = checkpoint.best_model_score
            return None if score is None else float(score), str(path)
    return None, ""


def monitor_of_rounds(trainer: Trainer) -> str:
    """The metric that `best_of_round` is about; empty where there is none."""
    return next((checkpoint.monitor or "" for checkpoint in _of_rounds(trainer)), "")


def monitors_of_all_rounds(trainer: Trainer) -> list[str]:
    """What each `ModelCheckpoint` monitors that keeps the best of all rounds together."""
    of_all = [c for c in _checkpoints(trainer) if not _is_of_rounds(c)]
    return [c.monitor for c in of_all if c.monitor and c.save_top_k > 0]


def _of_rounds(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those whose files are named by the round."""
    return [c for c in _checkpoints(trainer) if _is_of_rounds(c)]


def _is_of_rounds(checkpoint: ModelCheckpoint) -> bool:
    return "{round" in (checkpoint.filename or "")


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _worst(mode: str) -> Tensor:
    return torch.tensor(float("inf") if mode == "min" else -float("inf"))
