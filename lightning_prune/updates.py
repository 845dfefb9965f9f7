"""What survivors become: the weights of a layer that make up for the dead ones, given what reaches the layer.

All of this is about matrices of outputs x inputs: a linear layer is one, a convolution has one for each of
its groups, with as many inputs as channels times positions of the kernel. How much an output changes when its
weights change by d is d H d^T, H the mean over the data of x x^T, x the inputs: `moments`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import final, override

from lightning_prune.checks import whole
from lightning_prune.evidence import Forward
from lightning_prune.layers import Layout

# (weights, mask, moments), of outputs x inputs and of inputs x inputs -> weights, 0 where the mask is False
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------ matrices


def matrices(weight: Tensor, layout: Layout) -> Tensor:
    """A weight as (matrices, outputs, inputs), a row of positions after positions, each of all channels.

    >>> matrices(torch.arange(4).view(1, 2, 2), Layout())
    tensor([[[0, 2, 1, 3]]])
    """
    return layout.split(weight).transpose(2, 3).flatten(2)


def from_matrices(values: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Undo `matrices` for a weight of this shape."""
    count, outputs, inputs, positions = layout.split(torch.empty(shape, device="meta")).shape
    return layout.join(values.view(count, outputs, positions, inputs).transpose(2, 3), shape)


def patches(layer: nn.Module, own: str, layout: Layout, x: Tensor) -> Tensor:
    """The inputs that reach each row of a layer's `matrices`: (matrices, samples, inputs).

    A layer is linear in its weight: with a weight that picks one input, its output is this input, wherever
    strides, padding, dilation and groups put it.
    """
    weight = layer.get_parameter(own)
    if is_plain(layer, weight):
        return x.reshape(1, -1, x.shape[-1])
    count, _, inputs, positions = layout.split(weight).shape
    size = inputs * positions
    shape = list(weight.shape)
    shape[layout.outputs] = size if layout.outputs else size * count
    picks = torch.eye(size, dtype=x.dtype, device=x.device).repeat(count, 1, 1)
    ones = from_matrices(picks, layout, torch.Size(shape))
    tensors = {f"layer.{own}": ones}
    if getattr(layer, "bias", None) is not None:
        tensors["layer.bias"] = ones.new_zeros(size * count)
    output = functional_call(_WithoutHooks(layer), tensors, (x,))
    channels = -1 - (weight.dim() - 2)
    return output.movedim(channels, 0).reshape(count, size, -1).transpose(1, 2)


@final
class _WithoutHooks(nn.Module):
    """A layer, without what waits for it to be called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


def is_plain(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a layer is a product of its input with one matrix."""
    forward = type(layer).forward
    names = {kind.__name__ for kind in type(layer).__mro__}  # FSDP2 makes classes of its own
    return weight.dim() == 2 and (forward is nn.Linear.forward or "Conv1D" in names)


@dataclass(frozen=True)
class Moments:
    """The mean of x x^T over the inputs x of each matrix, and over how many."""

    mean: Tensor  # (matrices, inputs, inputs)
    samples: int


def moments(
    names: Sequence[str],
    layouts: dict[str, Layout],
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
) -> dict[str, Moments]:
    """Of layers that one input reaches; those that are plain products share what is held.

    In float32, or in float64 where the weights are.

    Raises:
        ValueError: when a layer is not called with one input, or with NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    waiting = {id(parameters[name]): name for name in names}
    sums: dict[str, Tensor] = {}
    samples: dict[str, int] = {}
    same: dict[str, str] = {}  # layers whose input another one's moments are of

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        for own, p in layer.named_parameters(recurse=False):
            if len(args) != 1 or not (name := waiting.get(id(p))):
                continue
            if is_plain(layer, p) and same.setdefault("", name) != name:
                same[name] = same[""]
                continue
            dtype = torch.promote_types(p.dtype, torch.float32)
            with torch.autocast(p.device.type, enabled=False):
                for x in _inputs(layer, own, layouts[name], args[0].detach().to(dtype)):
                    found = x.mT @ x
                    sums[name] = sums[name].add_(found) if name in sums else found
                    samples[name] = samples.get(name, 0) + x.shape[1]

    owners = [m for m in model.modules() if any(id(p) in waiting for p in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(add) for module in owners]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    same.pop("", None)
    found: dict[str, Moments] = {}
    for name in names:
        source = same.get(name, name)
        if source not in sums:
            raise ValueError(
                f"the layer of {name} is not called with an input of its own, as is needed for its inputs' "
                "moments. Exclude this weight. Nothing was pruned."
            )
        if source == name and not bool(torch.isfinite(sums[source]).all()):
            raise ValueError(
                f"what reaches the layer of {name} holds NaN or infinity; allowed are finite numbers. Look "
                "at the data, or run the model in float32 or bfloat16. Nothing was pruned."
            )
        if source == name:
            found[name] = Moments(sums[source].div_(max(1, samples[source])), samples[source])
        else:
            found[name] = found[source]
    return found


def _inputs(layer: nn.Module, own: str, layout: Layout, x: Tensor) -> list[Tensor]:
    """`patches` of a few examples at a time: there are as many as positions of a kernel times the input."""
    weight = layer.get_parameter(own)
    few = max(1, (1 << 24) // max(1, math.prod(x.shape[1:]) * math.prod(weight.shape[2:])))
    if is_plain(layer, weight) or x.dim() < weight.dim():
        return [patches(layer, own, layout, x)]
    return [patches(layer, own, layout, part) for part in x.split(few)]


# ------------------------------------------------------------------------------------------- optimal updates


def inverse_root(moments: Tensor, dampening: float) -> Tensor:
    """The upper triangular U with U^T U = (H + dampening * mean diagonal of H)^-1.

    Inputs that are always 0 count as if they were independent of the others. Where the sum is singular in
    this precision, it is dampened ten times as much, until it is not.
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.mean()) or 1.0
    damped = moments + torch.diag(torch.where(diagonal == 0, mean, 0.0))
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    while True:
        # J (H) J = L L^T, J the reversal, so H = (J L J) (J L J)^T, of which the root is upper triangular
        lower, failed = torch.linalg.cholesky_ex((damped + dampening * mean * identity).flip(0, 1))
        if not int(failed):
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        dampening = max(10 * dampening, 10 * torch.finfo(moments.dtype).eps)


def obs(
    weight: Tensor,
    root: Tensor,
    choose: Callable[[int, int, Tensor], Tensor],
    blocks: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Tensor, Tensor]:
    """Prune column after column, and let the columns to the right make up for what is lost: weights, mask.

    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that are nearly alike
    >>> keep_second = lambda start, stop, scores: torch.tensor([[False, True]])
    >>> weights, _ = obs(torch.ones(1, 2), inverse_root(H, 0), keep_second, [[(0, 2)]])
    >>> [round(w, 4) for w in weights[0].tolist()]
    [0.0, 1.9]

    Args:
        weight: outputs x inputs.
        root: of the inverse Hessian, from `inverse_root`.
        choose: (first column, last + 1, scores of the weights in these columns, as they are by then) -> who
            stays. A score is w^2 / U_jj^2: by how much the error grows at least when the weight goes.
        blocks: lists of parts of the columns, in order. The mask of a part is chosen when its turn has come;
            what is lost reaches the columns after the block when the block is done.

    Reference: Frantar & Alistarh (2023), arXiv:2301.00774, Algorithm 1.
    """
    columns = weight.mT.contiguous()  # a column is a row here: what is changed together lies together
    mask = torch.ones(columns.shape, dtype=torch.bool, device=columns.device)
    diagonal = root.diagonal()
    for block in blocks:
        first, last = block[0][0], block[-1][1]
        errors = torch.empty_like(columns[first:last])
        for start, stop in block:
            scores = (columns[start:stop] / diagonal[start:stop, None]).square().mT
            mask[start:stop] = choose(start, stop, scores).mT
            for j in range(start, stop):
                error = errors[j - first]
                torch.div(columns[j], diagonal[j], out=error).masked_fill_(mask[j], 0)
                columns[j].masked_fill_(~mask[j], 0)
                columns[j + 1 : last].addr_(root[j, j + 1 : last], error, alpha=-1)
        columns[last:].addmm_(root[first:last, last:].mT, errors, alpha=-1)
    return columns.mT.contiguous(), mask.mT.contiguous()


@dataclass(frozen=True)
class LeastSquares:
    """Survivors that change the outputs of their layer least: the least squares fit to the dense weights.

    By conjugate gradients on all outputs at once, from the dense weights without the dead: every step lowers
    the error of every output, so none is larger than before, however singular the moments are.

    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that are nearly alike
    >>> LeastSquares()(torch.ones(1, 2), torch.tensor([[False, True]]), H)
    tensor([[0.0000, 1.9000]])

    Args:
        steps: at most so many; as many as an output has survivors are exact, fewer are nearly so.

    Reference: Hestenes & Stiefel (1952); for pruned layers Meng et al. (2024), arXiv:2406.07831.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1, such_as=50)

    def __call__(self, weight: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
        diagonal = moments.diagonal()
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)  # of inputs that are always 0: left alone
        fit = weight * mask
        residual = (weight - fit) @ moments * mask
        direction = residual * inverse
        product = (residual * direction).sum(1, keepdim=True)
        enough = product * torch.finfo(weight.dtype).eps ** 2
        for _ in range(self.steps):
            forward = direction @ moments * mask
            curvature = (direction * forward).sum(1, keepdim=True)
            step = torch.where((product > enough) & (curvature > 0), product / curvature, 0)
            if not bool(step.any()):
                break
            fit += step * direction
            residual -= step * forward
            scaled = residual * inverse
            following = (residual * scaled).sum(1, keepdim=True)
            direction = scaled + torch.where(product > 0, following / product, 0) * direction
            product = following
        return fit


def no_worse(fit: Tensor, start: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """Of each output the fit, or the start where that changes the output of `weight` less."""
    errors = [((w - weight) @ moments * (w - weight)).sum(1, keepdim=True) for w in (fit, start)]
    return torch.where(errors[0] <= errors[1], fit, start)  # NaN compares false
