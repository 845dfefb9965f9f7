"""Criteria: which weights to keep. A criterion turns parameters into scores, higher = keep.

A criterion is any callable `(params, **evidence) -> {name: scores of the parameter's shape}`. `params` maps
names to detached tensors. Scores may be negative; those of dead weights do not matter. Of the evidence it
receives, by keyword, what its signature names (what has a default there is optional):

- `masks`: the masks so far, {name: bool tensor};
- `sparsity`: the fraction of all units that is to be dead after this pruning;
- `initial`: the weights at the start of the first fit, before its first step, {name: tensor};
- `batches`: a list of batches: of the training data, or what `prune` got as `data`;
- `model`: the module, in the mode it was found in; whatever a criterion does to it is undone afterwards;
- `loss`: `(model, batch) -> scalar`: the module's own `training_step`, or `prune`'s `loss` on (input,
  target);
- `forward`: `(model, batch) -> anything`: runs the model on a batch;
- `grads`: the mean over the batches of the gradient of the loss, {name: tensor};
- `generator`: a seeded `torch.Generator`, equal on all ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune.checks import number, whole
from lightning_prune.evidence import Forward, Loss, differentiable, gradients, inputs, mean_gradients
from lightning_prune.layers import Layout, layouts
from lightning_prune.masks import Masks
from lightning_prune.selection import DEAD, Scores, keep_top
from lightning_prune.shards import indices_of, is_sharded, local, placed, settle, sum_of_data
from lightning_prune.shards import whole as all_of
from lightning_prune.updates import inverse_root, is_plain, obs

Params = dict[str, Tensor]
# (weights, and by keyword what it asks for) -> scores
if TYPE_CHECKING:
    Criterion = Callable[Concatenate[Params, ...], Scores]
else:  # LightningCLI reads type hints at run time, and knows no Concatenate
    Criterion = Callable[..., Scores]

# -------------------------------------------------------------------------------- of the weights themselves


def magnitude(params: Params) -> Scores:
    """Magnitude |w| of each weight.

    >>> magnitude({"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([2., 1.])}

    Reference: Han et al. (2015), arXiv:1506.02626.
    """
    return {name: w.abs() for name, w in params.items()}


@dataclass(frozen=True)
class Ln:
    """The n-th power of the magnitude, |w|^n: what a weight adds to the Ln norm of its group.

    Single weights rank as by `magnitude`; groups, sums and buckets of scores differ.

    >>> Ln(n=2)({"w": torch.tensor([-2.0, 3.0])})
    {'w': tensor([4., 9.])}

    Args:
        n: above 0 and finite.

    Reference: Li et al. (2017), arXiv:1608.08710 (n=1 and n=2).
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        number("n", self.n, "are finite numbers above 0, such as 2", lambda v: 0 < v < float("inf"))

    def __call__(self, params: Params) -> Scores:
        return {name: w.abs() ** self.n for name, w in params.items()}


@dataclass(frozen=True)
class Random:
    """Uniform random scores in [0, 1): the same for the same seed, in every round and on every rank.

    >>> scores = Random(seed=0)({"w": torch.zeros(3)})["w"]
    >>> torch.equal(scores, Random(seed=0)({"w": torch.ones(3)})["w"])
    True

    Args:
        seed: of a generator of its own; the global one is left alone.

    Reference: the control of Frankle & Carbin (2019), arXiv:1803.03635, Appendix E.
    """

    seed: int = 0

    def __call__(self, params: Params) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: _uniform(w, generator) for name, w in params.items()}


_PIECE = 1 << 16  # numbers that are drawn together where only a part of them is kept


def _uniform(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers of a weight's shape, lying as it does.

    Of shards each process draws those of all, or the masks would not be those of one process; but it holds
    no more than its own and a few rows.
    """
    if not is_sharded(weight):
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    mine, (first, *others) = indices_of(weight), weight.shape
    part = torch.empty([len(indices) for indices in mine])
    step = max(1, _PIECE // max(1, math.prod(others)))
    for start in range(0, first, step):
        rows = torch.rand((min(step, first - start), *others), generator=generator)
        here = ((mine[0] >= start) & (mine[0] < start + len(rows))).nonzero().flatten()
        rows = rows[mine[0][here] - start]
        for dim, indices in enumerate(mine[1:], 1):
            rows = rows.index_select(dim, indices)
        part[here] = rows
    return placed(part.to(local(weight).device), weight)


# ------------------------------------------------------------ of the weights now and at the start: w and w0


def large_init(params: Params, initial: Params) -> Scores:
    """Large init: |w0|.

    >>> large_init({"w": torch.tensor([9.0, 9.0])}, initial={"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([2., 1.])}

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 3.
    """
    return {name: initial[name].abs() for name in params}


def small_final(params: Params) -> Scores:
    """Small final: -|w|; the largest weights go first.

    >>> small_final({"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([-2., -1.])}

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 3.
    """
    return {name: -w.abs() for name, w in params.items()}


def large_init_large_final(params: Params, initial: Params, masks: Masks) -> Scores:
    """Large init, large final: min(alpha |w|, |w0|).

    The authors' code keeps what is above the same percentile of its layer in both, |w| and |w0|, and so does
    this: the score is the smaller of the two ranks among the layer's living weights, as a fraction in (0, 1].

    >>> now, start = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.1, 0.3, 0.4, 0.2])
    >>> large_init_large_final({"w": now}, {"w": start}, {"w": torch.ones(4, dtype=torch.bool)})
    {'w': tensor([0.2500, 0.7500, 0.5000, 0.2500], dtype=torch.float64)}

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 3.
    """

    def rank(x: Tensor, mask: Tensor) -> Tensor:
        living = x.abs().masked_fill(~mask, DEAD).reshape(-1)
        ranks = living.argsort(stable=True).argsort().double() + 1
        return ((ranks - (~mask).sum()) / mask.sum().clamp_min(1)).view(x.shape)

    return {
        name: torch.minimum(rank(w, masks[name]), rank(initial[name], masks[name]))
        for name, w in params.items()
    }


def magnitude_increase(params: Params, initial: Params) -> Scores:
    """Magnitude increase: |w| - |w0|.

    >>> magnitude_increase({"w": torch.tensor([-2.0, 1.0])}, initial={"w": torch.tensor([0.5, 3.0])})
    {'w': tensor([ 1.5000, -2.0000])}

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 3.
    """
    return {name: w.abs() - initial[name].abs() for name, w in params.items()}


def movement(params: Params, initial: Params) -> Scores:
    """Movement: |w - w0|.

    >>> movement({"w": torch.tensor([-2.0, 1.0])}, initial={"w": torch.tensor([0.5, 3.0])})
    {'w': tensor([2.5000, 2.0000])}

    Reference: Zhou et al. (2019), arXiv:1905.01067, Section 3.
    """
    return {name: (w - initial[name]).abs() for name, w in params.items()}


# ---------------------------------------------------------------------------------- of the loss on the data


def gradient(params: Params, grads: Params) -> Scores:
    """Gradient magnitude |g|, also of the dead: where a connection would help most. RigL grows by it.

    >>> gradient({"w": torch.tensor([0.0, 1.0])}, grads={"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([2., 1.])}

    Reference: Evci et al. (2020), arXiv:1911.11134, Section 3.
    """
    return {name: grads[name].abs() for name in params}


def momentum(params: Params, momentum: Params) -> Scores:
    """Magnitude of the optimizer's momentum, also of the dead. SNFS grows by it.

    >>> momentum({"w": torch.tensor([0.0, 1.0])}, momentum={"w": torch.tensor([-2.0, 1.0])})
    {'w': tensor([2., 1.])}

    Reference: Dettmers & Zettlemoyer (2019), arXiv:1907.04840.
    """
    return {name: momentum[name].abs() for name in params}


def saliency(params: Params, grads: Params) -> Scores:
    """First-order saliency |w * g|, g the mean gradient over the batches.

    >>> saliency({"w": torch.tensor([-2.0, 1.0])}, grads={"w": torch.tensor([0.5, 3.0])})
    {'w': tensor([1., 3.])}

    Reference: Mozer & Smolensky (1989), "Skeletonization".
    """
    return {name: (w * grads[name]).abs() for name, w in params.items()}


def snip(params: Params, grads: Params) -> Scores:
    """Connection sensitivity |w * g| / (sum of |w * g| over all weights), meant for initialization.

    With one batch it is the paper's; prune in round 0, `schedule=Explicit([0.9])`.

    >>> snip({"w": torch.tensor([-2.0, 1.0])}, grads={"w": torch.tensor([0.5, 3.0])})
    {'w': tensor([0.2500, 0.7500])}

    Reference: Lee et al. (2019), arXiv:1810.02340, Equation 6.
    """
    scores = saliency(params, grads)
    total = sum(float(all_of(s.double().sum())) for s in scores.values())
    return {name: s / (total or 1.0) for name, s in scores.items()}


def taylor(params: Params, model: nn.Module, batches: list[Any], loss: Loss) -> Scores:
    """First-order Taylor importance (w * g)^2, its mean over the batches, each with its own gradient g.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 3.0]])]
    >>> taylor({"weight": model.weight.data}, model, batches, loss=lambda m, x: m(x).sum())
    {'weight': tensor([[ 4., 18.]])}

    Reference: Molchanov et al. (2019), arXiv:1906.10771, Equation 8.
    """
    scores = {name: torch.zeros_like(w) for name, w in params.items()}
    for batch in batches:
        for name, g in gradients(params, model, loss, batch).items():
            scores[name] += (params[name] * g).square() / len(batches)
    return scores


@dataclass(frozen=True)
class GraSP:
    """Gradient signal preservation: w * (H g), g the mean gradient and H the Hessian over the batches.

    To remove weights of low w * Hg harms the gradient flow least: the paper's S(-w) = -w * Hg is what is
    removed first. Two passes, both with the logits divided by a temperature. Needs a loss that can be
    differentiated twice.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    >>> loss = lambda m, x: m(x).square().sum() / 2  # H = x x^T, g = H w
    >>> GraSP(temperature=1)({"weight": model.weight.data}, model, [torch.tensor([[1.0, 1.0]])], loss)
    {'weight': tensor([[-2.,  4.]])}

    Args:
        temperature: divides the logits, above 0; the authors' code has 200.
        logits: name of the submodule whose output are the logits; "" is the model itself.

    Raises:
        ValueError: when the loss does not call the module named by `logits`.

    Reference: Wang et al. (2020), arXiv:2002.07376, Equation 8.
    """

    temperature: float = 200.0
    logits: str = ""

    def __post_init__(self) -> None:
        allowed = "are finite numbers above 0, such as 200"
        number("temperature", self.temperature, allowed, lambda v: 0 < v < float("inf"))

    def __call__(self, params: Params, model: nn.Module, batches: list[Any], loss: Loss) -> Scores:
        seen: list[bool] = []

        def cooler(module: nn.Module, args: Any, output: Any) -> Any:
            seen.append(True)
            return output / self.temperature

        modules = dict(model.named_modules())
        if self.logits not in modules:
            raise ValueError(
                f"logits={self.logits!r}: there is no such submodule; allowed are "
                f"{', '.join(filter(None, modules))}, "
                "and '' for the model itself. Name the one that gives the logits."
            )
        handle = modules[self.logits].register_forward_hook(cooler)
        try:
            g = mean_gradients(params, model, loss, batches)
            if not seen:
                raise ValueError(
                    f"logits={self.logits!r}: the loss does not call this module, and its output is "
                    "needed, to be "
                    "divided by the temperature. Name the submodule that gives the logits."
                )
            scores = {name: torch.zeros_like(w) for name, w in params.items()}
            for batch in batches:
                for name, h in _hessian_times(g, model, loss, batch).items():
                    scores[name] += params[name] * h / len(batches)
        finally:
            handle.remove()
        return scores


def _hessian_times(vector: Params, model: nn.Module, loss: Loss, batch: Any) -> Params:
    with differentiable(model, vector) as live:
        leaves = list(live.values())
        g = torch.autograd.grad(loss(model, batch), leaves, create_graph=True, materialize_grads=True)
        product = torch.stack([(a * b).sum() for a, b in zip(g, vector.values(), strict=True)]).sum()
        found = torch.autograd.grad(product, leaves, materialize_grads=True)
    return dict(zip(live, found, strict=True))


def wanda(params: Params, model: nn.Module, batches: list[Any], forward: Forward) -> Scores:
    """Weights and activations: |w| * ||x||_2, x all the inputs that the weight is multiplied with.

    The norm is over the batches, positions and, in a convolution, the places of the kernel. What is compared
    is for the allocation to say: the paper compares within an output, `allocation.per_output`.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    >>> batches = [torch.tensor([[3.0, 0.0], [4.0, 1.0]])]
    >>> wanda({"weight": model.weight.data}, model, batches, forward=lambda m, x: m(x))
    {'weight': tensor([[5., 2.]])}

    Raises:
        ValueError: when a layer is not called with one input: attention reads its weights, for instance.

    Reference: Sun et al. (2024), arXiv:2306.11695, Equation 1.
    """
    squares = input_squares(params, model, batches, forward)
    return {name: w.abs() * squares[name].sqrt() for name, w in params.items()}


def ria(params: Params, model: nn.Module, batches: list[Any], forward: Forward) -> Scores:
    """Relative importance and activations: the parts of |w| in its input and its output * ||x||^a.

    The sums are over all weights that read the same input, and over all that lead to the same output; the
    power a is the paper's 1/2, and x all the inputs that the weight is multiplied with, as in `wanda`. In a
    convolution each position of the kernel counts as an input of its own. No input or output is lost as a
    whole because its weights are small.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -3.0], [1.0, 0.0]]))
    >>> batches = [torch.tensor([[4.0, 9.0]])]
    >>> ria({"weight": model.weight.data}, model, batches, forward=lambda m, x: m(x))
    {'weight': tensor([[1.5000, 5.2500],
            [3.0000, 0.0000]])}

    Raises:
        ValueError: when a layer is not called with one input.

    Reference: Zhang et al. (2024), "Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models", ICLR, Equations 2 and 4.
    """
    squares, laid_out = input_squares(params, model, batches, forward), layouts(model, params)
    scores: Scores = {}
    for name, w in params.items():
        dtype = torch.promote_types(w.dtype, torch.float32)  # sums overflow in half precision
        parts = laid_out[name].split(w.abs().to(dtype))
        of_input, of_output = parts.sum(1, keepdim=True), parts.sum((2, 3), keepdim=True)
        tiny = torch.finfo(dtype).tiny
        relative = parts / of_input.clamp_min(tiny) + parts / of_output.clamp_min(tiny)
        scores[name] = laid_out[name].join(relative, w.shape) * squares[name].to(dtype) ** 0.25
    return scores


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgery in blocks of columns: w^2 / [H^-1]_jj, and the survivors make up for what goes.

    H is the mean of x x^T over the inputs x of a layer. Input after input is pruned in all outputs, the mask
    of `block` of them chosen together, and the weights of later inputs are changed such that the outputs
    change least. So this is no score of weights as they are: it works in `prune(layer_by_layer=True)` alone,
    with single weights or `granularity.NM`, and with counts per layer, `uniform` or `OWL` say. Each block of
    inputs keeps the same fraction.

    Args:
        block: inputs whose mask is chosen together, 1 or more; with N:M the groups are.
        dampening: this part of the mean diagonal of H is added to its diagonal, 0 or more. It makes up for
            inputs that depend on each other, and for fewer tokens than inputs.

    Raises:
        ValueError: when called for scores.

    Reference: Frantar & Alistarh (2023), arXiv:2301.00774, Algorithm 1.
    """

    block: int = 128
    dampening: float = 0.01

    def __post_init__(self) -> None:
        whole("block", self.block, 1, such_as=128)
        allowed = "are numbers from 0 on, such as 0.01"
        number("dampening", self.dampening, allowed, lambda v: 0 <= v < float("inf"))

    def __call__(self, params: Params) -> Scores:
        raise ValueError(
            f"criterion: {self} chooses masks and changes the survivors, one layer after the other, and here "
            "only masks are chosen. Allowed is lp.prune(model, criterion=SparseGPT(), layer_by_layer=True, "
            "data=...). Use that, or another criterion."
        )

    def solve(
        self,
        weight: Tensor,
        moments: Tensor,
        choose: Callable[[int, int, Tensor], Tensor],
        parts: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """The weights and the mask of one matrix of outputs x inputs.

        Args:
            weight: of the matrix.
            moments: H.
            choose: (first input, last + 1, scores) -> which weights of these inputs stay.
            parts: the inputs whose masks are chosen together, in order.
        """
        blocks: list[list[tuple[int, int]]] = []
        for part in parts:
            if not blocks or part[1] - blocks[-1][0][0] > self.block:
                blocks.append([])
            blocks[-1].append(part)
        always_0 = (moments.diagonal() == 0) & bool(moments.any())

        def chosen(start: int, stop: int, scores: Tensor) -> Tensor:
            return choose(start, stop, scores.masked_fill(always_0[start:stop], 0))

        return obs(weight, inverse_root(moments, self.dampening), chosen, blocks)


def input_squares(params: Params, model: nn.Module, batches: list[Any], forward: Forward) -> Params:
    """||x||^2 of all the inputs that each weight is multiplied with, in the weight's shape or one like it.

    Raises:
        ValueError: when a layer is not called with one input.
    """
    squares: Params = {}
    laid_out = layouts(model, params)
    with differentiable(model, params) as live:
        names = {id(p): name for name, p in live.items()}
        owned = {  # FSDP2 computes with others than those that it keeps
            (layer, own): name
            for layer in model.modules()
            for own, p in layer.named_parameters(recurse=False)
            if (name := names.get(id(p)))
        }

        def accumulate(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for own, p in layer.named_parameters(recurse=False):
                if len(args) == 1 and (name := owned.get((layer, own))):
                    found = (_input_squares if is_plain(layer, p) else _weight_squares)(
                        layer, p, args[0], laid_out[name]
                    )
                    found = sum_of_data(found, p, live[name])
                    squares[name] = squares[name] + found if name in squares else found

        handles = [m.register_forward_pre_hook(accumulate) for m in model.modules()]
        try:
            with torch.no_grad():
                for batch in batches:
                    forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
            settle(model)
    if missed := [name for name in params if name not in squares]:
        raise ValueError(
            f"criterion: the layers of {', '.join(missed)} are not called with an input of their own, as is "
            "needed for its norm. Exclude these weights."
        )
    return {
        name: placed(square.expand(local(w).shape), w) if is_sharded(w := params[name]) else square
        for name, square in squares.items()
    }


def _input_squares(layer: nn.Module, p: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The sums of squares of the inputs, along the weight's dimension of inputs."""
    dtype = torch.promote_types(p.dtype, torch.float32)  # sums of squares overflow in half precision
    return x.detach().reshape(-1, x.shape[-1]).to(dtype).square().sum(0).unsqueeze(1 - layout.inputs)


def _weight_squares(layer: nn.Module, p: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """For each weight the sum of the squares of all that it is multiplied with.

    A layer is linear in its weight, so this is the gradient of its output on x^2: strides, padding, groups
    and all.
    """
    with torch.enable_grad(), torch.autocast(p.device.type, enabled=False):
        output = layer.forward(x.detach().to(p.dtype).square())
        return torch.autograd.grad(output.sum(), p)[0]


# ----------------------------------------------------------------------------------------- without any data


@dataclass(frozen=True)
class SynFlow:
    """Iterative synaptic flow: |w * dR/dw|, R the summed output of the network of absolute weights on ones.

    The density falls to the one asked for, 1 - sparsity, in `rounds` equal ratios, and the scores are
    computed anew in each. What dies within gets a score below 0, lower the earlier its round, so the highest
    scores of all tensors together (`global_rank`) are what the iteration keeps.

    No data but the shape of an input. Computed in double precision, in evaluation mode and with absolute
    biases; running means count as 0, so that nothing cancels. Other normalizations that subtract a mean break
    the method.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    >>> _ = model[1].weight.data.fill_(-1.0)
    >>> params = {name: p.data for name, p in model.named_parameters()}
    >>> alive = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    >>> SynFlow(rounds=1, input_shape=(2,))(params, model, alive, sparsity=0.5)["0.weight"]
    tensor([[1., 2.],
            [3., 4.]], dtype=torch.float64)

    Args:
        rounds: of the exponential schedule, 1 or more.
        input_shape: of one input, without the batch. None: that of the model's `example_input_array`, or else
            of the first batch.

    Reference: Tanaka et al. (2020), arXiv:2006.05467, Algorithm 1.
    """

    rounds: int = 100
    input_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole("rounds", self.rounds, 1, such_as=100)

    def __call__(
        self,
        params: Params,
        model: nn.Module,
        masks: Masks,
        sparsity: float,
        batches: list[Any] | None = None,
    ) -> Scores:
        ones = torch.ones(1, *self._shape(model, batches), dtype=torch.float64, device=_device(params))
        tensors = _absolute(model)
        alive = torch.cat([masks[name].reshape(-1) for name in params])
        before, after = int(alive.sum()) / alive.numel(), 1 - sparsity
        scores = torch.full(alive.shape, DEAD, dtype=torch.float64, device=alive.device)
        model.eval()
        for k in range(1, self.rounds if after < before else 1):
            left = round(alive.numel() * before * (after / before) ** (k / self.rounds))
            flow = torch.where(alive, _flow(model, tensors, params, alive, ones), DEAD)
            survivors = keep_top(flow, min(left, int(alive.sum())))
            dying = alive & ~survivors
            # round k has its scores in [k - rounds - 1, k - rounds - 1/2]
            highest = torch.where(dying, flow, 0).max().clamp_min(1e-300)
            scores = torch.where(dying, k - self.rounds - 1 + flow / (2 * highest), scores)
            alive = survivors
        scores = torch.where(alive, _flow(model, tensors, params, alive, ones), scores)
        parts = scores.split([w.numel() for w in params.values()])
        return {name: part.view(w.shape) for (name, w), part in zip(params.items(), parts, strict=True)}

    def _shape(self, model: nn.Module, batches: list[Any] | None) -> tuple[int, ...]:
        if self.input_shape is not None:
            return tuple(self.input_shape)
        example = getattr(model, "example_input_array", None)
        if not isinstance(example, Tensor) and batches:
            example = inputs(batches[0])
        if not isinstance(example, Tensor):
            raise ValueError(
                "input_shape=None: allowed where the model has example_input_array, or with batches. Give "
                "input_shape, without the batch dimension."
            )
        return tuple(example.shape[1:])


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device


def _absolute(model: nn.Module) -> Params:
    """Absolute parameters, and buffers without running means, in double precision."""
    tensors = {name: p.detach().double().abs() for name, p in model.named_parameters()}
    for name, b in model.named_buffers():
        mean = name.rpartition(".")[2] == "running_mean"
        tensors[name] = (torch.zeros_like(b) if mean else b).double() if b.is_floating_point() else b
    return tensors


def _flow(model: nn.Module, tensors: Params, params: Params, alive: Tensor, ones: Tensor) -> Tensor:
    """|w * dR/dw| of all the weights, flat."""
    masks = alive.split([w.numel() for w in params.values()])
    leaves = {
        name: (tensors[name] * mask.view(w.shape)).requires_grad_(True)
        for (name, w), mask in zip(params.items(), masks, strict=True)
    }
    with torch.enable_grad():
        output = functional_call(model, {**tensors, **leaves}, (ones,))
        found = torch.autograd.grad(output.sum(), list(leaves.values()), materialize_grads=True)
    return torch.cat([(w.detach() * g).reshape(-1) for w, g in zip(leaves.values(), found, strict=True)])
