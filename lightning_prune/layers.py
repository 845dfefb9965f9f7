"""Layers: which weights of a network may be pruned, and why the others may not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import final, override

from lightning_prune.tables import table

LAYERS = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "MultiheadAttention",  # whose input projections are weights of its own
    "Conv1D",  # a linear layer of transformers' GPT-2, its weight (inputs, outputs)
)


@dataclass(frozen=True)
class Target:
    """A row of `Targets`: a parameter, whether it may be pruned, and if not, why not."""

    parameter: str
    shape: tuple[int, ...]
    prunable: bool
    why_not: str


@final
class Targets(tuple[Target, ...]):
    """What of a model would be pruned. `print` it for a table."""

    @override
    def __str__(self) -> str:
        sizes = [(math.prod(target.shape), target.prunable) for target in self]
        title = (
            f"{sum(n for n, yes in sizes if yes):,} of {sum(n for n, _ in sizes):,} parameters are prunable"
        )
        return table(title, self)


def targets(
    model: nn.Module,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Targets:
    """Which parameters would be pruned, and why the others would not: `print(targets(model))` is a dry run.

    >>> [(t.parameter, t.why_not) for t in targets(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))][1:3]
    [('0.bias', 'no weight matrix'), ('1.weight', 'BatchNorm1d is not among layers')]

    A parameter is prunable if it is a weight of two dimensions or more, and every module that owns it is of
    one of the types `layers` (a class name, or that of a base class): a head tied to an embedding is left
    alone.

    Args:
        model: any module, on the meta device too. Names are those of its `named_parameters()`.
        layers: class names of layers.
        include: fnmatch patterns over names; only what one of them matches. None: everything.
        exclude: fnmatch patterns over names; nothing that one of them matches.

    Raises:
        ValueError: when a pattern matches no prunable weight, when nothing is left to prune, or when a weight
            is computed from others (weight norm) or not there yet (a lazy layer).
    """
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: a list of class names is needed; write [{layers!r}].")
    why_not: dict[int, list[str]] = {}  # a parameter's, from each of its owners
    unfit: dict[str, str] = {}  # weights that no mask can be put on, and what to do
    for path, module in model.named_modules():
        kind, types = type(module).__name__, {cls.__name__ for cls in type(module).__mro__}
        is_layer = bool(types & {*layers})
        computed = is_layer and "weight" not in module._parameters
        if computed := computed and isinstance(getattr(module, "weight", None), Tensor):
            unfit[f"{path}.weight".lstrip(".")] = "is computed from others; remove its parametrization"
        for name, p in module.named_parameters(recurse=False):
            named = "weight" in name or isinstance(module, (nn.ParameterList, nn.ParameterDict))
            if is_layer and named and is_lazy(p):
                unfit[f"{path}.{name}".lstrip(".")] = "is not there yet; run a batch through the lazy layer"
            why = "" if named and not computed and not is_lazy(p) and p.dim() > 1 else "no weight matrix"
            why = why if is_layer else f"{kind} is not among layers"
            tied = f"tied to {path}: " if why and id(p) in why_not else ""
            why_not.setdefault(id(p), []).append(tied + why)
    found = {name: next(filter(None, why_not[id(p)]), "") for name, p in model.named_parameters()}
    weights = [name for name, why in found.items() if not why]
    candidates = [*weights, *unfit]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: no weight belongs to a layer of the types "
            f"layers={tuple(layers)}. Name its layer types in `layers`."
        )
    included = candidates if include is None else matching(candidates, "include", include)
    excluded = matching(candidates, "exclude", exclude or [])
    for name in unfit:
        if name in included and name not in excluded:
            raise ValueError(f"{name} {unfit[name]} first, or exclude it; plain weights are needed.")
    if not set(included) - set(excluded):
        raise ValueError(
            f"include={_shown(include)}, exclude={_shown(exclude)} leave nothing to prune. "
            f"Prunable weights, of which one is needed: {', '.join(candidates)}. Change the patterns."
        )
    for name in weights:
        found[name] = "excluded" if name in excluded else "" if name in included else "not included"
    shapes = {name: () if is_lazy(p) else tuple(p.shape) for name, p in model.named_parameters()}
    return Targets(Target(name, shapes[name], not why, why) for name, why in found.items())


def prunable(
    model: nn.Module,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Parameter]:
    """The weights of `model` that may be pruned, by name, each once: what `targets` says yes to.

    >>> list(prunable(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))))
    ['0.weight']
    """
    parameters = dict(model.named_parameters())
    rows = targets(model, layers, include, exclude)
    return {row.parameter: parameters[row.parameter] for row in rows if row.prunable}


def matching(names: Sequence[str], argument: str, patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches.

    Raises:
        ValueError: when one of the patterns matches none of the names, or the patterns are a bare string.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r}: a list of patterns is needed; write [{patterns!r}].")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no prunable weight. "
                f"They are: {', '.join(names)}. Name some of these."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _shown(patterns: Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else list(patterns)
