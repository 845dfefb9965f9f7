"""Evidence from a training under way: its batches and its loss, gathered without a trace."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_prune import rng
from lightning_prune.callbacks import _lightning, generators
from lightning_prune.callbacks.messages import warn
from lightning_prune.callbacks.ranks import of_ranks, together
from lightning_prune.checks import named
from lightning_prune.criteria import Criterion
from lightning_prune.evidence import OF_A_RUN, Loss, asked, undisturbed
from lightning_prune.shards import is_sharded, settle


class NoEvidence(ValueError):
    """What a criterion reads is not there at this step of a training, and may be at the next."""


def check_run(pl_module: LightningModule, criterion: Criterion, argument: str = "criterion") -> None:
    """Refuse a criterion that needs the loss of a module that steps its optimizers itself.

    Args:
        pl_module: the module.
        criterion: that reads it, or does not.
        argument: what the criterion was given as.

    Raises:
        ValueError: then.
    """
    if not pl_module.automatic_optimization and (
        needed := {"loss", "forward", "grads"} & asked(criterion).keys()
    ):
        raise ValueError(
            f"{argument}: {named(criterion)} asks for {', '.join(sorted(needed))}, from "
            "training_step; that of "
            f"{type(pl_module).__name__} steps its optimizers itself (automatic_optimization=False). Allowed "
            "here are criteria of the weights alone. Use one of them."
        )


@contextmanager
def evidence_of(
    trainer: Trainer,
    pl_module: LightningModule,
    criterion: Criterion,
    n_batches: int,
    seed: int,
    batches: list[Any] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """What a criterion asks for of a training; when the context ends, the training is as it was.

    Batches are the first of a fresh pass over the training data, the same on all ranks, in an order that
    depends on `seed` alone; or those that are given. While they are drawn and the model runs, nothing is
    logged and the running pass does not notice.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = OF_A_RUN & asked(criterion).keys()
    if not wanted:
        yield {"generator": generator}
        return
    loggers = trainer.loggers
    with undisturbed(pl_module, seed):
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            for module in pl_module.modules():
                if isinstance(module, LightningModule):
                    module.log = module.log_dict = _ignore
            step = loss_of(trainer, pl_module)
            yield {
                "generator": generator,
                "model": pl_module,
                "batches": first_batches(trainer, pl_module, n_batches) if batches is None else batches,
                "loss": step,
                "forward": step,
            }
        finally:
            trainer.loggers = loggers


def _ignore(*_: Any, **__: Any) -> None:
    pass


def loss_of(trainer: Trainer, pl_module: LightningModule) -> Loss:
    """The module's training step as a loss function."""
    with_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with trainer.precision_plugin.train_step_context():
            output = pl_module.training_step(batch, 0) if with_index else pl_module.training_step(batch)
        value = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(value, Tensor):
            raise (NoEvidence if value is None else ValueError)(
                f"training_step of {type(pl_module).__name__} gave {value!r} as loss; "
                "the criterion needs a tensor. Return the loss."
            )
        return value

    return loss


def traced_step(trainer: Trainer, pl_module: LightningModule) -> Callable[[Any, Any], Any]:
    """The training step of a copy of the module: (copy, batch) -> what it returns. Nothing is logged."""
    with_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def step(model: Any, batch: Any) -> Any:
        for module in model.modules():
            if isinstance(module, LightningModule):
                module.trainer = trainer
                module.log = module.log_dict = _ignore
        return model.training_step(batch, 0) if with_index else model.training_step(batch)

    return step


def first_batches(trainer: Trainer, pl_module: LightningModule, n: int) -> list[Any]:
    """The first n batches of a fresh pass over the training data, of all ranks, on the device.

    Where weights are sharded, ranks run the model together, each with its own batches: as many on each.
    """
    running = _lightning.loaders_of(trainer)
    assert running is not None
    loaders = CombinedLoader(tree_map(_twin, running.iterables), _lightning.mode_of(running))
    shared = generators.own(*running.flattened)  # with the running pass: those of data sets, for instance
    states = {name: rng.state_of(generator) for name, generator in shared.items()}
    try:
        mine = together(trainer, lambda: [batch for batch, _, _ in islice(iter(loaders), n)])
    finally:
        for name, generator in shared.items():
            rng.set_state(generator, states[name])
    if any(map(is_sharded, settle(pl_module).values())):
        batches = mine[: min(of_ranks(trainer, len(mine)))]
    else:
        batches = [batch for of_one in zip(*of_ranks(trainer, mine), strict=True) for batch in of_one]
    for i, batch in enumerate(batches):
        batch = _lightning.batch_before_transfer(trainer, pl_module, batch)
        batches[i] = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return batches


def _twin(loader: Any) -> Any:
    """A loader that draws the same batches without the other noticing: all but what draws is shared.

    Raises:
        ValueError: when it cannot be copied, a running generator for instance.
    """
    drawing = ("sampler", "batch_sampler", "generator")
    memo: dict[int, Any] = {
        id(value): value
        for name, value in getattr(loader, "__dict__", {}).items()
        if isinstance(value, Tensor) or (isinstance(loader, DataLoader) and name not in drawing)
    }
    memo[id(getattr(loader, "_iterator", None))] = None  # a running pass of persistent workers
    if isinstance(loader, DataLoader):
        memo[id(loader.dataset)] = _aside(loader.dataset)
    try:
        twin = deepcopy(loader, memo)
    except TypeError as error:
        raise ValueError(
            f"criterion: it reads training batches, and a {type(loader).__name__} cannot be copied to draw "
            f"them on the side ({error}). Allowed is a DataLoader, or an iterable that copy.deepcopy "
            "copies. Use one."
        ) from error
    if isinstance(twin, DataLoader):  # worker processes for a batch or two cost more than they give
        twin.num_workers, twin.timeout = 0, 0
    return twin


def _aside(data: Any) -> Any:
    """A data set with the same samples, and counters and iterators of its own; large things are shared."""
    try:
        twin = copy(data)
    except TypeError:
        return data
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, Dataset):
            vars(twin)[name] = _aside(value)
        elif isinstance(value, list) and all(isinstance(part, Dataset) for part in value):
            vars(twin)[name] = [_aside(part) for part in value]
        elif isinstance(value, Iterator):
            try:
                vars(twin)[name] = copy(value)
            except TypeError:
                warn(
                    f"criterion: it reads training batches, and {type(data).__name__}.{name} is a "
                    f"{type(value).__name__}, which cannot be copied: the epoch under way may see other "
                    "samples than without it. Open it in __iter__ or in __getitem__."
                )
    return twin
