"""Speed: as many channels go as make a network so many times as fast, measured where it runs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import final, override

from lightning_prune.checks import number
from lightning_prune.deploy.timing import ratio, settled, timed
from lightning_prune.masks import Masks
from lightning_prune.structured import surgery
from lightning_prune.structured.targets import Now, Target, aim, check_aim
from lightning_prune.structured.trial import copied, input_of, run, runs_itself
from lightning_prune.structured.units import Couplings, cut_of

log = logging.getLogger(__name__)
SECONDS = 0.3  # that the alternated runs of a measurement take; more on a busy machine
RATIOS = "are ratios from 1 on, such as 2.0"
HALVINGS = 7  # of what is left of the sparsities: to within a hundredth


@final
@dataclass(frozen=True)
class Faster(Target):
    """A schedule of how many times as fast the network becomes, measured on this machine by alternated runs.

    Inference on the example input is timed, of the full-size network and of cut copies. The least sparsity
    that reaches the target is found by bisection, to a hundredth; the ratio that it reaches is logged. What
    is measured differs from run to run by some percent. It is the speed of the whole network: where each of
    several patterns has a schedule, each goes on from what those before it leave.

    >>> Faster(2.0)(1, faster=lambda sparsity: 1 / (1 - 0.75 * sparsity))
    0.671875

    Args:
        times: the ratio, 1 or more, that of every round from 1 on; or round -> ratio.

    Raises:
        ValueError: when the network without all removable channels is not as fast.
    """

    times: float | Callable[[int], float]

    def __post_init__(self) -> None:
        if callable(self.times):
            check_aim("times", self.times, RATIOS)
        else:
            number("times", self.times, RATIOS, lambda v: v >= 1)

    def __call__(self, round: int, faster: Callable[[float], float], rounds: int | None = None) -> float:
        if (target := self._of(round, rounds)) <= 1:
            return 0.0
        faster = cache(faster)
        if (most := faster(1.0)) < target:
            raise ValueError(
                f"times: {target} times as fast is wanted in round {round}, and without all removable "
                f"channels but the few that each layer has to keep it is {most:.2f} times as fast on the "
                "example; allowed is less than that. Lower it, or give an example of the batch that counts."
            )
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if faster(middle) < target else (low, middle)
        log.info(
            f"Faster({target:g}): without {100 * high:.1f} % of the channels the network is "
            f"{faster(high):.2f} times as fast."
        )
        return high

    @override
    def comparison(self, round: int, now: Now, rounds: int | None = None) -> str | None:
        if (target := self._of(round, rounds)) <= 1:
            return None
        return (
            f"{target:g} times as fast is wanted, and it is {now.faster():.2f} times as fast with all of them"
        )

    def _of(self, round: int, rounds: int | None) -> float:
        target = aim(self.times, round, rounds, 1.0)
        number(f"times({round})", target, RATIOS, lambda v: v >= 1)
        return target


def full_size(model: nn.Module, gone: surgery.Cut) -> nn.Module:
    """A copy with the shapes that a model had before a cut; what its weights are is of no matter."""
    copy = copied(model)
    sizes: dict[int, tuple[Tensor, list[int]]] = {}
    for (module, name, dim), indices in gone.items():
        tensor = getattr(copy.get_submodule(module), name)
        sizes.setdefault(id(tensor), (tensor, list(tensor.shape)))[1][dim] += len(indices)
    new = {key: (tensor, tensor.new_zeros(shape)) for key, (tensor, shape) in sizes.items()}
    surgery.prepare(copy, new, {}).commit()
    return copy


def speed(model: nn.Module, example: Any, couplings: Couplings, left: Masks) -> Callable[[Masks], float]:
    """Units -> how many times as fast the network is with these as with all, on the example input.

    Args:
        model: as it is now; it is not changed.
        example: an input, or its shape.
        couplings: in the coordinates of the full-size network.
        left: the units that the model still has.
    """
    x = input_of(model, example)
    dense = full_size(model, cut_of(couplings, left))
    with torch.inference_mode(), runs_itself(dense):
        run(dense, x)

    @torch.inference_mode()
    def measure(units: Masks) -> float:
        smaller = copied(dense)
        surgery.cut(smaller, cut_of(couplings, units))
        works: Mapping[str, Callable[[], float]] = {
            name: timed(partial(run, network, x)) for name, network in (("dense", dense), ("cut", smaller))
        }
        times = settled(works, at_least=SECONDS)
        return ratio(times["dense"], times["cut"]).value

    return measure
