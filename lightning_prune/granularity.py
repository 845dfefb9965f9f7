"""Granularity: the units that live and die together: weights, blocks, kernels, filters.

A granularity is any callable `scores -> (unit scores, expand)`: from the scores of one weight tensor it makes
those of its units, of any shape, and `expand` turns a mask of the units into a mask of the weights. Sparsity,
allocation and ties then speak of units. The score of a dead weight, and of a unit without living weights, is
minus infinity.

Scores of units are Ln norms of the scores of their living weights, (sum s^n)^(1/n); n = inf: the highest.
With the criterion `magnitude` these are the Ln norms of the weights. A negative score counts as -|s|^n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.checks import number, whole
from lightning_prune.selection import DEAD

Granularity = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


def single(scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Single weights: every weight is a unit ("unstructured").

    >>> single(torch.tensor([3.0, 1.0]))[0]
    tensor([3., 1.])
    """
    return scores, lambda mask: mask


@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every m consecutive weights along the input dimension the n of highest score survive.

    The others are no candidates, whatever the allocation, so any sparsity up to 1 - n/m ends in exactly n of
    every m; a higher one prunes on within the pattern. The remainder of a row, its last `inputs % m` weights,
    is no unit: it stays dense and does not count in the sparsity.

    >>> import lightning_prune as lp
    >>> model = torch.nn.Linear(5, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1]]))
    >>> lp.prune(model, sparsity=0.5, granularity=NM(2, 4))["weight"]
    tensor([[False,  True,  True, False,  True]])

    Args:
        n: survivors of a group, 1 ... m - 1.
        m: length of a group.
        dim: the input dimension of the weights: 1, or 0 of transposed convolutions.

    Reference: Zhou et al. (2021), arXiv:2102.04010; Mishra et al. (2021), arXiv:2104.08378.
    """

    n: int = 2
    m: int = 4
    dim: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise ValueError(
                f"n={self.n}, m={self.m}: allowed are whole numbers with 1 <= n < m, such as 2 and 4."
            )

    def __call__(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows = scores.movedim(_dim(self.dim, scores), -1)
        full = rows.shape[-1] // self.m * self.m
        groups = rows[..., :full].reshape(-1, self.m)
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

        def expand(mask: Tensor) -> Tensor:
            weights = torch.ones(rows.shape, dtype=torch.bool, device=scores.device)
            weights[..., :full] = mask.view(*rows.shape[:-1], full)
            return weights.movedim(-1, self.dim)

        return groups.masked_fill(rank >= self.n, DEAD), expand


@dataclass(frozen=True)
class Block:
    """Blocks of the weight as a matrix of outputs x (inputs * kernel positions).

    At the edges blocks are smaller where the matrix does not divide.

    >>> Block(1, 2)(torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 1.0]]))[0]
    tensor([[3., 5.],
            [1., 1.]])

    Args:
        rows: height of a block, 1 or more.
        columns: width of a block, 1 or more.
        n: of the Ln norm, above 0.

    Reference: Gray et al. (2017), "GPU kernels for block-sparse weights"; Narang et al. (2017),
        arXiv:1711.02782.
    """

    rows: int = 1
    columns: int = 4
    n: float = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            whole(name, getattr(self, name), 1, such_as=4)
        _check_norm(self.n)

    def __call__(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        matrix = scores.reshape(scores.shape[0], -1)
        height, width = matrix.shape
        edges = (0, -width % self.columns, 0, -height % self.rows)
        padded = torch.nn.functional.pad(matrix, edges, value=DEAD)
        blocks = padded.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))

        def expand(mask: Tensor) -> Tensor:
            tall = mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
            return tall[:height, :width].reshape(scores.shape)

        return _norm(blocks, (1, 3), self.n), expand


@dataclass(frozen=True)
class Kernel:
    """Kernels: the weights from one input to one output channel of a convolution; elsewhere single weights.

    >>> Kernel()(torch.arange(8.0).view(1, 2, 2, 2))[0]
    tensor([[ 6., 22.]])

    Args:
        n: of the Ln norm, above 0.

    Reference: Mao et al. (2017), arXiv:1705.08922, "kernel-level (2-D)".
    """

    n: float = 1

    def __post_init__(self) -> None:
        _check_norm(self.n)

    def __call__(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if scores.dim() <= 2:
            return single(scores)
        inner = tuple(range(2, scores.dim()))
        return _norm(scores, inner, self.n), lambda mask: mask[(...,) + (None,) * len(inner)].expand(
            scores.shape
        )


@dataclass(frozen=True)
class Filter:
    """Whole slices of the weight: filters or neurons (dim=0), input channels (dim=1), as masks.

    Biases and the layers after it stay as they are; `StructuredChannelPruning` removes channels instead.

    >>> Filter(dim=0, n=2)(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))[0]
    tensor([5., 1.])

    Args:
        dim: the dimension that the slices are counted along.
        n: of the Ln norm, above 0.

    Reference: Li et al. (2017), arXiv:1608.08710 (dim=0, n=1).
    """

    dim: int = 0
    n: float = 1

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int):
            raise ValueError(f"dim={self.dim!r}: allowed are whole numbers, such as 0.")
        _check_norm(self.n)

    def __call__(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        dim = _dim(self.dim, scores)
        others = tuple(d for d in range(scores.dim()) if d != dim)
        shape = [-1 if d == dim else 1 for d in range(scores.dim())]
        return _norm(scores, others, self.n), lambda mask: mask.view(shape).expand(scores.shape)


def _norm(scores: Tensor, dims: tuple[int, ...], n: float) -> Tensor:
    """The Ln norm over `dims` of what is alive, minus infinity where nothing is."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # sums overflow in half precision
    if n == math.inf:
        return scores.amax(dims)
    dead = scores == DEAD
    scores = scores.masked_fill(dead, 0)
    total = (scores.sign() * scores.abs() ** n).sum(dims)
    return (total.sign() * total.abs() ** (1 / n)).masked_fill(dead.all(dims), DEAD)


def _check_norm(n: float) -> None:
    number("n", n, "are numbers above 0, infinity included, such as 1", lambda v: v > 0)


def _dim(dim: int, scores: Tensor) -> int:
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(
            f"dim={dim}: allowed are {-scores.dim()} to {scores.dim() - 1}, the dimensions of the "
            "weight; exclude it, or change dim."
        )
    return dim % scores.dim()
