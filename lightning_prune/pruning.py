"""Pruning: score, allocate, keep. The four axes meet here, and nowhere else."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import allocation, criteria
from lightning_prune.masks import DEAD, Masks, Scores, alive, bits, keep_top, zero_dead_
from lightning_prune.schedules import Schedule

Criterion = Callable[..., Scores]
Allocation = Callable[[Scores, int], dict[str, int]]
Groups = list[tuple[list[str], Schedule]]

LAYERS = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)


def prunable(
    model: nn.Module,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Parameter]:
    """The weights of `model` that may be pruned, by name, each once: never a bias, a norm or an embedding.

    A weight is prunable if it has two dimensions or more and every module that owns it is of one of the types
    `layers` (a class name, or that of a base class): a head tied to an embedding is left alone.

    >>> list(prunable(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))))
    ['0.weight']

    Args:
        model: any module. Names are those of its `named_parameters()`.
        layers: class names of layers.
        include: fnmatch patterns over names; only what one of them matches. None: everything.
        exclude: fnmatch patterns over names; nothing that one of them matches.

    Raises:
        ValueError: when a pattern matches no prunable weight, or when nothing is left to prune.
    """
    owners: dict[int, list[bool]] = {}
    for module in model.modules():
        matches = any(cls.__name__ in layers for cls in type(module).__mro__)
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append(matches and "weight" in name and p.dim() > 1)
    found = {name: p for name, p in model.named_parameters() if all(owners[id(p)])}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to prune: no weight belongs to a layer of the types "
            f"layers={tuple(layers)}. Name its layer types in `layers`."
        )
    candidates = list(found)
    kept = set(matching(candidates, "include", include)) if include is not None else set(found)
    kept -= set(matching(candidates, "exclude", exclude or []))
    if not kept:
        raise ValueError(
            f"include={_shown(include)}, exclude={_shown(exclude)} leave nothing to prune. "
            f"Prunable weights: {', '.join(candidates)}."
        )
    return {name: p for name, p in found.items() if name in kept}


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
                f"They are: {', '.join(names)}."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _shown(patterns: Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else list(patterns)


def groups(names: Sequence[str], schedule: Schedule | Mapping[str, Schedule]) -> Groups:
    """Which schedule drives which weights: one for all, or one per name pattern; the first that matches wins.

    >>> import lightning_prune as lp
    >>> half, all_ = lp.schedules.OneShot(0.1), lp.schedules.OneShot(0.2)
    >>> [(names, s.sparsity) for names, s in groups(["fc1.weight", "out.weight"], {"out.*": half, "*": all_})]
    [(['out.weight'], 0.1), (['fc1.weight'], 0.2)]

    Raises:
        ValueError: when a pattern gets no weight, or a weight no pattern.
    """
    if not isinstance(schedule, Mapping):
        return [(list(names), schedule)]
    left, result = list(names), Groups()
    for pattern, its in schedule.items():
        mine = matching(left, "schedule", [pattern])
        left = [name for name in left if name not in mine]
        result.append((mine, its))
    if left:
        raise ValueError(
            f"schedule: no pattern matches {', '.join(left)}. "
            "Add the pattern '*' as the last one, or exclude them."
        )
    return result


def budget(sparsity: float, n: int) -> int:
    """The survivors that a sparsity leaves of `n` weights: round((1 - sparsity) * n).

    Raises:
        ValueError: when the sparsity is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity}: allowed is 0 (dense) to 1.")
    return round((1 - sparsity) * n)


def next_masks(
    params: Mapping[str, Tensor],
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], float]],
    criterion: Criterion = criteria.magnitude,
    allocate: Allocation = allocation.global_rank,
    **evidence: Any,
) -> Masks:
    """One pruning: score the weights, allocate each group's budget, keep the best. Masks only shrink.

    Args:
        params: the weights, by name.
        masks: which of them are alive now.
        sparsities: pairs of a group's names and the sparsity it is to have; its budget is met exactly, unless
            fewer weights are alive already.
        criterion: weights -> scores.
        allocate: scores and survivors in a group -> survivors per tensor.
        evidence: what criteria may ask for besides; see `lightning_prune.criteria`.

    Returns:
        The new masks, in the order of `params`. Nothing that was given is changed.

    Raises:
        ValueError: when a weight or a score of a living weight is not finite.
    """
    weights = {name: p.detach() for name, p in params.items()}
    _check_finite(weights, "the weight")
    scores = _score(criterion, weights, {"masks": masks, **evidence})
    for name, score in scores.items():
        if not bool(masks[name].all()):
            scores[name] = torch.where(masks[name], score, DEAD)
    _check_finite(scores, "the score of", allow_dead=True)
    new: Masks = {}
    for names, sparsity in sparsities:
        total = min(
            budget(sparsity, sum(weights[n].numel() for n in names)), alive({n: masks[n] for n in names})
        )
        keep = allocate({name: scores[name] for name in names}, total)
        if sum(keep.values()) != total:
            raise ValueError(
                f"allocate: {allocate} gave {sum(keep.values())} survivors where {total} were asked for."
            )
        for name in names:
            mask = keep_top(scores[name], keep[name], near=getattr(keep, "near", None))
            if bool((mask & ~masks[name]).any()):
                raise ValueError(
                    f"allocate: {allocate} gave {name} {keep[name]} survivors, more than it has alive."
                )
            new[name] = mask
    return {name: new[name] for name in weights}


def _score(criterion: Criterion, weights: dict[str, Tensor], evidence: dict[str, Any]) -> Scores:
    """Call the criterion with the evidence that its signature names."""
    asked = [name for name in inspect.signature(criterion).parameters if name in EVIDENCE]
    for name in asked:
        if evidence.get(name) is None:
            raise ValueError(
                f"criterion: {criterion} asks for `{name}`, and there is none here. {EVIDENCE[name]}"
            )
    scores = criterion(weights, **{name: evidence[name] for name in asked})
    for name, w in weights.items():
        if name not in scores or scores[name].shape != w.shape or not scores[name].is_floating_point():
            raise ValueError(
                f"criterion: {criterion} must give floating point scores of {name}'s shape {tuple(w.shape)}."
            )
    return {name: scores[name].detach() for name in weights}


EVIDENCE = {
    "masks": "Masks are always there.",
}


def _check_finite(tensors: Mapping[str, Tensor], what: str, *, allow_dead: bool = False) -> None:
    for name, t in tensors.items():
        if not t.numel():
            continue
        low, high = (float(x) for x in torch.aminmax(t))
        if not (low > DEAD or (allow_dead and low == DEAD)) or not high < float("inf"):
            raise ValueError(
                f"{what} {name} holds NaN or infinity; allowed are finite numbers. "
                "Did the training diverge? Nothing was pruned."
            )


@torch.no_grad()
def prune(
    model: nn.Module,
    sparsity: float = 0.5,
    criterion: Criterion = criteria.magnitude,
    allocate: Allocation = allocation.global_rank,
    layers: Sequence[str] = LAYERS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Masks:
    """Prune any module once, in place, without training: dead weights become exactly 0. Returns the masks.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -2.0], [3.0, 0.2]]))
    >>> prune(model, sparsity=0.5)["weight"]
    tensor([[False,  True],
            [ True, False]])
    >>> model.weight.data
    tensor([[ 0., -2.],
            [ 3.,  0.]])

    Args:
        model: any module; parameters keep their identity and their names.
        sparsity: fraction of the prunable weights to remove, in [0, 1].
        criterion: which weights; see `lightning_prune.criteria`.
        allocate: how many where; see `lightning_prune.allocation`.
        layers: layer types whose weights are prunable.
        include: fnmatch patterns over parameter names; only these.
        exclude: fnmatch patterns over parameter names; not these.

    Raises:
        ValueError: when a pattern matches nothing, nothing is prunable, or a weight is not finite. The model
            is then as it was.
    """
    params = prunable(model, layers, include, exclude)
    dense = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    masks = next_masks(params, dense, [(list(params), sparsity)], criterion, allocate)
    for name, p in params.items():
        zero_dead_(p, bits(masks[name], like=p))
    return masks
