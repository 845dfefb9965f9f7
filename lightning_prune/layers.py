"""Layers: which weights of a network may be pruned, why the others may not, and how a weight is laid out."""

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import final, override

from lightning_prune.shards import settle
from lightning_prune.tables import html_table, table

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
    "*Experts",  # the linear layers of a mixture of experts as one tensor each, in transformers
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_MATRIX = {"bias", "biases", "scale", "scales", "gain"}  # words in names of what is no matrix

# Types of layers that keep matrices as inputs x outputs, and do not say so in an attribute `is_transposed`.
_INPUTS_FIRST = {
    "Conv1D",
    "Llama4TextExperts",
    "GptOssExperts",
    "OpenAIPrivacyFilterExperts",
    "AriaExperts",
    "AriaGroupedExpertsGemm",
}


# ------------------------------------------------------------------------------------------- what is prunable


@dataclass(frozen=True)
class Target:
    """A row of `Targets`: a parameter, whether it may be pruned, and if not, why not."""

    parameter: str
    shape: tuple[int, ...]
    prunable: bool
    why_not: str


@final
class Targets(tuple[Target, ...]):
    """What of a model would be pruned. `print` it for a table; a notebook shows it as one."""

    @property
    def _title(self) -> str:
        sizes = [(math.prod(target.shape), target.prunable) for target in self]
        return (
            f"{sum(n for n, yes in sizes if yes):,} of {sum(n for n, _ in sizes):,} parameters are prunable"
        )

    @override
    def __str__(self) -> str:
        return table(self._title, self)

    def _repr_html_(self) -> str:
        return html_table(self._title, self)


def targets(
    model: nn.Module,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Targets:
    """Which parameters would be pruned, and why the others would not: `print(targets(model))` is a dry run.

    >>> [(t.parameter, t.why_not) for t in targets(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))][1:3]
    [('0.bias', 'no weight matrix'), ('1.weight', 'BatchNorm1d is not in layers=')]

    A parameter is prunable if it is a weight of two dimensions or more, and every module that owns it is of
    one of the types `layers` (a class name, or that of a base class): a head tied to an embedding is left
    alone. Weights are the parameters with "weight" in their names. A module that has none by that name, such
    as experts with `gate_up_proj` and `down_proj`, has as weights its parameters of the most dimensions,
    biases and scales excepted.

    Args:
        model: any module, on the meta device too. Names are those of its `named_parameters()`.
        layers: class names of layers, or fnmatch patterns over them. Those of `LAYERS` need not occur in the
            model; others must.
        include: fnmatch patterns over names; only what one of them matches. None: everything.
        exclude: fnmatch patterns over names; nothing that one of them matches.

    Raises:
        ValueError: when an entry of `layers` matches no module, a pattern no prunable weight, when nothing is
            left to prune, or when a weight is computed from others (weight norm), not there yet (a lazy
            layer), or not of a floating point type with which one can train (quantized).
    """
    settle(model)
    _check_layers(model, layers)
    why_not: dict[int, list[str]] = {}  # a parameter's, from each of its owners
    unfit: dict[str, str] = {}  # weights that no mask can be put on, and what to do
    for path, module in model.named_modules():
        is_layer = _is_one_of(module, layers)
        computed = _computed(model, module) if is_layer else {}
        unfit |= {
            _join(path, weight): f"is computed from others {how}" for weight, (how, _) in computed.items()
        }
        sources = {name for _, names in computed.values() for name in names}
        weights = {*_weights(module)} - sources if is_layer else set[str]()
        for name, p in module.named_parameters(recurse=False):
            if name in weights and (what_to_do := _unfit(p)):
                unfit[_join(path, name)] = what_to_do
            if name in sources or isinstance(module, ParametrizationList):
                why = "another tensor is computed from it"
            elif not is_layer:
                why = f"{type(module).__name__} is not in layers="
            elif name not in weights:
                why = "no weight matrix"
            elif is_lazy(p):
                why = "not there yet"
            else:
                why = "" if p.numel() else "it has no elements"
            tied = f"tied to {path}: " if why and id(p) in why_not else ""
            why_not.setdefault(id(p), []).append(tied + why)
    found = {name: next(filter(None, why_not[id(p)]), "") for name, p in model.named_parameters()}
    plain = [name for name, why in found.items() if not why]
    candidates = [*dict.fromkeys([*plain, *unfit])]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: no weight belongs to a layer of the types "
            f"layers={tuple(layers)}, and one is needed. Name its layer types. {_advice(model)}"
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
    for name in plain:
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
    parameters = settle(model)
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
        if not isinstance(pattern, str):
            raise ValueError(f"{argument}: {pattern!r} is given; allowed are patterns, such as 'net.*'.")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no prunable weight. "
                f"They are: {', '.join(names)}. Name some of these."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _shown(patterns: Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else list(patterns)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _types(module: nn.Module) -> list[str]:
    """The class names that `layers` may call a module by."""
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)]


def _is_one_of(module: nn.Module, layers: Iterable[str]) -> bool:
    return any(fnmatchcase(name, entry) for name in _types(module) for entry in layers)


def _weights(module: nn.Module) -> list[str]:
    """The names of a module's own matrices, should its type be among the layers."""
    own = {
        name: p for name, p in module.named_parameters(recurse=False) if not _NO_MATRIX & {*name.split("_")}
    }
    own = {name: p for name, p in own.items() if is_lazy(p) or p.dim() > 1}
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return list(own)
    named = module._parameters  # noqa: SLF001  torch has no public list that holds those that are None
    if any("weight" in name for name in named) or hasattr(type(module), "weight"):
        return [name for name in own if "weight" in name]
    deepest = max((p.dim() for p in own.values() if not is_lazy(p)), default=0)
    return [
        name
        for name, p in own.items()
        if is_lazy(p) or (p.dim() == deepest and sum(size != 1 for size in p.shape) > 1)
    ]


def _unfit(p: Tensor) -> str:
    """Why no mask can be put on a weight, and what to do first."""
    if is_lazy(p):
        return "is not there yet; run a batch through the lazy layer"
    if p.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        name = str(p.dtype).removeprefix("torch.")
        return f"has the dtype {name}; allowed are {allowed}. Prune before quantizing, or convert it"
    if any(size > 1 and not stride for size, stride in zip(p.shape, p.stride(), strict=True)):
        return "shares its memory between its own elements (expand); clone it"
    return ""


def _computed(model: nn.Module, module: nn.Module) -> dict[str, tuple[str, list[str]]]:
    """Weights of a layer that are no parameters, as they are computed: how, and from which of its own."""
    found: dict[str, tuple[str, list[str]]] = {}
    parametrizations = dict(module.named_children()).get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for name, steps in parametrizations.items():
            originals = [p for p in steps.parameters(recurse=False) if is_lazy(p) or p.dim() > 1]
            if originals and not _NO_MATRIX & {*name.split("_")}:
                kinds = ", ".join(type(step).__name__ for step in steps.children())
                how = (
                    f"by a parametrization ({kinds}); call torch.nn.utils.parametrize.remove_parametrizations"
                )
                found[name] = (f"{how}(layer, {name!r})", [])
    own = [name for name, p in module.named_parameters(recurse=False) if is_lazy(p) or p.dim() > 1]
    for suffix, remedies in _RENAMED.items():
        for source in [name for name in own if name.endswith(suffix)]:
            name = source.removesuffix(suffix)
            if isinstance(vars(module).get(name), Tensor):
                how = next(
                    (how for how, mark in remedies if hasattr(module, name + mark)), "by a hook; undo it"
                )
                found[name] = (how.format(name), [n for n in own if n.rpartition("_")[0] == name])
    if own and not found and isinstance(getattr(type(module), "weight", None), property):
        weight = module.weight
        if isinstance(weight, Tensor) and all(weight is not p for p in model.parameters()):
            found["weight"] = (f"by {type(module).__name__}; make it a plain parameter", own)
    return found


# How torch's older reparametrizations rename a weight: what they add to the name, and by which other tensor
# of the layer one tells them apart.
_RENAMED = {
    "_orig": [
        ("by torch.nn.utils.prune; call torch.nn.utils.prune.remove(layer, {!r})", "_mask"),
        ("by spectral norm; call torch.nn.utils.remove_spectral_norm(layer, {!r})", "_u"),
    ],
    "_v": [("by weight norm; call torch.nn.utils.remove_weight_norm(layer, {!r})", "_g")],
}


def check_layers(layers: Sequence[str]) -> None:
    """Refuse what is no list of class names.

    Raises:
        ValueError: then.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: a list of class names is needed; write [{layers!r}].")
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers={layers!r}: allowed are class names in a list, such as ['Linear'].")
    for entry in layers:
        if not isinstance(entry, str):
            raise ValueError(f"layers: {entry!r} is given; allowed are class names, such as 'Linear'.")


def _check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Refuse entries that name no module of the model, and say which of the others have no effect."""
    check_layers(layers)
    modules = list(model.modules())
    for entry in layers:
        if entry in LAYERS:
            continue
        mine = [module for module in modules if _is_one_of(module, [entry])]
        if not mine:
            known = {name for module in modules for name in _types(module)} | {*LAYERS}
            close = difflib.get_close_matches(entry, sorted(known), 1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"layers: {entry!r} is the class of no module of {type(model).__name__}; allowed are "
                f"classes that are there. Name one. {hint}{_advice(model)}"
            )
        if not any(_weights(module) or _computed(model, module) for module in mine):
            warnings.warn(
                f"layers: the entry {entry!r} has no effect: modules of this class have no weight matrix of "
                "their own. Name the classes of the layers inside them.",
                stacklevel=3,
            )


def _advice(model: nn.Module) -> str:
    """Which entries of `layers` would find something."""
    kinds = {
        type(module).__name__
        for module in model.modules()
        if _weights(module) and not isinstance(module, ParametrizationList)
    }
    if not kinds:
        return "It has no weight matrices."
    return f"Weight matrices belong to these classes, to be named in `layers`: {', '.join(sorted(kinds))}."


# -------------------------------------------------------------------------------------------- how they lie


@dataclass(frozen=True)
class Layout:
    """Which dimension of a weight counts outputs of the layer, and which inputs.

    A weight is a number of matrices of outputs x inputs: one, or one for each group of a convolution or for
    each expert. Each entry of a matrix is one number, or the positions of a convolution's kernel.

    >>> grouped = torch.zeros(8, 3, 5, 5)  # a convolution of 4 groups: 12 inputs, 8 outputs
    >>> tuple(Layout(groups=4).split(grouped).shape)
    (4, 2, 3, 25)

    Args:
        outputs: the dimension of outputs, 0 in most layers.
        inputs: the dimension of inputs, 1 in most layers.
        groups: of a convolution. Dimension 0 counts the channels of all groups, the other one those of one.
        experts: whether dimension 0 counts experts, each with a matrix of its own.
        head: whether this is the last layer of the network, so that outputs of it are those of the network:
            classes, for instance.
    """

    outputs: int = 0
    inputs: int = 1
    groups: int = 1
    experts: bool = False
    head: bool = False

    def split(self, weight: Tensor) -> Tensor:
        """The weight as (matrices, outputs, inputs, positions): a view where strides allow it."""
        if weight.dim() < 2 + self.experts:
            raise ValueError(
                f"a weight of the shape {tuple(weight.shape)} has no outputs and inputs, as groups of "
                "weights need. Exclude it, or prune single weights."
            )
        grouped = weight if self.experts else weight.unflatten(0, (self.groups, -1))
        ordered = grouped.movedim(self._places, (1, 2))
        return ordered.reshape(*ordered.shape[:3], math.prod(ordered.shape[3:]))

    def join(self, parts: Tensor, shape: torch.Size) -> Tensor:
        """Undo `split` for a weight of this shape."""
        positions = shape[3:] if self.experts else shape[2:]
        return parts.reshape(*parts.shape[:3], *positions).movedim((1, 2), self._places).reshape(shape)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as a matrix of one row for each output: of each matrix in turn, of (inputs, positions).

        >>> Layout(outputs=1, inputs=0).rows(torch.tensor([[1, 2], [3, 4]]))
        tensor([[1, 3],
                [2, 4]])
        """
        return self.split(weight).flatten(2).flatten(0, 1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Undo `rows` for a weight of this shape."""
        parts = self.split(torch.empty(shape, device="meta")).shape
        return self.join(rows.reshape(parts), shape)

    def of_part(self) -> "Layout":
        """The layout of a part of a weight, whose outputs need not make whole groups.

        Raises:
            ValueError: when outputs of several groups have one index.
        """
        if self.groups > 1 and self.outputs != 0:
            raise ValueError(
                f"groups={self.groups}: a transposed convolution has outputs of several groups at one index, "
                "and its weight is sharded over processes; allowed are other layers here. Exclude it."
            )
        return replace(self, groups=1)

    def axes(self, dims: int) -> tuple[list[int], list[int]]:
        """Of a weight, or a part, with so many dimensions: those that count outputs, and the others.

        Both are in the order of `rows`, and of what lies within a row.

        >>> Layout(outputs=1, inputs=0).axes(4)
        ([1], [0, 2, 3])
        """
        outputs = [0, self.outputs] if self.experts else [self.outputs]
        rest = [dim for dim in range(dims) if dim not in (*outputs, self.inputs)]
        return outputs, [self.inputs, *rest]

    @property
    def _places(self) -> tuple[int, int]:
        """The two dimensions, counted with that of groups or experts in front."""
        return (self.outputs, self.inputs) if self.experts else (self.outputs + 1, self.inputs + 1)


def layouts(model: nn.Module, names: Iterable[str]) -> dict[str, Layout]:
    """How the weights of these names are laid out, as their layers say.

    >>> layouts(nn.ConvTranspose2d(4, 6, 3, groups=2), ["weight"])
    {'weight': Layout(outputs=1, inputs=0, groups=2, experts=False, head=False)}

    Inputs come before outputs in transposed convolutions, in the `Conv1D` of transformers, in experts that
    are known for it, and in any module with a true attribute `is_transposed`, which is how transformers marks
    experts. Elsewhere outputs come first. A parameter of three dimensions belongs to experts if the class of
    the module has "Expert" in its name, or if the module has as many `num_experts`.

    The head is the last matrix of the model, in the order of its parameters, unless it is the only one of
    `names`.
    """
    names = list(names)
    last = next((name for name in reversed(list(_matrices(model))) if name), None) if len(names) > 1 else None
    found: dict[str, Layout] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        found[name] = _layout(module, module.get_parameter(own), name == last)
    return found


def _matrices(model: nn.Module) -> Iterator[str]:
    """Names of all parameters that would be weights if their modules were layers, tied ones each time."""
    for path, module in model.named_modules():
        yield from (_join(path, name) for name in _weights(module))


def _layout(module: nn.Module, p: Tensor, head: bool) -> Layout:
    if isinstance(module, _ConvNd):
        outputs = int(module.transposed)
        return Layout(outputs, 1 - outputs, module.groups, head=head)
    first = bool(getattr(module, "is_transposed", not _INPUTS_FIRST.isdisjoint(_types(module))))
    named = any("expert" in name.lower() for name in _types(module))
    experts = p.dim() == 3 and (named or getattr(module, "num_experts", None) == len(p))
    return Layout(experts + first, experts + 1 - first, experts=experts, head=head)
