"""Granularity: the units that live and die together: weights, blocks, kernels, filters.

A granularity is any callable `scores -> (unit scores, expand)`: from the scores of one weight tensor it makes
those of its units, of any shape, and `expand` turns a mask of the units into a mask of the weights. One whose
signature has `layout` also gets, by keyword, the `Layout` of the weight: which dimension counts outputs, and
which one inputs. Sparsity, allocation and ties then speak of units. Where each unit lies within one output,
or within one row of blocks, dimension 0 of the units counts these; elsewhere units are a vector. The score of
a dead weight, and of a unit without living weights, is minus infinity.

Scores of units are Ln norms of the scores of their weights, taken per weight, (sum s^n / size)^(1/n), so that
units of different sizes compare; n = inf: the highest. Dead weights add nothing to the sum, and count in the
size. With the criterion `magnitude` units of one size rank by the Ln norms of the weights. A negative score
counts as -|s|^n.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checks import named, number, whole
from lightning_prune.evidence import call
from lightning_prune.layers import Layout
from lightning_prune.selection import DEAD

Expand = Callable[[Tensor], Tensor]
Granularity = Callable[..., tuple[Tensor, Expand]]


def units(granularity: Granularity, scores: Tensor, layout: Layout | None = None) -> tuple[Tensor, Expand]:
    """The scores of the units of one weight tensor, and how a mask of units becomes one of weights.

    >>> scores, expand = units(Filter(), torch.tensor([[1.0, 3.0], [2.0, 0.0]]), Layout(outputs=1, inputs=0))
    >>> scores, expand(torch.tensor([True, False]))
    (tensor([1.5000, 1.5000]), tensor([[ True, False],
            [ True, False]]))

    Args:
        granularity: is called with what it asks for.
        scores: of single weights, minus infinity where they are dead.
        layout: of the weight. None: outputs first, then inputs.

    Raises:
        ValueError: when the granularity is none, or does not give what one has to.
    """
    check(granularity)
    found: Any = call(granularity, scores, layout=layout or Layout())
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
        raise ValueError(
            f"granularity: {named(granularity)} gave {type(found).__name__}; a pair (scores of the "
            "units, function from a mask of the units to one of the weights) is needed. Return both."
        )
    of_units, expand = found

    def expand_checked(mask: Tensor) -> Tensor:
        weights: Tensor = expand(mask)
        if weights.shape != scores.shape or weights.dtype != torch.bool:
            raise ValueError(
                f"granularity: {named(granularity)} expands to {weights.dtype} of the shape "
                f"{tuple(weights.shape)}; "
                f"a bool mask of the weight's shape {tuple(scores.shape)} is needed. Mend its expand."
            )
        return weights

    return of_units, expand_checked


def check(granularity: object) -> None:
    """Refuse what is no granularity.

    Raises:
        ValueError: then.
    """
    if isinstance(granularity, type) or not callable(granularity):
        given = f"the class {granularity.__name__}" if isinstance(granularity, type) else repr(granularity)
        hint = f"{granularity.__name__}()" if isinstance(granularity, type) else "Filter(), or another of"
        raise ValueError(
            f"granularity: {given} is given; allowed are callables such as granularity.single, and instances "
            f"such as {hint} of lightning_prune.granularity. Give one of these."
        )


def within_outputs(granularity: object) -> bool:
    """Whether units are known to lie within one output each, which dimension 0 of the units counts.

    >>> within_outputs(NM(2, 4)), within_outputs(Filter(dim=1))
    (True, False)
    """
    match granularity:
        case NM() | Kernel() | Filter(dim=0) | Block(rows=1):
            return True
        case _:
            return granularity is single


def single(scores: Tensor) -> tuple[Tensor, Expand]:
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
    is no unit: it stays dense and does not count in the sparsity. Inputs are those of the layer, whatever the
    dimension of the weight that counts them, and in a grouped convolution those of one group.

    >>> import lightning_prune as lp
    >>> model = torch.nn.Linear(5, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1]]))
    >>> lp.prune(model, sparsity=0.5, granularity=NM(2, 4))["weight"]
    tensor([[False,  True,  True, False,  True]])

    Args:
        n: survivors of a group, 1 ... m - 1.
        m: length of a group.

    Reference: Zhou et al. (2021), arXiv:2102.04010; Mishra et al. (2021), arXiv:2104.08378.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise ValueError(
                f"n={self.n}, m={self.m}: allowed are whole numbers with 1 <= n < m, such as 2 and 4."
            )

    def __call__(self, scores: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        groups, expand = self.rows(scores, layout)
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        matrices, outputs, inputs, positions = layout.split(scores).shape
        shape = matrices * outputs, positions * (inputs // self.m), self.m
        return groups.masked_fill(rank >= self.n, DEAD).reshape(shape), expand

    def rows(self, weight: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        """A matrix of one row for each group, and how a mask of it becomes one of the weight.

        >>> NM(1, 2).rows(torch.tensor([[1, 2, 3, 4, 5]]))[0]
        tensor([[1, 2],
                [3, 4]])
        """
        rows = layout.split(weight).movedim(2, -1)
        full = rows.shape[-1] // self.m * self.m

        def expand(mask: Tensor) -> Tensor:
            weights = torch.ones(rows.shape, dtype=torch.bool, device=weight.device)
            weights[..., :full] = mask.reshape(*rows.shape[:-1], full)
            return layout.join(weights.movedim(-1, 2), weight.shape)

        return rows[..., :full].reshape(-1, self.m), expand


@dataclass(frozen=True)
class Block:
    """Blocks of the weight as a matrix of outputs x (inputs * kernel positions).

    At the edges blocks are smaller where the matrix does not divide. Each group of a convolution and each
    expert is a matrix of its own.

    >>> Block(1, 2)(torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 1.0]]))[0]
    tensor([[1.5000, 5.0000],
            [0.5000, 1.0000]])

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

    def __call__(self, scores: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        parts = layout.split(scores)
        matrices, height, inputs, positions = parts.shape
        width = inputs * positions
        edges = (0, -width % self.columns, 0, -height % self.rows)
        padded = torch.nn.functional.pad(parts.reshape(matrices, height, width), edges, value=DEAD)
        blocks = padded.unflatten(2, (-1, self.columns)).unflatten(1, (-1, self.rows))
        across, down = blocks.shape[3], blocks.shape[1]
        sizes = _lengths(height, self.rows, down)[:, None] * _lengths(width, self.columns, across)

        def expand(mask: Tensor) -> Tensor:
            tall = mask.view(matrices, down, across).repeat_interleave(self.rows, 1)
            wide = tall.repeat_interleave(self.columns, 2)[:, :height, :width]
            return layout.join(wide.reshape(parts.shape), scores.shape)

        return _norm(blocks, (2, 4), self.n, sizes.to(scores.device)).flatten(0, 1), expand


@dataclass(frozen=True)
class Kernel:
    """Kernels: the weights from one input to one output channel of a convolution; elsewhere single weights.

    >>> Kernel()(torch.arange(8.0).view(1, 2, 2, 2))[0]
    tensor([[1.5000, 5.5000]])

    Args:
        n: of the Ln norm, above 0.

    Reference: Mao et al. (2017), arXiv:1705.08922, "kernel-level (2-D)".
    """

    n: float = 1

    def __post_init__(self) -> None:
        _check_norm(self.n)

    def __call__(self, scores: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        if scores.dim() <= 2 + layout.experts:
            return layout.rows(scores), lambda mask: layout.from_rows(mask, scores.shape)
        parts = layout.split(scores)
        return _norm(parts, (3,), self.n, parts.shape[3]).flatten(0, 1), lambda mask: layout.join(
            mask.view(*parts.shape[:3], 1).expand(parts.shape), scores.shape
        )


@dataclass(frozen=True)
class Filter:
    """Whole filters or neurons (dim=0), or all that reads one input channel (dim=1), as masks.

    Outputs and inputs are those of the layer, whatever the dimension of the weight that counts them; a group
    of a convolution and an expert have outputs and inputs of their own. Biases and the layers after it stay
    as they are; `StructuredChannelPruning` removes channels instead.

    The outputs of a network's last layer are filters, too: a class that loses its weights is predicted from
    its bias alone. Exclude that layer; where it is told, from the order of the layers, a warning names it.

    Under `global_rank` filters of different layers compare by their mean scores, so a layer whose weights are
    small as a whole loses more of its filters; `uniform` takes the same fraction of each layer.

    >>> Filter(dim=0, n=2)(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))[0]
    tensor([3.5355, 0.7071])

    Args:
        dim: 0: units are outputs; 1: units are inputs.
        n: of the Ln norm, above 0.

    Reference: Li et al. (2017), arXiv:1608.08710 (dim=0, n=1).
    """

    dim: int = 0
    n: float = 1

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or self.dim not in (0, 1):
            raise ValueError(
                f"dim={self.dim!r}: allowed are 0, outputs of the layer, and 1, inputs. Give one."
            )
        _check_norm(self.n)

    def __call__(self, scores: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        if layout.head and self.dim == 0:
            warnings.warn(
                f"granularity: {self} prunes whole outputs, and those of the last layer, of which the weight "
                f"has the shape {tuple(scores.shape)}, too. If they are classes, exclude that layer.",
                stacklevel=2,
            )
        parts = layout.split(scores)
        own, other = self.dim + 1, 2 - self.dim
        size = parts.shape[other] * parts.shape[3]
        kept = [parts.shape[0], *(parts.shape[d] if d == own else 1 for d in (1, 2)), 1]
        return _norm(parts, (other, 3), self.n, size).flatten(), lambda mask: layout.join(
            mask.view(kept).expand(parts.shape), scores.shape
        )


def _norm(scores: Tensor, dims: tuple[int, ...], n: float, size: Tensor | int) -> Tensor:
    """The Ln norm per weight over `dims` of units of `size` weights, minus infinity where none is alive."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # sums overflow in half precision
    if n == math.inf:
        return scores.amax(dims)
    dead = scores == DEAD
    scores = scores.masked_fill(dead, 0)
    mean = (scores.sign() * scores.abs() ** n).sum(dims) / size
    return (mean.sign() * mean.abs() ** (1 / n)).masked_fill(dead.all(dims), DEAD)


def _lengths(total: int, each: int, pieces: int) -> Tensor:
    """Lengths of the pieces that something is cut into: all alike but the last."""
    return torch.tensor([min(each, total - i * each) for i in range(pieces)])


def _check_norm(n: float) -> None:
    number("n", n, "are numbers above 0, infinity included, such as 1", lambda v: v > 0)
