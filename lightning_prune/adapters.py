"""Adapters of a pruned network: low-rank updates that are masked as its weights are.

Merging an ordinary adapter brings the zeros back, and pruning the merged weights undoes what was trained.
Here the mask is on the product of the two factors while they train, so what is merged is what was trained.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import final, override

from lightning_prune.checks import number, whole
from lightning_prune.masks import bits as bits_of
from lightning_prune.masks import masks_of, zero_dead_
from lightning_prune.shards import is_sharded, settle


@final
class LowRank(nn.Module):
    """weight -> weight + scale * up @ down where the mask is True, and +0.0 elsewhere. Autocast is left out.

    Args:
        weight: of any shape; a row of its matrix is all that belongs to one place of the first dimension.
        mask: True = alive.
        rank: of the update, or less where the matrix has no more.
        scale: of the update.
        generator: draws `down` as `nn.Linear` draws its weight; `up` is 0, so nothing changes at first.
        order: the names of the parameters of the module that has the weight.
    """

    mask: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        mask: Tensor,
        rank: int,
        scale: float,
        generator: Generator,
        order: Sequence[str],
    ) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank, bound = min(rank, rows, columns), 1 / math.sqrt(max(1, columns))
        down = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter(down.to(weight))
        self.scale, self.trained, self.order = scale, weight.requires_grad, tuple(order)
        self.register_buffer("mask", mask.clone())

    @override
    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # else it would be another where it is merged
            update = self.scale * (self.up @ self.down).view(weight.shape)
            return torch.where(self.mask, weight + update, torch.zeros_like(weight))


def attach(
    model: nn.Module, masks: Mapping[str, Tensor], rank: int = 8, *, scale: float = 1.0, seed: int = 0
) -> None:
    """Freeze masked weights and give each a low-rank update that is masked as the weight is.

    The weights stay where they are; their modules compute with weight + mask * scale * up @ down, and `up`
    and `down` of each are parameters of the model. Make the optimizer afterwards; call `merge` in the end.
    Until then names in a `state_dict` are others, and it has the masks too: merge before you save for others.

    >>> import lightning_prune as lp
    >>> model = nn.Linear(4, 2)
    >>> masks = lp.prune(model, 0.5)
    >>> attach(model, masks, rank=1)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['bias', 'parametrizations.weight.0.up', 'parametrizations.weight.0.down']
    >>> merge(model)
    >>> [name for name, p in model.named_parameters()], int((model.weight == 0).sum())
    (['weight', 'bias'], 4)

    Args:
        model: any module. Other parameters stay as they are: freeze those that must not be trained.
        masks: {parameter name: bool tensor of its shape, True = alive}, such as `prune` returns them.
        rank: of each update, at least 1; of a matrix that has fewer rows or columns, as many as these.
        scale: of each update; LoRA's alpha / rank.
        seed: of the generator that draws `down`. The global one is not used.

    Raises:
        ValueError: for a name that is not that of a parameter, a mask that does not fit, a weight of fewer
            than two dimensions or of 8 bits, one that is shared or sharded. The model is then as it was.

    Reference:
        Zimmer et al., 2023, "PERP: Rethinking the prune-retrain paradigm in the era of LLMs" (MaskLoRA),
        arXiv:2312.15230.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: allowed are modules. Give one.")
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(
            f"masks={masks!r}: allowed are masks by name, as lightning_prune.prune returns them. Give those."
        )
    whole("rank", rank, 1, such_as=8)
    number(
        "scale", scale, "are finite numbers other than 0, such as 1.0", lambda s: math.isfinite(s) and s != 0
    )
    whole("seed", seed, 0)
    parameters = settle(model)
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(name)
    fitted = masks_of(parameters, masks, "model's")
    for name in fitted:
        if why := _unfit(parameters[name], places[id(parameters[name])]):
            raise ValueError(
                f"masks: {name} is {why}; allowed are whole weights of one place, of two dimensions or more "
                "and of 16 to 64 bits a number. Leave it out."
            )
    generator = Generator().manual_seed(seed)
    for name, mask in fitted.items():
        path, _, own = name.rpartition(".")
        module, weight = model.get_submodule(path), parameters[name]
        zero_dead_(weight, bits_of(mask, like=weight))
        order = [n for n, _ in module.named_parameters(recurse=False)]
        update = LowRank(weight, mask, rank, scale, generator, _first_order(module) or order)
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, own, update)


def _unfit(weight: nn.Parameter, names: Sequence[str]) -> str:
    """Why a weight can have no adapter, if it cannot."""
    if len(names) > 1:
        return f"shared by {', '.join(names)}"
    if is_sharded(weight):
        return "sharded"
    if weight.dim() < 2:
        return f"of {weight.dim()} dimensions"
    return "" if weight.is_floating_point() and weight.itemsize > 1 else f"of {weight.dtype}"


def merge(model: nn.Module) -> None:
    """Add the updates of `attach` to their weights, to the bit as they were computed, and take them away.

    Names, order, shapes and identity of the parameters are those before `attach`; dead weights are +0.0.

    Args:
        model: to which adapters were attached.

    Raises:
        ValueError: when no adapter is attached, or an update is not finite. The model is then as it was.
    """
    found = {path: module for path, module in model.named_modules() if _attached(module)}
    if not found:
        raise ValueError(
            "model: it has no adapters to merge; allowed are models to which adapters.attach gave some. Call "
            "adapters.attach(model, masks) and train first."
        )
    with torch.no_grad():
        merged = {
            path: {own: getattr(module, own) for own in _attached(module)} for path, module in found.items()
        }
    unusable = [
        f"{path}.{own}".lstrip(".")
        for path, values in merged.items()
        for own, value in values.items()
        if not bool(value.isfinite().all())
    ]
    if unusable:
        raise ValueError(
            f"model: the updates of {', '.join(unusable)} are not finite; allowed are finite numbers. Train "
            "with a lower learning rate, or go back to an earlier checkpoint."
        )
    for path, module in found.items():
        _replace(module, merged[path])


def _attached(module: nn.Module) -> dict[str, LowRank]:
    """The adapters of a module's own weights, by their names."""
    steps = dict(module.named_children()).get("parametrizations")
    if not isinstance(steps, nn.ModuleDict):
        return {}
    chains = {own: list(chain.children()) for own, chain in steps.named_children()}
    return {own: chain[0] for own, chain in chains.items() if chain and isinstance(chain[0], LowRank)}


def _first_order(module: nn.Module) -> tuple[str, ...]:
    """The order of parameters before the first adapter came."""
    return next((step.order for step in _attached(module).values()), ())


def _replace(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let a module have weights instead of their parametrizations, in the order of before.

    Not by torch's `remove_parametrizations`, which takes the property away from the class: it is that of
    copies of the module, too.
    """
    steps, order, parametrizations = (
        _attached(module),
        _first_order(module),
        module.get_submodule("parametrizations"),
    )
    assert isinstance(parametrizations, nn.ModuleDict)
    weights = {own: parametrizations[own].get_parameter("original") for own in values}
    if set(parametrizations) == set(values):
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    else:  # the class is needed for those of others
        for own in values:
            parametrize.remove_parametrizations(module, own, leave_parametrized=True)
    for own, weight in weights.items():
        with torch.no_grad():
            weight.copy_(values[own])
        weight.requires_grad_(steps[own].trained)
        module.register_parameter(own, weight)
    there = dict(module.named_parameters(recurse=False))
    for own in order:
        if own in there:
            delattr(module, own)
            module.register_parameter(own, there[own])
