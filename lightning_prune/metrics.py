"""What masks say, as torchmetrics: logged in a `LightningModule`, added up over updates and processes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import final, override

from lightning_prune.masks import overlap


class _Counts(Metric):
    """Two counts, added up exactly."""

    is_differentiable = False
    full_state_update = False
    part: Tensor
    whole: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("part", "whole"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")


class _Survivors(_Counts):
    """The elements that are not zero, of all that was given."""

    @override
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        self.part += sum(int(t.count_nonzero()) for t in tensors.values())
        self.whole += sum(t.numel() for t in tensors.values())


@final
class Sparsity(_Survivors):
    """Fraction of zeros, of all that was given.

    >>> sparsity = Sparsity()
    >>> sparsity({"w": torch.tensor([True, False, False, False])})
    tensor(0.7500)

    `update` takes masks, or weights, by name: `sparsity.update(pruner.masks)`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    higher_is_better = None

    @override
    def compute(self) -> Tensor:
        return 1 - self.part / self.whole


@final
class CompressionRatio(_Survivors):
    """Original size over new size: all weights over those that are not 0; infinite where none is left.

    >>> ratio = CompressionRatio()
    >>> ratio({"w": torch.tensor([0.0, 0.3, 0.0, 0.0])})
    tensor(4.)

    `update` takes masks, or weights, by name.

    Args:
        kwargs: those of `torchmetrics.Metric`.

    Reference: Blalock et al. (2020), arXiv:2003.03033, Section 6.
    """

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        return self.whole / self.part


@final
class MaskOverlap(_Counts):
    """The Jaccard index of pairs of masks: alive in both over alive in either; 1 where nothing is alive.

    >>> overlap = MaskOverlap()
    >>> overlap({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([False, True, True])})
    tensor(0.3333)

    `update` takes two masks of the same weights, of two seeds or of two rounds, say.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    higher_is_better = None

    @override
    def update(self, masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        both, either = overlap(masks, others)
        self.part += both
        self.whole += either

    @override
    def compute(self) -> Tensor:
        return self.part / self.whole if self.whole else torch.ones_like(self.part, dtype=torch.float32)
