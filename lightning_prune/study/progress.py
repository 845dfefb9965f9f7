"""One progress bar for the whole experiment: rounds are many and epochs short."""

import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from tqdm import TqdmExperimentalWarning, tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from tqdm.rich import tqdm_rich
from typing_extensions import final, override

from lightning_prune.study.recording import pruner_of


@final
class ExperimentProgress(Callback):
    """A bar over all optimizer steps: kind of run, round, weights left, best validation so far, time left.

    Args:
        kind: shown first.
        bar: the class of the bar, `tqdm.tqdm` or one like it, such as `tqdm.rich.tqdm`.
        every: steps between two refreshes.
    """

    def __init__(self, kind: str, bar: Any = tqdm, every: int = 50) -> None:
        self.kind, self.bar, self.every = kind, bar, every
        self.best: dict[str, float] = {}
        self._bar: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        options: dict[str, Any] = {"unit": "step", "file": sys.stderr, "dynamic_ncols": True}
        if issubclass(self.bar, tqdm_rich):  # in one line, however narrow the terminal is
            what = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            text = TextColumn("{task.description}", table_column=what)
            share = TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True))
            options["progress"] = text, BarColumn(10), share, TimeRemainingColumn(compact=True)
            options["options"] = {"expand": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # rich's
            self._bar = self.bar(total=trainer.max_steps, initial=trainer.global_step, **options)
        self._show(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for metric, better in (("val_acc", max), ("val_loss", min)):
            if metric in trainer.callback_metrics:
                value = float(trainer.callback_metrics[metric])
                self.best[metric] = better(value, self.best.get(metric, value))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and trainer.global_step % self.every == 0:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        pruner = pruner_of(trainer)
        left = f"{100 * (1 - pruner.sparsity):.1f}% of weights"
        best = next((f", best {name} {value:.4g}" for name, value in self.best.items()), "")
        said = f"{self.kind}: {pruner.counted} {pruner.round}/{pruner.rounds}, {left}{best}"
        self._bar.set_description(said, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._show(trainer)
            self._bar.close()
            self._bar = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])


@contextmanager
def lines_above(bar: Any) -> Generator[None, None, None]:
    """While a bar of this class is shown, the log appears above it."""
    if not (isinstance(bar, type) and issubclass(bar, tqdm_rich)):
        with logging_redirect_tqdm():
            yield
        return
    # rich puts streams of its own in the place of these while it shows a bar, and handlers hold the old ones
    streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
    loggers = [logging.getLogger(name) for name in (None, "lightning_prune", "lightning_prune.callbacks")]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    held = {h: stream for h in handlers if (stream := h.stream) in streams}
    for handler, stream in held.items():
        handler.setStream(_Now(streams[stream]))
    try:
        yield
    finally:
        for handler, stream in held.items():
            handler.setStream(stream)


@final
class _Now:
    """What `sys.stdout` or `sys.stderr` is when something is written."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, text: str) -> int:
        return getattr(sys, self.name).write(text)

    def flush(self) -> None:
        getattr(sys, self.name).flush()
