"""What the processes of a distributed training tell each other."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch import distributed

from lightning_prune.checks import check_alike
from lightning_prune.doctor import digest
from lightning_prune.masks import Masks, pack, unpack

T = TypeVar("T")


def of_ranks(trainer: Trainer, value: Any) -> list[Any]:
    """What every rank has here, in order of ranks."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        distributed.all_gather_object(values, value)
    return values


def decided(trainer: Trainer, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. All ranks must call it, and each carries `decide` out.

    Raises:
        Exception: what `decide` raised on this rank.
        RuntimeError: on the ranks on which it went well, when it failed on another.
    """
    if trainer.world_size == 1:
        return decide()
    return trainer.strategy.broadcast(together(trainer, decide))


def decided_masks(trainer: Trainer, decide: Callable[[], Masks]) -> Masks:
    """The masks that rank 0 decides, on every rank, on the CPU where there are several; else as `decided`."""
    if trainer.world_size == 1:
        return decide()
    return unpack(decided(trainer, lambda: pack(decide())))


def gathered(trainer: Trainer, make: Callable[[], T]) -> list[T]:
    """What each rank makes, on every rank, in order of ranks; errors as with `decided`."""
    return of_ranks(trainer, together(trainer, make))


def together(trainer: Trainer, make: Callable[[], T], shared: type[Exception] | tuple[()] = ()) -> T:
    """What this rank makes. All ranks must call it, so that none goes on where another one failed.

    Args:
        trainer: of the fit.
        make: carried out on each rank.
        shared: a class of errors that all ranks raise where one does, and none fails otherwise.

    Raises:
        Exception: what `make` raised on this rank.
        RuntimeError: on the ranks on which it went well, when it failed on another.
    """
    if trainer.world_size == 1:
        return make()
    mine: Exception | None = None
    value: Any = None
    try:
        value = make()
    except Exception as error:  # told to the others first, so that none of them waits for this rank
        mine = error
    told = None if mine is None else (f"{type(mine).__name__}: {mine}", isinstance(mine, shared), str(mine))
    failed = [(rank, *error) for rank, error in enumerate(of_ranks(trainer, told)) if error is not None]
    others = [(rank, said) for rank, said, is_shared, _ in failed if not is_shared]
    if mine is not None and not (others and isinstance(mine, shared)):
        raise mine
    if others:
        wrong, said = others[0]
        raise RuntimeError(f"process {wrong} failed, and all are needed. Look at its error: {said}")
    if failed and shared:
        raise shared(failed[0][-1])
    return value


def check_arguments(trainer: Trainer, given: Mapping[str, str]) -> None:
    """Make sure that a callback has the same arguments on all processes, which take decisions by them.

    Args:
        trainer: of the fit.
        given: the arguments in words, by name.

    Raises:
        ValueError: on every process, naming those that differ.
    """
    check_alike(of_ranks(trainer, dict(given)))


def check_ranks(trainer: Trainer, masks: Masks) -> None:
    """Make sure that all ranks hold the same masks.

    Raises:
        RuntimeError: on every rank, when they do not.
    """
    if trainer.world_size == 1:
        return
    first, *others = of_ranks(trainer, digest(masks))
    if wrong := [rank for rank, other in enumerate(others, 1) if other != first]:
        raise RuntimeError(
            f"masks differ between processes: those of process {', '.join(map(str, wrong))} are not those "
            "of process 0. Give all the same masks=, change none in on_prune, and draw random "
            "numbers from the `generator` that a criterion may ask for: all must come to the same."
        )
