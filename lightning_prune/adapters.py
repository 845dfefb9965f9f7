"""Adapters of a pruned network: low-rank updates that are masked as its weights are.

Merging an ordinary adapter brings the zeros back, and pruning the merged weights undoes what was trained.
Here the mask is on the product of the two factors while they train, so what is merged is what was trained.
"""

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import final, override

from lightning_prune.checks import number, whole
from lightning_prune.masks import bits as bits_of
from lightning_prune.masks import masks_of, zero_dead_
from lightning_prune.shards import is_sharded


@final
class LowRank(nn.Module):
    """weight -> weight + scale * up @ down where the mask is True, and +0.0 elsewhere.

    Args:
        weight: of any shape; a row of its matrix is all that belongs to one place of the first dimension.
        mask: True = alive.
        rank: of the update.
        scale: of the update.
        generator: draws `down` as `nn.Linear` draws its weight; `up` is 0, so nothing changes at first.
    """

    mask: Tensor

    def __init__(
        self, weight: nn.Parameter, mask: Tensor, rank: int, scale: float, generator: Generator
    ) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        bound = 1 / math.sqrt(columns)
        down = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter(down.to(weight))
        self.scale, self.trained = scale, weight.requires_grad
        self.register_buffer("mask", mask, persistent=False)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        update = self.scale * (self.up @ self.down).view_as(weight)
        return torch.where(self.mask, weight + update, torch.zeros_like(weight))


def attach(
    model: nn.Module, masks: Mapping[str, Tensor], rank: int = 8, *, scale: float = 1.0, seed: int = 0
) -> None:
    """Freeze masked weights and give each a low-rank update that is masked as the weight is.

    The weights stay where they are; their modules compute with weight + mask * scale * up @ down, and `up`
    and `down` of each are parameters of the model. Make the optimizer afterwards; call `merge` in the end.

    >>> import lightning_prune as lp
    >>> model = nn.Linear(4, 2)
    >>> masks = lp.prune(model, 0.5)
    >>> attach(model, masks, rank=1)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['bias', 'parametrizations.weight.0.up', 'parametrizations.weight.0.down']
    >>> merge(model)
    >>> [name for name, p in model.named_parameters()], int((model.weight == 0).sum())
    (['bias', 'weight'], 4)

    Args:
        model: any module. Other parameters stay as they are: freeze those that must not be trained.
        masks: {parameter name: bool tensor of its shape, True = alive}, such as `prune` returns them.
        rank: of each update, at least 1.
        scale: of each update; LoRA's alpha / rank.
        seed: of the generator that draws `down`. The global one is not used.

    Raises:
        ValueError: for a name that is not that of a parameter, a mask that does not fit, a weight of fewer
            than two dimensions, one that is shared or sharded. The model is then as it was.

    Reference:
        Zimmer et al., 2023, "PERP: Rethinking the prune-retrain paradigm in the era of LLMs" (MaskLoRA),
        arXiv:2312.15230.
    """
    whole("rank", rank, 1, such_as=8)
    number(
        "scale", scale, "are finite numbers other than 0, such as 1.0", lambda s: math.isfinite(s) and s != 0
    )
    whole("seed", seed, 0)
    parameters = dict(model.named_parameters())
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(name)
    fitted = masks_of(parameters, masks, "model's")
    for name in fitted:
        if len(names := places[id(parameters[name])]) > 1:
            raise ValueError(
                f"masks: {name} is shared by {', '.join(names)}, and an adapter would change one of them. "
                "Allowed are weights of one place. Leave it out."
            )
        if parameters[name].dim() < 2 or is_sharded(parameters[name]):
            why = "sharded" if is_sharded(parameters[name]) else f"of {parameters[name].dim()} dimensions"
            raise ValueError(
                f"masks: {name} is {why}; allowed are whole weights of two dimensions or more. Leave it out."
            )
    generator = Generator().manual_seed(seed)
    for name, mask in fitted.items():
        path, _, own = name.rpartition(".")
        weight = parameters[name]
        zero_dead_(weight, bits_of(mask, like=weight))
        update = LowRank(weight, mask, rank, scale, generator)
        weight.requires_grad_(False)
        parametrize.register_parametrization(model.get_submodule(path), own, update)


def merge(model: nn.Module) -> None:
    """Add the updates of `attach` to their weights, to the bit as they were computed, and take them away.

    Names, shapes and identity of the parameters are those before `attach`; dead weights are +0.0.

    Args:
        model: to which adapters were attached.

    Raises:
        ValueError: when no adapter is attached.
    """
    found: list[tuple[nn.Module, str, LowRank]] = []
    for module in model.modules():
        steps = dict(module.named_children()).get("parametrizations")
        for own, chain in steps.named_children() if isinstance(steps, nn.ModuleDict) else ():
            found += [(module, own, step) for step in chain.children() if isinstance(step, LowRank)]
    if not found:
        raise ValueError(
            "model: it has no adapters to merge; allowed are models to which adapters.attach gave some. Call "
            "adapters.attach(model, masks) and train first."
        )
    for module, own, step in found:
        parametrize.remove_parametrizations(module, own, leave_parametrized=True)
        weight = module.get_parameter(own)
        weight.requires_grad_(step.trained)
